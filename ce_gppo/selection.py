"""Which tokens of a whole mini-batch an entropy method picks, over all micro-batches and ranks.

All three look at the rollout weights' logprobs and entropy, which are known before the first micro-batch. The authors
look at the present policy's, in each GPU's micro-batch by itself; in the first update of a rollout these are the same.
"""

import torch
from torch import Tensor

from ce_gppo import dist
from ce_gppo.types import Response

ENTROPY_SHARE = 0.2  # of the tokens, arXiv 2506.01939
COV_SHARE = 2e-4  # of the tokens, at least one; arXiv 2505.22617 and its code
COV_BOUNDS = 1.0, 5.0  # of Clip-Cov, from the same code


def high_entropy(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> Tensor:
    """[N] each -> bool [N]: the fifth of the tokens with the highest entropy."""
    return old_entropy >= largest(old_entropy, ENTROPY_SHARE)


def kl_cov(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> Tensor:
    """[N] each -> bool [N]: the tokens with the highest covariance."""
    values = covariance(old_logprobs, advantages)
    return values >= largest(values, COV_SHARE)


def clip_cov(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> Tensor:
    """[N] each -> bool [N]: tokens drawn at random among those whose covariance is within COV_BOUNDS."""
    values = covariance(old_logprobs, advantages)
    inside = ((values > COV_BOUNDS[0]) & (values < COV_BOUNDS[1])).nonzero()[:, 0]
    inside = inside[values[inside].argsort()]  # an order that does not depend on the number of ranks
    shuffled = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(len(values)))]
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[shuffled[: count(values, COV_SHARE)]] = True
    return chosen


def covariance(old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Each token's part of Cov(log pi, A): [N], [N] -> [N]. Its mean drives entropy down (arXiv 2505.22617)."""
    return (old_logprobs - old_logprobs.mean()) * (advantages - advantages.mean())


def count(values: Tensor, share: float) -> int:
    return max(1, int(share * len(values)))


def largest(values: Tensor, share: float) -> Tensor:
    """The smallest of this share of the values, taken from above."""
    return values.topk(count(values, share)).values[-1]


METHODS = {"high_entropy": high_entropy, "clip_cov": clip_cov, "kl_cov": kl_cov}


def choose(responses: list[Response], objective: str) -> None:
    """Set `chosen`, [R], of responses that are this rank's share of a mini-batch, perhaps none. Collective."""
    if objective not in METHODS:
        return
    lengths = [len(r.response_ids) for r in responses]
    columns = [torch.stack([r.old_logprobs, r.entropy, r.advantages]) for r in responses]
    parts = dist.all_gather(torch.cat([torch.zeros(3, 0), *columns], 1))  # [3, n] of each rank
    chosen = METHODS[objective](*torch.cat(parts, 1)).float()  # [N]
    start = sum(part.shape[1] for part in parts[: dist.rank()])
    for response, own in zip(responses, chosen[start : start + sum(lengths)].split(lengths), strict=True):
        response.chosen = own
