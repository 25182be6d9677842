"""The policy: a model as a function from packed tokens to logprobs, entropy and moment, without padding or [N, V]."""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from ce_gppo import parallel
from ce_gppo.batch import REPEATED, Packed, Packing, Rollout, concat, micro_batches, pack, similar_lengths
from ce_gppo.messages import UserError

SCALES = ("logit_scale", "lm_head_multiplier", "logits_scaling")  # settings of models: two factors and a divisor
CPU_PASS = 2048  # tokens of a pass without gradients on a CPU: the activations fit its cache, 1.6 times as fast


class Policy(torch.nn.Module):
    """The unit that DDP and FSDP2 wrap."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, packed: Packed, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logprob, entropy and moment (see TokenStatistics) of every response token: [N] each."""
        hidden = hidden_states(self.model.base_model, packed)  # [L, D]
        hidden = hidden.to(torch.bfloat16) if hidden.is_cuda else hidden  # the precision that vLLM's head gets
        head, (scale, softcap) = self.model.get_output_embeddings(), logit_transform(self.model.config)
        options = {"bias": head.bias, "scale": scale, "softcap": softcap}
        return token_statistics(take(hidden, packed.predecessors), head.weight, packed.targets, temperature, **options)


def logit_transform(config) -> tuple[float, float | None]:
    """(scale, softcap) of a model's logits, see TokenStatistics: of Cohere, Falcon-H1 and Granite; of Gemma."""
    cohere, falcon, granite = (getattr(config, name, None) or 1.0 for name in SCALES)
    return cohere * falcon / granite, getattr(config, "final_logit_softcapping", None)


def repeated(policy: torch.nn.Module) -> float:
    """What the repetition of a prompt costs, for micro_batches: rows compute it again."""
    ways = {part.config._attn_implementation for part in policy.modules() if hasattr(part, "config")}
    return REPEATED if ways <= {"packed"} else 1.0


def hidden_states(body: PreTrainedModel, packed: Packed) -> Tensor:
    """Output of a model's body, without its head, for the packed tokens: [L, D], in the residual stream's precision."""
    ids, positions = packed.input_ids[None], packed.position_ids[None]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        if body.config._attn_implementation != "packed":  # it would attend across sequences
            return states_of_rows(body, packed)
        return body(input_ids=ids, position_ids=positions, packing=packed.packing, use_cache=False).last_hidden_state[0]


def states_of_rows(body: PreTrainedModel, packed: Packed) -> Tensor:
    """hidden_states for layers that mix tokens elsewhere than in attention: each sequence is a row, padded at its end.

    No token sees what comes after it, so the padding changes nothing. Rows of similar length share a pass; all share
    one where the weights are sharded, as every rank must make the same number of passes.
    """
    starts = packed.packing.starts.long()  # [B + 1]
    lengths = starts.diff()  # [B]
    rows, ranked = packed.packing.order.split(lengths.tolist()), lengths.argsort(stable=True)
    blocks = (
        [(len(rows), int(lengths.max()))] if parallel.is_sharded(body) else similar_lengths(lengths[ranked].tolist())
    )
    states, first, begins = [], 0, torch.zeros_like(lengths)  # begins [B]: of each row among all states
    for count, longest in blocks:
        members, done = ranked[first : first + count], sum(map(len, states))
        ids = packed.input_ids[pad_sequence([rows[i] for i in members.tolist()], batch_first=True)]  # [count, longest]
        states.append(body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1))
        begins[members] = done + longest * torch.arange(count, device=ids.device)
        first += count
    row = torch.bucketize(packed.packing.inverse, starts[1:], right=True)  # [L]
    return take(torch.cat(states), begins[row] + packed.packing.inverse - starts[row])


@torch.no_grad()
@parallel.host_threads()
def logprobs_and_entropy(
    policy: torch.nn.Module, parts: list[Rollout], temperature: float, max_tokens: int, device: str
) -> list[tuple[Tensor, Tensor]]:
    """Logprobs and entropy of every part's response tokens under the policy's present weights: [N] each. Collective.

    parts: of one rollout, this rank's share, perhaps empty. The results are on the CPU.
    """
    if device == "cpu":
        max_tokens = min(max_tokens, CPU_PASS)
    results = [torch.zeros(2, 0)]
    for part in micro_batches(concat(parts), max_tokens, repeated(policy)) if parts else []:
        logprobs, entropy, _ = policy(pack(part, device), temperature)
        results.append(torch.stack([logprobs, entropy]).cpu())
    parallel.reshard(policy)  # no backward pass will do it
    return [tuple(columns) for columns in torch.cat(results, 1).split([len(part.tokens) for part in parts], 1)]


def with_old_logprobs(policy: torch.nn.Module, parts: list[Rollout], *passes) -> list[Rollout]:
    """The parts with old_logprobs and entropy under the present weights. passes: as of logprobs_and_entropy."""
    columns = logprobs_and_entropy(policy, parts, *passes)
    return [replace(part, old_logprobs=a, entropy=b) for part, (a, b) in zip(parts, columns, strict=True)]


def with_reference_logprobs(reference: torch.nn.Module, parts: list[Rollout], *passes) -> list[Rollout]:
    columns = logprobs_and_entropy(reference, parts, *passes)
    return [replace(part, reference_logprobs=a) for part, (a, _) in zip(parts, columns, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Attention within the packed sequences


def register_attention() -> None:
    """Make attn_implementation "packed" known to transformers; compiled layers call it between their graphs."""
    AttentionInterface.register("packed", torch.compiler.disable(packed_attention))


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, packing: Packing, scaling=None, **options
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence, as transformers calls it: [1, H, L, d] -> [1, L, H, d]."""
    if refused := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise UserError(f"{type(module).__name__}: attention with {refused[0]} is not supported")
    window = options.get("sliding_window")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, H, d]
    if query.is_cuda:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if not packing.is_identity:
        q, k, v = (take(x, packing.order) for x in (q, k, v))  # [M, H, d]
    if query.is_cuda:
        longest, starts = packing.longest, packing.starts
        ends = {"max_q": longest, "max_k": longest, "cu_seq_q": starts, "cu_seq_k": starts}
        sides = (-1 if window is None else window - 1, 0)
        out = varlen_attn(q, k, v, **ends, scale=scaling, window_size=sides, enable_gqa=True)  # [M, H, d]
    else:
        out, sizes = [], [b * t for b, t in packing.blocks]
        for (b, t), *qkv in zip(packing.blocks, *(x.split(sizes) for x in (q, k, v)), strict=True):
            qkv = (x.unflatten(0, (b, t)).transpose(1, 2) for x in qkv)  # [b, H, t, d]
            mask = None if window is None or window >= t else torch.ones(t, t, dtype=torch.bool).tril().triu(1 - window)
            causal = {"attn_mask": mask, "is_causal": mask is None}
            block = F.scaled_dot_product_attention(*qkv, **causal, scale=scaling, enable_gqa=True)
            out.append(block.transpose(1, 2).flatten(0, 1))
        out = torch.cat(out)  # [M, H, d]
    return (out if packing.is_identity else take(out, packing.inverse))[None], None


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension, by F.embedding: its backward is fast, and adds up in a fixed order."""
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Logprob, entropy and moment of tokens, without a [tokens, vocabulary] tensor

TILE_LOGITS = {"cuda": 2**27, "cpu": 2**20}  # in memory at a time: 512 MiB on a GPU; 4 MiB on a CPU, for its caches


def token_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, width: int | None = None, **head
) -> tuple[Tensor, Tensor, Tensor]:
    """See TokenStatistics: [N, D], [V, D], [N] -> [N] each. The distribution is that of sampling, at the temperature.

    head: bias, scale and softcap of the logits. width: of a tile. Default: as TILE_LOGITS allows, and a multiple of
    256, where matrix products are fastest.
    """
    if width is None:
        width = max(256, TILE_LOGITS["cuda" if hidden.is_cuda else "cpu"] // max(1, len(hidden)) // 256 * 256)
    transform = head.get("bias"), head.get("scale", 1.0), head.get("softcap")
    return TokenStatistics.apply(hidden, weight, targets, temperature, width, *transform)


class TokenStatistics(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> logprobs, entropy in nats, moment, each [N], at least float32.

    With y = scale (hidden weight^T + bias), a softcap c tanh(y / c) of it if there is one, z = y / temperature,
    p = softmax(z) and a the target:
        logprob = log p_a                       d logprob / dz = onehot(a) - p
        entropy H = - sum_k p_k log p_k         d H / dz       = - p (log p + H)
        moment S = sum_k p_k^2 (log p_k + H)    (no gradient)
    The logits exist for `width` entries of the vocabulary at a time: a tile. Forward folds each tile into a maximum and
    four sums per token, and backward computes it again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature: float, width: int, bias=None, scale=1.0, softcap=None):
        # m: the largest logit so far (-inf would give NaN). Sums: of e, e (z - m), e^2, e^2 (z - m); e = exp(z - m).
        m = torch.full_like(targets, -1e30, dtype=torch.promote_types(hidden.dtype, torch.float32))  # [N]
        sums = tuple(torch.zeros_like(m) for _ in range(4))  # [N] each
        target_logits = torch.zeros_like(m)  # [N]
        for start in range(0, len(weight), width):
            z = _logits(hidden, weight, bias, slice(start, start + width), scale, softcap)  # [N, W]
            place = targets - start  # of the target in this tile, [N]
            m, sums, target_logits = _on_device(_fold, z.is_cuda)(z, m, sums, target_logits, place, temperature)
        e, ez, ee, eez = sums
        log_z = m + e.log()
        entropy = e.log() - ez / e
        moment = (eez - ez / e * ee) / e.square()
        ctx.save_for_backward(hidden, weight, targets, bias, log_z, entropy)
        ctx.temperature, ctx.width, ctx.scale, ctx.softcap = temperature, width, scale, softcap
        ctx.mark_non_differentiable(moment)
        ctx.set_materialize_grads(False)
        return target_logits - log_z, entropy, moment

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _):
        hidden, weight, targets, bias, *of_tokens = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=of_tokens[0].dtype)  # [N, D]
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # [V, D]; LoRA freezes the head
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[5] else None  # [V]
        for start in range(0, len(weight), ctx.width):
            tile, own_weight = (
                slice(start, start + ctx.width),
                weight[start : start + ctx.width].to(hidden.dtype),
            )  # [W, D]
            z, place = _logits(hidden, weight, bias, tile, ctx.scale, ctx.softcap), targets - start  # [N, W], [N]
            inputs = z, *of_tokens, grad_logprobs, grad_entropy, place, ctx.temperature, hidden.dtype
            grad_z = _on_device(_grad_logits, z.is_cuda)(*inputs, compare=z.is_cuda)  # [N, W]
            grad_z = grad_z if ctx.scale == 1 else grad_z * ctx.scale
            grad_z = grad_z if ctx.softcap is None else (grad_z * (1 - (z / ctx.softcap).square())).to(hidden.dtype)
            if z.is_cuda:
                grad_hidden = torch.addmm(grad_hidden, grad_z, own_weight, out_dtype=torch.float32)
            else:
                grad_hidden.addmm_(grad_z, own_weight)
            if grad_weight is not None:
                grad_weight[tile] = _product(grad_z.T, hidden)
            if grad_bias is not None:
                grad_bias[tile] = grad_z.sum(0)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, grad_bias, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: slice, scale: float, softcap: float | None):
    """A tile of y, see TokenStatistics: [N, W]."""
    y = _product(hidden, weight[tile].to(hidden.dtype).T)
    y = y if bias is None else y + bias[tile]
    y = y if scale == 1 else y * scale
    return y if softcap is None else softcap * (y / softcap).tanh()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product. On a GPU the factors are bfloat16, and the result is not rounded to it."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a @ b


@functools.cache  # compiled once, not for each tile
def _on_device(function, is_cuda: bool):
    """On a GPU a tile is read and written as few times as possible. On a CPU compiling takes longer than it saves."""
    return torch.compile(function, dynamic=True) if is_cuda else function


def _fold(z: Tensor, m: Tensor, sums: tuple[Tensor, ...], target_logits: Tensor, place: Tensor, temperature: float):
    """Add a tile of logits [N, W] to the sums [N] about their running maximum m [N], and find the targets' logits."""
    z = z if temperature == 1 else z / temperature
    inside = (place >= 0) & (place < z.shape[1])  # other tokens have their target in another tile
    target_logits = target_logits + z.gather(1, place.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1) * inside
    e, ez, ee, eez = sums
    new_m = torch.maximum(m, z.amax(1))
    shift = m - new_m
    scale = shift.exp()
    z = z - new_m[:, None]
    p = z.exp()
    pz = z.mul_(p)  # overwrites z: on a CPU the first touch of fresh memory costs more than the product
    sums = (
        e * scale + p.sum(1),
        (ez + shift * e) * scale + pz.sum(1),
        ee * scale**2 + p.norm(dim=1).square(),
        (eez + shift * ee) * scale**2 + p.mul_(pz).sum(1),
    )
    return new_m, sums, target_logits


def _grad_logits(z, log_z, entropy, grad_logprobs, grad_entropy, place, temperature: float, dtype, compare: bool):
    """The gradient of a tile of logits z [N, W]. All other tensors are [N]; one of the two gradients may be None.

    compare: find the targets by comparing every column with `place`. In a compiled function that costs nothing. Without
    compiling it is a pass over the tile, and one write per token is faster.
    """
    log_p = (z if temperature == 1 else z / temperature) - log_z[:, None]
    factor = torch.zeros_like(log_z)[:, None] if grad_logprobs is None else -grad_logprobs[:, None]
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
    grad = log_p.exp().mul_(factor)
    if grad_logprobs is not None and compare:
        here = torch.arange(z.shape[1], device=z.device) == place[:, None]  # [N, W]
        grad = torch.where(here, grad + grad_logprobs[:, None], grad)
    elif grad_logprobs is not None:
        inside = (place >= 0) & (place < z.shape[1])
        grad.scatter_add_(1, place.clamp(0, z.shape[1] - 1)[:, None], (grad_logprobs * inside)[:, None])
    return (grad if temperature == 1 else grad / temperature).to(dtype)
