"""The objectives that CE-GPPO is compared with.

Each takes a `loss.Tokens` x and a `loss.Objective` o, and returns the loss of every token, [B, T]. OBJECTIVES in
loss.py has names for them, with the settings of their papers.
The last four are entropy methods. For three of them selection.py picks tokens over the whole mini-batch.
"""

import torch
from torch import Tensor


def ppo_clip(x, o) -> Tensor:
    """PPO-clip, arXiv 1707.06347, eq. 7: max(-delta A, -clip(delta) A).

    It is the objective of GRPO (arXiv 2402.03300), of DAPO (arXiv 2503.14476: a larger eps_high), and of GSPO
    (arXiv 2507.18071), whose delta is the geometric mean of a response's ratios, the same for all its tokens.
    """
    delta = x.ratio * x.unit
    return torch.maximum(-delta * x.advantages, -delta.clamp(1 - o.eps_low, 1 + o.eps_high) * x.advantages)


def cispo(x, o) -> Tensor:
    """CISPO, arXiv 2506.13585: - sg(clip(delta)) A log pi. No token loses its gradient.

    Its bounds on delta differ by source: [0, 1.2] here, as there is no lower one in the paper; [0.8, 1.2] in the paper
    of CE-GPPO, where it collapses; [0, 5] in ScaleRL (arXiv 2510.13786), which is eps_high = 4.
    """
    return -x.ratio.clamp(1 - o.eps_low, 1 + o.eps_high) * x.advantages * x.logprobs


def reinforce(x, o) -> Tensor:
    """REINFORCE, as RLOO has it (arXiv 2402.14740): - A log pi, without a ratio and a clip.

    From the second update of a rollout on the samples are another policy's, and nothing corrects for it.
    """
    return -x.advantages * x.logprobs


def high_entropy(x, o) -> Tensor:
    """PPO-clip for the fifth of the tokens with the highest entropy only, arXiv 2506.01939:

    l = PPO-clip's if H >= tau, 0 otherwise. The others stay in the denominator. The paper adds it to DAPO.
    """
    return ppo_clip(x, o) * x.chosen


def clip_cov(x, o) -> Tensor:
    """Clip-Cov, arXiv 2505.22617: PPO-clip, and 0 for a few tokens of high covariance between log pi and A."""
    return ppo_clip(x, o) * (1 - x.chosen)


def kl_cov(x, o) -> Tensor:
    """KL-Cov, arXiv 2505.22617: - delta A, and + |log delta| for the tokens of the highest covariance.

    There is no clip. The distance is the one of the authors' code, with its coefficient of 1.
    """
    return -x.ratio * x.unit * x.advantages + (x.logprobs - x.old_logprobs).abs() * x.chosen


def sapo(x, o) -> Tensor:
    """SAPO, arXiv 2511.20347: - 4 / tau sigmoid(tau (delta - 1)) A, tau = 1 for A > 0 and 1.05 otherwise.

    In place of a clip the gradient fades as delta moves away from 1, where it is the policy gradient.
    """
    tau = torch.full_like(x.ratio, 1.05).masked_fill(x.advantages > 0, 1.0)
    return -4 / tau * (tau * (x.ratio * x.unit - 1)).sigmoid() * x.advantages
