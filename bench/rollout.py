"""Rollouts: Engine.generate against bare vLLM, seconds of a weight sync by model size, the parts of a step's time.

    .venv/bin/python -m bench.rollout                                      all three, with the default model and data
    .venv/bin/python -m bench.rollout --metrics out/<run>/metrics.jsonl    the step times of that run

Run it from the repository root. Bare is `vllm.LLM.generate` on the same engine, in turn with ours: the same prompts,
seed and sampling settings give the same tokens, and the prefix cache is emptied before each. The difference is
everything that rollout.py adds. Bare runs with vLLM's own detokenization, as usual: once with the logprobs of the
sampled tokens, which training needs, and once without. Bare also compares one generator for all requests, which
rollout.py uses on a CPU, with a seed for each request, which it uses on a GPU.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2Config

import train
from bench import common
from ce_gppo import types as t
from ce_gppo.config import command
from ce_gppo.messages import UserError
from ce_gppo.model import context_of, load_model, named_weights
from ce_gppo.problems import load_problems
from rollout import Engine, prepare_environment

ROOT = Path(__file__).parents[1]
PARTS = ("rollout", "reward", "old_logprobs", "update", "sync")


@dataclass
class Config:
    model: str = train.Config.model  # folder or hub name
    data: str = train.Config.eval_data  # prompts, JSONL
    prompts: t.Count = train.Config.prompts_per_step
    responses: t.Count = train.Config.responses_per_prompt  # to each prompt
    max_tokens: t.Count = train.Config.max_response_tokens  # of a response
    rounds: t.Count = 5  # of all variants, in turn
    shapes: tuple[str, ...] = ("256x8", "576x30")  # random Qwen2 models to sync, hidden size x layers
    vocabulary: t.Count = 49152  # of these models
    train_steps: t.Count = 6  # of a short run with the default settings, for the parts of a step
    metrics: str = ""  # metrics.jsonl of a run, instead of the short run
    only_sync: bool = False  # only the weight sync of --model: this script starts itself so, one engine per process


def random_model(folder: str, shape: str, vocabulary: int) -> None:
    hidden_size, layers = map(int, shape.split("x"))
    config = Qwen2Config(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    common.save_random_model(Path(folder), config)


def sync_seconds(engine: Engine, model) -> float:
    """Median seconds of the part of a step that train.py calls sync."""
    taken = []
    for _ in range(4):
        engine.sleep()
        start = time.perf_counter()
        engine.wake(named_weights(model))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def bare(engine: Engine, prompts: list[list[int]], config: Config, generator_seed: int, **options) -> int:
    """Sample with vllm.LLM.generate and these options of SamplingParams. Returns the number of tokens."""
    torch.manual_seed(generator_seed)
    params = engine.vllm.SamplingParams(
        n=config.responses,
        temperature=1.0,
        max_tokens=config.max_tokens,
        stop_token_ids=engine.stop_token_ids,
        **options,
    )
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


def rates_in_turn(engine: Engine, variants: dict[str, Callable[[int], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each variant in each round. A variant takes a seed, and returns the number of tokens that it sampled.

    All variants must sample equally many tokens in a round, except those whose name begins with "seed".
    """
    rates = {name: [] for name in variants}
    for seed in range(rounds + 1):
        counts = set()
        for name, variant in variants.items():
            engine.llm.reset_prefix_cache()
            start = time.perf_counter()
            tokens = variant(seed)
            taken = time.perf_counter() - start
            if not name.startswith("seed"):
                counts.add(tokens)
            if seed:  # the first round warms up
                rates[name].append(tokens / taken)
        assert len(counts) == 1, f"the variants sampled different numbers of tokens: {counts}"
    return rates


def seeds_over_one_generator(engine: Engine, prompts: list[list[int]], config: Config) -> float:
    """Median tokens/s with a seed for each request, over that with one generator for all: bare, in turn.

    Only as many prompts as vLLM reads in one piece: 0.32 fails on a CPU when a request with a seed is cut.
    """
    room = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    fit = room // (config.responses * max(map(len, prompts)))
    one = partial(bare, engine, prompts[:fit], config, detokenize=False)
    rates = rates_in_turn(engine, {"one": one, "seeds": lambda seed: one(seed, seed=seed)}, config.rounds)
    return statistics.median(a / b for a, b in zip(rates["seeds"], rates["one"], strict=True))


def generation(engine: Engine, prompts: list[list[int]], config: Config) -> dict[str, float]:
    """Median tokens/s of the variants, and the share of the rollout after which half of the groups are complete."""
    half_complete = []

    def ours(seed: int) -> int:
        start, complete = time.perf_counter(), []
        groups = engine.generate(
            prompts,
            config.responses,
            max_tokens=config.max_tokens,
            temperature=1.0,
            seed=seed,
            on_group=lambda *_: complete.append(time.perf_counter() - start),
        )
        half_complete.append(complete[len(complete) // 2] / complete[-1])
        return sum(len(response.response_ids) for group in groups for response in group)

    plain = partial(bare, engine, prompts, config)
    variants = {
        "engine": ours,
        "bare_with_logprobs": partial(plain, logprobs=0),
        "bare": plain,
        "bare_without_text": partial(plain, detokenize=False),
    }
    rates = rates_in_turn(engine, variants, config.rounds)
    medians = {f"{name}/tokens_per_s": statistics.median(values) for name, values in rates.items()}
    return medians | {"half_of_groups_complete_at": statistics.median(half_complete)}


def short_run(steps: int, folder: str) -> Path:
    """metrics.jsonl of a run with the default settings, W&B included. It is evaluated only before and after."""
    arguments = [sys.executable, "train.py", "--out", folder, "--run-name", "bench", "--steps", str(steps)]
    arguments += ["--eval-every", str(steps), "--eval-samples", "1"]
    environment = {"WANDB_MODE": "offline"} | os.environ
    subprocess.run(arguments, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return Path(folder) / "bench" / "metrics.jsonl"


def shares(path: Path) -> dict[str, float]:
    """The parts' shares of the steps' time, without evaluation.

    `rest` is advantages, metrics, logging and checkpoints. `outside` is everything except vLLM and the model's passes.
    One of these passes computes old logprobs, of all mini-batches except the first, and entropy, of some responses of
    dropped groups.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if "time/step" in row]  # the evaluation before the first step has none
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the metrics.jsonl of a run ({error})") from None
    if not rows:
        raise UserError(f"{path}: no step in it; the metrics.jsonl of a run is needed")
    seconds = {part: sum(row.get(f"time/{part}", 0.0) for row in rows) for part in PARTS}
    total = sum(row["time/step"] for row in rows)
    seconds["rest"] = total - sum(seconds.values())
    result = {f"share/{part}": value / total for part, value in seconds.items()}
    model_passes = result["share/rollout"] + result["share/old_logprobs"] + result["share/update"]
    return result | {"share/outside": 1 - model_passes}


def main(config: Config) -> None:
    if wrong := [shape for shape in config.shapes if not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{0,2}", shape)]:
        raise UserError(f"--shapes {wrong[0]}: hidden size x layers is needed, such as 256x8")
    given = shares(Path(config.metrics)) if config.metrics else {}
    prepare_environment()
    model, tokenizer = load_model(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(config.model, tokenizer, context=context_of(config.model))
    sync = {"parameters": sum(p.numel() for p in model.parameters()), "seconds": sync_seconds(engine, model)}
    if config.only_sync:
        print(json.dumps(sync))
        return
    problems, _ = load_problems(config.data, tokenizer, train.Config.max_prompt_tokens)
    result = {"bench": "rollout", "date": time.strftime("%Y-%m-%d"), "model": config.model}
    prompts = [problem.prompt_ids for problem in problems[: config.prompts]]
    result |= generation(engine, prompts, config)
    if not engine.cuda:
        result["seeds_over_one_generator"] = seeds_over_one_generator(engine, prompts, config)
    for name in ("bare_with_logprobs", "bare"):
        result[f"engine_over_{name}"] = result["engine/tokens_per_s"] / result[f"{name}/tokens_per_s"]
    syncs = [sync]
    with tempfile.TemporaryDirectory() as folder:
        for shape in config.shapes:
            random_model(f"{folder}/{shape}", shape, config.vocabulary)
            again = [sys.executable, "-m", "bench.rollout", "--only-sync", "--model", f"{folder}/{shape}"]
            output = subprocess.run(again, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            syncs.append(json.loads(output.splitlines()[-1]))
        result |= given or shares(short_run(config.train_steps, folder))
    result["sync"] = syncs

    rates = [(name.removesuffix("/tokens_per_s"), value) for name, value in result.items() if "/tokens_per_s" in name]
    parts = [(name.removeprefix("share/"), value) for name, value in result.items() if name.startswith("share/")]
    bars = [
        ("tokens/s, Engine.generate over bare with logprobs", result["engine_over_bare_with_logprobs"], ">= 0.97"),
        ("tokens/s, Engine.generate over bare", result["engine_over_bare"], ""),
        ("half of the groups are complete at this share of the rollout", result["half_of_groups_complete_at"], ""),
        (
            "share of a step outside rollout and update",
            result["share/outside"] + result["share/old_logprobs"],
            "<= 0.08",
        ),
        ("the same, without the pass that computes old logprobs", result["share/outside"], ""),
    ]
    if "seeds_over_one_generator" in result:
        bars.append(("tokens/s, a seed per request over one generator", result["seeds_over_one_generator"], ""))
    common.show(
        result,
        [("sampling", "tokens/s"), *rates],
        [("weight sync, M parameters", "seconds"), *((f"{s['parameters'] / 1e6:,.1f}", s["seconds"]) for s in syncs)],
        [("step without evaluation", "share"), *parts],
        [("", "value", "bar"), *bars],
    )


if __name__ == "__main__":
    command(main, Config, __doc__)
