"""Memory of a GPU and time of a step, estimated: which model fits on how many GPUs, and with which settings.

    .venv/bin/python -m bench.scaling                      the table of docs/scaling.md
    .venv/bin/python -m bench.scaling --gpu-memory 80 --mean-length 4000

Run it from the repository root. It counts the bytes and the floating-point operations of the code, and divides them by
rates. Rates marked `measured` were measured with torch on one H200. The others are from datasheets or guesses, and are
marked so. The result was never compared with a run on a GPU: trust its order of magnitude, and which term is largest.
"""

import json
import math
from dataclasses import dataclass

from ce_gppo.config import command

# Rates of one GPU.
MATRIX_RATE = 788e12  # FLOP/s, bfloat16, 8192^3 on random data; measured
MEMORY_RATE = 4.3e12  # bytes/s, device to device, read and written; measured
NODE_RATE = 350e9  # bytes/s per GPU within a node; guess from NVLink's 450e9 by datasheet
NETWORK_RATE = 40e9  # bytes/s per GPU between nodes; guess from 400 Gbit/s InfiniBand's 50e9 by datasheet
MFU = 0.4  # of the update; guess (0.68 is measured on two CPU cores, with a small model)
DECODE_SHARE = 0.6  # of MEMORY_RATE, in vLLM's decoding; guess
GPUS_A_NODE = 8

SHAPES = {  # layers, hidden, intermediate, heads, key heads, vocabulary, tied
    "1.5B": (28, 1536, 8960, 12, 2, 151936, True),
    "7B": (28, 3584, 18944, 28, 4, 152064, False),
    "32B": (64, 5120, 27648, 40, 8, 152064, False),
}


@dataclass
class Config:
    gpu_memory: float = 141.0  # GiB of one GPU
    prompts: int = 256  # per step, with 8 responses each; half of them are trained on (the paper's numbers)
    mini_batch_prompts: int = 16  # groups per update: 8 updates per step
    prompt_tokens: int = 200  # on average
    mean_length: int = 6000  # tokens of a response on average; a guess
    max_length: int = 16384  # tokens of the longest response
    gpus: tuple[int, ...] = (1, 8, 64, 1024)


def parameters(name: str) -> tuple[float, float, float]:
    """Numbers of parameters: (all, in the layers, in the head)."""
    layers, hidden, intermediate, heads, key_heads, vocabulary, tied = SHAPES[name]
    layer = hidden * hidden * (2 + 2 * key_heads / heads) + 3 * hidden * intermediate
    head = vocabulary * hidden
    return layers * layer + head * (1 if tied else 2), layers * layer, head


def memory(name: str, gpus: int, shard: bool, tensor_parallel: int, config: Config) -> dict[str, float]:
    """GiB per GPU, by use. Trainer and vLLM share a GPU; the trainer's states stay there while vLLM samples."""
    layers, hidden, intermediate, *_ = SHAPES[name]
    total, in_layers, head = parameters(name)
    tokens = config.prompt_tokens + config.max_length  # a micro-batch has at least one response
    states = 16 * total / (gpus if shard else 1)  # float32 weights, gradients and two moments
    # bfloat16 copies: of all weights under autocast; with shards only of two layers, embedding, head, and gradients.
    copies = 4 * (2 * in_layers / layers + total - in_layers) if shard else 2 * total
    # Gradient checkpointing keeps each layer's input (float32), and everything of one layer (mostly bfloat16).
    activations = tokens * (layers * hidden * 4 + 30 * hidden + 10 * intermediate)
    head_work = 4 * 2**26 + 4 * tokens * hidden * 2 + 4 * head
    update = (states + copies + activations + head_work) / 2**30
    engine = (2 * total / tensor_parallel) / 2**30
    return {"update": update, "rollout_without_cache": states / 2**30 + engine, "states": states / 2**30}


def seconds(name: str, gpus: int, shard: bool, tensor_parallel: int, config: Config) -> dict[str, float]:
    """Seconds of a step, by part."""
    layers, hidden, _, heads, key_heads, _, _ = SHAPES[name]
    total, in_layers, head = parameters(name)
    responses = config.prompts * 8
    trained = responses / 2
    updates = config.prompts / 2 / config.mini_batch_prompts

    # Rollout: for each token decoding reads the weights and the cache of every running sequence once.
    engines = gpus // tensor_parallel
    room = 0.9 * config.gpu_memory - memory(name, gpus, shard, tensor_parallel, config)["rollout_without_cache"]
    cache_of_token = 2 * layers * key_heads * (hidden // heads) * 2
    running = min(
        math.ceil(responses / engines), room * tensor_parallel * 2**30 / (cache_of_token * config.mean_length)
    )
    read = 2 * total + running * config.mean_length / 2 * cache_of_token
    token = read / (tensor_parallel * MEMORY_RATE * DECODE_SHARE)
    waves = max(1.0, math.ceil(responses / engines) / max(running, 1e-9))
    # At least one response runs to the limit, at the end with no other beside it.
    last = max(0, config.max_length - config.mean_length * waves) * 2 * total / (tensor_parallel * MEMORY_RATE)
    rollout = waves * config.mean_length * token + last / DECODE_SHARE

    # Forward over all responses; forward, recomputation and backward over those trained on. Of more GPUs than a
    # mini-batch has responses, some are idle.
    length = config.prompt_tokens + config.mean_length
    forward = 2 * (in_layers * length + head * config.mean_length) + 2 * layers * hidden * length**2
    rate = MATRIX_RATE * MFU
    old_logprobs = forward * responses / min(gpus, responses) / rate
    at_work = min(gpus, trained / updates)
    update = 4 * forward * trained / at_work / rate

    # DDP moves gradients once per update. FSDP moves weights twice and gradients once per micro-batch.
    link = NODE_RATE if gpus <= GPUS_A_NODE else NETWORK_RATE
    micro_batches = math.ceil(trained / updates / at_work)
    bytes_moved = (2 * 2 + 4) * total * micro_batches if shard else 2 * 4 * total
    communication = 0.0 if gpus == 1 else updates * bytes_moved / link
    sync = 4 * total / link if shard else 2 * total / MEMORY_RATE
    return {
        "rollout": rollout,
        "old_logprobs": old_logprobs,
        "update": update,
        "communication": communication,
        "sync": sync,
    }


def plan(name: str, gpus: int, config: Config) -> dict:
    """The simplest settings that fit: copies rather than shards, and engines on as few GPUs as possible."""
    for shard in (False, True):
        for tensor_parallel in (1, 2, 4, 8):
            if (shard and gpus == 1) or tensor_parallel > gpus:
                continue
            need = memory(name, gpus, shard, tensor_parallel, config)
            # The cache needs at least a tenth of the GPU; a sleeping vLLM keeps about 3 GiB.
            if (
                max(need["update"] + 3, need["rollout_without_cache"] + 0.1 * config.gpu_memory)
                < 0.95 * config.gpu_memory
            ):
                time = seconds(name, gpus, shard, tensor_parallel, config)
                row = {"model": name, "gpus": gpus, "shard": shard, "rollout_tp": tensor_parallel, "memory_gib": need}
                return row | {"seconds": time | {"step": sum(time.values())}}
    return {
        "model": name,
        "gpus": gpus,
        "memory_gib": memory(name, gpus, gpus > 1, min(gpus, 8), config),
        "seconds": None,
    }


def main(config: Config) -> None:
    rows = [plan(name, gpus, config) for name in SHAPES for gpus in config.gpus]
    print(json.dumps({"config": vars(config), "rows": rows}))
    print(
        "| model | GPUs | settings | GiB: update, rollout | rollout s | old logprobs s | update s | moving s | step s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        need, time = row["memory_gib"], row["seconds"]
        gib = f"{need['update']:.0f}, {need['rollout_without_cache']:.0f} + cache"
        if time is None:
            print(f"| {row['model']} | {row['gpus']} | does not fit | {gib} | | | | | |")
            continue
        settings = (
            " ".join(["shard"] * row["shard"] + [f"rollout_tp {row['rollout_tp']}"] * (row["rollout_tp"] > 1)) or "-"
        )
        cells = [
            time["rollout"],
            time["old_logprobs"],
            time["update"],
            time["communication"] + time["sync"],
            time["step"],
        ]
        print(
            f"| {row['model']} | {row['gpus']} | {settings} | {gib} | "
            + " | ".join(f"{cell:,.0f}" for cell in cells)
            + " |"
        )


if __name__ == "__main__":
    command(main, Config, __doc__)
