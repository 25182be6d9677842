"""The sweep behind docs/evidence.md: every objective from the same base policy, on the arithmetic task.

    python results/sweep.py              60 runs of 80 steps: under three hours on two cores
    python results/sweep.py --quick      12 runs of 5 steps: a few minutes

Every core (or GPU) has one run at a time. A run that ends adds a line to the results at once; started again, the sweep
goes on with what is missing, runs that were interrupted included. results/claims.py makes figures and tables of it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from prompts import UserError

HERE = Path(__file__).parent
REPOSITORY = HERE.parent

# Chosen once for all (docs/evidence.md): train.py's learning rate, eight updates a rollout. At twice that rate more is
# clipped, and the policies that keep most of the clipped gradients unlearn the task. The rest is train.py's defaults.
COMMON = {
    "lr": 1e-4,
    "prompts_per_step": 48,
    "max_kept_prompts": 48,
    "mini_batch_prompts": 6,
    "eval_every": 20,
    "eval_samples": 8,
    "keep_checkpoints": 1,
    "max_silent_rollouts": 1000,  # a policy that has unlearned the task is a result, too
}
SETTINGS = {
    "grpo": {"objective": "grpo"},
    "dapo": {"objective": "dapo"},
    "gppo": {"objective": "gppo"},
    "cispo": {"objective": "cispo"},
    "gspo": {"objective": "gspo"},
    "ce_gppo (0.5, 1)": {"beta1": 0.5, "beta2": 1.0},
    "ce_gppo (0.75, 1)": {"beta1": 0.75, "beta2": 1.0},
    "ce_gppo (1, 0.5)": {"beta1": 1.0, "beta2": 0.5},
    "ce_gppo (0, 1)": {"beta1": 0.0, "beta2": 1.0},
    "grpo, bonus 0.01": {"objective": "grpo", "entropy_coef": 0.01},
    "grpo, bonus 0.03": {"objective": "grpo", "entropy_coef": 0.03},
    "ce_gppo, target 0.11": {"entropy_target": 0.11},
}
# What is kept of metrics.jsonl, as lists by step. Five significant digits: 60 runs are a few hundred kilobytes.
SERIES = (
    "entropy/mean", "reward/mean", "response/length_mean", "response/truncated",
    "clip/low", "clip/high", "clip/prob_low", "clip/prob_high", "kl/old", "ratio/max",
    "velocity/pa_lp", "velocity/na_hp", "velocity/pa_hp", "velocity/na_lp", "velocity/total",
    "velocity/clipped_low", "velocity/clipped_high", "optim/beta1", "optim/beta2",
    "eval/arithmetic/avg_at_k", "eval/arithmetic/pass_at_k",
)  # fmt: skip


@dataclass
class Config:
    quick: bool = False  # one seed and 5 steps: whether it works, not what is true
    results: str = ""  # file that the runs are added to; empty: results/reproduction.jsonl, or results/quick.jsonl
    seeds: int | None = None  # runs of each setting, from seed 0; None: 5, quick: 1
    steps: int | None = None  # of each run; None: 80, quick: 5
    settings: tuple[str, ...] = field(default_factory=lambda: tuple(SETTINGS))  # which to run
    out: Path = REPOSITORY / "out" / "reproduce"  # folder of the runs themselves
    lanes: int | None = None  # runs at a time; None: one a GPU, else one a core as far as the memory goes


def main(config: Config) -> None:
    if unknown := [name for name in config.settings if name not in SETTINGS]:
        raise UserError(f"setting '{unknown[0]}' is unknown; known: {', '.join(SETTINGS)}")
    results = Path(config.results or HERE / ("quick.jsonl" if config.quick else "reproduction.jsonl"))
    seeds, steps = config.seeds or (1 if config.quick else 5), config.steps or (5 if config.quick else 80)
    wanted = [(name, seed) for seed in range(seeds) for name in config.settings]  # whole seeds first
    done = {(row["setting"], row["seed"]): row["arguments"] for row in read(results)}
    if other := [job for job in wanted if done.get(job, arguments(*job, steps)) != arguments(*job, steps)]:
        raise UserError(f"{results} has {other[0][0]} with other arguments; name another file with --results")
    waiting = [job for job in wanted if job not in done]
    lanes = lanes_of_this_machine()[: config.lanes]
    print(f"{results}: {len(wanted) - len(waiting)} of {len(wanted)} runs are there; {len(lanes)} at a time")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; start again to go on"))  # by way of `finally`
    running, failed = {}, []
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(waiting), unit="run", disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            free = [lane for lane in lanes if lane not in running]
            for lane in free[: len(waiting)]:
                running[lane] = Run(*waiting.pop(0), steps, config.out, lane)
            time.sleep(0.5)
            for lane, run in [(lane, run) for lane, run in running.items() if run.process.poll() is not None]:
                del running[lane]
                bar.update()
                if run.process.returncode == 0:
                    row = run.row()
                    append(results, row)
                    bar.write(describe(row))
                else:
                    failed.append(run)
                    bar.write(f"{run.setting} seed {run.seed} FAILED: see {run.log}", file=sys.stderr)
    except KeyboardInterrupt:
        for run in running.values():  # Ctrl-C has reached them too; they save, and go on when they are started again
            run.process.wait()
        sys.exit("\nstopped; start again to go on")
    finally:
        bar.close()
        for run in running.values():
            run.process.terminate()
    if failed:
        sys.exit(f"sweep.py: {len(failed)} of {len(wanted)} runs failed; start again to try them again")


class Run:
    """One run of train.py, on one lane: variables of the environment that confine it to a core or a GPU."""

    def __init__(self, setting: str, seed: int, steps: int, out: Path, lane: tuple[str, int]):
        self.setting, self.seed = setting, seed
        self.arguments = arguments(setting, seed, steps)
        name = "".join(c if c.isalnum() or c in "._" else "-" for c in f"{setting}-{steps}-{seed}").replace("--", "-")
        self.folder = out / name
        self.log = out / f"{name}.log"
        out.mkdir(parents=True, exist_ok=True)
        kind, index = lane
        environment = {"WANDB_MODE": "disabled"} | os.environ
        if kind == "gpu":
            environment["CUDA_VISIBLE_DEVICES"] = str(index)
        else:
            environment["OMP_NUM_THREADS"] = "1"  # two processes that share cores slow each other down many times
        finished = (self.folder / f"checkpoint-{steps:06d}").exists()  # its row was not written
        command = ["true"] if finished else [sys.executable, "train.py", *self.arguments.split()]
        command += [] if finished else ["--out", str(out.resolve()), "--run-name", name]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=(lambda: os.sched_setaffinity(0, {index})) if kind == "core" else None,
            )

    def row(self) -> dict:
        metrics = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        series = {name: [shorten(row.get(name)) for row in metrics if row["step"]] for name in SERIES}
        evaluations = [row for row in metrics if "eval/arithmetic/avg_at_k" in row]
        series |= {name: [shorten(row[name]) for row in evaluations] for name in SERIES if name.startswith("eval/")}
        return {
            "setting": self.setting,
            "seed": self.seed,
            "arguments": self.arguments,
            "commit": json.loads((self.folder / "config.json").read_text())["git_commit"],
            "minutes": round(sum(row["time/step"] for row in metrics if row["step"]) / 60, 2),  # but for the start
            "eval_steps": [row["step"] for row in evaluations],
            "series": series,
        }


def arguments(setting: str, seed: int, steps: int) -> str:
    """train.py's command line for a run."""
    options = COMMON | SETTINGS[setting] | {"steps": steps, "seed": seed}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def lanes_of_this_machine() -> list[tuple[str, int]]:
    if torch.cuda.is_available():
        return [("gpu", i) for i in range(torch.cuda.device_count())]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [("core", i) for i in sorted(os.sched_getaffinity(0))[: max(1, int(gib / 5))]]


def read(path: Path) -> list[dict]:
    """The runs in a file of results, none if there is no file. UserError for a line that is not one."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["setting"], rows[-1]["seed"], rows[-1]["arguments"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a run, which sweep.py writes as one line; remove the line") from None
    return rows


def append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")


def describe(row: dict) -> str:
    entropy, accuracy = row["series"]["entropy/mean"], row["series"]["eval/arithmetic/avg_at_k"]
    return (
        f"{row['setting']} seed {row['seed']}: entropy {entropy[0]:.3f} -> {entropy[-1]:.3f}, "
        f"accuracy {accuracy[0]:.3f} -> {accuracy[-1]:.3f}, {row['minutes']:.1f} min"
    )


def shorten(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(2)
