"""Checkpoints: Hugging Face folders that also hold the trainer's state. Each is written whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict
from torch.utils._pytree import tree_leaves, tree_map_only

from ce_gppo import __version__, lora, messages, parallel
from ce_gppo.messages import RunEnded, UserError

MANIFEST = "manifest.json"
WHOLE = {"options": state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)}  # not in shards
KEEP = 2  # newest checkpoints of a run: the second in case the first is damaged; the best is kept as well
NAME = re.compile(r"checkpoint-([0-9]{6}|[1-9][0-9]{6,})")


@dataclass
class State:
    """The state of a run that a checkpoint keeps beside weights and optimizer."""

    wandb_id: str
    step: int = 0  # the last one that is done
    batches: int = 0  # batches of prompts sampled so far
    entropy: float | None = None  # mean of the last rollout, nats
    control: tuple[float, float] = (0.5, 0.0)  # of the entropy controller, see entropy.py
    skipped: int = 0  # updates without a finite gradient, in a row
    no_signal: int = 0  # rollouts in which every group has equal rewards, in a row


class Saver:
    """Saves a run's checkpoints in a thread. Each is a folder that vLLM and transformers can load.

    With LoRA its weights are merged, and it has the folder `adapter`, which peft can load on the base model.
    It also has trainer.pt (optimizer, `State`, and a critic with its optimizer) and checksums. It is written aside,
    flushed and renamed, so checkpoint-<step> is whole. All but the newest KEEP and the best are then removed.
    """

    def __init__(self, run: Path, model, tokenizer, optimizer, step: int = 0, critic=None, accuracies=dict):
        """step: of the checkpoint that the run resumes from, or 0. accuracies(): held-out accuracy by step."""
        self.run, self.model, self.tokenizer, self.optimizer = run, model, tokenizer, optimizer
        self.critic, self.accuracies = critic, accuracies
        self.saved, self.saving = step, step  # steps of the last checkpoint that was written, and of the last begun
        self.thread: threading.Thread | None = None
        self.error = ""  # from the thread

    def save(self, state: State) -> None:
        """Copy everything; a thread of rank 0 writes it. First waits for the save before this one. Collective.

        Shards are gathered: a checkpoint has the same form for any number of ranks.
        """
        self.wait()
        self.saving = state.step
        weights = {name: weight.cpu() for name, weight in lora.named_weights(self.model) if parallel.is_main()}
        adapters = {name: parallel.full_tensor(p.detach()).cpu() for name, p in lora.adapters(self.model).items()}
        record, trained = {"optimizer": _optimizer_state(self.model, self.optimizer)}, [(self.model, self.optimizer)]
        if self.critic:
            trained.append((self.critic.model, self.critic.optimizer))
            record["critic"] = state_dict.get_model_state_dict(self.critic.model, **WHOLE)
            record["critic_optimizer"] = _optimizer_state(*trained[1])
        if parallel.is_main():
            weights, adapters, record = _apart((weights, adapters, record), trained)
            written = weights, adapters, record | {"state": asdict(state), "version": __version__}
            self.thread = threading.Thread(target=self._write, args=written)
            self.thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if any. If it failed, print a warning, and training goes on. Collective."""
        if self.thread:
            self.thread.join()
            self.thread = None
        error, self.error = parallel.all_gather(self.error)[0], ""
        if error:
            messages.say(f"checkpoint not written, training goes on: {error}", warning=True)
            self.saving = self.saved
        self.saved = self.saving

    def finish(self, state: State) -> None:
        """Save the run's last step, if it is not saved yet. RunEnded if that fails. Collective."""
        self.wait()
        if self.saved < state.step:
            self.save(state)
            self.wait()
        if self.saved < state.step:
            raise RunEnded(f"the checkpoint of step {state.step} could not be written")

    def _write(self, weights: dict, adapters: dict, record: dict) -> None:
        folder = self.run / f"checkpoint-{self.saving:06d}"
        try:
            _write(folder, self.model, weights, adapters, self.tokenizer, record)
            prune(self.run, KEEP, self.accuracies())
        except Exception as failure:  # of any kind: without this the checkpoint would seem to be written
            self.error = f"{folder}: {failure}"


def _apart(record, trained: list[tuple]):
    """The record with copies of those tensors that training goes on to change: what was gathered is one already."""
    used = [x for model, _ in trained for x in (*model.parameters(), *model.buffers())]
    used += [x for _, optimizer in trained for x in tree_leaves(list(optimizer.state.values()))]
    used = {parallel.to_local(x).untyped_storage().data_ptr() for x in used if isinstance(x, torch.Tensor)}
    return tree_map_only(torch.Tensor, lambda x: x.clone() if x.untyped_storage().data_ptr() in used else x, record)


def _optimizer_state(model, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state by the names of parameters. Collective.

    torch makes a state for an optimizer that has none, by a step with gradients of 0. That is not to be counted: a
    checkpoint in the critic's warm-up would otherwise make the policy's first updates smaller.
    """
    new = not optimizer.state
    record = state_dict.get_optimizer_state_dict(model, optimizer, **WHOLE)
    if new:
        for state in (*optimizer.state.values(), *record.get("state", {}).values()):  # the record's: on rank 0
            state["step"].zero_()
    return record


def _write(folder: Path, model, weights: dict, adapters: dict, tokenizer, trainer: dict) -> None:
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside, state_dict=weights, save_original_format=False)  # they have these names already
        tokenizer.save_pretrained(aside)
        if adapters:
            lora.write_adapters(aside, model, adapters)
        torch.save(trainer, aside / "trainer.pt")
        # rglob, as a tokenizer with several chat templates makes a folder inside.
        sums = {str(path.relative_to(aside)): _checksum(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        (aside / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # perhaps its files have filled the disk
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems (CIFS, FUSE, Ceph) cannot flush a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def try_saving(model, tokenizer) -> None:
    """Write a checkpoint without weights to a scratch folder. UserError if a part can be loaded but not saved."""
    parts = {"config": model.config, "generation config": model.generation_config, "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in parts.items():
            told = f"model '{model.name_or_path}': its {name} can be loaded but not saved; correct its file"
            with messages.explained(told):
                part.save_pretrained(scratch)


def load(folder: Path, model, optimizer: torch.optim.Optimizer, critic=None) -> State:
    """Load a checkpoint's optimizer and critic into the objects given, and return its state. Weights: model.py."""
    with messages.explained(f"the optimizer in {folder} does not fit the model"):
        saved = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
        state_dict.set_optimizer_state_dict(model, optimizer, saved["optimizer"], **WHOLE)
    if any(moments["exp_avg"].shape != parameter.shape for parameter, moments in optimizer.state.items()):
        raise UserError(f"{folder}: its optimizer belongs to another model, as the shapes differ")
    if (step := saved["state"]["step"]) != step_of(folder):
        raise UserError(f"{folder}: it was made after step {step}, so it has another name; rename it")
    if critic:
        state_dict.set_model_state_dict(critic.model, saved["critic"], **WHOLE)
        state_dict.set_optimizer_state_dict(critic.model, critic.optimizer, saved["critic_optimizer"], **WHOLE)
    return State(**saved["state"])


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run that is not damaged, or None. A warning names each damaged one."""
    for folder in reversed(all_of(run)):
        if (problem := damage(folder)) is None:
            return folder
        messages.say(f"{folder} is damaged ({problem}); going back to the one before", warning=True)
    return None


def all_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Folders with other names, such as copies, belong to the user."""
    return sorted((path for path in run.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def damage(folder: Path) -> str | None:
    """The first problem with a checkpoint's files, by their checksums; None if there is none."""
    try:
        sums = {"trainer.pt": "none"} | json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return f"no readable {MANIFEST}"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != expected:
            return f"{name} is not what was written"
    return None


def prune(run: Path, keep: int, accuracies: dict[int, float]) -> None:
    """Remove all but the newest `keep` checkpoints and that of the highest accuracy, of equal ones the newest."""
    known = [folder for folder in all_of(run) if step_of(folder) in accuracies]
    best = max(reversed(known), key=lambda folder: accuracies[step_of(folder)], default=None)
    for folder in all_of(run)[:-keep]:
        if folder != best:
            shutil.rmtree(folder, ignore_errors=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
