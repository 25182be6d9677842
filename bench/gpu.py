"""To run first on a GPU: a short run from end to end, and the speed of an update at full size.

    .venv/bin/python -m bench.gpu                        all parts, one JSON line each; one that fails stops no other
    .venv/bin/python -m bench.gpu --part update          one part
    .venv/bin/python -m bench.gpu --train "--model Qwen/Qwen2.5-1.5B-Instruct --lr 1e-6"       a larger model in `run`
    .venv/bin/python -m bench.gpu --device cpu --part update --hidden-size 64 --layers 2 ...   the same code, small

Run it from the repository root. Each part runs in a process of its own, for --minutes at most:

    run      train.py for two steps (rollout, update, new weights in vLLM, checkpoint), and its second step again from
             the checkpoint of the first: seconds by part, vLLM against trainer, how many responses are the same again
    update   forward and backward of train.update, without the optimizer's step, in bfloat16 over float32 weights, which
             are random: model flops utilization, peak memory, the head against its matrix products. A case is one
             micro-batch of about --tokens tokens, in sequences of one length or of all lengths. Without compiled layers
             if TORCH_COMPILE_DISABLE=1 is in the environment
    offload  the passes of `update` and the optimizer's step, with weights, gradients and moments in the host's memory:
             seconds, peak memory of the GPU, and pinned memory of the host over its exact size

All parts except `run` need torch and transformers, but not vLLM, W&B, tyro or scipy. Options are therefore argparse's.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import Qwen2Config

import train
from bench import common
from ce_gppo import parallel, perf
from ce_gppo import ranges as t
from ce_gppo.batch import Rollout, pack
from ce_gppo.config import command
from ce_gppo.messages import RunEnded
from ce_gppo.model import load_model
from ce_gppo.policy import Policy, hidden_states, take

ROOT = Path(__file__).parents[1]
PARTS = ("run", "update", "offload")


@dataclass
class Config:
    part: t.one_of(("all", *PARTS)) = "all"
    minutes: t.Positive = 15.0  # time limit of a part
    train: str = ""  # more settings for the two steps of `run`
    device: str = "cuda"
    lengths: tuple[t.Count, ...] = (4096, 8192, 17408)  # tokens of a sequence
    prompt_tokens: t.Count = 1024
    tokens: t.Count = 34816  # of a micro-batch
    repeats: t.Count = 3
    gradient_checkpointing: bool = True
    # The shape of DeepSeek-R1-Distill-Qwen-1.5B, whose embedding is not its head.
    hidden_size: t.Count = 1536
    intermediate_size: t.Count = 8960
    layers: t.Count = 28
    heads: t.Count = 12
    kv_heads: t.Count = 2
    vocabulary: t.Count = 151936


def read(arguments: list[str]) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        kind = type(field.default)
        how = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+", "type": int}}
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, default=field.default, **how.get(kind, {"type": kind}))
    config = Config(**vars(parser.parse_args(arguments)))
    config.lengths = tuple(config.lengths)
    t.check_ranges(config)
    return config


def show(part: str, config: Config, result: dict, *tables: list[tuple]) -> None:
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else "cpu"
    common.show("gpu", {"part": part, "device": device, "torch": torch.__version__} | result, *tables)


# ----------------------------------------------------------------------------------------------------------------------
# run


def run_part(config: Config) -> None:
    """Two steps, and the second one again after a resume."""
    with tempfile.TemporaryDirectory() as out:
        settings = ["--steps", "2", "--checkpoint-every", "1", "--eval-every", "2", "--eval-samples", "1"]
        whole, again = Path(out) / "whole", Path(out) / "again"
        minutes = 0.45 * config.minutes  # train.py must end before the time limit of this process
        run_train(minutes, *settings, "--out", out, "--run-name", "whole", *shlex.split(config.train))
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoint-000002")
        rows = (again / "metrics.jsonl").read_text().splitlines(keepends=True)
        (again / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] < 2))
        run_train(minutes, "--resume", str(again))
        result = summary(whole, again)
    show("run", config, result, [("", "value"), *result.items()])


def run_train(minutes: float, *words: str) -> None:
    options = {"cwd": ROOT, "env": os.environ | {"WANDB_MODE": "disabled"}, "timeout": 60 * minutes}
    with tempfile.TemporaryFile("w+") as output:
        try:
            train_py = [sys.executable, "train.py", *words]
            code = subprocess.run(train_py, stdout=output, stderr=output, **options).returncode
        except subprocess.TimeoutExpired:
            code = "no result in time"
        output.seek(0)
        if code:
            raise RuntimeError(f"train.py {shlex.join(words)} ended with {code}: {output.read().strip()[-2000:]}")


def summary(whole: Path, again: Path) -> dict:
    """Metrics of the second step, in which everything is warm, and how much of it a resumed run repeats.

    On a GPU the tokens may differ: vLLM's results depend on the requests that share a batch.
    """

    def rows_of(run: Path, name: str) -> list[dict]:
        return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]

    last, resumed = (rows_of(run, "metrics")[-1] for run in (whole, again))
    wanted = ("time/", "perf/", "mismatch/", "entropy/mean", "reward/mean", "optim/updates", "kl/approx")
    found = {name: value for name, value in last.items() if name.startswith(wanted)}
    samples = [[r["response"] for r in rows_of(run, "samples") if r["step"] == 2] for run in (whole, again)]
    found["resume/same_responses"] = sum(a == b for a, b in zip(*samples, strict=True)) / len(samples[0])
    found["resume/entropy_difference"] = abs(last["entropy/mean"] - resumed["entropy/mean"])
    return found


# ----------------------------------------------------------------------------------------------------------------------
# update, offload


def make_model(config: Config, shard: str = "no"):
    """A random model, loaded from a folder as train.py loads it."""
    more = {"max_position_embeddings": max(config.lengths), "tie_word_embeddings": False, "pad_token_id": 0}
    with tempfile.TemporaryDirectory() as folder:
        common.save_random_model(Path(folder), common.model_config(Qwen2Config, config, **more), config.device)
        return load_model(folder, config.device, config.gradient_checkpointing, shard)[0]


def cases_of(config: Config) -> dict[str, list[int]]:
    """Tokens of the sequences of one micro-batch each."""
    cases = {str(length): [length] * max(1, config.tokens // length) for length in config.lengths}
    return cases | {"mixed": list(config.lengths) * max(1, config.tokens // sum(config.lengths))}


def make_rollout(lengths: list[int], config: Config) -> Rollout:
    """A response for each length, which is that of prompt and response together."""
    generator = torch.Generator().manual_seed(0)
    ids = [common.random_ids(length, config.vocabulary, generator) for length in lengths]
    prompts, responses = [each[: config.prompt_tokens] for each in ids], [each[config.prompt_tokens :] for each in ids]
    return common.rollout_of(prompts, responses, [(1.0, -0.5)[i % 2] for i in range(len(ids))])


def measure(policy: Policy, lengths: list[int], config: Config, rate: float) -> dict[str, float]:
    rollout, tokens, model = make_rollout(lengths, config), sum(lengths), policy.model
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    taken = common.median_seconds(lambda: common.update_passes(policy, rollout, tokens, config.device), config.repeats)
    peak = perf.peak_memory_gib()
    policy.zero_grad()
    packed = pack(rollout, config.device)
    with torch.no_grad():
        hidden = hidden_states(model.base_model, packed)  # [L, D]
        hidden = hidden.to(torch.bfloat16) if hidden.is_cuda else hidden  # as Policy.forward does
    inputs = take(hidden, packed.predecessors), model.get_output_embeddings().weight, packed.targets
    head, products = common.head_seconds(*inputs, config.repeats)
    return {
        "tokens": tokens,
        "seconds": taken,
        "tokens_per_s": tokens / taken,
        "mfu": perf.flops(model, rollout) / taken / rate,  # without the recomputation
        "peak_gib": peak,
        "head_s": head,
        "head_over_products": head / products,
    }


def update_part(config: Config) -> None:
    policy = Policy(make_model(config))
    rate, numbers = perf.matrix_rate(config.device), sum(p.numel() for p in policy.parameters())
    result = {"parameters": numbers, "matrix_tflops": rate / 1e12}
    result |= {"weights_and_gradients_gib": 8 * numbers / 2**30, "checkpointing": config.gradient_checkpointing}
    rows = {case: measure(policy, lengths, config, rate) for case, lengths in cases_of(config).items()}
    result |= {f"{case}/{key}": value for case, row in rows.items() for key, value in row.items()}
    table = [("length", *rows["mixed"]), *((case, *row.values()) for case, row in rows.items())]
    bars = [
        ("least mfu", min(row["mfu"] for row in rows.values()), ">= 0.45"),
        ("head over its matrix products, most", max(row["head_over_products"] for row in rows.values()), "<= 1.3"),
    ]
    show("update", config, result, table, [("", "value", "bar"), *bars])


def offload_part(config: Config) -> None:
    cuda, model = config.device.startswith("cuda"), make_model(config, "offload")
    policy = parallel.distribute(Policy(model), "offload", model._no_split_modules)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda, **train.ADAMW)
    lengths = cases_of(config)["mixed"]
    rollout, step, taken = make_rollout(lengths, config), parallel.host_threads()(optimizer.step), []
    for _ in range(config.repeats + 1):  # the first one compiles, and makes the moments
        passes = common.timed(lambda: common.update_passes(policy, rollout, sum(lengths), config.device))
        taken.append((passes, common.timed(step)))
    passes, steps = map(statistics.median, zip(*taken[1:], strict=True))
    found = {"tokens": sum(lengths), "passes_s": passes, "step_s": steps, "peak_gib": perf.peak_memory_gib()}
    if cuda:
        pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
        exact = 2 * 4 * sum(p.numel() for p in model.parameters())  # weights and gradients
        found |= {"pinned_gib": pinned / 2**30, "pinned_over_exact": pinned / exact}
    show("offload", config, found, [("", "value"), *found.items()])


def main() -> None:
    config = read(sys.argv[1:])
    if config.part != "all":
        return globals()[f"{config.part}_part"](config)
    failed = []
    for part in PARTS:  # each in its own process: its memory is then free for the next, even after a crash
        command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--part", part]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=60 * config.minutes).returncode
        except subprocess.TimeoutExpired:
            code = f"no result in {config.minutes:g} minutes"
        if code:
            print(json.dumps({"bench": "gpu", "part": part, "failed": code}), flush=True)
            failed.append(part)
    if failed:
        raise RunEnded(f"failed: {', '.join(failed)}; their output is above")


if __name__ == "__main__":
    command(main)
