"""A run is its folder: new, continued or finished. Requests to stop, and what ends a run early."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import NamedTuple

import torch

from ce_gppo import __version__, checkpoint, messages, parallel
from ce_gppo.config import read_record
from ce_gppo.log import read_rows
from ce_gppo.messages import RunEnded, UserError

ROOT = Path(__file__).parents[1]
HASHED = 2**28  # bytes at the end of a file: a quarter of a second
MAX_SKIPPED_UPDATES = 5  # in a row, before the run ends
MAX_NO_SIGNAL = 20  # rollouts in a row in which every group has equal rewards, before the run ends


@messages.explained("the run's folder cannot be read")
def locate(config, resume: str, files: list[Path]) -> tuple[Path, Path | None]:
    """(folder, newest checkpoint or None) of the run to start, new or continued. Creates no file in a new one yet.

    UserError if the run is finished or being trained; without `resume`, the run's folder, also if its settings differ,
    or if code, data, base model or `files`, those of the user's reward functions, have changed since it began.
    """
    name = config.run_name or f"{config.objective}-seed{config.seed}-{time.strftime('%m%d-%H%M%S')}"
    folder, other = Path(resume or Path(config.out) / name), "choose another name with --run-name"
    if not (folder / "config.json").exists():
        if folder.exists() and {path.name for path in folder.iterdir()} - {".lock", "source", "config.partial"}:
            raise UserError(f"{folder} has files, but no config.json, so it is not the folder of a run; {other}")
        return folder, None
    saved, now = read_record(folder / "config.json")["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    differ = [key for key in now | saved if saved.get(key) != now.get(key) and key not in ("out", "run_name")]
    if differ and not resume:
        told = ", ".join(f"{key} = {saved.get(key)}, not {now.get(key)}" for key in differ)
        raise UserError(f"{folder} belongs to a run with other settings: {told}; {other}")
    rows = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    if any(row["step"] == config.steps and any(key.startswith("eval/") for key in row) for row in rows):
        raise UserError(f"{folder} is finished: its metrics.jsonl has all {config.steps} steps; to train anew, {other}")
    take(folder)
    last = checkpoint.newest(folder)
    if not last and checkpoint.all_of(folder):
        raise UserError(f"{folder}: no checkpoint is whole, so it cannot go on; {other}")
    if changed := ", ".join(changes(folder, config, files)):
        if not resume:
            how = f"continue it with --resume {shlex.quote(str(folder))}, or {other}"
            raise UserError(f"{folder}: these have changed since the run began: {changed}; {how}")
        messages.say(f"changed since the run began: {changed}", warning=True)
    where = f"after {last.name}" if last else "from its start, as there is no checkpoint yet"
    if (done := max((row["step"] for row in rows), default=0)) > (checkpoint.step_of(last) if last else 0):
        where += f"; later steps, up to {done}, are done again, and their rows kept beside"
    messages.say(f"going on with {folder} {where}; a new run of the same settings needs its own name: --run-name NAME")
    return folder, last


def changes(folder: Path, config, files: list[Path]) -> list[str]:
    """Sources and inputs that have changed since the run in `folder` began, or was last continued with `resume`."""
    before = read_record(folder / "config.json").get("inputs", {})
    if not isinstance(before, dict):  # edited, or of another version
        return ["inputs in config.json, which cannot be compared"]
    return [name for name, mark in fingerprints(config, files).items() if mark != before.get(name)]


def fingerprints(config, files: list[Path]) -> dict[str, str]:
    """Size and checksum of each source, and each file of data, base model and `files` that is there. See HASHED.

    A base model that was deleted is no change: the checkpoint has the weights, and only kl_coef needs it.
    """
    paths = [*map(Path, f"{config.train_data},{config.eval_data}".split(",")), *files]
    paths += [path for level in ("*", "*/*") for path in sorted(Path(config.model).glob(level))]
    marks = {}
    for name, path in ({path: path for path in paths} | {name: ROOT / name for name in sources()}).items():
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, (size := path.stat().st_size) - HASHED))
                marks[str(name)] = f"{size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return marks


def sources() -> list[Path]:
    return [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("ce_gppo/**/*.py"))]


@messages.explained("the run's folder cannot be written")
def claim(folder: Path, config, recipe: str, step: int, files: list[Path]) -> None:
    """Make the folder and lock it until this process ends. Write the settings, inputs and a copy of the sources.

    Called when all else has been checked: a start that is refused leaves no folder. A run that is continued after
    `step` with changed sources gets a copy of these in another folder.
    """
    take(folder)
    path, copy = folder / "config.json", folder / "source"
    if path.exists():
        record, changed = read_record(path) | {"config": dataclasses.asdict(config)}, changes(folder, config, files)
        copy = folder / f"source-from-step-{step + 1:06d}" if any(name.endswith(".py") for name in changed) else None
    else:
        record = {"config": dataclasses.asdict(config), "recipe": recipe, "git_commit": None, "command": sys.argv}
        record["version"] = __version__
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit
            commit = ["git", "rev-parse", "HEAD"]
            record["git_commit"] = subprocess.check_output(
                commit, cwd=ROOT, stderr=subprocess.DEVNULL, text=True
            ).strip()
    for source in sources() if copy else []:
        (copy / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, copy / source)
    path.with_suffix(".partial").write_text(json.dumps(record | {"inputs": fingerprints(config, files)}, indent=2))
    path.with_suffix(".partial").rename(path)  # last, and whole: a folder that has it is a run


@functools.cache  # the file is open, and so the folder locked, as long as the process lives
def take(folder: Path) -> typing.IO:
    """Make the folder and lock it until this process ends. UserError if another process is training there."""
    file = open_to_append(folder / ".lock", "--out")
    if not lock_file(file):
        raise UserError(f"{folder}: another process is training there; choose another name with --run-name")
    return file


def lock_file(file: typing.IO) -> bool:
    """Whether no other process has locked this open file. From now on this one has, until it closes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        messages.say(f"{file.name} cannot be locked ({error.strerror}): start no second run there", warning=True)
    return True


def open_to_append(path: Path, option: str) -> typing.TextIO:
    """Open a file, and make it and its folder if missing. Called before hours are spent on its contents."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from None


class StopRequest:
    """Ctrl-C, SIGTERM, a closed terminal, a scheduler's warning: calling it then returns True, and the run is saved.

    A second one ends the program at once; warnings do not count, as the scheduler sends SIGTERM after them. What the
    shell had the process ignore, as nohup does, stays ignored.
    """

    WARNINGS = (signal.SIGUSR1, signal.SIGXCPU)  # Slurm's, and every second that of a limit on CPU time

    def __init__(self):
        self.signals = set()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *self.WARNINGS):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return bool(self.signals)

    def _handle(self, number: int, frame) -> None:
        if number not in self.WARNINGS and self.signals.difference(self.WARNINGS):
            os._exit(128 + number)  # metrics are on the disk, checkpoints are whole
        if not self.signals:
            name = signal.Signals(number).name
            messages.say(f"\n{name}: finishing this step's updates, then saving; once more to stop now")
        self.signals.add(number)


def watch_skipped(folder: Path, state: checkpoint.State, index: int, batch, update, lr: float) -> bool:
    """Count skipped updates in a row; keep this rank's inputs of one in `folder`, a file of torch's.

    batch, update: dataclasses. Returns True if there are too many, see check_end.
    """
    state.skipped = state.skipped + 1 if update.skipped else 0
    if update.skipped:
        path = folder / f"step-{state.step + 1:06d}-update-{index}-rank-{parallel.rank()}.pt"
        try:
            folder.mkdir(exist_ok=True)
            torch.save({"batch": vars(batch), "loss": update.loss, "grad_norm": update.grad_norm, "lr": lr}, path)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of a full disk
            messages.say(f"the inputs of a skipped update are not kept in {folder} ({error})", warning=True)
    return state.skipped >= MAX_SKIPPED_UPDATES


class End(NamedTuple):
    """What the end of a run means; docs/interruptions.md has the table."""

    kind: str  # finished, stopped, ended (by a rule) or failed
    exit_code: int  # of the process, and of the run in W&B
    sentence: str  # after the table at the end, for what is not finished

    @classmethod
    def of(cls, error: BaseException | None, evaluated: bool, step: int, folder: Path) -> "End":
        """error: that ends the training loop, if any. evaluated: the last step has its evaluation. step: last done."""
        again, code = f'continue with: make train ARGS="--resume {folder}"', messages.exit_code(error)
        if error is None and evaluated:
            return cls("finished", code, "")
        kind = "stopped" if error is None else "ended" if isinstance(error, RunEnded) else "failed"
        return cls(kind, code, f"{kind} after step {step}; {again}")


def check_end(state: checkpoint.State, saver: checkpoint.Saver, lr: float) -> None:
    """After too many skipped updates or rollouts without a signal in a row: finish the checkpoint, raise RunEnded."""
    problem = ""
    if state.skipped >= MAX_SKIPPED_UPDATES:
        problem = f"{state.skipped} updates in a row had no finite gradient; {saver.run / 'skipped'} has their inputs"
        problem += f", and a lower lr than {lr:g} may help"
    elif state.no_signal >= MAX_NO_SIGNAL:
        problem = f"{state.no_signal} rollouts in a row had no group with unequal rewards; use easier or harder "
        problem += "problems, or look in samples.jsonl for right answers that score 0"
    if problem:
        saver.finish(state)
        raise RunEnded(problem)
