"""Logprob, entropy and S of tokens, in one pass over the vocabulary and never in a [tokens, vocabulary] tensor."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class HeadLogprobs(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> logprobs, entropy, S, each [N] in float32.

    With z = hidden weight^T / temperature, p = softmax(z) and a the target:
        logprob = log p_a                       d logprob / dz = onehot(a) - p
        entropy H = - sum_k p_k log p_k         d H / dz       = - p (log p + H)
        S = sum_k p_k^2 (log p_k + H)           (no gradient)
    The logits exist for `width` entries of the vocabulary at a time, forward folds them into five sums a token, and
    backward computes them again. So the head's weight is read once and its gradient written once in either direction.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, width: int):
        # With m the largest logit so far: sum e, sum e (z - m), sum e^2, sum e^2 (z - m), where e = exp(z - m).
        m = torch.full_like(targets, -1e30, dtype=torch.float32)  # [N]; not -inf, whose products with 0 are NaN
        sums = tuple(torch.zeros_like(m) for _ in range(4))  # [N] each
        target_logits = torch.zeros_like(m)  # [N]
        for columns in _tiles(len(weight), width):
            z = _logits(hidden, weight[columns], temperature)  # [N, W]
            inside, place = _targets_in(columns, targets)
            target_logits += z.gather(1, place[:, None]).squeeze(1) * inside
            m, sums = _on_device(_fold, hidden)(z, m, sums)
        e, ez, ee, eez = sums
        log_z = m + e.log()
        entropy = e.log() - ez / e
        S = (eez - ez / e * ee) / e.square()
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.temperature, ctx.width = temperature, width
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        return target_logits - log_z, entropy, S

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _):
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # [N, D]
        grad_weight = torch.empty_like(weight)  # [V, D]
        for columns in _tiles(len(weight), ctx.width):
            z = _logits(hidden, weight[columns], ctx.temperature)  # [N, W]
            grad_z = _on_device(_grad_logits, hidden)(z, log_z, entropy, grad_logprobs, grad_entropy)
            if grad_logprobs is not None:
                inside, place = _targets_in(columns, targets)
                grad_z.scatter_add_(1, place[:, None], (grad_logprobs * inside)[:, None])
            grad_z = (grad_z / ctx.temperature if ctx.temperature != 1 else grad_z).to(hidden.dtype)
            if weight.dtype == torch.float32 == hidden.dtype:  # the same products, without a copy of each
                grad_hidden.addmm_(grad_z, weight[columns])
                torch.mm(grad_z.T, hidden, out=grad_weight[columns])
            else:
                grad_hidden += grad_z @ weight[columns].to(hidden.dtype)
                grad_weight[columns] = grad_z.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _tiles(length: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, length)) for start in range(0, length, width))


def _targets_in(columns: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in this tile, and their column in it (of the others some column). [N] each."""
    place = targets - columns.start
    inside = (place >= 0) & (targets < columns.stop)
    return inside, place.clamp(0, columns.stop - columns.start - 1)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[N, D], [W, D] -> [N, W] in float32; bfloat16 factors are not rounded again on a GPU."""
    weight = weight.to(hidden.dtype)
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.T).float()
    return logits if temperature == 1 else logits / temperature


def _fold(z: Tensor, m: Tensor, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add a tile of logits [N, W] to the sums [N] about their running maximum m [N]."""
    e, ez, ee, eez = sums
    new_m = torch.maximum(m, z.amax(1))
    shift = m - new_m
    scale = shift.exp()
    z = z - new_m[:, None]
    p = z.exp()
    pz = z.mul_(p)  # in place: on a CPU the first touch of fresh memory costs more than the product
    return new_m, (
        e * scale + p.sum(1),
        (ez + shift * e) * scale + pz.sum(1),
        ee * scale**2 + p.norm(dim=1).square(),
        (eez + shift * ee) * scale**2 + p.mul_(pz).sum(1),
    )


def _grad_logits(z: Tensor, log_z: Tensor, entropy: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None):
    """The gradient of a tile of logits [N, W], but for the target's own 1."""
    log_p = z - log_z[:, None]
    factor = torch.zeros_like(log_z)[:, None] if grad_logprobs is None else -grad_logprobs[:, None]
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
    return log_p.exp().mul_(factor)


_compiled = {}


def _on_device(function, tensor: Tensor):
    """On a GPU the element-wise work of a tile becomes one kernel; on a CPU a compiler is not worth its wait."""
    if not tensor.is_cuda:
        return function
    return _compiled.setdefault(function, torch.compile(function, dynamic=True))


def head_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprob of `targets`, full-vocabulary entropy in nats, and S: [N, D], [V, D], [N] -> three times [N], float32.

    All three are of softmax(logits / temperature), the distribution that was sampled from. The first two have
    gradients. width bounds the memory: the entries of the vocabulary whose logits exist at a time. By default they take
    4 MiB on a CPU, so that they stay in its caches, and 64 MiB on a GPU; matrix products are fastest at round widths.
    """
    if width is None:
        width = max(256, (2**24 if hidden.is_cuda else 2**20) // max(1, len(hidden)) // 256 * 256)
    return HeadLogprobs.apply(hidden, weight, targets, temperature, width)
