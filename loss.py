"""The objectives: pure functions on tensors. No model, no I/O.

CE-GPPO (arXiv 2509.20712) with delta = pi(a) / pi_old(a), group advantage A, and sg() the stop-gradient:

    l = - beta1 (1 - eps_low)  / sg(delta) * delta * A     if delta < 1 - eps_low  and A < 0     (NA&LP)
      = - beta2 (1 + eps_high) / sg(delta) * delta * A     if delta > 1 + eps_high and A > 0     (PA&LP)
      = - delta * A                                        otherwise

PPO-clip gives the first two cases no gradient. Here they keep one, bounded by beta (1 -+ eps) |A|.

Where this file differs from the authors' released code:
 1. token-mean is exact: one denominator for the whole mini-batch, over all micro-batches and ranks. Theirs is a mean of
    per-micro-batch means, weighted by sequence counts.
 2. delta / sg(delta) is computed as exp(logprobs - sg(logprobs)), and log ratios are clamped to +-20. In theirs the
    quotient is 0/0 once delta underflows, and such a step is lost.
 3. `dual_clip` (their c = 10) is off by default, as in the paper's equation.
 4. `beta1` has one default, 0.75, the paper's 7B value. Theirs has three.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ce_gppo import objectives as other
from ce_gppo.corrections import correction_weights
from ce_gppo.objectives import BETAS, CLIPS, Spec, ppo_clip

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: far outside any clip interval, and still finite when squared in float32


@dataclass(frozen=True)
class Objective:
    """Everything that decides the loss of a mini-batch, apart from its tensors."""

    name: str = "ce_gppo"  # a key of OBJECTIVES
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta1: float | None = 0.75  # None: the objective has no betas
    beta2: float | None = 1.0
    dual_clip: float | None = None
    aggregation: str = "token-mean"  # one of AGGREGATIONS
    max_response_tokens: int = 1  # the divisor of seq-mean-token-sum-norm
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    positive_nll_coef: float = 0.0
    rollout_correction: str = "none"  # a key of corrections.KINDS


# ----------------------------------------------------------------------------------------------------------------------
# Objectives: functions of Tokens that return the loss of every token, [B, T], to be differentiated by logprobs.
# Those that CE-GPPO is compared with are in ce_gppo/objectives.py.


@dataclass
class Tokens:
    """A micro-batch, [B, T] each. old_*: under the weights that sampled.

    A constant times `unit` has the constant's value, and the gradient of constant * logprobs. `ratio * unit` is delta.
    """

    ratio: Tensor  # delta, without a gradient
    unit: Tensor  # exp(logprobs - sg(logprobs)): its value is 1, its gradient that of logprobs
    advantages: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    old_entropy: Tensor | None  # nats
    chosen: Tensor | None  # 1 for those that the objective picks, 0 for the others; see Spec.picks


def ce_gppo(x: Tokens, o: Objective) -> Tensor:
    """CE-GPPO, arXiv 2509.20712: the equation above. Betas of 0 have the gradient of PPO-clip."""
    clipped_low, clipped_high = out_of_clip(x.ratio, x.advantages, o)
    low, high = o.beta1 * (1 - o.eps_low), o.beta2 * (1 + o.eps_high)
    weight = torch.where(clipped_low, low, torch.where(clipped_high, high, x.ratio))
    return -weight * x.unit * x.advantages


def gppo(x: Tokens, o: Objective) -> Tensor:
    """GPPO, arXiv 2508.07629: CE-GPPO with both betas 1."""
    return ce_gppo(x, replace(o, beta1=1.0, beta2=1.0))


def lp_only(x: Tokens, o: Objective) -> Tensor:
    """CE-GPPO for LP tokens only, this project's own: l = CE-GPPO's if log pi_old(a) < -H_old, PPO-clip's otherwise.

    HP tokens get no gradient outside the interval. These may be sure tokens of wrong answers, such as their end.
    """
    return torch.where(x.old_logprobs < -x.old_entropy, ce_gppo(x, o), ppo_clip(x, o))


def lp_only_half(x: Tokens, o: Objective) -> Tensor:
    """`lp_only` with another threshold: l = CE-GPPO's if pi_old(a) < 1/2, PPO-clip's otherwise."""
    return torch.where(x.old_logprobs.exp() < 0.5, ce_gppo(x, o), ppo_clip(x, o))


# Each with all that depends on its name; ce_gppo/objectives.py explains what a Spec has.
OBJECTIVES = {
    "ce_gppo": Spec(ce_gppo, {"beta1": 0.75, "beta2": 1.0}),
    "gppo": Spec(gppo, {"beta1": 1.0, "beta2": 1.0}, ignores=BETAS),
    "grpo": Spec(ppo_clip),
    "ppo": Spec(ppo_clip, {"advantages": "gae"}),
    "dapo": Spec(ppo_clip, {"eps_high": 0.28, "filter_groups": "refill", "overlong": other.last_fifth}),
    "cispo": Spec(other.cispo, {"eps_low": 1.0}, ignores=("dual_clip",)),  # no lower bound
    "gspo": Spec(ppo_clip, {"eps_low": 3e-4, "eps_high": 4e-4, "aggregation": "seq-mean-token-mean"}, by_response=True),
    "dr_grpo": Spec(ppo_clip, {"aggregation": "seq-mean-token-sum-norm", "advantages": "group-mean"}),
    "rloo": Spec(other.reinforce, {"aggregation": "seq-mean-token-sum", "advantages": "leave-one-out"}, ignores=CLIPS),
    "lp_only": Spec(lp_only, {"beta1": 0.75, "beta2": 1.0}),
    "lp_only_half": Spec(lp_only_half, {"beta1": 0.75, "beta2": 1.0}),
    "high_entropy": Spec(other.high_entropy, {"eps_high": 0.28}, picks=other.highest_entropy),
    # The interval of its authors' scripts.
    "clip_cov": Spec(other.clip_cov, {"eps_low": 1.0, "eps_high": 1.0}, picks=other.covariance_in_bounds),
    "kl_cov": Spec(other.kl_cov, ignores=("eps_low", "eps_high"), picks=other.highest_covariance),
    "sapo": Spec(other.sapo, ignores=CLIPS),
}


def out_of_clip(ratio: Tensor, advantages: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    """The tokens whose gradient PPO-clip drops: NA below 1 - eps_low, PA above 1 + eps_high. Bool, [B, T]."""
    return (ratio < 1 - o.eps_low) & (advantages < 0), (ratio > 1 + o.eps_high) & (advantages > 0)


# ----------------------------------------------------------------------------------------------------------------------


def policy_loss(
    batch,
    logprobs: Tensor,
    entropy: Tensor | None,
    objective: Objective,
    denominator: float | None = None,
    correct_tokens: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, and the gradient weight of each token.

    batch: a forward.Batch, or any object with response_mask, old_logprobs, advantages [B, T], and those that the
    objective needs of old_entropy, chosen, rollout_logprobs, ref_logprobs [B, T], correct [B, 1]. logprobs, entropy
    [B, T]: of the policy now. All are aligned with the response's tokens. Values where the mask is 0 are never read.
    denominator: `denominator_of` the WHOLE mini-batch, over all micro-batches and ranks. The losses of the parts then
    add up to the loss of the whole. Default: this call's own. correct_tokens: of the whole mini-batch, too.

    Returns (loss, info). info holds [B, T] tensors without gradient:
        log_ratio       log pi / pi_old of the token, clamped to +-20; 0 where masked
        ratio           pi / pi_old (gspo: the response's)
        weight          g = -dl/dlogprob, the gradient weight that each token really got, before aggregation
        clipped_low     ratio < 1 - eps_low and A < 0;   clipped_high   ratio > 1 + eps_high and A > 0   (bool)
        kl_reference    of the token, with a kl_coef
    """
    o, mask = objective, batch.response_mask.bool()
    if o.name not in OBJECTIVES:
        raise ValueError(f"objective '{o.name}' is unknown; known: {', '.join(OBJECTIVES)}")
    if denominator is None:
        denominator = denominator_of(o, mask.sum().item(), mask.any(-1).sum().item())
    leaf = logprobs.detach().requires_grad_()  # gradients of logprobs themselves would start FSDP's backward hooks
    with torch.enable_grad():
        masked_logprobs = leaf.masked_fill(~mask, 0)
        old_logprobs = batch.old_logprobs.masked_fill(~mask, 0)
        log_ratio = clamped(masked_logprobs.detach() - old_logprobs)  # [B, T]
        exponent = log_ratio
        if OBJECTIVES[o.name].by_response:
            exponent = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
        ratio = exponent.exp()  # [B, T]
        unit = (masked_logprobs - masked_logprobs.detach()).exp()
        advantages = batch.advantages.masked_fill(~mask, 0)

        tokens = Tokens(ratio, unit, advantages, masked_logprobs, old_logprobs, batch.old_entropy, batch.chosen)
        token_loss = OBJECTIVES[o.name].token_loss(tokens, o)
        if o.dual_clip is not None:  # arXiv 1912.09729: bounds the loss of NA, and ends its gradient, at delta > c
            token_loss = torch.where(advantages < 0, torch.minimum(token_loss, -o.dual_clip * advantages), token_loss)
        if o.rollout_correction != "none":
            weights = correction_weights(old_logprobs, batch.rollout_logprobs, mask, o.rollout_correction)
            token_loss = token_loss * weights
        info = {"log_ratio": log_ratio, "ratio": ratio}
        if o.kl_coef:  # k3 of KL(pi || pi_ref), as in GRPO, arXiv 2402.03300, eq. 4
            gap = clamped(batch.ref_logprobs.masked_fill(~mask, 0) - masked_logprobs)
            kl = gap.exp() - gap - 1
            token_loss, info["kl_reference"] = token_loss + o.kl_coef * kl, kl.detach()
        token_loss = token_loss.masked_fill(~mask, 0)

        # Every l_t depends on its own logprob only, so one gradient gives all the weights, whatever the objective.
        weight = -torch.autograd.grad(token_loss.sum(), leaf)[0]
        denominator, divisor = max(float(denominator), 1.0), divisors(mask, o.aggregation)
        loss = (token_loss / divisor).sum() / denominator  # 0 without any token, not NaN
        if o.positive_nll_coef:  # the mean over the tokens of the correct responses, in every aggregation
            each = o.positive_nll_coef / max(1.0, correct_tokens) * (batch.correct & mask)
            loss = loss - (each * masked_logprobs).sum()
            weight = weight + each * divisor * denominator
        step = (logprobs - logprobs.detach()).masked_fill(~mask, 0)  # of value 0, with the gradient of logprobs
        loss = loss.detach() - (weight / divisor * step).sum() / denominator
        if o.entropy_coef:
            loss = loss - o.entropy_coef * (entropy.masked_fill(~mask, 0) / divisor).sum() / denominator
        clipped_low, clipped_high = out_of_clip(ratio, advantages, o)
        return loss, info | {"weight": weight, "clipped_low": clipped_low, "clipped_high": clipped_high}


def clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# ----------------------------------------------------------------------------------------------------------------------
# From tokens to a scalar

# seq-mean-token-sum-norm divides every response by the length limit: Dr. GRPO (arXiv 2503.20783).
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def divisors(mask: Tensor, aggregation: str) -> Tensor:
    """The divisor of the losses of a response's tokens, [B, 1]: its length, or 1. An empty response has 1."""
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return lengths if aggregation == "seq-mean-token-mean" else torch.ones_like(lengths)


def denominator_of(o: Objective, tokens: float, responses: float) -> float:
    """The divisor of the sum over all tokens. tokens, responses: of the whole mini-batch, without empty responses."""
    if o.aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation '{o.aggregation}' is unknown; known: {', '.join(AGGREGATIONS)}")
    if o.aggregation == "token-mean":
        return tokens
    return responses * o.max_response_tokens if o.aggregation == "seq-mean-token-sum-norm" else responses


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


ADVANTAGES = ("group", "group-mean", "leave-one-out")  # and gae, for single tokens, in ce_gppo/critic.py


def group_advantages(rewards: Tensor, kind: str = "group") -> Tensor:
    """Rewards [P, G] -> advantages [P, G], within each group of G responses to one prompt.

    group           (r - mean) / (std + 1e-6): GRPO; the sample standard deviation (ddof 1), as in the authors' code
    group-mean      r - mean: Dr. GRPO, arXiv 2503.20783
    leave-one-out   r - mean of the other responses: RLOO, arXiv 2402.14740; it is G / (G - 1) (r - mean)

    A group of equal rewards has advantages of exactly 0, whatever the rounding of its mean.
    """
    G = rewards.shape[-1]
    if rewards.ndim != 2 or G < 2:
        raise ValueError(f"rewards must be [prompts, at least 2 responses], not {list(rewards.shape)}")
    centered = rewards - rewards.mean(1, keepdim=True)
    centered = centered.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0)
    if kind == "group":
        return centered / (rewards.std(1, keepdim=True) + 1e-6)
    return centered * G / (G - 1) if kind == "leave-one-out" else centered
