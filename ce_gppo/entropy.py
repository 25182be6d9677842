"""The exact entropy of every token, in one pass over the vocabulary, and which tokens change it.

The accounting is first order and exact in logit space. Flexible Entropy Control (arXiv 2602.09782), independent work,
has the same split of tokens (-log p > H) and the same inner product; the theory is in arXiv 2602.03392.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# ----------------------------------------------------------------------------------------------------------------------
# Logprob, entropy and S of tokens, without a [tokens, vocabulary] tensor

TILE_LOGITS = {"cuda": 2**27, "cpu": 2**20}  # in memory at a time: 512 MiB on a GPU; 4 MiB on a CPU, for its caches


def token_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprob of `targets`, full-vocabulary entropy in nats, and S: [N, D], [V, D], [N] -> three times [N], float32.

    All three are of softmax(logits / temperature), the distribution that was sampled from. The first two have
    gradients. width: for how many entries of the vocabulary logits are in memory at a time. Default: as
    TILE_LOGITS allows; matrix products are fastest at round widths.
    """
    if width is None:
        width = max(256, TILE_LOGITS["cuda" if hidden.is_cuda else "cpu"] // max(1, len(hidden)) // 256 * 256)
    return TokenStatistics.apply(hidden, weight, targets, temperature, width)


class TokenStatistics(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> logprobs, entropy, S, each [N] in float32.

    With z = hidden weight^T / temperature, p = softmax(z) and a the target:
        logprob = log p_a                       d logprob / dz = onehot(a) - p
        entropy H = - sum_k p_k log p_k         d H / dz       = - p (log p + H)
        S = sum_k p_k^2 (log p_k + H)           (no gradient)
    The logits exist for `width` entries of the vocabulary at a time. Forward folds them into a maximum and four sums
    per token, and backward computes them again. Each pass reads the head's weight once, and backward writes its
    gradient once.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, width: int):
        # m is the largest logit so far. The sums are e, e (z - m), e^2 and e^2 (z - m), where e = exp(z - m).
        m = torch.full_like(targets, -1e30, dtype=torch.float32)  # [N]; not -inf, whose products with 0 are NaN
        sums = tuple(torch.zeros_like(m) for _ in range(4))  # [N] each
        target_logits = torch.zeros_like(m)  # [N]
        for columns in _tiles(len(weight), width):
            z = _product(hidden, weight[columns].to(hidden.dtype).T)  # [N, W]
            place = targets - columns.start  # of the target in this tile, [N]
            m, sums, target_logits = _on_device(_fold, hidden)(z, m, sums, target_logits, place, temperature)
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
        hidden, weight, targets, *of_tokens = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # [N, D]
        grad_weight = torch.empty_like(weight)  # [V, D]
        for columns in _tiles(len(weight), ctx.width):
            own_weight = weight[columns].to(hidden.dtype)  # [W, D]
            z, place = _product(hidden, own_weight.T), targets - columns.start  # [N, W], [N]
            inputs = z, *of_tokens, grad_logprobs, grad_entropy, place, ctx.temperature, hidden.dtype
            grad_z = _on_device(_grad_logits, hidden)(*inputs, hidden.is_cuda)  # [N, W]
            if hidden.is_cuda:
                grad_hidden = torch.addmm(grad_hidden, grad_z, own_weight, out_dtype=torch.float32)
                grad_weight[columns] = _product(grad_z.T, hidden)
            else:
                grad_hidden.addmm_(grad_z, own_weight)
                torch.mm(grad_z.T, hidden, out=grad_weight[columns])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _tiles(length: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, length)) for start in range(0, length, width))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in float32. On a GPU the factors are bfloat16, and the result is not rounded to it."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a @ b


# On a GPU the next two functions are compiled, so that a tile of logits is read and written as few times as possible.


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


_compiled = functools.cache(functools.partial(torch.compile, dynamic=True))  # once for each function, not for each tile


def _on_device(function, tensor: Tensor):
    """On a GPU the element-wise work of a tile becomes one kernel. On a CPU compiling takes longer than it saves."""
    return _compiled(function) if tensor.is_cuda else function


# ----------------------------------------------------------------------------------------------------------------------
# Which tokens move entropy, and which way

QUADRANTS = ("pa_hp", "pa_lp", "na_hp", "na_lp")


def quadrants(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Bool masks by the sign of the advantage (PA, NA) and by probability under the rollout weights (HP, LP).

    LP if log p_a < -H: the token is less probable than the (geometric) average one. Otherwise HP. There is no
    threshold to tune. Tokens of advantage 0 are in none of the four. A token keeps its quadrant through all updates.
    """
    low = old_logprobs < -old_entropy
    positive, negative = advantages > 0, advantages < 0
    return {"pa_hp": positive & ~low, "pa_lp": positive & low, "na_hp": negative & ~low, "na_lp": negative & low}


def entropy_velocity(weight: Tensor, logprobs: Tensor, entropy: Tensor, S: Tensor) -> Tensor:
    """v = g h_a with h_a = S - p_a (log p_a + H): the rate and sign at which the update changes this token's entropy.

    The step g d log p_a / dz in logit space changes H, to first order, by g h_a: exactly the product of the gradients
    dH/dz_k = -p_k (log p_k + H) and d log p_a / dz_k = [k = a] - p_k, summed over the vocabulary.
    """
    return weight * (S - logprobs.exp() * (logprobs + entropy))


def token_sums(
    info: dict[str, Tensor],
    logprobs: Tensor,
    entropy: Tensor,
    S: Tensor,
    old_logprobs: Tensor,
    old_entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Sums over a micro-batch's response tokens, by metric name. All arguments [B, R]; `info` is policy_loss's.

    The sums can be added over micro-batches, updates and ranks (`add_sums`). `statistics.sums_to_metrics` makes means.
    """
    with torch.no_grad():
        values = {key: value[mask] for key, value in info.items()}  # [N] from here on
        weight, ratio, low, high = values["weight"], values["ratio"], values["clipped_low"], values["clipped_high"]
        logprobs, entropy, S = logprobs[mask], entropy[mask], S[mask]
        old_logprobs, old_entropy, advantages = old_logprobs[mask], old_entropy[mask], advantages[mask]
        velocity = entropy_velocity(weight, logprobs, entropy, S)
        log_ratio, old_probs = values["log_ratio"], old_logprobs.exp()
        sums = {
            "tokens": mask.sum(),
            "velocity/total": velocity.sum(),
            "velocity/clipped_low": velocity[low].sum(),
            "velocity/clipped_high": velocity[high].sum(),
            "clip/low": low.sum(),
            "clip/high": high.sum(),
            "clip/prob_low": old_probs[low].sum(),
            "clip/prob_high": old_probs[high].sum(),
            "weight/low": weight[low].abs().sum(),
            "weight/high": weight[high].abs().sum(),
            "weight/inside": weight[~(low | high)].abs().sum(),
            "ratio/mean": ratio.sum(),
            "kl/old": (log_ratio.exp() - 1 - log_ratio).sum(),  # k3 of KL(pi_old || pi), joschu.net/blog/kl-approx.html
            "ratio/min": ratio.min() if len(ratio) else mask.new_tensor(torch.inf, dtype=torch.float32),
            "ratio/max": ratio.max() if len(ratio) else mask.new_tensor(-torch.inf, dtype=torch.float32),
        }
        if "kl_reference" in values:
            sums["kl/reference"] = values["kl_reference"].sum()
        for name, members in quadrants(old_logprobs, old_entropy, advantages).items():
            sums[f"tokens/{name}"] = members.sum()
            sums[f"entropy/{name}"] = old_entropy[members].sum()
            sums[f"velocity/{name}"] = velocity[members].sum()
        return {key: value.double() for key, value in sums.items()}


def add_sums(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of several parts as the sums of one whole."""
    reduce = {"ratio/min": torch.amin, "ratio/max": torch.amax}
    return {key: reduce.get(key, torch.sum)(torch.stack([part[key] for part in parts])) for key in parts[0]}
