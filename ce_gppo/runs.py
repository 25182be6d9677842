"""The folder of a run: a new one, or one to go on with; and requests to stop."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from ce_gppo import checkpoint, dist
from ce_gppo.types import Response, Update, UserError

ROOT = Path(__file__).parents[1]


def locate(config, resume: str) -> tuple[Path, Path | None]:
    """(folder, newest checkpoint or None) of the run to start: new, resumed, or interrupted. Makes nothing yet.

    UserError where the folder belongs to another run.
    """
    folder = Path(resume) if resume else interrupted(config) or new_folder(config)
    last = checkpoint.newest(folder)
    if (folder / "config.json").exists():
        after = f"after {last.name}" if last else "from its start, as there is no checkpoint yet"
        dist.say(f"going on with {folder} {after}; a new run of the same settings needs its own name: --run-name NAME")
    return folder, last


def interrupted(config) -> Path | None:
    """The newest run with exactly these settings that is neither finished nor being trained by another process."""
    wanted = comparable(dataclasses.asdict(config))
    out = Path(config.out)
    paths = [folder / "config.json" for folder in out.iterdir()] if out.is_dir() else []
    paths = [path for path in paths if path.is_file() and config.run_name in ("", path.parent.name)]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        finished = (path.parent / f"checkpoint-{config.steps:06d}").exists()
        try:
            same = comparable(json.loads(path.read_text())["config"]) == wanted
        except (ValueError, KeyError, TypeError):  # not a run's
            continue
        if same and not finished and lock(path.parent, keep=False):
            return path.parent
    return None


def comparable(config: dict) -> dict:
    """The settings as they come back from a JSON file, without the run's name."""
    return json.loads(json.dumps(config | {"run_name": ""}))


def new_folder(config) -> Path:
    name = config.run_name or f"{config.objective}-seed{config.seed}-{time.strftime('%m%d-%H%M%S')}"
    folder = Path(config.out) / name
    if folder.exists() and {path.name for path in folder.iterdir()} - {".lock"}:
        raise UserError(
            f"{folder} belongs to a run that is finished or has other settings; choose another name with --run-name"
        )
    return folder


def claim(folder: Path, config, recipe: str) -> None:
    """Make the folder and lock it until this process ends. Of a new run it gets the settings and the sources.

    UserError if another process trains there, or if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); --out names another folder") from None
    if not lock(folder):
        raise UserError(f"{folder}: another process is training there; choose another name with --run-name")
    if (folder / "config.json").exists():
        return
    (folder / "source").mkdir(exist_ok=True)
    for source in [*ROOT.glob("*.py"), *ROOT.glob("ce_gppo/**/*.py")]:
        copy = folder / "source" / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    record = {"config": dataclasses.asdict(config), "recipe": recipe, "git_commit": commit(), "command": sys.argv}
    aside = folder / "config.partial"
    aside.write_text(json.dumps(record, indent=2) + "\n")
    aside.rename(folder / "config.json")  # last, and whole: a folder that has it is a run


def commit() -> str | None:
    """The git commit of the sources; None without git, or outside a repository."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


_locks = []  # open as long as the process lives


def lock(folder: Path, keep: bool = True) -> bool:
    """Whether no other process is training in this folder. From now on this one is, if `keep`."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        dist.say(f"{folder} cannot be locked ({error.strerror}): start no second run there", warning=True)
    if keep:
        _locks.append(file)
    return True


class StopRequest:
    """Ctrl-C, SIGTERM or a closed terminal: the current rollout is lost, updates finish, and the run is saved.

    Calling it tells whether there was a request. A second one ends the program at once.
    """

    def __init__(self):
        self.signal = ""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return bool(self.signal)

    def _handle(self, number: int, frame) -> None:
        if self.signal:
            os._exit(128 + number)  # metrics are on the disk, checkpoints are whole
        self.signal = signal.Signals(number).name
        dist.say(f"\n{self.signal}: finishing the update, then saving; once more to stop now")


def save_skipped(folder: Path, step: int, index: int, responses: list[Response], update: Update) -> None:
    """Keep this rank's part of a skipped update, to be looked at with torch.load(..., weights_only=True)."""
    folder.mkdir(exist_ok=True)
    fields = [dataclasses.asdict(response) for response in responses]
    record = {"responses": fields, "micro_batch_losses": update.micro_batch_losses, "grad_norm": update.grad_norm}
    torch.save(record, folder / f"step-{step:06d}-update-{index}-rank-{dist.rank()}.pt")
