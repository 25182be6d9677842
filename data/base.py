"""Small base policies for `walk` and `countdown`: Qwen2 of 1.0 M parameters that are right in a part of their samples.

    .venv/bin/python -m data.base                  data/walk/base, in a minute on two slow cores
    .venv/bin/python -m data.base countdown        data/countdown/base

A policy imitates the task's traces, and stops early: much is left for reinforcement learning to improve. It never sees
a held-out problem. A task is a module like data/walk/prepare.py, with its tokens, problems and traces.
"""

import random
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from ce_gppo.config import command
from ce_gppo.messages import UserError
from data.common import arguments, positive, splitting
from data.countdown import small as countdown
from data.walk import prepare as walk
from reward import score

TASKS = {"walk": walk, "countdown": countdown}
BATCH = 32  # traces in a step of the imitation
SAMPLES = 8  # of each held-out problem, for pass@8
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(words: tuple[str, ...] = ("\\boxed{",)) -> PreTrainedTokenizerFast:
    """A token for each byte, each role, the end of a turn, padding, and each of `words`."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|pad|>",  # unused; without it Qwen2's tokenizer class adds a token beyond the vocabulary
        eos_token="<|end|>",
        extra_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, num_layers: int = 2) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 32,
            max_position_embeddings=512,
            initializer_range=hidden_size**-0.5,  # with the usual 0.02, meant for wide models, learning starts late
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def batch(
    traces: list[tuple[list[int], list]], ids_of: Callable[[str], list[int]], vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids [B, T], target [B, T, V]): the probabilities of the next token, 0 where it is not of the trace."""
    rows, targets = [], []  # token ids of each sequence; (row, position, token, probability)
    for prompt, trace in traces:
        row = list(prompt)
        for text, choices in trace:
            for token in ids_of(text):
                likely = [(ids_of(choice)[0], p) for choice, p in choices.items()] or [(token, 1.0)]
                targets += [(len(rows), len(row) - 1, *each) for each in likely]
                row.append(token)
        rows.append(torch.tensor(row))
    input_ids = torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True
    )  # padded with any token: nothing looks back at it
    row, position, token, p = (torch.tensor(column) for column in zip(*targets, strict=True))
    target = torch.zeros(*input_ids.shape, vocabulary)
    target[row, position, token] = p
    return input_ids, target


def imitate(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: ModuleType, problems: list[tuple], args
) -> int:
    """Train on traces of `problems` until the loss is near the least possible one. Returns the number of steps.

    The targets are the probabilities by which a trace was drawn, where it knows them: the loss has then less noise than
    with the drawn token, and half as many steps are enough. Every batch is drawn anew, so its loss is that of unseen
    traces. args.excess: nats per response above the least loss, mean over the last 32 batches.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.99), fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=args.max_steps)
    ids_of, rng = cache(partial(tokenizer.encode, add_special_tokens=False)), random.Random(args.seed)
    prompts = {problem: prompt_ids(tokenizer, task.row(*problem)["prompt"]) for problem in problems}
    wanted, recent = task.EXCESS if args.excess is None else args.excess, deque(maxlen=32)
    progress = tqdm(range(1, args.max_steps + 1), desc="base policy", unit="step", disable=None)
    for step in progress:
        chosen = rng.choices(problems, k=BATCH)
        traces = [(prompts[each], [*task.trace(rng, *each), (tokenizer.eos_token, {})]) for each in chosen]
        input_ids, target = batch(traces, ids_of, len(tokenizer))
        imitated = target.sum(-1) > 0  # [B, T]
        target = target[imitated]  # [N, V]
        hidden = model.model(input_ids=input_ids).last_hidden_state[imitated]  # [N, H]
        loss = F.cross_entropy(model.lm_head(hidden), target)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append((loss.item() * len(target) - torch.special.entr(target).sum().item()) / BATCH)
        excess = sum(recent) / len(recent)
        progress.set_postfix(excess=f"{excess:.2f}")
        if progress.disable and step % 100 == 0:  # no terminal: plain lines for the log
            print(f"base policy: step {step}, excess {excess:.2f} nats", flush=True)
        if excess <= wanted:
            progress.close()
            return step
    raise UserError(f"excess of {excess:.2f} nats after {step} steps, above {wanted}; allow more with --max-steps")


@torch.no_grad()
def sample(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[dict[str, str]]], max_tokens: int
) -> tuple[list[str], float]:
    """A response to each prompt at temperature 1 (empty: it did not end), and the mean entropy in nats per token.

    The prompts have the same number of tokens, so nothing is padded.
    """
    model.eval()
    responses: list[str] = []
    entropy, tokens = 0.0, 0
    for start in range(0, len(prompts), 256):
        rows = torch.tensor([prompt_ids(tokenizer, prompt) for prompt in prompts[start : start + 256]])  # [B, P]
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_tokens, "output_logits": True}
        out = model.generate(rows, attention_mask=torch.ones_like(rows), return_dict_in_generate=True, **options)
        sampled = out.sequences[:, rows.shape[1] :]  # [B, R]
        ended = (sampled == tokenizer.eos_token_id).int()
        mask = ended.cumsum(1) - ended == 0  # [B, R]  the end-of-sequence token included
        p = torch.stack(out.logits, 1).softmax(-1)  # [B, R, V]
        entropy += (torch.special.entr(p).sum(-1) * mask).sum().item()
        tokens += mask.sum().item()
        texts = [text.partition(tokenizer.eos_token) for text in tokenizer.batch_decode(sampled)]
        responses += [response if end else "" for response, end, _ in texts]
    return responses, entropy / tokens


def main() -> None:
    parser = arguments(__doc__, out=None)
    parser.add_argument("task", nargs="?", choices=TASKS, default="walk")
    splitting(parser, held_out=256)
    parser.add_argument(
        "--excess", type=float, help="stop at this many nats per response above the least possible loss"
    )
    parser.add_argument("--max-steps", type=positive, default=1000, help="then the learning rate is 0: give up")
    args = parser.parse_args()
    task, out = TASKS[args.task], args.out or Path(__file__).parent / args.task / "base"
    try:
        out.mkdir(parents=True, exist_ok=True)  # early: the error would otherwise come after a minute of training
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error})") from None
    disable_progress_bar()
    torch.manual_seed(args.seed)
    training, held_out = task.splits(args.seed, args.held_out)
    tokenizer = make_tokenizer(task.WORDS)
    model = make_model(tokenizer)  # wide and flat learns these tasks faster than four layers of 128
    steps = imitate(model, tokenizer, task, training, args)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    rows = [task.row(*problem) for problem in held_out for _ in range(SAMPLES)]
    responses, entropy = sample(model, tokenizer, [row["prompt"] for row in rows], task.MAX_TOKENS)
    answers, sources = ([row[key] for row in rows] for key in ("answer", "source"))
    right = [parts["correctness"] for parts in score(responses, answers, sources)]
    solved = [max(right[i : i + SAMPLES]) for i in range(0, len(right), SAMPLES)]
    print(
        f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps; at temperature 1 "
        f"accuracy {sum(right) / len(right):.2f}, pass@{SAMPLES} {sum(solved) / len(solved):.2f}, entropy "
        f"{entropy:.2f} nats per token"
    )


if __name__ == "__main__":
    command(main)
