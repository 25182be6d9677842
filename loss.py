"""The objectives: pure functions on the tokens of a mini-batch, without padding. No model, no I/O.

CE-GPPO (arXiv 2509.20712) with delta = pi(a) / pi_old(a), group advantage A, and sg() the stop-gradient:

    l = - beta1 (1 - eps_low)  / sg(delta) * delta * A     if delta < 1 - eps_low  and A < 0     (NA&LP)
      = - beta2 (1 + eps_high) / sg(delta) * delta * A     if delta > 1 + eps_high and A > 0     (PA&LP)
      = - delta * A                                        otherwise

PPO-clip gives the first two cases no gradient. Here they keep one, bounded by beta (1 -+ eps) |A|.

Where this file differs from the authors' released code:
 1. token-mean is exact: one denominator for the whole mini-batch, over all micro-batches and ranks. Theirs is a mean of
    per-micro-batch means, weighted by sequence counts.
 2. delta / sg(delta) is computed as exp(logprobs - sg(logprobs)). In theirs the quotient is 0/0 once delta underflows,
    and such a step is lost. Log ratios are clamped to +-20, in the value only: the clamp ends no gradient.
 3. `dual_clip` (their c = 10) is off by default, as in the equation. `beta1` has one default, 0.75; theirs has three.
 4. grpo is what the paper compares with: token-mean, no KL term, groups of equal rewards left out. DeepSeekMath's has a
    mean of sequences, kl_coef 0.04 and no filter; `aggregation`, `kl_coef` and `dynamic_sampling` set them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: far outside any clip interval, and still finite when squared in float32


@dataclass(frozen=True)
class Objective:
    """Everything that decides the loss of a mini-batch, apart from its tensors. train.py's settings explain it."""

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
    rollout_correction: str = "none"  # one of CORRECTIONS


class Totals(NamedTuple):
    """Counts over the WHOLE mini-batch, all micro-batches and ranks: the losses of its parts then add up to its own."""

    tokens: float
    responses: float
    correct_tokens: float  # in responses whose answer is right


def totals_of(batch) -> Totals:
    correct = [] if batch.correct is None else batch.lengths[batch.correct].tolist()
    return Totals(int(batch.lengths.sum()), len(batch.lengths), sum(correct))


@dataclass
class Tokens:
    """What the functions below turn into the loss of every token, [N] each. old_*: under the weights that sampled."""

    ratio: Tensor  # delta, without a gradient; ratio * unit is delta with its gradient
    unit: Tensor  # exp(logprobs - sg(logprobs)) = 1: c * unit has the value c, and the gradient of c * logprobs
    advantages: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    entropy: Tensor | None  # nats, of the policy now, without a gradient; None if it was not given
    old_entropy: Tensor | None  # nats; of these two an objective gets None if the batch has none
    mask: Tensor | None  # bool: what the objective's token_filter picked
    batch: object  # a Rollout: its `lengths` [B] and `sequence` [N], for mean_of_response


def ppo_clip(x: Tokens, o: Objective) -> Tensor:
    """PPO-clip, arXiv 1707.06347, eq. 7: max(-delta A, -clip(delta) A)."""
    delta = x.ratio * x.unit
    return torch.maximum(-delta * x.advantages, -delta.clamp(1 - o.eps_low, 1 + o.eps_high) * x.advantages)


def ce_gppo(x: Tokens, o: Objective) -> Tensor:
    """CE-GPPO, arXiv 2509.20712: the equation above."""
    return clipped_with(x, o, o.beta1 * (1 - o.eps_low), o.beta2 * (1 + o.eps_high))


def clipped_with(x: Tokens, o: Objective, low, high) -> Tensor:
    """- w A: w is `low` or `high`, [N] or a number, for tokens out of the clip interval, and delta for the others."""
    clipped_low, clipped_high = out_of_clip(x.ratio, x.advantages, o)
    weight = torch.where(clipped_low, low, torch.where(clipped_high, high, x.ratio))
    return -weight * x.unit * x.advantages


def decaying(x: Tokens, o: Objective) -> Tensor:
    """This project's own: below the interval w = beta1 delta, which goes to 0 with delta; above it CE-GPPO's."""
    return clipped_with(x, o, o.beta1 * x.ratio, o.beta2 * (1 + o.eps_high))


def dgpo(x: Tokens, o: Objective) -> Tensor:
    """DGPO, arXiv 2603.14389: w = delta^2 / (1 - eps_low) below the interval, ((1 + eps_high) delta)^(1/2) above it."""
    return clipped_with(x, o, x.ratio.square() / (1 - o.eps_low), ((1 + o.eps_high) * x.ratio).sqrt())


def dppo(x: Tokens, o: Objective) -> Tensor:
    """DPPO with total variation, arXiv 2602.04879: the interval is that of pi - pi_old; delta is at most 20."""
    moved = x.logprobs.detach().exp() - x.old_logprobs.exp()
    inside = torch.where(x.advantages > 0, moved <= o.eps_high, moved >= -o.eps_low)
    return -x.ratio.clamp(max=20) * x.advantages * x.logprobs * inside


def erc(x: Tokens, o: Objective) -> Tensor:
    """ERC, arXiv 2512.05591: PPO-clip for tokens whose entropy is within 5 % of the old one, 0 for the others."""
    return ppo_clip(x, o) * ((x.entropy - x.old_entropy).abs() <= 0.05 * x.old_entropy)


def gmpo(x: Tokens, o: Objective) -> Tensor:
    """GMPO, arXiv 2507.20673: - A times the geometric mean of a response's ratios, each clipped in log space."""
    gap = x.ratio.log()
    clipped = torch.where(x.advantages > 0, gap.clamp(max=o.eps_high), gap.clamp(min=-o.eps_low))
    return -mean_of_response(clipped, x.batch).exp() * torch.where(clipped == gap, x.unit, 1) * x.advantages


def gppo(x: Tokens, o: Objective) -> Tensor:
    """GPPO, arXiv 2508.07629: CE-GPPO with both betas 1."""
    return ce_gppo(x, replace(o, beta1=1.0, beta2=1.0))


def lp_only(x: Tokens, o: Objective) -> Tensor:
    """This project's own: CE-GPPO for LP tokens (log pi_old < -H_old), PPO-clip for the others, which were sure."""
    return torch.where(x.old_logprobs < -x.old_entropy, ce_gppo(x, o), ppo_clip(x, o))


def cispo(x: Tokens, o: Objective) -> Tensor:
    """CISPO, arXiv 2506.13585: - sg(clip(delta)) A log pi. No token loses its gradient."""
    return -x.ratio.clamp(1 - o.eps_low, 1 + o.eps_high) * x.advantages * x.logprobs


def reinforce(x: Tokens, o: Objective) -> Tensor:
    """REINFORCE, as in RLOO (arXiv 2402.14740): - A log pi, without ratio or clip, also in later updates."""
    return -x.advantages * x.logprobs


def sapo(x: Tokens, o: Objective) -> Tensor:
    """SAPO, arXiv 2511.20347: - 4 / tau sigmoid(tau (delta - 1)) A, tau = 1 for A > 0 and 1.05 otherwise."""
    tau = torch.full_like(x.ratio, 1.05).masked_fill(x.advantages > 0, 1.0)
    return -4 / tau * (tau * (x.ratio * x.unit - 1)).sigmoid() * x.advantages


def high_entropy(x: Tokens, o: Objective) -> Tensor:
    """arXiv 2506.01939: PPO-clip for the tokens of the highest entropy, 0 for the others."""
    return ppo_clip(x, o) * x.mask


def clip_cov(x: Tokens, o: Objective) -> Tensor:
    """Clip-Cov, arXiv 2505.22617: PPO-clip, and 0 for a few tokens of high covariance between log pi and A."""
    return ppo_clip(x, o) * ~x.mask


def kl_cov(x: Tokens, o: Objective) -> Tensor:
    """KL-Cov, arXiv 2505.22617: - delta A, and + |log delta| for the tokens of the highest covariance. No clip."""
    return -x.ratio * x.unit * x.advantages + (x.logprobs - x.old_logprobs).abs() * x.mask


# Token filters: old logprobs, old entropy, advantages of a WHOLE mini-batch, [N] each -> bool [N]. Their authors pick
# as many, but by the present policy in a micro-batch; and those of high_entropy divide by the picked tokens only.
def highest_entropy(logprobs: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
    k = math.ceil(len(entropy) / 5)  # rounded up: the paper's threshold is a quantile, which is among the picked
    return torch.zeros(len(entropy)).index_fill(0, entropy.topk(k).indices, 1).bool()  # k tokens, also with ties


def covariance(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Each token's part of Cov(log pi, A), [N]. Its mean drives entropy down (arXiv 2505.22617)."""
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def highest_covariance(logprobs: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
    k = max(1, int(2e-3 * len(logprobs)))  # 2e-3: the authors' script for 7B; for 32B, and in verl, it is 2e-4
    return torch.zeros(len(logprobs)).index_fill(0, covariance(logprobs, advantages).topk(k).indices, 1).bool()


def covariance_in_bounds(logprobs: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
    values, k = covariance(logprobs, advantages), max(1, int(2e-4 * len(logprobs)))
    inside = ((values > 1.0) & (values < 5.0)).nonzero()[:, 0]
    inside = inside[values[inside].argsort()]  # an order that does not depend on the number of ranks
    shuffled = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(len(values)))]
    return torch.zeros(len(values)).index_fill(0, shuffled[:k], 1).bool()


# What train.py's settings are where one is left at None, unless the objective's own settings say otherwise.
USUAL = {"eps_low": 0.2, "eps_high": 0.2, "beta1": None, "beta2": None, "aggregation": "token-mean"}
USUAL |= {"advantages": "group", "dynamic_sampling": "filter", "overlong": "score"}
DAPO = {"eps_high": 0.28, "dynamic_sampling": "refill", "overlong": lambda c: str(max(1, c.max_response_tokens // 5))}
BETAS, CLIPS = ("beta1", "beta2", "beta_schedule"), ("dual_clip", "eps_low", "eps_high")


@dataclass(frozen=True)
class Spec:
    """All that the program knows about an objective."""

    token_loss: Callable[[Tokens, Objective], Tensor]
    settings: dict = field(default_factory=dict)  # published ones that are not USUAL; a function gets train.py's Config
    ignores: tuple[str, ...] = ()  # settings that it does not read, an error if given; BETAS if it has no beta1
    token_filter: Callable | None = None
    by_response: bool = False  # GSPO, arXiv 2507.18071: delta is the geometric mean of a response's ratios

    @property
    def has_betas(self) -> bool:
        return "beta1" in self.settings and "beta1" not in self.ignores

    def values(self, config) -> dict:
        """What settings left at None are."""
        return {name: v(config) if callable(v) else v for name, v in (USUAL | self.settings).items()}


COV = {"dynamic_sampling": "refill"}
ALL = {"dynamic_sampling": "off"}  # these have no filter: groups of equal rewards are in the loss, with advantage 0
SEQ_MEAN = ALL | {"aggregation": "seq-mean-token-mean"}
OBJECTIVES = {  # settings of the paper, or of its authors' scripts
    "ce_gppo": Spec(ce_gppo, {"beta1": 0.75, "beta2": 1.0}),  # paper, 7B
    "gppo": Spec(gppo, {"beta1": 1.0, "beta2": 1.0, "eps_high": 0.28}, ignores=BETAS),  # scripts
    "grpo": Spec(ppo_clip),  # arXiv 2402.03300 as CE-GPPO compares with it, see 4 above
    "ppo": Spec(ppo_clip, {"advantages": "gae"}),  # verl's
    "dapo": Spec(ppo_clip, DAPO),  # paper, arXiv 2503.14476; it penalizes the last 4,096 tokens of 20,480
    "cispo": Spec(cispo, {"eps_low": 1.0}, ignores=("dual_clip",)),  # paper: no lower bound; the upper one is verl's
    "gspo": Spec(ppo_clip, SEQ_MEAN | {"eps_low": 3e-4, "eps_high": 4e-4}, by_response=True),  # paper
    "dr_grpo": Spec(ppo_clip, ALL | {"aggregation": "seq-mean-token-sum-norm", "advantages": "group-mean"}),  # paper
    "rloo": Spec(reinforce, ALL | {"aggregation": "seq-mean-token-sum", "advantages": "leave-one-out"}, ignores=CLIPS),
    "decaying": Spec(decaying, {"beta1": 1.0, "beta2": 1.0}),  # this project's
    "dgpo": Spec(dgpo),  # paper
    "dppo": Spec(dppo, {"eps_low": 0.15, "eps_high": 0.15}),  # script in verl
    "erc": Spec(erc, DAPO),  # paper, on DAPO
    "gmpo": Spec(gmpo, SEQ_MEAN | {"eps_low": 0.4, "eps_high": 0.4}),  # paper
    "lp_only": Spec(lp_only, {"beta1": 0.75, "beta2": 1.0}),  # this project's
    "sapo": Spec(sapo, SEQ_MEAN, ignores=CLIPS),  # paper
    "high_entropy": Spec(high_entropy, DAPO, token_filter=highest_entropy),  # paper, on DAPO
    "clip_cov": Spec(clip_cov, COV | {"eps_low": 1.0, "eps_high": 1.0}, token_filter=covariance_in_bounds),  # scripts
    "kl_cov": Spec(kl_cov, COV, ignores=("eps_low", "eps_high"), token_filter=highest_covariance),  # script for 7B
}


def out_of_clip(ratio: Tensor, advantages: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    """The tokens whose gradient PPO-clip drops: NA below 1 - eps_low, PA above 1 + eps_high. Bool, [N]."""
    return (ratio < 1 - o.eps_low) & (advantages < 0), (ratio > 1 + o.eps_high) & (advantages > 0)


AGGREGATIONS = {  # the divisor of the sum over all tokens
    "token-mean": lambda totals, o: totals.tokens,
    "seq-mean-token-mean": lambda totals, o: totals.responses,  # and each token's loss is divided by its length
    "seq-mean-token-sum": lambda totals, o: totals.responses,
    "seq-mean-token-sum-norm": lambda totals, o: totals.responses * o.max_response_tokens,  # Dr. GRPO
}


def policy_loss(batch, logprobs: Tensor, entropy: Tensor | None, objective: Objective, totals: Totals | None = None):
    """The loss of one micro-batch, and the gradient weight of each token.

    batch: a Rollout with old_logprobs, advantages, and what the objective reads: entropy (the old one), token_mask,
    rollout_logprobs, reference_logprobs, correct. logprobs, entropy [N]: of the policy now.
    totals: of the mini-batch; default: of this call alone.

    Returns (loss, info). info has [N] tensors without gradient:
        log_ratio, ratio            of pi / pi_old, clamped to +-20; ratio of gspo: the response's
        weight                      g = -dloss/dlogprob, what each token really got, times totals.tokens
        unclipped_weight            what it would be if the loss were - delta A
        clipped_low, clipped_high   bool, see out_of_clip
        kl_reference                of the token, with a kl_coef
    """
    o, spec, A = objective, OBJECTIVES[objective.name], batch.advantages
    totals = totals or totals_of(batch)
    leaf = logprobs.detach().requires_grad_()  # not logprobs themselves: their gradients start FSDP's backward hooks
    with torch.enable_grad():
        log_ratio = (leaf.detach() - batch.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [N]
        ratio = (mean_of_response(log_ratio, batch) if spec.by_response else log_ratio).exp()  # [N]
        unit = (leaf - leaf.detach()).exp()  # [N]
        now = None if entropy is None else entropy.detach()
        tokens = Tokens(ratio, unit, A, leaf, batch.old_logprobs, now, batch.entropy, batch.token_mask, batch)
        token_loss = spec.token_loss(tokens, o)  # [N]
        if o.dual_clip is not None:  # arXiv 1912.09729: bounds the loss of NA, and ends its gradient, at delta > c
            token_loss = torch.where(A < 0, torch.minimum(token_loss, -o.dual_clip * A), token_loss)
        if o.rollout_correction in CAPS:
            token_loss = token_loss * correction_weights(batch, o.rollout_correction)
        info = {"log_ratio": log_ratio, "ratio": ratio}
        if o.kl_coef:  # k3 of KL(pi || pi_ref), as in GRPO, arXiv 2402.03300, eq. 4
            gap = (batch.reference_logprobs - leaf).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            kl = gap.expm1() - gap
            token_loss, info["kl_reference"] = token_loss + o.kl_coef * kl, kl.detach()
        share = shares(batch, o, totals)  # [N]
        loss = (token_loss * share).sum()  # this micro-batch's part of the mini-batch's loss
        if o.positive_nll_coef:  # the mean over the tokens of the correct responses, in every aggregation
            likelihood = leaf[batch.correct[batch.sequence]].sum() / max(1.0, totals.correct_tokens)
            loss = loss - o.positive_nll_coef * likelihood

        weight = -torch.autograd.grad(loss, leaf)[0]  # [N]  a token's loss depends on its own logprob only
        # Surrogate: the value of the loss, and by these weights its gradient, now with respect to the model's logprobs.
        loss = loss.detach() - (weight * (logprobs - logprobs.detach())).sum()
        if o.entropy_coef:
            loss = loss - o.entropy_coef * (entropy * share).sum()
        clipped_low, clipped_high = out_of_clip(ratio, A, o)
        info |= {"weight": weight * max(1.0, totals.tokens), "clipped_low": clipped_low, "clipped_high": clipped_high}
        info["unclipped_weight"] = ratio * A * share * max(1.0, totals.tokens)
        return loss, info


def shares(batch, o: Objective, totals: Totals) -> Tensor:
    """The factor of each token's loss in the loss of the mini-batch, [N]."""
    share = torch.full_like(batch.advantages, 1 / max(1.0, AGGREGATIONS[o.aggregation](totals, o)))
    return share / batch.lengths[batch.sequence] if o.aggregation == "seq-mean-token-mean" else share


def mean_of_response(values: Tensor, batch) -> Tensor:
    """Each token gets the mean over the tokens of its response: [N] -> [N]."""
    sums = values.new_zeros(len(batch.lengths)).index_add(0, batch.sequence, values)  # [B]
    return (sums / batch.lengths)[batch.sequence]


# Corrections where vLLM's probabilities are not the trainer's: r_t = pi_old / pi_vllm, and a cap c.
#   tis      min(r_t, c)                               seq-tis, seq-mask   the same of r_1 ... r_T, over a response
#   mask     1 if 1/c <= r_t <= c, 0 otherwise         geo-mask            the same of (r_1 ... r_T)^(1/T)
#   bypass   no weights: pi_old is vLLM's from the second update on, which saves a pass; ratios are less exact
# By token they are biased, with a low variance. The product is unbiased; its variance grows with length. Masked tokens
# stay in the denominator of the loss; in verl they leave it.
CAPS = {"tis": 2.0, "mask": 2.0, "seq-tis": 2.0, "seq-mask": 2.0, "geo-mask": 1.001}
CORRECTIONS = ("none", "bypass", *CAPS)


def correction_weights(batch, kind: str, cap: float | None = None) -> Tensor:
    """Factors for the losses of tokens, [N], from old_logprobs and rollout_logprobs. cap: default the one of CAPS."""
    gap = batch.old_logprobs - batch.rollout_logprobs  # [N]  log r_t
    if kind.startswith(("seq", "geo")):
        gap = mean_of_response(gap, batch)
    if kind.startswith("seq"):
        gap = gap * batch.lengths[batch.sequence]
    limit = math.log(cap or CAPS[kind])
    return gap.clamp(max=limit).exp() if kind.endswith("tis") else (gap.abs() <= limit).to(gap.dtype)
