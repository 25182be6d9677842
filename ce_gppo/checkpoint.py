"""Checkpoints: Hugging Face folders with the trainer's state inside, written whole or not at all, checked when read."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ce_gppo import dist
from ce_gppo.types import UserError, starting

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-([0-9]{6}|[1-9][0-9]{6,})")


@dataclass
class State:
    """What a checkpoint keeps beside weights and optimizer."""

    wandb_id: str
    step: int = 0  # the last one that is done
    entropy: float | None = None  # mean of the last rollout, nats
    control: tuple[float, float] = (0.5, 0.0)  # the entropy controller's u and relative error
    skipped: int = 0  # updates without a finite gradient, in a row
    no_signal: int = 0  # rollouts in which every group has equal rewards, in a row


def save(folder: Path, model, tokenizer, optimizer: torch.optim.Optimizer, state: State) -> None:
    """A folder that vLLM and transformers load as it is, with trainer.pt (optimizer and `state`) and checksums inside.

    Collective: shards are gathered, rank 0 writes, all in the same form whatever the number of ranks. Written aside,
    flushed to the disk and renamed: a folder of this name is whole. Raises OSError, on every rank, where rank 0 could
    not write; what was there before stays.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    named = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # tied weights once
    weights = {name: tensor for name, tensor in weights.items() if name in named}
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    error = None
    if dist.is_main():
        try:
            _write(folder, model, weights, tokenizer, {"optimizer": moments, "state": asdict(state)})
        except (OSError, RuntimeError, SafetensorError) as failure:  # torch and safetensors raise their own
            error = f"{folder}: {failure}"
    if error := dist.all_gather(error)[0]:
        raise OSError(error)


def save_or_warn(run: Path, model, tokenizer, optimizer: torch.optim.Optimizer, state: State, keep: int) -> bool:
    """Save the run's checkpoint after the step in `state`, and remove all but the newest `keep`. Collective.

    A checkpoint that cannot be written does not end the run: False, with a warning that says why.
    """
    try:
        save(run / f"checkpoint-{state.step:06d}", model, tokenizer, optimizer, state)
    except OSError as error:
        dist.say(f"checkpoint not written, training goes on: {error}", warning=True)
        return False
    if dist.is_main():
        prune(run, keep)
    return True


def _write(folder: Path, model, weights: dict, tokenizer, trainer: dict) -> None:
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        torch.save(trainer, aside / "trainer.pt")
        # Folders inside too: a tokenizer with several chat templates makes one.
        sums = {str(path.relative_to(aside)): _checksum(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        (aside / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")
        for path in [*aside.rglob("*"), aside]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def try_saving(model, tokenizer) -> None:
    """Write a checkpoint without its weights to a scratch folder. UserError for what can be loaded but not saved."""
    parts = {"config": model.config, "generation config": model.generation_config, "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in parts.items():
            try:
                part.save_pretrained(scratch)
            except Exception as error:  # each class has its own checks
                raise UserError(
                    f"model '{model.name_or_path}': its {name} can be loaded but not saved, so there would be no "
                    f"checkpoint; correct its file: {' '.join(str(error).split())[:300]}"
                ) from None


def load(folder: Path, model, optimizer: torch.optim.Optimizer) -> State:
    """Load the optimizer of a checkpoint in place; returns the state. `model.load_model` loads the weights."""
    starting(f"the optimizer in {folder} does not fit the model")
    saved = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
    set_optimizer_state_dict(
        model, optimizer, saved["optimizer"], options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return State(**saved["state"])


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or None. Damaged ones are named and skipped."""
    for folder in reversed(all_of(run)):
        if (problem := damage(folder)) is None:
            return folder
        print(f"{folder} is damaged ({problem}); going back to the one before", file=sys.stderr)
    return None


def all_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. A folder with any other name, such as a copy, is its user's."""
    return sorted((path for path in run.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by their checksums."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != expected:
            return f"{name} is not what was written"
    return None


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in all_of(run)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
