"""The sweeps behind docs/evidence.md: settings of the objective from the same base policy, several seeds each.

    .venv/bin/python -m results.sweep                    55 runs on the task `walk`: 1:40 to three hours on two cores
    .venv/bin/python -m results.sweep --quick            11 runs of 5 steps: a few minutes
    .venv/bin/python -m results.sweep --sweep walk-32    another of results/settings.py

Every core (or GPU) has one run at a time. Each run adds a line to the results when it ends. The same command again
continues the sweep: it starts the missing runs, and resumes interrupted ones. If the sweep is stopped or killed in any
way, its runs save and end. Two sweeps cannot write to the same results. results/claims.py makes figures and tables.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ce_gppo import ranges as t
from ce_gppo.config import command, read_record
from ce_gppo.log import read_rows
from ce_gppo.messages import RunEnded, UserError
from ce_gppo.run import lock_file, open_to_append
from results.series import RUN, read
from results.settings import SETTINGS, SWEEPS, Sweep

REPOSITORY = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
KEPT = re.compile(  # metrics that are kept of a run, as lists by step with five significant digits: 20 kB per run
    "(clip|kl|ratio|response|velocity)/.+|eval/.+_at_k|entropy/(mean|p10|p90)|optim/beta[12]|reward/mean"
)


@dataclass
class Config:
    sweep: t.one_of(SWEEPS) = "walk"
    quick: bool = False  # one seed and 5 steps: a test of the sweep itself, too short for verdicts
    results: str = ""  # file that the runs are added to; empty: results/reproduction-<sweep>.jsonl, or quick.jsonl
    seeds: t.Count | None = None  # runs of each setting; None: the sweep's, quick: 1
    first_seed: t.Seed = 0  # the seeds of the runs start here
    steps: t.Count | None = None  # of each run; None: the sweep's, quick: 5
    settings: tuple[t.one_of(SETTINGS), ...] = ()  # settings to run; empty: the sweep's
    out: Path = REPOSITORY / "out" / "reproduce"  # folder of the runs themselves
    lanes: t.Count | None = None  # runs at a time; None: one per GPU, or one per core and 5 GiB of memory


def main(config: Config) -> None:
    sweep = SWEEPS[config.sweep]
    name = "quick" if config.quick else f"reproduction-{config.sweep}"
    results = Path(config.results or REPOSITORY / "results" / f"{name}.jsonl")
    seeds = config.seeds or (1 if config.quick else sweep.seeds)
    steps = config.steps or (5 if config.quick else sweep.steps)
    names = dict.fromkeys(config.settings or sweep.settings)  # each once
    wanted = [(name, config.first_seed + seed) for seed in range(seeds) for name in names]  # whole seeds first
    own = open_to_append(results, "--results")
    if not lock_file(own):
        raise UserError(f"{results}: another sweep, or a run of one that was killed, is at work; wait until it ends")
    done = {(row["setting"], row["seed"]): row["arguments"] for row in read(results, RUN)}
    if other := [job for job in wanted if done.get(job, given := arguments(sweep, *job, steps)) != given]:
        raise UserError(f"{results} has {other[0][0]} with other arguments; name another file with --results")
    waiting = [job for job in wanted if job not in done]
    lanes = lanes_of_this_machine()[: config.lanes]
    print(f"{results}: {len(wanted) - len(waiting)} of {len(wanted)} runs are there; {len(lanes)} at a time")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; start again to continue"))  # runs `finally`
    running, failed = {}, []
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(waiting), unit="run", disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            free = [lane for lane in lanes if lane not in running]
            for lane in free[: len(waiting)]:
                running[lane] = Run(sweep, *waiting.pop(0), steps, config.out / config.sweep, lane, own.fileno())
            time.sleep(0.5)
            for lane, run in [(lane, run) for lane, run in running.items() if run.process.poll() is not None]:
                del running[lane]
                bar.update()
                if run.process.returncode == 0:
                    row = run.row()
                    with results.open("a") as file:
                        file.write(json.dumps(row, separators=(",", ":")) + "\n")
                    bar.write(f"{run.setting} seed {run.seed}: {row['minutes']} minutes")
                else:
                    failed.append(run)
                    bar.write(f"{run.setting} seed {run.seed} FAILED: see {run.log}", file=sys.stderr)
    finally:
        bar.close()
        for run in running.values():
            run.process.terminate()
        for run in running.values():  # a second signal, see `attach`, would keep them from saving
            run.process.wait()
        own.close()
    if failed:
        raise RunEnded(f"{len(failed)} of {len(wanted)} runs failed; start again to try them again")


class Run:
    """One run of train.py, on one lane: a core or a GPU. It holds the file `own`, and so its lock, until it ends."""

    def __init__(self, sweep: Sweep, setting: str, seed: int, steps: int, out: Path, lane: tuple[str, int], own: int):
        self.source, self.setting, self.seed = sweep.source, setting, seed
        self.arguments = arguments(sweep, setting, seed, steps)
        name = "".join(c if c.isalnum() or c in "._" else "-" for c in f"{setting}-{steps}-{seed}").replace("--", "-")
        self.folder, self.log = out / name, out / f"{name}.log"
        out.mkdir(parents=True, exist_ok=True)
        kind, index = lane
        # More threads than cores would slow each other down many times.
        own_part = {"CUDA_VISIBLE_DEVICES": str(index)} if kind == "gpu" else {"OMP_NUM_THREADS": "1"}
        training = ["train.py", *self.arguments.split(), "--out", str(out.resolve()), "--run-name", name]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["true"] if self.finished(steps) else [sys.executable, *training],
                cwd=REPOSITORY,
                env={"WANDB_MODE": "disabled"} | os.environ | own_part,
                stdout=log,
                stderr=log,
                pass_fds=[own],
                start_new_session=True,  # Ctrl-C is for the sweep, which tells its runs by SIGTERM
                preexec_fn=partial(attach, lane),
            )

    def finished(self, steps: int) -> bool:
        """Whether the run is done: the sweep was killed before it wrote the row. Not if it has other arguments."""
        last = [row for row in read_rows(self.folder / "metrics.jsonl") if row["step"] == steps]
        if not any(f"eval/{self.source}/avg_at_k" in row for row in last):
            return False
        given = self.arguments.split()
        return read_record(self.folder / "config.json")["command"][1 : len(given) + 1] == given

    def row(self) -> dict:
        metrics = read_rows(self.folder / "metrics.jsonl")
        steps = [row for row in metrics if row["step"]]
        evaluations = [row for row in metrics if f"eval/{self.source}/avg_at_k" in row]
        series = {}
        for name in sorted(name for name in set().union(*metrics) if KEPT.fullmatch(name)):
            values = [row.get(name) for row in (evaluations if name.startswith("eval/") else steps)]
            series[name] = [None if value is None else float(f"{value:.5g}") for value in values]
        return {
            "setting": self.setting,
            "seed": self.seed,
            "source": self.source,
            "arguments": self.arguments,
            "commit": read_record(self.folder / "config.json")["git_commit"],
            "minutes": round(sum(row.get(name, 0.0) for row in metrics for name in ("time/step", "time/eval")) / 60, 2),
            "eval_steps": [row["step"] for row in evaluations],
            "series": series,
        }


def attach(lane: tuple[str, int]) -> None:
    """In a run's process: stay on the core of its lane, and get SIGTERM, so save and end, once the sweep is dead."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    kind, index = lane
    if kind == "core":
        os.sched_setaffinity(0, {index})


def arguments(sweep: Sweep, setting: str, seed: int, steps: int) -> str:
    """The arguments of train.py for a run."""
    options = sweep.common | SETTINGS[setting] | {"steps": steps, "seed": seed}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def lanes_of_this_machine() -> list[tuple[str, int]]:
    if torch.cuda.is_available():
        return [("gpu", i) for i in range(torch.cuda.device_count())]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [("core", i) for i in sorted(os.sched_getaffinity(0))[: max(1, int(gib / 5))]]


if __name__ == "__main__":
    command(main, Config, __doc__)
