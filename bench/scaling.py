"""Memory of a GPU and time of a step, estimated: which model fits on how many GPUs, and with which settings.

    .venv/bin/python -m bench.scaling                      the table of docs/scaling.md
    .venv/bin/python -m bench.scaling --recipes            memory, utilization and hours of recipes/, on GPUs of 80 GiB
    .venv/bin/python -m bench.scaling --gpu-memory 80 --mean-length 4000

Run it from the repository root. It counts the bytes and the floating-point operations of the code, and divides them by
rates: measured with torch on one H200, from datasheets, or guesses, as marked. The settings are those of
recipes/r1-distill-1.5b.toml. The result was never compared with a run on a GPU: trust only its order of magnitude.
"""

import functools
import heapq
import inspect
import itertools
import json
import math
from dataclasses import dataclass

import torch

import train
from ce_gppo import parallel
from ce_gppo import ranges as t
from ce_gppo.config import RECIPES, command, parse
from ce_gppo.policy import TILE_LOGITS
from rollout import Engine

# Rates of one GPU.
MATRIX_RATE = 788e12  # FLOP/s, bfloat16, 8192^3 on random data; measured
MEMORY_RATE = {141: 4.3e12, 80: 3.0e12}  # bytes/s, by GiB. H200: measured; H100: the same share of its datasheet
NODE_RATE = 350e9  # bytes/s per GPU within a node; guess from NVLink's 450e9 by datasheet
NETWORK_RATE = 40e9  # bytes/s per GPU between nodes; guess from 400 Gbit/s InfiniBand's 50e9 by datasheet
HOST_RATE = 25e9  # bytes/s between a GPU and its host; guess from PCIe 5's 64e9 by datasheet
HOST_MEMORY_RATE = 100e9  # bytes/s of a host's memory, for one GPU's share; guess
PAGEABLE_RATE = 4e9  # bytes/s of a copy to memory that is not pinned, as a checkpoint makes; guess
MFU = 0.3  # of an update as bench.gpu and perf/matmul_utilization count it, without recomputation; guess
DECODE_SHARE = 0.6  # of MEMORY_RATE, in vLLM's decoding; guess
DECODE_FLOOR = 0.005  # s of a decode step, at least: the scheduler and the launch of kernels; guess
WAKE_SECONDS = 2.0  # of vLLM's sleep and wake in a step; guess
ASLEEP = 3.0  # GiB that a sleeping vLLM and CUDA's context keep; guess
GPUS_A_NODE = 8

RECIPE = parse(train.Config, ["--recipe", "r1-distill-1.5b"])[0]
RUNNING = inspect.signature(Engine.__init__).parameters["max_sequences"].default  # sequences at a time in one engine
EVALUATED = 60  # problems, AIME24 and AIME25

SHAPES = {  # layers, hidden, intermediate, heads, key heads, vocabulary; none ties its embedding to its head
    "1.5B": (28, 1536, 8960, 12, 2, 151936),
    "7B": (28, 3584, 18944, 28, 4, 152064),
    "32B": (64, 5120, 27648, 40, 8, 152064),
}


@dataclass
class Config:
    recipes: bool = False  # the recipes instead of the table by size
    gpu_memory: t.Positive = 141.0  # GiB of one GPU: 141 or 80
    prompts: t.Count = RECIPE.prompts_per_step  # per step
    responses_per_prompt: t.Count = RECIPE.responses_per_prompt
    kept_prompts: t.Count = RECIPE.max_kept_prompts  # groups trained on
    mini_batch_prompts: t.Count = RECIPE.mini_batch_prompts  # groups per update
    prompt_tokens: t.Count = 200  # on average; a guess
    mean_length: t.Count = 6000  # tokens of a response on average; a guess
    max_length: t.Count = RECIPE.max_response_tokens  # tokens of the longest response
    micro_batch_tokens: t.Count = RECIPE.max_micro_batch_tokens
    checkpoint_every: t.Count = RECIPE.checkpoint_every
    gpus: tuple[t.Count, ...] = (1, 8, 64, 1024)

    @property
    def memory_rate(self) -> float:
        """Bytes/s of the known GPU that is nearest in size."""
        return MEMORY_RATE[min(MEMORY_RATE, key=lambda gib: abs(gib - self.gpu_memory))]


def matrices(name: str) -> list[int]:
    """Numbers of parameters of each matrix; embedding and head are the last. Norms and biases, below 0.1 %, are out."""
    layers, hidden, intermediate, heads, key_heads, vocabulary = SHAPES[name]
    keys = hidden * hidden * key_heads // heads
    layer = [hidden * hidden, keys, keys, hidden * hidden, *[hidden * intermediate] * 3]
    return layers * layer + [hidden * vocabulary] * 2


def parameters(name: str) -> tuple[int, int, int]:
    """Numbers of parameters: (all, in the layers, in the head)."""
    *in_layers, embedding, head = matrices(name)
    return sum(in_layers) + embedding + head, sum(in_layers), head


def host_memory(name: str, limit_mib: float = parallel.PINNED_CACHED_MIB) -> dict[str, float]:
    """GiB of the host's memory with `offload` on one GPU: in an update, and of the copy that a checkpoint needs.

    Weights and gradients are pinned, and the two moments are not. torch rounds the bytes of a pinned tensor up to a
    power of two, unless they are more than limit_mib (parallel.pin_exactly).
    """
    exact = [4 * numbers for numbers in matrices(name)]
    pinned = [size if size > limit_mib * 2**20 else 2 ** (size - 1).bit_length() for size in exact]
    return {"update": (2 * sum(pinned) + 2 * sum(exact)) / 2**30, "checkpoint": 3 * sum(exact) / 2**30}


def memory(name: str, gpus: int, shard: str, tensor_parallel: int, config: Config) -> dict[str, float]:
    """GiB per GPU of the policy in an update; of the policy and vLLM's weights in a rollout; and what share of the GPU
    is left to vLLM then, in steps of 0.05 (gpu_memory_utilization)."""
    layers, hidden, intermediate, *_ = SHAPES[name]
    total, in_layers, head = parameters(name)
    tokens = max(config.micro_batch_tokens, config.prompt_tokens + config.max_length)
    parts = gpus if shard != "no" else 1
    states = 0.0 if shard == "offload" else total / parts  # each is 4 bytes of a weight, its gradient, two moments
    # bfloat16 copies: of all weights under autocast; with shards only of two layers, embedding, head, and gradients.
    copies = 2 * total if shard == "no" else 4 * (2 * in_layers / layers + total - in_layers)
    # Gradient checkpointing keeps each layer's input (float32), and everything of one layer (mostly bfloat16).
    activations = tokens * (layers * hidden * 4 + 30 * hidden + 10 * intermediate)
    head_work = 4 * 4 * TILE_LOGITS["cuda"] + 4 * tokens * hidden * 2 + 4 * head
    update = (16 * states + copies + activations + head_work) / 2**30
    # Gradients are freed before the rollout, except DDP's, which are its buckets.
    policy = (16 if gpus > 1 and shard == "no" else 12) * states / 2**30
    utilization = math.floor(min(0.9, (config.gpu_memory - policy - ASLEEP) / config.gpu_memory) * 20) / 20
    engine = 2 * total / tensor_parallel / 2**30
    return {"update": update, "rollout": policy, "engine": engine, "utilization": utilization}


@functools.cache
def sample_lengths(count: int, mean: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of responses: log-normal, with a long tail that is cut at the limit."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))  # [count]
    return ((0.8 * normal - 0.32).exp() * mean).clamp(1, longest).long().tolist()  # 0.32: half of 0.8 squared


@functools.cache
def largest_share(ranks: int, responses: int, mean: int, longest: int) -> float:
    """Of a mini-batch's tokens, those of the rank that has the most, which all others wait for: the mean of 50."""
    found = []
    for seed in range(50):
        lengths, loads = sample_lengths(responses, mean, longest, seed), [0] * ranks
        for length, owner in zip(lengths, parallel.deal(list(range(responses)), lengths, lengths, ranks), strict=True):
            loads[owner] += length
        found.append(max(loads) / sum(lengths))
    return sum(found) / len(found)


def decode_seconds(lengths: list[int], prompt: int, running: int, weights: float, cache: float, rate: float) -> float:
    """Of one engine. A decode step reads `weights` bytes, and `cache` bytes for each token of each running sequence.

    From one end of a sequence to the next, the sequences that run are the same ones; when one ends, the next begins.
    """
    waiting, ends, step, seconds = list(lengths)[::-1], [], 0, 0.0
    context = 0  # tokens of all running sequences
    while waiting or ends:
        while waiting and len(ends) < running:
            length = waiting.pop()
            heapq.heappush(ends, (step + length, length))
            context += prompt
        steps = ends[0][0] - step
        read = weights + cache * (context + len(ends) * (steps + 1) / 2)  # on average over these steps
        seconds += steps * max(DECODE_FLOOR, read / rate)
        step, context = step + steps, context + len(ends) * steps
        while ends and ends[0][0] == step:
            context -= prompt + heapq.heappop(ends)[1]
    return seconds


def rollout_seconds(name: str, gpus: int, shard: str, tensor_parallel: int, responses: int, config: Config) -> float:
    layers, hidden, _, heads, key_heads, _ = SHAPES[name]
    need = memory(name, gpus, shard, tensor_parallel, config)
    room = need["utilization"] * config.gpu_memory - need["engine"] - 2  # 2 GiB for vLLM's activations and graphs
    cache_of_token = 2 * layers * key_heads * (hidden // heads) * 2
    lengths = sample_lengths(math.ceil(responses / (gpus // tensor_parallel)), config.mean_length, config.max_length)
    lengths = [config.max_length, *lengths[1:]]  # at least one response of the step runs to the limit
    context = config.prompt_tokens + sum(n * n for n in lengths) / sum(lengths) / 2  # of a running sequence, on average
    running = max(1, min(RUNNING, int(room * tensor_parallel * 2**30 / (cache_of_token * context))))
    rate, weights = tensor_parallel * config.memory_rate * DECODE_SHARE, 2 * parameters(name)[0]
    return decode_seconds(lengths, config.prompt_tokens, running, weights, cache_of_token, rate)


def flops(name: str, prompt: int, lengths: list[int]) -> float:
    """Of forward and backward, without recomputation, as perf.flops counts them where each prompt has one response."""
    layers, hidden, *_ = SHAPES[name]
    _, in_layers, head = parameters(name)
    squares = sum((prompt + length) ** 2 for length in lengths)
    tokens = sum(lengths)
    return 6.0 * (in_layers * (prompt * len(lengths) + tokens) + head * tokens + layers * hidden * squares)


def passes(config: Config) -> tuple[float, float]:
    """The step's responses that the old-logprobs pass computes, and those that are updated on."""
    trained = config.kept_prompts * config.responses_per_prompt
    dropped = config.prompts * config.responses_per_prompt - trained
    return trained - config.mini_batch_prompts * config.responses_per_prompt + dropped / train.MEASURED, trained


def seconds(name: str, gpus: int, shard: str, tensor_parallel: int, config: Config) -> dict[str, float]:
    """Seconds of a step, by part."""
    total, *_ = parameters(name)
    old, trained = passes(config)
    updates, mini_batch = config.kept_prompts / config.mini_batch_prompts, trained * config.mini_batch_prompts
    mini_batch = int(mini_batch / config.kept_prompts)
    responses = config.prompts * config.responses_per_prompt

    # An update recomputes the forward pass, which the old-logprobs pass does not. A rank waits for the one with the
    # largest share; GPUs beyond the number of responses in a mini-batch are idle.
    lengths = sample_lengths(responses, config.mean_length, config.max_length)
    share = largest_share(gpus, mini_batch, config.mean_length, config.max_length)
    update = flops(name, config.prompt_tokens, lengths) / responses * trained * share / (MATRIX_RATE * MFU)

    # DDP moves gradients once per update; FSDP weights twice and gradients once per micro-batch.
    link = NODE_RATE if gpus <= GPUS_A_NODE else NETWORK_RATE
    tokens = mini_batch / min(gpus, mini_batch) * (config.prompt_tokens + config.mean_length)
    micro_batches = math.ceil(tokens / config.micro_batch_tokens)
    moved = (2 * 2 + 4) * total * micro_batches if shard != "no" else 2 * 4 * total
    moving = 0.0 if gpus == 1 else updates * moved / link
    if shard == "offload":  # the same to and from the host, of this GPU's shard; gradients add up and AdamW runs there
        there = (12 * micro_batches + 28) / HOST_MEMORY_RATE
        moving += updates * total / gpus * ((2 * 4 + 4) * micro_batches / HOST_RATE + there)
    moving += 4 * total / {"no": 2 * config.memory_rate, "yes": link, "offload": HOST_RATE}[shard]  # to vLLM
    return {
        "rollout": rollout_seconds(name, gpus, shard, tensor_parallel, responses, config),
        "old_logprobs": update / 4 * old / trained,  # a forward pass of four, with the recomputation
        "update": update,
        "moving": moving + WAKE_SECONDS + 12 * total / PAGEABLE_RATE / config.checkpoint_every,
    }


def plan(name: str, gpus: int, config: Config, shards: tuple[str, ...] = ("no", "yes")) -> dict:
    """The simplest settings that fit: copies rather than shards, and engines on as few GPUs as possible.

    If none fit, the last of them, without `seconds`.
    """
    for shard, tensor_parallel in itertools.product(shards, (1, 2, 4, 8)):
        if (shard == "yes" and gpus == 1) or tensor_parallel > gpus:
            continue
        need = memory(name, gpus, shard, tensor_parallel, config)
        row = {"model": name, "gpus": gpus, "shard": shard, "rollout_tp": tensor_parallel, "memory_gib": need}
        room = need["utilization"] * config.gpu_memory - need["engine"]
        # The cache should have a quarter of the GPU.
        if need["update"] + ASLEEP < 0.95 * config.gpu_memory and room > 0.25 * config.gpu_memory:
            time = seconds(name, gpus, shard, tensor_parallel, config)
            return row | {"seconds": time | {"step": sum(time.values())}}
    return row | {"seconds": None}


def recipe_rows() -> list[dict]:
    """Each recipe on 1 GPU of 80 GiB, where it fits, and on 8. A response in evaluations has 10,000 tokens; a guess."""
    rows = []
    for path in sorted(RECIPES.glob("*.toml")):
        recipe = parse(train.Config, ["--recipe", path.stem])[0]
        limits = {"max_length": recipe.max_response_tokens, "micro_batch_tokens": recipe.max_micro_batch_tokens}
        config = Config(gpu_memory=80.0, checkpoint_every=recipe.checkpoint_every, **limits)
        held_out = Config(gpu_memory=80.0, mean_length=10000, max_length=recipe.eval_response_tokens)
        offload = recipe.shard == "offload"
        name = next((name for name in SHAPES if name in recipe.model), None)  # None: a small policy, for a CPU
        for gpus in () if name is None else (1,) if offload else (1, 8):
            row = plan(name, gpus, config, ("offload",) if offload else ("no", "yes"))
            row |= {"recipe": path.stem, "steps": recipe.steps, "host_gib": host_memory(name) if offload else None}
            if time := row["seconds"]:
                where = name, gpus, row["shard"], row["rollout_tp"]
                evaluation = rollout_seconds(*where, EVALUATED * recipe.eval_samples, held_out) / recipe.eval_every
                time["evaluation"] = evaluation
                row["hours"] = recipe.steps * (time["step"] + evaluation) / 3600
            if time or gpus > 1:
                rows.append(row)
    return rows


def cells_of(row: dict) -> dict:
    """A row of the table, by column."""
    need, time, host = row["memory_gib"], row["seconds"] or {}, row.get("host_gib")
    settings = [] if row["shard"] == "no" else ["shard" + " offload" * (row["shard"] == "offload")]
    settings += [f"rollout_tp {row['rollout_tp']}"] * (row["rollout_tp"] > 1)
    cells = {"model": f"`{row['recipe']}`" if "recipe" in row else row["model"], "GPUs": row["gpus"]}
    cells["settings"] = (" ".join(settings) or "-") if time else "does not fit"
    cells["GiB: update"] = f"{need['update']:.0f}" + (f", host {host['update']:.0f}" if host else "")
    cells["rollout"] = f"{need['rollout'] + need['engine']:.0f} + cache"
    cells["utilization"] = f"{need['utilization']:.2f}" if time else ""
    parts = ("rollout", "old_logprobs", "update", "moving", "step", *["evaluation"] * ("recipe" in row))
    cells |= {f"{part.replace('_', ' ')} s": time.get(part, "") for part in parts}
    return cells | ({name: row.get(name, "") for name in ("steps", "hours")} if "recipe" in row else {})


def main(config: Config) -> None:
    rows = recipe_rows() if config.recipes else [plan(name, gpus, config) for name in SHAPES for gpus in config.gpus]
    print(json.dumps({"config": vars(config), "rows": rows}))
    table = [cells_of(row) for row in rows]
    print("|", " | ".join(table[0]), "|\n" + "|---" * len(table[0]) + "|")
    for row in table:
        print("|", " | ".join(f"{cell:,.0f}" if isinstance(cell, float) else str(cell) for cell in row.values()), "|")


if __name__ == "__main__":
    command(main, Config, __doc__)
