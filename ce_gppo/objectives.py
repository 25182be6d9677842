"""The objectives that CE-GPPO is compared with.

Each takes a `loss.Tokens` x and a `loss.Objective` o, and returns the loss of every token, [B, T]. OBJECTIVES in
loss.py has names for them, with the settings of their papers.
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
    """REINFORCE, as RLOO has it (arXiv 2402.14740, section 2.3): - A log pi, without a ratio and a clip."""
    return -x.advantages * x.logprobs
