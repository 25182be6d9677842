"""Performance: seconds of a step's parts, tokens per second, use of the device, memory."""

import math
import resource
import time
import timeit
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from ce_gppo import parallel
from ce_gppo.batch import Rollout
from ce_gppo.messages import UserError


class Meter:
    """Seconds spent in each part of a step: `with meter("rollout"): ...`, and `take` once per step."""

    def __init__(self, model, device: str, doing: Callable[[str], None] = lambda part: None):
        """doing: is called with the name of a part when it begins."""
        self.model, self.device, self.doing = model, device, doing
        self.matrix_rate, self.start = matrix_rate(device), now(device)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str):
        self.doing(part)
        start = now(self.device)
        yield
        self.seconds[f"time/{part}"] = self.seconds.get(f"time/{part}", 0.0) + now(self.device) - start

    def take(self, rollout: Rollout, mini_batches: list[Tensor], epochs: int) -> dict[str, float]:
        """time/* and perf/* of the step, that is since the last `take`. mini_batches: that were trained on.

        Speed: time/rollout, time/reward, time/old_logprobs, time/critic, time/update, time/sync | s | parts of a step |
        Speed: time/step, time/checkpoint, time/eval | s | a step, with the checkpoint before it, without evaluation |
        Speed: perf/rollout_tokens_per_s, perf/update_tokens_per_s | tokens/s | sampled; trained on, prompts included |
        Speed: perf/matmul_utilization | share | operations that the updates need, over the device's measured rate |
        Speed: perf/peak_memory_gib | GiB | of this process; on a GPU without vLLM's |
        """
        metrics = self.seconds | {"time/step": now(self.device) - self.start}
        self.seconds, self.start = {}, self.start + metrics["time/step"]
        metrics["perf/rollout_tokens_per_s"] = len(rollout.tokens) / metrics["time/rollout"]
        metrics["perf/peak_memory_gib"] = peak_memory_gib()
        if mini_batches:
            batches, seconds = [rollout[rows] for rows in mini_batches], metrics["time/update"] / epochs
            metrics["perf/update_tokens_per_s"] = sum(int(batch.sizes.sum()) for batch in batches) / seconds
            rate = sum(flops(self.model, batch) for batch in batches) / seconds
            metrics["perf/matmul_utilization"] = rate / self.matrix_rate / parallel.world_size()
        return metrics

    def take_part(self, part: str) -> dict[str, float]:
        """The seconds of a part that belongs to no step."""
        self.start += (seconds := self.seconds.pop(f"time/{part}"))
        return {f"time/{part}": seconds}


def now(device: str) -> float:
    """Seconds, when the device has done all that it was asked to."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def flops(model, batch: Rollout) -> float:
    """Operations of forward and backward: 6 a weight and token (arXiv 2204.02311, appendix B); a prompt counts once.

    A frozen weight has 4: it gets no gradient.
    """
    c, N = model.config, len(batch.tokens)
    weights = model.get_output_embeddings().weight, model.get_input_embeddings().weight, *model.parameters()
    head, embedding, *every = ((6.0 if p.requires_grad else 4.0) * p.numel() for p in weights)
    blocks = sum(every) - embedding - (0 if c.tie_word_embeddings else head)
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    prompts = sum(len(batch.prompts[i]) for i in batch.prompt_of.unique_consecutive().tolist())
    attention = c.num_hidden_layers * width * int(batch.sizes.square().sum())
    return blocks * (prompts + N) + head * N + 6.0 * attention


def matrix_rate(device: str) -> float:
    """Floating-point operations per second of one large matrix product, the best of five."""
    size, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(timeit.repeat(lambda: (a @ a, now(device)), repeat=5, number=1))


def check_memory(config, model, device: str) -> None:
    """UserError if vLLM's share of the GPU leaves too little for what the policy keeps after its first update.

    Weights and two moments, 12 bytes a parameter, and DDP's gradients; a frozen one has 2 bytes. 3 GiB are for CUDA and
    vLLM's sleep.
    """
    if device != "cuda":
        return
    total, ranks = torch.cuda.get_device_properties(device).total_memory / 2**30, parallel.world_size()
    of_shard = {"no": 16 if ranks > 1 else 12, "yes": 12 / ranks, "offload": 0}[config.shard]
    of_frozen = {"no": 2, "yes": 2 / ranks, "offload": 0}[config.shard]
    kept = sum((of_shard if p.requires_grad else of_frozen) * p.numel() for p in model.parameters()) / 2**30
    if config.advantages == "gae":  # the critic, which has no adapters
        kept += of_shard * sum(p.numel() for p in model.parameters()) / 2**30
    if config.gpu_memory_utilization > (most := math.floor((total - kept - 3) / total * 100) / 100):
        share = f"gpu_memory_utilization = {config.gpu_memory_utilization:g}"
        least = f"at most {most:g} leaves room" if most > 0 else "--shard offload keeps that in the host's memory"
        raise UserError(f"{share}: of {total:.0f} GiB the policy keeps {kept:.0f} while vLLM samples; {least}")


def peak_memory_gib() -> float:
    """Peak memory of this process; on a GPU torch's, without vLLM's pools, which torch counts also in vLLM's sleep."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    segments = torch.cuda.memory_snapshot(include_traces=False)
    pools = sum(s["allocated_size"] for s in segments if s["segment_pool_id"] != (0, 0))
    return (torch.cuda.max_memory_allocated() - pools) / 2**30
