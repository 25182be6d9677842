"""Performance: seconds of a step's parts, tokens per second, MFU, memory."""

import resource
import time
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ce_gppo import parallel
from ce_gppo.types import Response


class Meter:
    """Seconds spent in each part of a step: `with meter("rollout"): ...`, and `take` once per step."""

    def __init__(self, model: PreTrainedModel, device: str):
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

    def take(self, groups: list[list[Response]], mini_batches: list[list[Response]]) -> dict[str, float]:
        """time/* and perf/* of the step, that is since the last `take`."""
        now = self._now()
        taken = self.seconds | {"time/step": now - self.start}
        self.seconds, self.start = {}, now
        return taken | speed(self.model, groups, mini_batches, taken, self.matrix_rate)

    def take_part(self, part: str) -> dict[str, float]:
        """The seconds of a part that belongs to no step."""
        self.start = self._now()
        return {f"time/{part}": self.seconds.pop(f"time/{part}")}


def flops(model: PreTrainedModel, prompt_and_response: int, response: int, squares: int) -> float:
    """Floating-point operations of forward and backward (6 a weight and token; arXiv 2204.02311, appendix B).

    prompt_and_response: tokens through the blocks. response: tokens through the head. squares: the sum of the squared
    sequence lengths, for causal attention, which sees half of each square.
    """
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - embedding - (0 if config.tie_word_embeddings else head)
    attention = 6 * config.num_hidden_layers * config.hidden_size * squares
    return 6.0 * (blocks * prompt_and_response + head * response) + attention


def work_of(mini_batches: list[list[Response]]) -> tuple[int, int, int, int]:
    """The work of updates on these responses: (tokens of prompts and responses, the same with each group's prompt
    counted once, tokens of responses, sum of squared lengths)."""
    responses = [response for mini_batch in mini_batches for response in mini_batch]
    pairs = [(len(r.prompt_ids), len(r.response_ids)) for r in responses]
    prompts = sum(
        len(r.prompt_ids) for i, r in enumerate(responses) if i == 0 or r.prompt_ids != responses[i - 1].prompt_ids
    )
    tokens, response_tokens = sum(map(sum, pairs)), sum(R for _, R in pairs)
    return tokens, prompts + response_tokens, response_tokens, sum((P + R) ** 2 for P, R in pairs)


def speed(
    model: PreTrainedModel, groups: list[list[Response]], mini_batches: list[list[Response]], seconds: dict, rate: float
) -> dict[str, float]:
    """perf/* of a step, from its time/* in `seconds`. rate: `matrix_rate` of one device.

    Update tokens are those of prompts and responses, without padding. mfu counts only necessary work: a shared prompt
    once, and no recomputation.
    """
    sampled_tokens = sum(len(r.response_ids) for group in groups for r in group)
    metrics = {
        "perf/rollout_tokens_per_s": sampled_tokens / seconds["time/rollout"],
        "perf/peak_memory_gib": peak_memory_gib(
            "cuda" if torch.cuda.is_available() else "cpu"
        ),  # weights may be on hosts
    }
    tokens, *needed = work_of(mini_batches)
    if tokens:
        metrics["perf/update_tokens_per_s"] = tokens / seconds["time/update"]
        metrics["perf/mfu"] = flops(model, *needed) / seconds["time/update"] / (rate * parallel.world_size())
    return metrics


def matrix_rate(device: str) -> float:
    """Measured floating-point operations per second of one large matrix product; MFU is relative to it."""
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


def peak_memory_gib(device: str) -> float:
    """Peak memory of this process: resident on a CPU; allocated by torch on a GPU, without vLLM's.

    vLLM's weights, cache and graphs are in pools of their own, all of one size since the start. torch counts them also
    while vLLM sleeps and the memory is the trainer's.
    """
    if device.startswith("cuda"):
        segments = torch.cuda.memory_snapshot(include_traces=False)
        pools = sum(s["allocated_size"] for s in segments if s["segment_pool_id"] != (0, 0))
        return (torch.cuda.max_memory_allocated() - pools) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
