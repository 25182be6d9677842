"""Packed micro-batches: no padding, and the prompt of a group once. And the attention that knows where what stands."""

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from prompts import UserError
from rollout import Response


@dataclasses.dataclass
class Packing:
    """Where the packed tokens stand in their sequences. Only attention asks; all else in a model is by token."""

    order: Tensor  # [L]  the sequences' tokens one behind the other, shared prompts repeated, as packed indices
    places: Tensor  # [N]  the inverse: where each packed token stands in `order`, once
    starts: Tensor  # [B + 1]  int32, where the sequences start in `order`
    longest: int  # tokens
    blocks: list[tuple[int, int]]  # CPU: `order` as padded blocks [b, t] of sequences of like length


@dataclasses.dataclass
class Batch:
    """Responses one behind the other, without padding; a prompt that several neighbours share stands there once."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N]
    packing: Packing
    predecessors: Tensor  # [tokens of all responses]  packed index of the token before each response token
    targets: Tensor  # [tokens of all responses]  their ids
    response_mask: Tensor  # [B, R]  True for the response's tokens, end-of-sequence included; R of the longest response
    old_logprobs: Tensor  # [B, R]
    old_entropy: Tensor  # [B, R]
    rollout_logprobs: Tensor  # [B, R]
    advantages: Tensor  # [B, R]


def collate(responses: list[Response], device: str = "cpu") -> Batch:
    """The mask comes from lengths alone, never from token ids: padding may well be the end-of-sequence token.

    No responses at all make a batch that can be computed and has no response tokens, for a rank with nothing to do.
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
    lengths = torch.tensor([len(r.response_ids) for r in responses])
    response_mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, R]

    def padded(values: list[Tensor]) -> Tensor:
        return torch.zeros(response_mask.shape).masked_scatter(response_mask, torch.cat(values))

    unknown = [torch.zeros(len(r.response_ids)) for r in responses]
    measured = responses[0].old_logprobs is not None
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        packing=pack(sequences, len(ids), device),
        predecessors=torch.tensor(predecessors, device=device),
        targets=torch.tensor(targets, device=device),
        response_mask=response_mask.to(device),
        old_logprobs=padded([r.old_logprobs for r in responses] if measured else unknown).to(device),
        old_entropy=padded([r.entropy for r in responses] if measured else unknown).to(device),
        rollout_logprobs=padded([r.rollout_logprobs for r in responses]).to(device),
        advantages=padded([torch.full((len(r.response_ids),), r.advantage) for r in responses]).to(device),
    )


def pack(sequences: list[list[int]], tokens: int, device: str) -> Packing:
    """sequences: the packed indices of each sequence's tokens; `tokens` of them are distinct.

    On a GPU attention takes sequences of any lengths; on a CPU it takes blocks, so that some places are padding.
    """
    sequences = sorted(sequences, key=len)
    blocks = [] if device.startswith("cuda") else like_lengths([len(s) for s in sequences])
    lengths = [t for b, t in blocks for _ in range(b)] or [len(s) for s in sequences]
    starts = [0, *itertools.accumulate(lengths)]
    order = torch.zeros(starts[-1], dtype=torch.long)  # where there is padding it stays 0: a real token, never read
    places = torch.empty(tokens, dtype=torch.long)
    for sequence, start in zip(sequences, starts, strict=False):
        place = slice(start, start + len(sequence))
        order[place] = torch.tensor(sequence)
        places[order[place]] = torch.arange(place.start, place.stop)  # of a shared prompt's equal results any will do
    starts = torch.tensor(starts, dtype=torch.int32)
    return Packing(order.to(device), places.to(device), starts.to(device), max(lengths), blocks)


def like_lengths(lengths: list[int], waste: float = 0.15) -> list[tuple[int, int]]:
    """Ascending lengths -> blocks (sequences, longest) with at most this share of padding each."""
    blocks, first, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if (i - first + 1) * length * (1 - waste) > tokens + length:
            blocks.append((i - first, lengths[i - 1]))
            first, tokens = i, 0
        tokens += length
    return [*blocks, (len(lengths) - first, lengths[-1])]


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, packing: Packing, scaling=None, **options
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence, in the form transformers calls: [1, H, N, d] -> [1, N, H, d]."""
    if refused := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise UserError(f"{type(module).__name__}: attention with {refused[0]} is not supported")
    window = options.get("sliding_window")
    q, k, v = (take(x[0].transpose(0, 1), packing.order) for x in (query, key, value))  # [L, H, d]
    if query.is_cuda:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        ends = {
            "max_q": packing.longest,
            "max_k": packing.longest,
            "cu_seq_q": packing.starts,
            "cu_seq_k": packing.starts,
        }
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
    return take(out, packing.places)[None], None


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension; as an embedding, whose backward is fast, and adds up in a fixed order."""
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])


AttentionInterface.register("packed", packed_attention)


def micro_batches(responses: list[Response], max_tokens: int) -> list[list[int]]:
    """Indices of `responses`, cut so that no micro-batch holds more than max_tokens packed tokens.

    In their order, so that a group stays together and its prompt is computed once. A single response longer than
    max_tokens is a batch of its own.
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
