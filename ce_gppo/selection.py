"""The tokens of a whole mini-batch that an objective picks, over all micro-batches and ranks."""

from collections.abc import Callable

import torch

from ce_gppo import parallel
from ce_gppo.types import Response


def choose(responses: list[Response], picks: Callable | None) -> None:
    """Set `chosen`, [R], of responses that are this rank's share of a mini-batch, perhaps none. Collective.

    picks: of the objective, see objectives.py; None: it picks no tokens.
    """
    if picks is None:
        return
    lengths = [len(r.response_ids) for r in responses]
    columns = [torch.stack([r.old_logprobs, r.entropy, r.advantages]) for r in responses]
    parts = parallel.all_gather(torch.cat([torch.zeros(3, 0), *columns], 1))  # [3, n] of each rank
    chosen = picks(*torch.cat(parts, 1)).float()  # [N]
    start = sum(part.shape[1] for part in parts[: parallel.rank()])
    for response, own in zip(responses, chosen[start : start + sum(lengths)].split(lengths), strict=True):
        response.chosen = own
