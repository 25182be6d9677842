"""What the program knows about an objective, and the objectives that CE-GPPO is compared with.

Each of these takes a `loss.Tokens` x and a `loss.Objective` o, and returns the loss of every token, [B, T]. To add one,
write its function here, and add its `Spec` to OBJECTIVES in loss.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Values of train.py's settings, where one is left at None and the objective's paper has no other.
USUAL = {"eps_low": 0.2, "eps_high": 0.2, "beta1": None, "beta2": None, "aggregation": "token-mean"}
USUAL |= {"advantages": "group", "filter_groups": "on", "overlong": "score"}
BETAS, CLIPS = ("beta1", "beta2", "beta_schedule"), ("dual_clip", "eps_low", "eps_high")


@dataclass(frozen=True)
class Spec:
    """All that the program knows about an objective: an entry of OBJECTIVES in loss.py."""

    token_loss: Callable  # (Tokens, Objective) -> [B, T], to be differentiated by logprobs
    published: dict = field(default_factory=dict)  # its paper's settings that are not USUAL, see `values`
    ignores: tuple[str, ...] = ()  # settings that it does not read; BETAS, too, where published has no beta1
    picks: Callable | None = None  # of the whole mini-batch the tokens whose x.chosen is 1; see the entropy methods
    by_response: bool = False  # delta is the geometric mean of a response's ratios, the same for all its tokens

    @property
    def has_betas(self) -> bool:
        """Whether its betas can be set."""
        return "beta1" in self.published and "beta1" not in self.ignores

    def values(self, config) -> dict:
        """What settings left at None are. A published value may be a function of the configuration."""
        values = USUAL | self.published
        return {name: value(config) if callable(value) else value for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Policy gradients, with a clip or without


def ppo_clip(x, o) -> Tensor:
    """PPO-clip, arXiv 1707.06347, eq. 7: max(-delta A, -clip(delta) A).

    It is the objective of GRPO (arXiv 2402.03300), of DAPO (arXiv 2503.14476: a larger eps_high), and of GSPO
    (arXiv 2507.18071), whose delta is the geometric mean of a response's ratios.
    """
    delta = x.ratio * x.unit
    return torch.maximum(-delta * x.advantages, -delta.clamp(1 - o.eps_low, 1 + o.eps_high) * x.advantages)


def last_fifth(config) -> str:
    """`overlong` of DAPO, arXiv 2503.14476: the last 4,096 tokens of 20,480."""
    return str(max(1, config.max_response_tokens // 5))


def cispo(x, o) -> Tensor:
    """CISPO, arXiv 2506.13585: - sg(clip(delta)) A log pi. No token loses its gradient.

    Its bounds on delta differ by source. The paper has no lower one, and does not say its upper one: here they are
    [0, 1.2], as in verl's example; [0.8, 1.2] in the paper of CE-GPPO, where it collapses; [0, 5] in ScaleRL (arXiv
    2510.13786), which is eps_high = 4, and where upper bounds of 4 and 8 did no worse.
    """
    return -x.ratio.clamp(1 - o.eps_low, 1 + o.eps_high) * x.advantages * x.logprobs


def reinforce(x, o) -> Tensor:
    """REINFORCE, as in RLOO (arXiv 2402.14740): - A log pi, without ratio or clip.

    From the second update of a rollout on, the samples are those of an older policy, and nothing corrects for that.
    """
    return -x.advantages * x.logprobs


def sapo(x, o) -> Tensor:
    """SAPO, arXiv 2511.20347: - 4 / tau sigmoid(tau (delta - 1)) A, tau = 1 for A > 0 and 1.05 otherwise.

    In place of a clip the gradient fades as delta moves away from 1, where it is the policy gradient.
    """
    tau = torch.full_like(x.ratio, 1.05).masked_fill(x.advantages > 0, 1.0)
    return -4 / tau * (tau * (x.ratio * x.unit - 1)).sigmoid() * x.advantages


# ----------------------------------------------------------------------------------------------------------------------
# Entropy methods, each with the tokens that it picks of a whole mini-batch, over all micro-batches and ranks: from
# old_logprobs, old_entropy and advantages, [N] each, which are known before the first micro-batch, to a bool [N].
#
# The authors look at the present policy's logprobs and entropy, in each GPU's micro-batch by itself. Their Clip-Cov
# does not pick tokens that PPO-clip drops. In the first update of a rollout these are the same.

ENTROPY_SHARE = 0.2  # of the tokens, arXiv 2506.01939
# Of the tokens, at least one; as in the code of arXiv 2505.22617, github.com/PRIME-RL/Entropy-Mechanism-of-RL. KL-Cov's
# is its k_percent = 0.2; verl's default is a tenth of that.
CLIP_COV_SHARE, KL_COV_SHARE = 2e-4, 2e-3
COV_BOUNDS = 1.0, 5.0  # of Clip-Cov, from the same code


def high_entropy(x, o) -> Tensor:
    """PPO-clip for the fifth of the tokens with the highest entropy only, arXiv 2506.01939:

    l = PPO-clip's if H >= tau, 0 otherwise. The others stay in the denominator. The paper adds it to DAPO.
    """
    return ppo_clip(x, o) * x.chosen


def highest_entropy(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> Tensor:
    """The fifth of the tokens with the highest entropy."""
    return old_entropy >= largest(old_entropy, ENTROPY_SHARE)


def clip_cov(x, o) -> Tensor:
    """Clip-Cov, arXiv 2505.22617: PPO-clip, and 0 for a few tokens of high covariance between log pi and A.

    The paper has no clip beside that. Its code has one, and its scripts a wide interval, [0, 2].
    """
    return ppo_clip(x, o) * (1 - x.chosen)


def covariance_in_bounds(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> Tensor:
    """Tokens drawn at random among those whose covariance is within COV_BOUNDS."""
    values = covariance(old_logprobs, advantages)
    inside = ((values > COV_BOUNDS[0]) & (values < COV_BOUNDS[1])).nonzero()[:, 0]
    inside = inside[values[inside].argsort()]  # an order that does not depend on the number of ranks
    shuffled = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(len(values)))]
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[shuffled[: count(values, CLIP_COV_SHARE)]] = True
    return chosen


def kl_cov(x, o) -> Tensor:
    """KL-Cov, arXiv 2505.22617: - delta A, and + |log delta| for the tokens of the highest covariance.

    There is no clip. The distance |log delta| and its coefficient of 1 are those of the authors' code.
    """
    return -x.ratio * x.unit * x.advantages + (x.logprobs - x.old_logprobs).abs() * x.chosen


def highest_covariance(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> Tensor:
    """The tokens with the highest covariance."""
    values = covariance(old_logprobs, advantages)
    return values >= largest(values, KL_COV_SHARE)


def covariance(old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Each token's part of Cov(log pi, A): [N], [N] -> [N]. Its mean drives entropy down (arXiv 2505.22617)."""
    return (old_logprobs - old_logprobs.mean()) * (advantages - advantages.mean())


def count(values: Tensor, share: float) -> int:
    return max(1, int(share * len(values)))


def largest(values: Tensor, share: float) -> Tensor:
    """The smallest of this share of the values, taken from above."""
    return values.topk(count(values, share)).values[-1]
