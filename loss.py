"""The objectives: pure functions on tensors. No model, no I/O.

CE-GPPO (arXiv 2509.20712) with delta = pi(a) / pi_old(a), group advantage A, and sg() the stop-gradient:

    l = - beta1 (1 - eps_low)  / sg(delta) * delta * A     if delta < 1 - eps_low  and A < 0     (NA&LP)
      = - beta2 (1 + eps_high) / sg(delta) * delta * A     if delta > 1 + eps_high and A > 0     (PA&LP)
      = - delta * A                                        otherwise

PPO-clip gives the first two cases no gradient at all; here they keep one, bounded by beta (1 -+ eps) |A|.

Where this file does not do what the authors' released code does:
 1. token-mean is exact: one denominator for the whole mini-batch, whatever the micro-batches and ranks. Theirs is a
    mean of per-micro-batch means, weighted by sequence counts.
 2. delta / sg(delta) is computed as exp(logprobs - sg(logprobs)), and log ratios saturate at +-20. Their quotient is
    0/0 once delta underflows, and such a step is lost.
 3. `dual_clip` (their c = 10) is off by default, as in the paper's equation.
 4. `beta1` has one default, 0.75, the paper's 7B value; theirs has three.
"""

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: far outside any clip interval, and still finite when squared in float32

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


# ----------------------------------------------------------------------------------------------------------------------
# Objectives. Each takes [B, T] tensors and returns the loss of every token, [B, T], to be differentiated by logprobs.
#   ratio   delta, a constant                       (the value of pi / pi_old, no gradient)
#   unit    exp(logprobs - sg(logprobs))            (the value is 1, the gradient that of logprobs)
# so that `ratio * unit` has the value and the gradient of delta, and `c * unit` those of c / sg(delta) * delta.


def ce_gppo(ratio, unit, advantages, logprobs, eps_low, eps_high, beta1, beta2):
    """CE-GPPO, arXiv 2509.20712: the equation above. beta1 = beta2 = 0 has the gradient of PPO-clip."""
    clipped_low, clipped_high = out_of_clip(ratio, advantages, eps_low, eps_high)
    weight = torch.where(clipped_low, beta1 * (1 - eps_low), torch.where(clipped_high, beta2 * (1 + eps_high), ratio))
    return -weight * unit * advantages


def gppo(ratio, unit, advantages, logprobs, eps_low, eps_high, beta1, beta2):
    """GPPO, arXiv 2508.07629: CE-GPPO with both betas 1."""
    return ce_gppo(ratio, unit, advantages, logprobs, eps_low, eps_high, beta1=1.0, beta2=1.0)


def ppo_clip(ratio, unit, advantages, logprobs, eps_low, eps_high, beta1, beta2):
    """PPO-clip, arXiv 1707.06347, eq. 7: max(-delta A, -clip(delta) A).

    It is the objective of GRPO (arXiv 2402.03300), of DAPO (arXiv 2503.14476: a larger eps_high), and of GSPO
    (arXiv 2507.18071), whose delta is the geometric mean of a response's ratios, the same for all its tokens.
    """
    delta = ratio * unit
    return torch.maximum(-delta * advantages, -delta.clamp(1 - eps_low, 1 + eps_high) * advantages)


def cispo(ratio, unit, advantages, logprobs, eps_low, eps_high, beta1, beta2):
    """CISPO, arXiv 2506.13585: - sg(clip(delta)) A log pi. No token loses its gradient."""
    return -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages * logprobs


OBJECTIVES = {"ce_gppo": ce_gppo, "gppo": gppo, "grpo": ppo_clip, "dapo": ppo_clip, "cispo": cispo, "gspo": ppo_clip}


def out_of_clip(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """The tokens whose gradient PPO-clip throws away, by boundary: NA beyond the left, PA beyond the right. Bool."""
    return (ratio < 1 - eps_low) & (advantages < 0), (ratio > 1 + eps_high) & (advantages > 0)


# ----------------------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: str = "ce_gppo",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    beta1: float = 0.75,
    beta2: float = 1.0,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | None = None,
    rollout_weights: Tensor | None = None,
    positive_nll: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, and what it did to each token.

    logprobs, old_logprobs, advantages, mask: [B, T], aligned with the response's tokens; old_logprobs are the
    trainer's own, of the rollout weights. What stands where mask is 0 is never read.

    denominator: the number of tokens (token-mean) or of non-empty responses (seq-mean-*) of the WHOLE mini-batch, over
    all micro-batches and ranks; the losses of the parts then add up to the loss of the whole. Default: this call's own.
    rollout_weights: [B, T] factors of the tokens' losses, from `rollout_correction`; never part of the ratio.
    positive_nll: adds this much of -log pi to the loss of every token of positive advantage.

    Returns (loss, info). info holds [B, T] tensors without gradient:
        ratio           pi / pi_old (gspo: the response's), saturated at e^+-20; 1 where masked
        weight          g = -dl/dlogprob, the gradient weight that each token really got, before aggregation
        clipped_low     ratio < 1 - eps_low and A < 0;   clipped_high   ratio > 1 + eps_high and A > 0   (bool)
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective '{objective}' is unknown; known: {', '.join(OBJECTIVES)}")
    mask = mask.bool()
    if not logprobs.requires_grad:  # measured without training: the weights below still need a graph
        logprobs = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        masked_logprobs = logprobs.masked_fill(~mask, 0)
        log_ratio = (masked_logprobs.detach() - old_logprobs.masked_fill(~mask, 0)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if objective == "gspo":
            log_ratio = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
        ratio = log_ratio.exp()  # [B, T]
        unit = (masked_logprobs - masked_logprobs.detach()).exp()
        advantages = advantages.masked_fill(~mask, 0)

        loss = OBJECTIVES[objective](ratio, unit, advantages, masked_logprobs, eps_low, eps_high, beta1, beta2)
        if dual_clip is not None:  # arXiv 1912.09729: bounds the loss of NA, and ends its gradient, at delta > c
            loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
        if rollout_weights is not None:
            loss = loss * rollout_weights
        if positive_nll:
            loss = loss - positive_nll * (advantages > 0) * masked_logprobs
        loss = loss.masked_fill(~mask, 0)

        # Every l_t depends on its own logprob only, so one gradient gives all the weights, whatever the objective.
        weight = -torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)[0]
        clipped_low, clipped_high = out_of_clip(ratio, advantages, eps_low, eps_high)
        info = {"ratio": ratio, "weight": weight, "clipped_low": clipped_low, "clipped_high": clipped_high}
        return aggregate(loss, mask, aggregation, denominator), info


def aggregate(
    values: Tensor, mask: Tensor, aggregation: str = "token-mean", denominator: float | None = None
) -> Tensor:
    """[B, T] -> scalar. Empty responses count nowhere; without any token the result is 0, not NaN."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation '{aggregation}' is unknown; known: {', '.join(AGGREGATIONS)}")
    if denominator is None:
        denominator = count(mask, aggregation)
    values = values.masked_fill(~mask.bool(), 0)
    if aggregation == "seq-mean-token-mean":
        values = values / mask.sum(-1, keepdim=True).clamp(min=1)
    return values.sum() / max(float(denominator), 1.0)


def count(mask: Tensor, aggregation: str = "token-mean") -> float:
    """What `aggregate` divides by: tokens, or non-empty responses. Add it up over micro-batches."""
    return float(mask.sum() if aggregation == "token-mean" else mask.any(-1).sum())


ROLLOUT_CORRECTIONS = ("none", "tis", "mask")


def rollout_correction(old_logprobs: Tensor, rollout_logprobs: Tensor, kind: str, cap: float) -> Tensor | None:
    """Factors [B, T] for tokens that vLLM sampled with other probabilities than the trainer's, or None for `none`.

    tis: sg(min(pi_old / pi_vllm, cap)), truncated importance sampling (fengyao.notion.site/off-policy-rl).
    mask: 0 where that ratio is outside [1 / cap, cap], 1 elsewhere. Masked tokens stay in the denominator.
    """
    ratio = (old_logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if kind == "none":
        return None
    if kind == "tis":
        return ratio.clamp(max=cap)
    if kind == "mask":
        return ((ratio <= cap) & (ratio >= 1 / cap)).to(ratio.dtype)
    raise ValueError(f"rollout_correction '{kind}' is unknown; known: {', '.join(ROLLOUT_CORRECTIONS)}")


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """Rewards [P, G] -> advantages [P, G]: (r - mean) / (std + 1e-6) within each group of G responses to one prompt.

    The sample standard deviation (ddof 1), as in the authors' code. normalize_std=False: r - mean (arXiv 2503.20783).
    A group of equal rewards has advantages of exactly 0, whatever the rounding of its mean.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, at least 2 responses], not {list(rewards.shape)}")
    centered = rewards - rewards.mean(1, keepdim=True)
    centered = centered.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0)
    return centered / (rewards.std(1, keepdim=True) + 1e-6) if normalize_std else centered


# ----------------------------------------------------------------------------------------------------------------------
# Betas that hold entropy at a target

GAIN, INTEGRAL_GAIN = 4.0, 0.4  # of the controller, a rollout; relative errors of entropy vary by some 0.03


def steer(control: tuple[float, float], entropy: float, target: float) -> tuple[float, float]:
    """One step of the entropy controller, after a rollout: (u, x) and that rollout's mean entropy -> the new (u, x).

    u in [0, 1] says how much entropy is wanted: `steered_betas`. x = log(entropy / target) is the relative error.
    A proportional-integral law in incremental form, which cannot wind up:  u <- clip(u - K_P (x' - x) - K_I x', 0, 1).
    The paper leaves adaptive betas to future work; the law is this project's.
    """
    u, before = control
    error = math.log(max(entropy, 1e-6) / target)
    return min(1.0, max(0.0, u - GAIN * (error - before) - INTEGRAL_GAIN * error)), error


def steered_betas(u: float, beta1: float, beta2: float) -> tuple[float, float]:
    """u = 1: clipped NA&LP get no gradient, clipped PA&LP beta2 of theirs, for the most entropy; u = 0: the reverse."""
    return (1 - u) * beta1, u * beta2


# ----------------------------------------------------------------------------------------------------------------------
# Entropy accounting

QUADRANTS = ("pa_hp", "pa_lp", "na_hp", "na_lp")


def quadrants(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Bool masks by the sign of the advantage (PA, NA) and by probability under the rollout weights.

    LP where log p_a < -H, that is where the token is less probable than the (geometric) average one; HP elsewhere. No
    threshold to tune. Tokens of advantage 0 are in none of the four. A token keeps its quadrant through all updates.
    """
    low = old_logprobs < -old_entropy
    positive, negative = advantages > 0, advantages < 0
    return {
        "pa_hp": positive & ~low,
        "pa_lp": positive & low,
        "na_hp": negative & ~low,
        "na_lp": negative & low,
    }


def entropy_velocity(weight: Tensor, logprobs: Tensor, entropy: Tensor, S: Tensor) -> Tensor:
    """v = g h_a with h_a = S - p_a (log p_a + H): how fast the update moves the entropy at this place, and which way.

    The step g d log p_a / dz in logit space changes H, to first order, by g h_a: exactly the product of the gradients
    dH/dz_k = -p_k (log p_k + H) and d log p_a / dz_k = [k = a] - p_k, summed over the vocabulary.
    """
    return weight * (S - logprobs.exp() * (logprobs + entropy))


def update_sums(
    info: dict[str, Tensor],
    logprobs: Tensor,
    entropy: Tensor,
    S: Tensor,
    old_logprobs: Tensor,
    old_entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Sums over a micro-batch's response tokens, by metric name; all arguments [B, T], `info` from `policy_loss`.

    Sums add up over micro-batches, updates and ranks (ratio/min and ratio/max excepted); `update_metrics` divides.
    """
    with torch.no_grad():
        values = {key: value[mask] for key, value in info.items()}  # [N] from here on
        weight, ratio, low, high = values["weight"], values["ratio"], values["clipped_low"], values["clipped_high"]
        logprobs, entropy, S = logprobs[mask], entropy[mask], S[mask]
        old_logprobs, old_entropy, advantages = old_logprobs[mask], old_entropy[mask], advantages[mask]
        velocity = entropy_velocity(weight, logprobs, entropy, S)
        log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        old_probs = old_logprobs.exp()
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
        for name, members in quadrants(old_logprobs, old_entropy, advantages).items():
            sums[f"tokens/{name}"] = members.sum()
            sums[f"entropy/{name}"] = old_entropy[members].sum()
            sums[f"velocity/{name}"] = velocity[members].sum()
        return {key: value.double() for key, value in sums.items()}


def add_sums(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of several parts as the sums of one whole."""
    reduce = {"ratio/min": torch.amin, "ratio/max": torch.amax}
    return {key: reduce.get(key, torch.sum)(torch.stack([part[key] for part in parts])) for key in parts[0]}


def update_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """From sums to means and shares; a mean over no tokens is left out rather than called 0."""
    sums = {key: float(value) for key, value in sums.items()}
    weights = sum(value for key, value in sums.items() if key.startswith("weight/"))
    metrics = {}
    for key, value in sums.items():
        group, _, name = key.partition("/")
        if key in ("ratio/min", "ratio/max"):
            metrics[key] = value
            continue
        denominator = {"entropy": sums.get(f"tokens/{name}"), "weight": weights}.get(group, sums["tokens"])
        if group == "clip" and name.startswith("prob_"):
            denominator = sums[f"clip/{name.removeprefix('prob_')}"]
        if key != "tokens" and denominator:
            metrics[key] = value / denominator
    return metrics
