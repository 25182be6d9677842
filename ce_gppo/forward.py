"""From responses to logprobs and gradients: packed micro-batches without padding, and the passes over them."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel

from ce_gppo import parallel
from ce_gppo.entropy import add_sums, token_statistics, token_sums
from ce_gppo.messages import UserError
from ce_gppo.tokens import follow
from ce_gppo.types import Response

# ----------------------------------------------------------------------------------------------------------------------
# The policy: a model as a function from micro-batches to logprobs, entropy and S


class Policy(torch.nn.Module):
    """The unit that DDP and FSDP2 wrap."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: "Batch", temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logprobs, entropy and S (see entropy.py) of response tokens: [B, R] each, 0 elsewhere."""
        mask, hidden = batch.response_mask, hidden_states(self.model.base_model, batch)
        hidden = hidden.to(torch.bfloat16) if hidden.is_cuda else hidden  # the precision that vLLM's head gets
        weight = self.model.get_output_embeddings().weight  # [V, D]
        statistics = token_statistics(take(hidden, batch.predecessors), weight, batch.targets, temperature)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return tuple(zeros.masked_scatter(mask, values) for values in statistics)


def hidden_states(body: PreTrainedModel, batch: "Batch") -> Tensor:
    """Output of a model's body, without its head, for the packed tokens: [N, D], in the residual stream's precision."""
    assert body.config._attn_implementation == "packed"  # any other would attend across sequences
    ids, positions = batch.input_ids[None], batch.position_ids[None]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        outputs = body(input_ids=ids, position_ids=positions, packing=batch.packing, use_cache=False)
    return outputs.last_hidden_state[0]


@torch.no_grad()
@parallel.host_threads()
def compute_old_logprobs(
    policy: torch.nn.Module, responses: list[Response], temperature: float, max_tokens: int, device: str
) -> None:
    """Set old_logprobs and entropy, [R] each, of every response under the present weights. Collective."""
    if device == "cpu":  # the activations then fit the CPU's cache: 1.6 times as fast as with 16,384 (measured)
        max_tokens = min(max_tokens, 2048)
    for indices in even_passes(micro_batches(responses, max_tokens)):
        chosen = [responses[i] for i in indices]
        batch = collate(chosen, device)
        logprobs, entropy, _ = policy(batch, temperature)
        set_old_logprobs(chosen, logprobs, entropy, batch.response_mask)


def set_old_logprobs(responses: list[Response], logprobs: Tensor, entropy: Tensor, response_mask: Tensor) -> None:
    """Set old_logprobs and entropy from [B, R] tensors that the rollout weights gave."""
    lengths = [len(r.response_ids) for r in responses]
    old = (values.detach()[response_mask].cpu().split(lengths) for values in (logprobs, entropy))
    for response, old_logprobs, old_entropy in zip(responses, *old, strict=True):
        response.old_logprobs, response.entropy = old_logprobs, old_entropy


def accumulate_gradients(
    policy: torch.nn.Module,
    responses: list[Response],
    batch_loss: Callable[["Batch", Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    temperature: float,
    max_tokens: int,
    device: str,
) -> tuple[list[float], dict[str, Tensor], float]:
    """Forward and backward over a mini-batch, of which `responses` are this rank's share, perhaps none. Collective.

    batch_loss: (batch, logprobs [B, R], entropy [B, R]) -> (loss, info), as of loss.policy_loss. The losses of the
    micro-batches add up to the mini-batch's. Returns (loss of each micro-batch, token_sums, share of padding).
    """
    losses, sums, places = [], [], 0
    passes = even_passes(micro_batches(responses, max_tokens))
    for index, rows in enumerate(passes, start=1):
        chosen = [responses[i] for i in rows]
        batch = collate(chosen, device)
        with parallel.no_sync(policy) if index < len(passes) else contextlib.nullcontext():
            logprobs, entropy, S = policy(batch, temperature)  # [B, R] each
            if chosen and chosen[0].entropy is None:  # not measured yet: the first update of a rollout
                batch.old_entropy = entropy.detach()
            if chosen and chosen[0].old_logprobs is None:
                set_old_logprobs(chosen, logprobs, entropy, batch.response_mask)
                batch.old_logprobs = logprobs.detach()
            loss, info = batch_loss(batch, logprobs, entropy)
            (loss * parallel.world_size()).backward()  # DDP and FSDP2 divide by it
        losses.append(loss.item())
        places += len(batch.packing.order) if chosen else 0
        old = batch.old_logprobs, batch.old_entropy
        sums.append(token_sums(info, logprobs, entropy, S, *old, batch.advantages, batch.response_mask))
        follow(responses, chosen, batch, info, logprobs, entropy, S)
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in responses)
    sums = {name: value.cpu() for name, value in add_sums(sums).items()}  # to be gathered over the ranks
    return losses, sums, 1 - tokens / places if places else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches


def flatten(groups: Iterable[list]) -> list:
    return [item for group in groups for item in group]


def own_share(responses: list[Response]) -> list[Response]:
    """The responses that this rank works on, in their order; the ranks' shares have nearly equal numbers of tokens."""
    sizes = [len(r.prompt_ids) + len(r.response_ids) for r in responses]
    owners = parallel.largest_first(sizes, parallel.world_size())
    return [r for r, owner in zip(responses, owners, strict=True) if owner == parallel.rank()]


def micro_batches(responses: list[Response], max_tokens: int) -> list[list[int]]:
    """Indices of `responses`, cut so that no micro-batch holds more than max_tokens packed tokens.

    The order is kept: responses of one group stay together, and their prompt is computed once. A response longer than
    max_tokens gets a micro-batch of its own.
    """
    batches: list[list[int]] = []
    tokens, prompt_ids = 0, None
    for i, r in enumerate(responses):
        added = len(r.response_ids) + (0 if r.prompt_ids == prompt_ids else len(r.prompt_ids))
        if not batches or tokens + added > max_tokens:
            batches.append([])
            tokens, added = 0, len(r.prompt_ids) + len(r.response_ids)
        batches[-1].append(i)
        tokens, prompt_ids = tokens + added, r.prompt_ids
    return batches


def even_passes(batches: list[list[int]]) -> list[list[int]]:
    """The micro-batches, and empty ones (see `collate`) up to the number of the rank that has the most."""
    return batches + [[]] * (max(parallel.all_gather(len(batches))) - len(batches))


@dataclasses.dataclass
class Packing:
    """Which packed tokens form which sequence. Only attention needs it; all other layers work token by token."""

    order: Tensor  # [L]  packed indices of the sequences' tokens, one sequence after another, shared prompts repeated
    places: Tensor  # [N]  the inverse: an index in `order` of each packed token
    as_packed: bool  # both are 0, 1, 2, ..., so no token has to be moved
    starts: Tensor  # [B + 1]  int32, the first index of each sequence in `order`, and the end
    longest: int  # tokens
    blocks: list[tuple[int, int]]  # on a CPU: `order` as padded blocks [b, t] of sequences of similar length


@dataclasses.dataclass
class Batch:
    """Responses one after another, without padding. A prompt shared by neighbouring responses is there once."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N]
    packing: Packing
    predecessors: Tensor  # [tokens of all responses]  packed index of the token before each response token
    targets: Tensor  # [tokens of all responses]  their ids
    response_mask: Tensor  # [B, R]  True for response tokens, end-of-sequence included; R: the longest response
    old_logprobs: Tensor  # [B, R]
    old_entropy: Tensor  # [B, R]
    chosen: Tensor  # [B, R]
    rollout_logprobs: Tensor  # [B, R]
    ref_logprobs: Tensor  # [B, R]  0 without a reference policy
    advantages: Tensor  # [B, R]
    correct: Tensor  # [B, 1]  True where the verifier found the answer right


def collate(responses: list[Response], device: str = "cpu") -> Batch:
    """Pack responses. The mask comes from lengths, never from token ids: padding may be the end-of-sequence token.

    An empty list gives a batch of one token and no response tokens, for a rank that has nothing to compute.
    """
    if not responses:
        batch = collate([Response([0], [0], torch.zeros(1), False, "")], device)
        return dataclasses.replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    ids, positions, predecessors, targets = [], [], [], []
    sequences: list[list[int]] = []  # packed indices of each sequence's tokens
    prompt_ids, prompt = None, range(0)
    for r in responses:
        if r.prompt_ids != prompt_ids:
            prompt_ids, prompt = r.prompt_ids, range(len(ids), len(ids) + len(r.prompt_ids))
            ids += prompt_ids
            positions += range(len(prompt_ids))
        own = range(len(ids), len(ids) + len(r.response_ids))
        ids += r.response_ids
        positions += range(len(prompt_ids), len(prompt_ids) + len(r.response_ids))
        predecessors += [prompt[-1], *own[:-1]] if own else []
        targets += r.response_ids
        sequences.append([*prompt, *own])
    lengths = [len(r.response_ids) for r in responses]
    response_mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]  # [B, R]

    def padded(values: list[Tensor | None]) -> Tensor:  # None: not measured
        values = [torch.zeros(n) if value is None else value for n, value in zip(lengths, values, strict=True)]
        return torch.zeros(response_mask.shape).masked_scatter(response_mask, torch.cat(values)).to(device)

    return Batch(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        packing=pack(sequences, len(ids), device),
        predecessors=torch.tensor(predecessors, device=device),
        targets=torch.tensor(targets, device=device),
        response_mask=response_mask.to(device),
        old_logprobs=padded([r.old_logprobs for r in responses]),
        old_entropy=padded([r.entropy for r in responses]),
        chosen=padded([r.chosen for r in responses]),
        rollout_logprobs=padded([r.rollout_logprobs for r in responses]),
        ref_logprobs=padded([r.ref_logprobs for r in responses]),
        advantages=padded([r.advantages for r in responses]),
        correct=torch.tensor([[r.verdict > 0] for r in responses], device=device),
    )


def pack(sequences: list[list[int]], tokens: int, device: str) -> Packing:
    """sequences: the packed indices of each sequence's tokens. tokens: how many of these are distinct.

    On a GPU attention takes sequences of any length. On a CPU it takes blocks, which have some padding.
    """
    on_gpu = device.startswith("cuda")
    sequences = sequences if on_gpu else sorted(sequences, key=len)
    blocks = [] if on_gpu else similar_lengths([len(s) for s in sequences])
    lengths = [t for b, t in blocks for _ in range(b)] or [len(s) for s in sequences]
    starts = [0, *itertools.accumulate(lengths)]
    order = [0] * starts[-1]  # padding stays 0: a real token, whose result is never read
    places = [0] * tokens
    for sequence, start in zip(sequences, starts, strict=False):
        order[start : start + len(sequence)] = sequence
        for place, token in enumerate(sequence, start):  # a shared prompt's copies have equal results
            places[token] = place
    as_packed = order == list(range(tokens))
    order, places = torch.tensor(order, device=device), torch.tensor(places, device=device)
    starts = torch.tensor(starts, dtype=torch.int32, device=device)
    return Packing(order, places, as_packed, starts, max(lengths), blocks)


def similar_lengths(lengths: list[int], waste: float = 0.15) -> list[tuple[int, int]]:
    """Ascending lengths -> blocks (number of sequences, longest), each with at most this share of padding."""
    blocks, first, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if (i - first + 1) * length * (1 - waste) > tokens + length:
            blocks.append((i - first, lengths[i - 1]))
            first, tokens = i, 0
        tokens += length
    return [*blocks, (len(lengths) - first, lengths[-1])]


# ----------------------------------------------------------------------------------------------------------------------
# Attention within the packed sequences


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, packing: Packing, scaling=None, **options
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence, as transformers calls it: [1, H, N, d] -> [1, N, H, d]."""
    if refused := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise UserError(f"{type(module).__name__}: attention with {refused[0]} is not supported")
    window = options.get("sliding_window")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, d]
    if not packing.as_packed:
        q, k, v = (take(x, packing.order) for x in (q, k, v))  # [L, H, d]
    if query.is_cuda:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        longest, starts = packing.longest, packing.starts
        ends = {"max_q": longest, "max_k": longest, "cu_seq_q": starts, "cu_seq_k": starts}
        sides = (-1 if window is None else window - 1, 0)
        out = varlen_attn(q, k, v, **ends, scale=scaling, window_size=sides, enable_gqa=True)  # [L, H, d]
    else:
        out, sizes = [], [b * t for b, t in packing.blocks]
        for (b, t), *qkv in zip(packing.blocks, *(x.split(sizes) for x in (q, k, v)), strict=True):
            qkv = (x.unflatten(0, (b, t)).transpose(1, 2) for x in qkv)  # [b, H, t, d]
            mask = None if window is None or window >= t else torch.ones(t, t, dtype=torch.bool).tril().triu(1 - window)
            block = F.scaled_dot_product_attention(
                *qkv, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
            out.append(block.transpose(1, 2).flatten(0, 1))
        out = torch.cat(out)  # [L, H, d]
    return (out if packing.as_packed else take(out, packing.places))[None], None


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension, by F.embedding: its backward is fast, and adds up in a fixed order."""
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])
