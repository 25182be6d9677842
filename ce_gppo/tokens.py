"""The effect of updates on every token of a few responses, for tools/view.py.

In every mini-batch two responses are followed, one right and one wrong; each process follows two of its share. At the
first step and when evaluations are due, some of those of the first process become rows of the run's tokens.jsonl.
"""

import torch
from torch import Tensor

from ce_gppo.entropy import entropy_velocity
from ce_gppo.types import Response

MAX_UPDATES = 4  # updates of a step that have rows: the first, the last, and some between
MAX_TOKENS = 2000  # tokens of a response in a row; the middle of a longer one is left out


@torch.no_grad()
def follow(
    responses: list[Response], chosen: list[Response], batch, info: dict, logprobs: Tensor, entropy: Tensor, S: Tensor
) -> None:
    """Set `changes` of the first right and the first wrong one of a mini-batch's `responses`, if they are in `chosen`.

    chosen: the micro-batch. batch, info: its forward.Batch, and the info of loss.policy_loss. logprobs, entropy, S:
    [B, R], those of the update. `changes` has [R] tensors by name, see `row`.
    """
    for right in (True, False):
        first = next((r for r in responses if (r.verdict > 0) == right), None)
        i = next((i for i, r in enumerate(chosen) if r is first), None)
        if i is not None:
            values = {
                "entropy": batch.old_entropy[i],
                "advantage": batch.advantages[i],
                "ratio": info["ratio"][i],
                "clipped": info["clipped_high"][i].float() - info["clipped_low"][i].float(),
                "weight": info["weight"][i],
                "velocity": entropy_velocity(info["weight"][i], logprobs[i], entropy[i], S[i]),
            }
            length = len(first.response_ids)
            first.changes = {name: value[:length].detach().cpu() for name, value in values.items()}


def token_rows(groups, mini_batches, problems, tokenizer) -> list[dict]:
    """Rows of tokens.jsonl: the followed responses of up to MAX_UPDATES updates.

    groups[i] are responses to problems[i]; mini_batches: lists of some of these responses.
    """
    problem_of = {id(r): problem for group, problem in zip(groups, problems, strict=True) for r in group}
    rows = []
    last = len(mini_batches) - 1
    for index in sorted({round(i * last / (MAX_UPDATES - 1)) for i in range(MAX_UPDATES)} if mini_batches else ()):
        for response in mini_batches[index]:
            if response.changes is not None:
                where = {"update": index + 1, "updates": len(mini_batches)}
                rows.append(where | row(response, problem_of[id(response)], tokenizer))
    return rows


def row(response: Response, problem, tokenizer) -> dict:
    """One response. The lists have a number for each token that is kept, or None if that is not finite:

    old_logprobs, entropy    under the weights that sampled it, with old_logprobs = sampler those of the update; nats
    advantage, ratio         of the token; ratio: pi / pi_old in this update
    clipped                  -1 below the clip interval with A < 0, 1 above it with A > 0, 0 elsewhere
    weight, velocity         the gradient weight, and how much it raises (above 0) or lowers the token's entropy
    """
    length = len(response.response_ids)
    kept = torch.arange(length)
    if length > MAX_TOKENS:
        kept = torch.cat([kept[: MAX_TOKENS // 2], kept[-MAX_TOKENS // 2 :]])
    values = {"old_logprobs": response.old_logprobs} | response.changes
    return {
        "prompt": problem.prompt,
        "answer": problem.answer,
        "right": response.verdict > 0,
        "reward": response.reward,
        "parts": response.parts,
        "length": length,
        "tokens": token_texts(tokenizer, [response.response_ids[i] for i in kept]),
        **{name: [shorten(x) for x in value[kept].tolist()] for name, value in values.items()},
    }


def shorten(x: float) -> float | None:
    """Five significant digits; None if x is not finite."""
    return float(f"{x:.5g}") if abs(x) < float("inf") else None


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, special tokens included. They join to the whole text. [R] -> R strings.

    If several tokens form one character, the last one has it, and the others are empty. Ids beyond the tokenizer's
    vocabulary (padded embeddings have them) are empty as well.
    """

    def decode(some: list[int]) -> str:
        known = [i for i in some if i < len(tokenizer)]
        return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    before, pending = [], []  # decoded after the token before, as some tokenizers drop a space at the start of a text
    for token in ids:
        pending.append(token)
        text = decode(before + pending)[len(decode(before)) :]
        if text.endswith("\ufffd") and len(pending) < 4:
            texts.append("")
        else:
            texts.append(text)
            before, pending = [token], []
    return texts
