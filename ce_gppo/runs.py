"""The folder of a run, new or resumed, and requests to stop."""

import atexit
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import torch

from ce_gppo import checkpoint, messages, parallel
from ce_gppo.messages import RunEnded, UserError
from ce_gppo.types import Response, Update, starting

ROOT = Path(__file__).parents[1]
COPIES = re.compile(r"source(-from-step-\d{6,})?")  # folders with other names belong to the user
WHOLE = 2**28  # bytes of a file that is hashed whole: a quarter of a second
MAX_SKIPPED_UPDATES = 5  # in a row, before the run ends
MAX_NO_SIGNAL = 20  # rollouts in a row in which every group has equal rewards, before the run ends


def locate(config, resume: str) -> tuple[Path, Path | None]:
    """(folder, newest checkpoint or None) of the run to start: new, resumed, or interrupted. Creates no file yet.

    UserError if the folder belongs to another run. UserError if code, data or base model have changed since an
    interrupted run began, unless `resume` names it.
    """
    starting(f"the runs in {config.out} cannot be read")
    folder = Path(resume) if resume else interrupted(config) or new_folder(config)
    if (folder / "config.json").exists():
        take(folder, keep=False)  # what follows takes a while, and starts only here
    last = checkpoint.newest(folder)
    if not last and checkpoint.all_of(folder):
        raise UserError(f"{folder}: no checkpoint is whole, so it cannot go on; begin a new run with --run-name NAME")
    if (folder / "config.json").exists():
        if changed := ", ".join(changes(folder, config)):
            if not resume:
                raise UserError(
                    f"{folder} was interrupted and would be resumed, but these have changed since: {changed}. Resume "
                    f"it anyway with --resume {shlex.quote(str(folder))}, or begin a new run with --run-name NAME"
                )
            messages.say(f"changed since the run began: {changed}", warning=True)
        after = f"after {last.name}" if last else "from its start, as there is no checkpoint yet"
        if last and checkpoint.step_of(last) >= config.steps:
            after += f", though it has all its {config.steps} steps: only its last evaluation is done if it is missing"
        messages.say(
            f"going on with {folder} {after}; a new run of the same settings needs its own name: --run-name NAME"
        )
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
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not the file of a run, or not readable
            continue
        with contextlib.suppress(OSError):  # a folder of another user, which cannot be locked
            if same and not finished and lock(path.parent, keep=False):
                return path.parent
    return None


def comparable(config: dict) -> dict:
    """The settings as they come back from a JSON file, without the run's name."""
    return json.loads(json.dumps(config | {"run_name": ""}))


def changes(folder: Path, config) -> list[str]:
    """Sources, data and files of the base model that have changed since the run in `folder` began (or was resumed)."""
    copied = newest_sources(folder)
    before = {path.relative_to(copied): path.read_bytes() for path in copied.rglob("*.py")} if copied else {}
    now = {path.relative_to(ROOT): path.read_bytes() for path in sources()}
    changed = [str(path) for path in sorted(before | now) if before and before.get(path) != now.get(path)]
    recorded = json.loads((folder / "config.json").read_text()).get("inputs", {})
    if not isinstance(recorded, dict):  # edited, or of another version
        return [*changed, "inputs in config.json, which cannot be compared"]
    current = fingerprints(config)  # a deleted base model is no change: the checkpoint has the weights
    return changed + [path for path, mark in recorded.items() if current.get(path, mark) != mark]


def fingerprints(config) -> dict[str, str]:
    """A checksum for each file of data, verifiers and base model; of large files (WHOLE) only of size and both ends."""
    paths = [Path(path) for path in f"{config.train_data},{config.eval_data}".split(",")]
    import reward

    paths += [path for path in reward.files(config.rewards) if path.resolve() not in sources()]
    if Path(config.model).is_dir():
        paths += sorted(path for level in ("*", "*/*") for path in Path(config.model).glob(level))
    marks = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                size = path.stat().st_size
                mark = hashlib.sha256(file.read(WHOLE if size < WHOLE else 2**20))
                file.seek(max(file.tell(), size - 2**20))
                mark.update(file.read() + str(size).encode())
            marks[str(path)] = mark.hexdigest()
    return marks


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *ROOT.glob("ce_gppo/**/*.py")]


def newest_sources(folder: Path) -> Path | None:
    """The copy of the sources that the run used last."""
    return max((path for path in folder.glob("source*") if COPIES.fullmatch(path.name)), default=None)


def copy_sources(folder: Path) -> None:
    for source in sources():
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)


def new_folder(config) -> Path:
    name = config.run_name or f"{config.objective}-seed{config.seed}-{time.strftime('%m%d-%H%M%S')}"
    folder = Path(config.out) / name
    if folder.exists() and {path.name for path in folder.iterdir()} - {".lock"}:
        if (folder / "config.json").exists():
            take(folder, keep=False)
        raise UserError(
            f"{folder} belongs to a run that is finished or has other settings; choose another name with --run-name"
        )
    return folder


def claim(folder: Path, config, recipe: str, step: int) -> None:
    """Make the folder and lock it until this process ends. In a new run, write the settings and a copy of the sources.

    A new folder is removed again if the process ends before the run begins, for example because its model cannot be
    trained. A run that is resumed after `step` with changed sources gets a copy of these in another folder.

    UserError if another process trains there, or if the folder cannot be made.
    """
    starting(f"the run's folder {folder} cannot be written")
    take(folder)
    if (folder / "config.json").exists():
        if any(path.endswith(".py") for path in changes(folder, config)):
            copy_sources(folder / f"source-from-step-{step + 1:06d}")
        return
    atexit.register(withdraw, folder)
    copy_sources(folder / "source")
    record = {"config": dataclasses.asdict(config), "recipe": recipe, "git_commit": commit(), "command": sys.argv}
    record["inputs"] = fingerprints(config)
    aside = folder / "config.partial"
    aside.write_text(json.dumps(record, indent=2) + "\n")
    aside.rename(folder / "config.json")  # last, and whole: a folder that has it is a run


def withdraw(folder: Path) -> None:
    """Remove the files that `claim` made, if the run has not begun. It would otherwise count as interrupted."""
    if not (folder / "metrics.jsonl").exists():
        shutil.rmtree(folder / "source", ignore_errors=True)
        for name in ("config.json", ".lock"):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder has other files
            folder.rmdir()


def commit() -> str | None:
    """The git commit of the sources; None without git, or outside a repository."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def take(folder: Path, keep: bool = True) -> None:
    """Make the folder, and `lock` it. UserError if it cannot be made, or if another process is training there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked = lock(folder, keep)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UserError(f"{folder}: cannot be made ({error}); --out names another folder") from None
    if not locked:
        raise UserError(f"{folder}: another process is training there; choose another name with --run-name")


_locks = []  # open as long as the process lives


def lock(folder: Path, keep: bool = True) -> bool:
    """True if no other process is training in this folder. With `keep` the lock is held until this process ends."""
    file = (folder / ".lock").open("w")
    if not lock_file(file):
        return False
    if keep:
        _locks.append(file)
    return True


def lock_file(file: typing.IO) -> bool:
    """Whether no other process has locked this open file. From now on this one has, until it closes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        messages.say(f"{file.name} cannot be locked ({error.strerror}): start no second run there", warning=True)
    return True


class StopRequest:
    """Ctrl-C, SIGTERM or a closed terminal: the current rollout is lost, updates finish, and the run is saved.

    Calling it returns True after a request. A second one ends the program at once. What the shell had the process
    ignore, as nohup does with a closed terminal, stays ignored.
    """

    def __init__(self):
        self.signal = ""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return bool(self.signal)

    def _handle(self, number: int, frame) -> None:
        if self.signal:
            os._exit(128 + number)  # metrics are on the disk, checkpoints are whole
        self.signal = signal.Signals(number).name
        messages.say(f"\n{self.signal}: finishing this step's updates, then saving; once more to stop now")


def watch_skipped(
    folder: Path, state: checkpoint.State, index: int, responses: list[Response], update: Update, lr: float
) -> None:
    """Save this rank's inputs of a skipped update. torch.load(..., weights_only=True) reads them.

    RunEnded after MAX_SKIPPED_UPDATES in a row.
    """
    state.skipped = state.skipped + 1 if update.skipped else 0
    if update.skipped:
        fields = [dataclasses.asdict(response) for response in responses]
        record = {"responses": fields, "micro_batch_losses": update.micro_batch_losses, "grad_norm": update.grad_norm}
        try:
            folder.mkdir(exist_ok=True)
            torch.save(record, folder / f"step-{state.step + 1:06d}-update-{index}-rank-{parallel.rank()}.pt")
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of a full disk
            messages.say(f"the inputs of a skipped update are not kept in {folder} ({error})", warning=True)
    if state.skipped >= MAX_SKIPPED_UPDATES:
        raise RunEnded(
            f"{state.skipped} updates in a row had no finite gradient; {folder} has their inputs, "
            f"and a lower lr than {lr:g} may help"
        )


def check_signal(state: checkpoint.State, saver: checkpoint.Saver) -> None:
    """After MAX_NO_SIGNAL rollouts in a row without a signal: finish the checkpoint, then raise RunEnded."""
    if state.no_signal >= MAX_NO_SIGNAL:
        saver.finish(state)
        raise RunEnded(
            f"{state.no_signal} rollouts in a row had no group with unequal rewards; use easier or harder "
            "problems, or look in samples.jsonl for right answers that score 0"
        )
