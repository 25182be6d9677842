"""Performance: seconds of a step's parts, tokens per second, use of the device, memory."""

import resource
import time
from contextlib import contextmanager

import torch
from torch import Tensor

from ce_gppo import parallel
from ce_gppo.batch import Rollout


class Meter:
    """Seconds spent in each part of a step: `with meter("rollout"): ...`, and `take` once per step."""

    def __init__(self, model, device: str):
        self.model, self.device = model, device
        self.matrix_rate = matrix_rate(device)
        self.seconds: dict[str, float] = {}
        self.start = self._now()

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str):
        start = self._now()
        yield
        self.seconds[f"time/{part}"] = self.seconds.get(f"time/{part}", 0.0) + self._now() - start

    def take(self, rollout: Rollout, mini_batches: list[Tensor], epochs: int) -> dict[str, float]:
        """time/* and perf/* of the step, that is since the last `take`. mini_batches: the responses of its updates.

        Speed: time/rollout, time/reward, time/old_logprobs, time/update, time/sync, time/step | s | parts of a step,
            and all of it; old_logprobs: with kl_coef the reference policy's, too |
        Speed: time/critic, time/checkpoint, time/eval | s | values and the critic's updates; the checkpoint before this
            step; the evaluation after it, which is not in time/step |
        Speed: perf/rollout_tokens_per_s | tokens/s | sampled |
        Speed: perf/update_tokens_per_s | tokens/s | prompt and response tokens trained on, without padding |
        Speed: perf/matmul_utilization | share | necessary operations of the updates (a shared prompt once, no
            recomputation) over the measured rate of a large matrix product |
        Speed: perf/peak_memory_gib | GiB | of this process; on a GPU without vLLM's |
        """
        now = self._now()
        metrics = self.seconds | {"time/step": now - self.start}
        self.seconds, self.start = {}, now
        metrics["perf/rollout_tokens_per_s"] = len(rollout.tokens) / metrics["time/rollout"]
        metrics["perf/peak_memory_gib"] = peak_memory_gib()
        if mini_batches:
            batches, seconds = [rollout[rows] for rows in mini_batches], metrics["time/update"] / epochs
            rate = self.matrix_rate * parallel.world_size()
            metrics["perf/update_tokens_per_s"] = sum(int(batch.sizes.sum()) for batch in batches) / seconds
            metrics["perf/matmul_utilization"] = sum(flops(self.model, batch) for batch in batches) / seconds / rate
        return metrics

    def take_part(self, part: str) -> dict[str, float]:
        """The seconds of a part that belongs to no step."""
        seconds = self.seconds.pop(f"time/{part}")
        self.start += seconds
        return {f"time/{part}": seconds}


def flops(model, batch: Rollout) -> float:
    """Floating-point operations of forward and backward (6 a weight and token; arXiv 2204.02311, appendix B).

    Causal attention sees half of each squared sequence length. A group's prompt goes through the blocks once, response
    tokens through the head.
    """
    config = model.config
    head, embedding = model.get_output_embeddings().weight.numel(), model.get_input_embeddings().weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - embedding - (0 if config.tie_word_embeddings else head)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    prompts = sum(len(batch.prompts[i]) for i in batch.prompt_of.unique_consecutive().tolist())
    attention = 6 * config.num_hidden_layers * width * int(batch.sizes.square().sum())
    return 6.0 * (blocks * (prompts + len(batch.tokens)) + head * len(batch.tokens)) + attention


def matrix_rate(device: str) -> float:
    """Measured floating-point operations per second of one large matrix product."""
    size, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib() -> float:
    """Peak memory of this process: resident on a CPU; allocated by torch on a GPU, without vLLM's.

    vLLM's weights, cache and graphs are in pools of their own, all of one size since the start. torch counts them also
    while vLLM sleeps and the memory is the trainer's.
    """
    if torch.cuda.is_available():
        segments = torch.cuda.memory_snapshot(include_traces=False)
        pools = sum(s["allocated_size"] for s in segments if s["segment_pool_id"] != (0, 0))
        return (torch.cuda.max_memory_allocated() - pools) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
