"""Rollouts: Engine.generate against bare vLLM, and the parts of a step's time.

    .venv/bin/python -m bench.rollout                                      with the default model and data
    .venv/bin/python -m bench.rollout --metrics out/<run>/metrics.jsonl    also the step times of that run

Run it from the repository root. Bare is `vllm.LLM.generate` on the same engine, in turn with ours: the same prompts,
seed and sampling settings give the same tokens, and the prefix cache is emptied before each. The difference is
everything that rollout.py adds. Bare runs with vLLM's own detokenization, as usual: once with the logprobs of the
sampled tokens, which training needs, and once without.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train
from bench import common
from ce_gppo import ranges as t
from ce_gppo.config import command
from ce_gppo.messages import UserError
from ce_gppo.model import load_model
from ce_gppo.problems import load_problems
from rollout import Engine, prepare_environment

PARTS = ("rollout", "reward", "old_logprobs", "update", "sync")


@dataclass
class Config:
    model: str = train.Config.model  # folder or hub name
    data: str = train.Config.eval_data  # prompts, JSONL
    prompts: t.Count = train.Config.prompts_per_step
    responses: t.Count = train.Config.responses_per_prompt  # to each prompt
    max_tokens: t.Count = train.Config.max_response_tokens  # of a response
    rounds: t.Count = 5  # of all variants, in turn
    metrics: str = ""  # metrics.jsonl of a run, for the parts of a step


def bare(engine: Engine, prompts: list[list[int]], config: Config, seed: int, **options) -> int:
    """Sample with vllm.LLM.generate and these options of SamplingParams. Returns the number of tokens."""
    torch.manual_seed(seed)
    options |= {"n": config.responses, "max_tokens": config.max_tokens, "stop_token_ids": engine.stop_token_ids}
    params = engine.vllm.SamplingParams(temperature=1.0, **options)
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


def rates_in_turn(engine: Engine, variants: dict[str, Callable[[int], int]], rounds: int) -> dict[str, float]:
    """Median tokens/s of each variant. A variant takes a seed, and returns the number of tokens that it sampled."""
    rates = {name: [] for name in variants}
    for seed in range(rounds + 1):
        counts = set()
        for name, variant in variants.items():
            engine.llm.reset_prefix_cache()
            start = time.perf_counter()
            tokens = variant(seed)
            rates[name].append(tokens / (time.perf_counter() - start))
            counts.add(tokens)
        assert len(counts) == 1, f"the variants sampled different numbers of tokens: {counts}"
    return {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first round warms up


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
    return result | {
        "share/outside": 1 - sum(result[f"share/{part}"] for part in ("rollout", "old_logprobs", "update"))
    }


def main(config: Config) -> None:
    of_step = shares(Path(config.metrics)) if config.metrics else {}
    prepare_environment()
    _, tokenizer = load_model(config.model)
    engine = Engine(config.model, tokenizer, context=train.Config.max_prompt_tokens + config.max_tokens)
    problems, _ = load_problems(config.data, tokenizer, train.Config.max_prompt_tokens)
    prompts = [problem.prompt_ids for problem in problems[: config.prompts]]

    def ours(seed: int) -> int:
        options = {"max_tokens": config.max_tokens, "temperature": 1.0, "seed": seed}
        return len(engine.generate(prompts, config.responses, **options).tokens)

    plain = partial(bare, engine, prompts, config)
    variants = {"engine": ours, "bare_with_logprobs": partial(plain, logprobs=0), "bare": plain}
    medians = rates_in_turn(engine, variants, config.rounds)
    ratios = {name: medians["engine"] / medians[name] for name in list(medians)[1:]}
    result = {"model": config.model} | {f"{name}/tokens_per_s": rate for name, rate in medians.items()}
    result |= {f"engine_over_{name}": ratio for name, ratio in ratios.items()} | of_step
    bars = [
        ("tokens/s, Engine.generate over bare with logprobs", ratios["bare_with_logprobs"], ">= 0.97"),
        ("tokens/s, Engine.generate over bare", ratios["bare"], ""),
    ]
    tables = [[("sampling", "tokens/s"), *medians.items()]]
    if of_step:
        outside = result["share/outside"]
        bars.append(("share of a step outside rollout and update", outside + result["share/old_logprobs"], "<= 0.08"))
        bars.append(("the same, without the pass that computes old logprobs", outside, ""))
        tables.append([("step without evaluation", "share"), *of_step.items()])
    common.show("rollout", result, *tables, [("", "value", "bar"), *bars])


if __name__ == "__main__":
    command(main, Config, __doc__)
