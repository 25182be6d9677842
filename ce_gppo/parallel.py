"""Several processes: torchrun, collectives, DDP, FSDP2, sharing work. Every rank must call what is "Collective"."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from ce_gppo.messages import UserError, say

THREADS = torch.get_num_threads()  # before vLLM changes it
PINNED_CACHED_MIB = 32  # larger pinned tensors are neither rounded up nor kept: the weights and gradients of offload


def check_environment() -> None:
    """UserError where torchrun's variables are not as it sets them: the script of a job may have changed them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        if not re.fullmatch("[0-9]{1,5}", text := os.environ.get(name, "missing")) or int(text) > 65535:
            raise UserError(f"{name}={text} in the environment: torchrun sets a whole number, at most 65535")
    if not re.fullmatch(r"[\w.:%-]+", address := os.environ.get("MASTER_ADDR", "")):
        raise UserError(f"MASTER_ADDR={address} in the environment: torchrun sets a machine's name or address")
    if (rank := int(os.environ["RANK"])) >= (size := world_size()):
        raise UserError(f"RANK={rank} and WORLD_SIZE={size} in the environment: ranks go from 0 to WORLD_SIZE - 1")


def init() -> str:
    """Join the other processes that torchrun started, if any. Returns the device: "cuda" is this process's own GPU."""
    if cuda := torch.cuda.is_available():
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"more processes are started here than the {gpus} GPUs; say make train GPUS={gpus}")
        torch.cuda.set_device(local_rank)
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        say(f"WORLD_SIZE={size} in the environment counts only with torchrun; this is one process", warning=True)
    if world_size() > 1:
        # A long timeout: a rank may sample for long while others wait. torchrun detects a dead rank within seconds.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return "cuda" if cuda else "cpu"


def rank() -> int:
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_main() -> bool:
    """True on rank 0, which logs, writes checkpoints and prints messages."""
    return rank() == 0


def all_gather(value) -> list:
    """Every rank's value, in the order of ranks. Collective. Values are pickled between these processes.

    Tensors must be on the CPU: others would arrive on the sender's GPU everywhere.
    """
    leaves = tree_leaves(value)
    for leaf in leaves:  # the list grows
        leaves += tree_leaves(vars(leaf)) if dataclasses.is_dataclass(leaf) else []
    if any(isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu" for leaf in leaves):
        raise ValueError("all_gather: a tensor is not on the CPU")
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def rank0_then_broadcast(function: Callable):
    """Calls `function` on rank 0; every rank returns its result, or raises its error. Collective."""
    value = error = None
    try:
        value = function() if is_main() else None
    except Exception as failure:
        error = failure
    value, error = all_gather((value, error))[0]
    if error:
        raise error
    return value


def all_sum(*values: float) -> list[float]:
    """The sums of numbers over all ranks. Collective."""
    return [sum(column) for column in zip(*all_gather(values), strict=True)]


def any_rank(flag: bool) -> bool:
    """Whether the flag is true on any rank, for decisions that must be the same on all ranks. Collective."""
    return any(all_gather(flag))


def round_robin(count: int, ranks_per_engine: int = 1) -> list[int]:
    """Indices of the prompts, of `count`, that this rank's engine samples. Ranks that share an engine get the same."""
    return list(range(rank() // ranks_per_engine, count, world_size() // ranks_per_engine))


def leads(ranks_per_engine: int) -> bool:
    """Whether this rank is the first of those that share its engine, and so have the same responses: it judges."""
    return rank() % ranks_per_engine == 0


def deal(groups: list[int], sizes: list[int], lengths: list[int], ranks: int) -> list[int]:
    """The rank of each response, for nearly even loads: the longest first, to the rank with the fewest tokens.

    Of the ranks that have its group's prompt already, as long as one has room. sizes: of prompt and response together.
    """
    prompts = {group: size - length for group, size, length in zip(groups, sizes, lengths, strict=True)}
    room = (sum(lengths) + sum(prompts.values())) / ranks  # tokens of an even load
    owners, loads, has = [0] * len(lengths), [0] * ranks, {group: set() for group in prompts}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        having = [rank for rank in has[groups[i]] if loads[rank] + lengths[i] <= room]
        owners[i] = rank = min(having or range(ranks), key=loads.__getitem__)
        loads[rank] += lengths[i] if rank in has[groups[i]] else sizes[i]
        has[groups[i]].add(rank)
    return owners


def distribute(policy: torch.nn.Module, shard: str, layer_classes: list[str]) -> torch.nn.Module:
    """The policy over all ranks, gradients averaged: copied (DDP), or sharded layer by layer (FSDP2). Collective.

    shard: no, yes or offload, where shards, gradients and optimizer stay in the host's memory, also with one process.
    layer_classes: those that FSDP2 gathers one at a time; embedding, last norm and head stay whole until backward.
    Every rank must then make the same number of forward and backward passes.
    """
    if world_size() == 1 and shard != "offload":
        return policy
    if shard == "no":
        return DistributedDataParallel(policy, forward_sync_buffers=False, gradient_as_bucket_view=True)
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():  # FSDP2 needs a group, even with one process
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    options = {"mesh": init_device_mesh("cuda" if cuda else "cpu", (world_size(),))}
    options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16 if cuda else None, torch.float32)
    if shard == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
        pin_exactly()
    for module in policy.modules():
        if type(module).__name__ in layer_classes:
            fully_shard(module, **options)
    return fully_shard(policy, **options)


def pin_exactly() -> None:
    """Pinned tensors of more than PINNED_CACHED_MIB get just their size, and give it back when they are freed.

    torch rounds others up to a power of two, 51 GiB more for 7B, and keeps them. pinned_max_round_threshold_mb alone
    would be wrong: torch may then reuse a kept block for a larger tensor.
    """
    setting, others = f"pinned_max_cached_size_mb:{PINNED_CACHED_MIB}", torch._C._accelerator_getAllocatorSettings()
    if torch.cuda.is_available() and setting not in others:  # the user's are kept
        torch._C._accelerator_setAllocatorSettings(f"{others},{setting}".strip(","))


def zero_gradients(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clear the last update's gradients. DDP's are views of its buckets, and new ones would need memory again."""
    optimizer.zero_grad(set_to_none=not isinstance(policy, DistributedDataParallel))


def no_sync(policy: torch.nn.Module):
    """A context for all backward passes of an update but the last: DDP then sums over ranks once. FSDP2 always sums."""
    return policy.no_sync() if isinstance(policy, DistributedDataParallel) else contextlib.nullcontext()


def clip_gradients(policy: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients down to max_norm. Returns their norm before that, over all shards. Collective."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)).item()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered over all ranks if it is sharded, which is collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or this rank's part of it if it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: torch.nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(policy: torch.nn.Module) -> None:
    """Free what FSDP2 keeps whole after a forward pass until a backward pass: of one that will have none."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


@contextlib.contextmanager
def host_threads():
    """A context, or decorator, with all of torch's threads, for work on the host such as an offloaded optimizer's.

    On a GPU vLLM sets its process to one thread, which its compiled code relies on, so the number is restored. All
    passes of the trainer have this context: torch.compile makes another variant for another number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS if torch.cuda.is_available() else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
