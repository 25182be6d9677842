"""Measure how each setting changes entropy in one step, from the same state and the same rollout.

make branch RUN=out/<run>                                 from the run's newest checkpoint, with its own settings
make branch RUN=out/<run>/checkpoint-000040 BRANCHES=10 EVERY=5
make branch RECIPE=walk ARGS="--objective grpo"           from a model, with a fresh optimizer; train.py's settings

A branch takes the state of a run before a step, with its optimizer, and that step's rollout. It trains the step once
under each setting, each time from this state, and measures the changes on the same tokens. Nothing is sampled in
between, so only the settings differ. Then the run continues with its own setting, up to the next branch. One process,
one device.

Writes a JSONL file with a line per branch and setting, a table, and a figure. Further runs add to the same file.
"""

import argparse
import json
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from ce_gppo.betas import first_control, next_control
from ce_gppo.forward import Policy, flatten
from ce_gppo.statistics import check_mismatch
from ce_gppo.types import has_signal
from tqdm import tqdm

import loss
import reward
import train
from ce_gppo import checkpoint, parallel
from ce_gppo import types as t
from ce_gppo.checkpoint import State
from ce_gppo.config import check_ranges, command, open_to_append, parse, resolve
from ce_gppo.evaluation import evaluate
from ce_gppo.messages import UserError
from ce_gppo.model import load_model, named_weights
from ce_gppo.perf import Meter
from ce_gppo.problems import load_sets
from rollout import Engine, prepare_environment
from tools.branches import BASELINE, SAME, figure, read, table
from tools.step import Step

SETTINGS = {  # each with its objective's published values; rollout and rewards are those of the run
    BASELINE: {"objective": "grpo"},
    "dapo": {"objective": "dapo"},
    "cispo": {"objective": "cispo"},
    "(1, 0)": {"beta1": 1.0, "beta2": 0.0},
    "(0, 1)": {"beta1": 0.0, "beta2": 1.0},
    "(0.5, 1)": {"beta1": 0.5, "beta2": 1.0},
    "(0.75, 1)": {"beta1": 0.75, "beta2": 1.0},
    "(1, 1)": {"beta1": 1.0, "beta2": 1.0},
    "lp_only (1, 1)": {"objective": "lp_only", "beta1": 1.0, "beta2": 1.0},
    "bonus 0.001": {"objective": "grpo", "entropy_coef": 0.001},
    "bonus 0.003": {"objective": "grpo", "entropy_coef": 0.003},
}


def variant(config: train.Config, changes: dict) -> train.Config:
    """The run's configuration under another objective, whose published values replace the run's."""
    kept = {"name", "max_response_tokens", "positive_nll_coef", "rollout_correction"}
    defaults = {field.name: field.default for field in fields(train.Config)}
    names = {field.name for field in fields(loss.Objective)} - kept | {
        "objective",
        "advantages",
        "beta_schedule",
        "entropy_target",
    }
    return resolve(replace(config, **{name: defaults[name] for name in names} | changes))


@dataclass
class Options:
    branches: t.Count
    every: t.Count
    held_out: t.Count
    settings: list[str]
    results: Path


def run(config: train.Config, start: Path | None, options: Options) -> None:
    """Branch before the next step of the run, and again every `options.every` steps."""
    open_to_append(options.results, "--results").close()
    rows = read(options.results)
    about = {name: getattr(config, name) for name in SAME}
    if any(row[name] != value for row in rows for name, value in about.items()):
        raise UserError(f"{options.results} has branches of a run with other settings; name another --results")
    if config.kl_coef:
        raise UserError(f"kl_coef = {config.kl_coef}: branches have no reference policy; leave it out")
    if config.advantages == "gae":
        raise UserError("advantages = gae: branches have no critic; they need a run with group advantages")
    device = parallel.init()
    source = str(start or config.model)
    model, tokenizer = load_model(source, device, config.gradient_checkpointing)
    problems, held_out, _ = load_sets(config, tokenizer, model.config, reward.VERIFIERS)
    policy = Policy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=device == "cuda", **train.ADAMW)
    state = checkpoint.load(start, model, optimizer) if start else State("", control=first_control(config))
    engine = Engine(
        source,
        tokenizer,
        context=config.max_prompt_tokens + config.max_response_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        seed=config.seed,
    )
    engine.load_weights(named_weights(model))
    meter = Meter(model, device)
    settings = {name: variant(config, changes) for name, changes in SETTINGS.items() if name in options.settings}
    last = state.step + 1 + (options.branches - 1) * options.every
    progress = tqdm(total=options.branches * (len(settings) + 3), unit="setting", disable=None)
    for step in range(state.step + 1, last + 1):
        branching = (last - step) % options.every == 0
        if branching:  # before `sample`, which sends the engine to sleep
            sampling = {"max_tokens": config.max_response_tokens, "temperature": config.temperature}
            held = evaluate(
                engine,
                held_out[: options.held_out],
                4,
                score=partial(reward.score, thinking=config.thinking),
                seed=config.seed + step,
                **sampling,
            )
        chosen, rollout = train.sample(engine, problems, state.batches, config, meter, lambda: False)
        state.batches += len(chosen) // config.prompts_per_step
        one = Step(policy, optimizer, config, meter, options.results.parent, step, state.control, rollout)
        if branching and any(map(has_signal, rollout)):
            found = one.branch(settings, flatten(held), progress.update)
            with options.results.open("a") as file:
                for row in found:
                    values = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
                    file.write(json.dumps(about | {"seed": config.seed, "step": step} | values) + "\n")
        if step < last:
            metrics = one.learn(config)
            check_mismatch(metrics, device)
            engine.wake(named_weights(model))
            if config.entropy_target:
                state.control = next_control(config, state.control, metrics["entropy/mean"])
    progress.close()


def start_of(path: str) -> tuple[str, Path | None]:
    """(folder of the run, checkpoint to start from) of a run's folder or of one of its checkpoints."""
    folder = Path(path)
    if not checkpoint.NAME.fullmatch(folder.name):
        return path, checkpoint.newest(folder)
    if problem := checkpoint.damage(folder):
        raise UserError(f"--run {folder}: no whole checkpoint there ({problem})")
    return str(folder.parent), folder


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --run, all other arguments are train.py's settings.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--branches", type=int, default=1, help="number of branches")
    parser.add_argument("--every", type=int, default=5, help="steps from one branch to the next")
    parser.add_argument("--held-out", type=int, default=64, help="held-out problems, with four responses each")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=list(SETTINGS),
        metavar="NAME",
        help=f"some of {', '.join(SETTINGS)}; {BASELINE} is always added",
    )
    parser.add_argument("--results", type=Path, default=Path("out/branches/branches.jsonl"), help="file to add to")
    parser.add_argument("--draw", action="store_true", help="only make table and figure, of the results in the file")
    given, settings = parser.parse_known_args()
    if unknown := [name for name in given.settings if name not in SETTINGS]:
        raise UserError(f"--settings: '{unknown[0]}' is unknown; known: {', '.join(SETTINGS)}")
    if given.run == "":  # as of a variable of the shell that is not set
        raise UserError("--run is empty; leave it out, or name the folder of a run")
    options = Options(given.branches, given.every, given.held_out, [BASELINE, *given.settings], given.results)
    check_ranges(options)
    if not given.draw:
        prepare_environment()
        folder, start = start_of(given.run) if given.run else ("", None)
        config, _, _ = parse(train.Config, [*(["--resume", folder] if folder else []), *settings])
        run(config, start, options)
    rows = read(options.results)
    if not rows:
        raise UserError(f"{options.results}: no results in this file")
    report = table(rows)
    print(report)
    options.results.with_suffix(".md").write_text(report)
    figure(rows).savefig(options.results.with_suffix(".png"), dpi=150)
    print(options.results.with_suffix(".png"))


if __name__ == "__main__":
    command(main)
