"""Several processes as one, by torchrun: who am I, and sums, gathers, agreements over all; alone, each is the identity.

Everything here but `rank`, `world` and `is_main` is collective: all ranks must come by, in the same order.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def start() -> str:
    """Join the others, if torchrun started any; returns this process's device, "cuda" being its own GPU."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world() > 1:
        # A rank may sample for long while the others wait. One that has died is torchrun's to notice, within seconds.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return "cuda" if cuda else "cpu"


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_main() -> bool:
    """The rank that logs, writes checkpoints and talks to people."""
    return rank() == 0


def gather(value) -> list:
    """Every rank's value, in the order of ranks, on every rank. Anything that can be pickled; it stays among us."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def first(function):
    """What `function` gives on rank 0, or raises there, on every rank."""
    value, error = None, None
    if is_main():
        try:
            value = function()
        except Exception as failure:
            error = failure
    value, error = gather((value, error))[0]
    if error:
        raise error
    return value


def total(*values: float) -> list[float]:
    """The sums of numbers over all ranks."""
    return [sum(column) for column in zip(*gather(values), strict=True)]


def any_of(flag: bool) -> bool:
    """Whether it is so on any rank; for decisions that all must take alike."""
    return any(gather(flag))
