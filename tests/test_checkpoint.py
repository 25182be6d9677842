"""Checkpoints are written whole or not at all, and damaged ones are skipped."""

import copy
import errno
import os
import stat
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from ce_gppo import checkpoint
from ce_gppo.checkpoint import Saver, State
from ce_gppo.messages import RunEnded, UserError
from ce_gppo.model import load_model
from data.base import make_model
from helpers import refuses


def train_a_step(model, optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.fixture
def optimizer(tiny_model):
    return torch.optim.AdamW(tiny_model.parameters(), lr=1e-2)


@pytest.fixture
def saver(tiny_model, tokenizer, optimizer, tmp_path):
    return Saver(tmp_path, tiny_model, tokenizer, optimizer)


def save(saver, state: State):
    """Save and wait; the folder."""
    saver.save(state)
    saver.wait()
    return saver.run / f"checkpoint-{state.step:06d}"


def test_round_trip(tiny_model, optimizer, saver, tmp_path):
    """Weights and optimizer come back bit for bit, and transformers loads the folder as it is."""
    train_a_step(tiny_model, optimizer, 0)
    state = State("abc", step=7, control=(0.25, -0.1), entropy=0.3, no_signal=2)
    folder = save(saver, state)
    assert not list(tmp_path.glob("*.partial")) and checkpoint.damage(folder) is None

    saved = {name: p.clone() for name, p in tiny_model.named_parameters()}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.get_input_embeddings().weight, saved["model.embed_tokens.weight"])
    model, _ = load_model(str(folder))
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    new = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert checkpoint.load(folder, model, new) == state
    train_a_step(tiny_model, optimizer, 1)
    train_a_step(model, new, 1)
    assert all(map(torch.equal, tiny_model.parameters(), model.parameters()))


def test_saving_an_optimizer_without_a_step_changes_no_later_step(tiny_model, optimizer, saver):
    """While a critic warms up, the policy's has none. torch makes its state by a step, and would count it."""
    models = {"never saved": copy.deepcopy(tiny_model), "saved": tiny_model}
    optimizers = {"never saved": torch.optim.AdamW(models["never saved"].parameters(), lr=1e-2), "saved": optimizer}
    folder = save(saver, State("id", step=1))
    models["resumed"], _ = load_model(str(folder))
    optimizers["resumed"] = torch.optim.AdamW(models["resumed"].parameters(), lr=1e-2)
    checkpoint.load(folder, models["resumed"], optimizers["resumed"])
    for name, model in models.items():
        train_a_step(model, optimizers[name], 0)
        assert all(map(torch.equal, model.parameters(), models["never saved"].parameters())), name


def test_a_save_that_fails_leaves_the_old_checkpoint(saver, tmp_path, monkeypatch, capsys):
    folder = save(saver, State("id", 1))
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    save(saver, State("id", 1, no_signal=1))
    assert "checkpoint-000001: disk full" in capsys.readouterr().err
    assert torch.load(folder / "trainer.pt", weights_only=True)["state"]["no_signal"] == 0
    assert checkpoint.damage(folder) is None and checkpoint.all_of(tmp_path) == [folder]
    assert not list(tmp_path.glob("*.partial")), "a partial checkpoint would use up the full disk"
    saver.finish(State("id", 1))
    with pytest.raises(RunEnded, match="checkpoint of step 2 could not be written"):
        saver.finish(State("id", 2))
    monkeypatch.undo()
    saver.finish(State("id", 2))
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-000002"


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("zip"), ValueError("odd"), KeyError("key")])
def test_every_failure_of_the_saving_thread_is_reported(saver, tmp_path, monkeypatch, capsys, failure):
    def fails(*_):
        raise failure

    monkeypatch.setattr(checkpoint, "_write", fails)
    save(saver, State("id", 1))
    assert "checkpoint not written, training goes on" in capsys.readouterr().err and saver.saved == 0
    with pytest.raises(RunEnded, match="checkpoint of step 1 could not be written"):
        saver.finish(State("id", 1))


def test_training_goes_on_while_a_checkpoint_is_written(tiny_model, optimizer, saver, tmp_path, monkeypatch):
    """The weights written are those at the start of the save; the next save waits for it."""
    train_a_step(tiny_model, optimizer, 0)
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    moments = [optimizer.state[p]["exp_avg"].clone() for p in tiny_model.parameters()]
    write, may_write = checkpoint._write, threading.Event()
    monkeypatch.setattr(checkpoint, "_write", lambda *args: (may_write.wait(), write(*args)))
    state = State("id", 1)
    saver.save(state)
    train_a_step(tiny_model, optimizer, 1)
    state.step = 2
    assert saver.thread.is_alive() and checkpoint.newest(tmp_path) is None
    may_write.set()
    saver.save(state)
    saver.wait()
    one, two = (tmp_path / f"checkpoint-{step:06d}" for step in (1, 2))
    assert [folder for folder in checkpoint.all_of(tmp_path) if checkpoint.damage(folder) is None] == [one, two]
    model, _ = load_model(str(one))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    new = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert checkpoint.load(one, model, new).step == 1
    assert all(torch.equal(new.state[p]["exp_avg"], m) for p, m in zip(model.parameters(), moments, strict=True))
    assert not torch.equal(load_model(str(two))[0].model.norm.weight, model.model.norm.weight)


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: corrupt(folder / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda folder: (folder / "trainer.pt").unlink(), "trainer.pt is missing"),
        (lambda folder: (folder / "config.json").write_text(""), "config.json is not what was written"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "trainer.pt is not what was written"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(saver, tmp_path, capsys, damage, said):
    folders = [save(saver, State("id", step)) for step in (5, 10)]
    assert checkpoint.newest(tmp_path) == folders[1]
    damage(folders[1])
    assert checkpoint.newest(tmp_path) == folders[0]
    assert f"{folders[1]} is damaged ({said})" in capsys.readouterr().err
    damage(folders[0])
    assert checkpoint.newest(tmp_path) is None


def test_a_renamed_checkpoint_and_another_models_optimizer_are_refused(tiny_model, optimizer, saver, tokenizer):
    train_a_step(tiny_model, optimizer, 0)
    folder = save(saver, State("abc", step=7))
    wider = make_model(tokenizer, hidden_size=96, num_layers=1)
    with pytest.raises(UserError, match="belongs to another model, as the shapes differ"):
        checkpoint.load(folder, wider, torch.optim.AdamW(wider.parameters(), lr=1e-2))
    folder = folder.rename(folder.with_name("checkpoint-000009"))
    refuses("it was made after step 7, so it has another name", checkpoint.load, folder, tiny_model, optimizer)


def test_the_remains_of_a_killed_save_are_no_checkpoint(saver, tmp_path):
    save(saver, State("id", 2))
    (tmp_path / "checkpoint-000003.partial").mkdir()
    (tmp_path / "checkpoint-000003.partial" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-000002"
    save(saver, State("id", 3))
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-000003"


def test_the_newest_and_the_best_are_kept(saver, tmp_path):
    """The best of those that are still there; of equal ones the newest; without an evaluation only the newest."""
    accuracies, known, kept = {1: 0.5, 3: 0.7, 11: 0.7, 12: 0.1, 14: 0.9}, {}, []
    saver.accuracies = lambda: known
    for step in (1, 2, 3, 11, 12, 13, 14, 15, 16):
        save(saver, State("id", step))
        kept.append([checkpoint.step_of(folder) for folder in checkpoint.all_of(tmp_path)])
        known |= {step: accuracies[step]} if step in accuracies else {}  # evaluated after it is saved
    assert kept[2:] == [[1, 2, 3], [3, 11], [11, 12], [11, 12, 13], [11, 13, 14], [14, 15], [14, 15, 16]]
    checkpoint.prune(tmp_path, 2, {})
    assert [checkpoint.step_of(folder) for folder in checkpoint.all_of(tmp_path)] == [15, 16]


@pytest.mark.parametrize(
    "number, of_folder, written",
    [("EINVAL", True, True), ("ENOTSUP", True, True), ("EIO", True, False), ("EINVAL", False, False)],
)
def test_a_file_system_that_cannot_flush_folders_has_checkpoints(saver, monkeypatch, number, of_folder, written):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folder:
            raise OSError(getattr(errno, number), "no")

    monkeypatch.setattr(os, "fsync", fsync)
    assert save(saver, State("id", 1)).exists() == written


def test_a_tokenizer_that_writes_folders_is_saved_whole(saver, tmp_path):
    """Two chat templates make a folder inside the checkpoint; damage there is found, too."""
    saver.tokenizer = copy.deepcopy(saver.tokenizer)
    saver.tokenizer.chat_template = {"default": saver.tokenizer.chat_template, "tools": "{{ messages[0] }}"}
    folder = save(saver, State("abc", step=3))
    inner = folder / "additional_chat_templates" / "tools.jinja"
    assert checkpoint.newest(tmp_path) == folder and inner.is_file()
    inner.write_text("changed")
    assert checkpoint.damage(folder) == "additional_chat_templates/tools.jinja is not what was written"


def test_only_exact_names_are_checkpoints(tmp_path):
    """A user's copies are neither removed nor counted among the newest; a million steps are in their order."""
    own = ["checkpoint-000020", "checkpoint-000040", "checkpoint-999999", "checkpoint-1000000"]
    users = [f"checkpoint-{name}" for name in ("000020-best1", "000040.bak2", "20", "best", "0000060")]
    for name in own + users:
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoint.all_of(tmp_path)] == own
    checkpoint.prune(tmp_path, 1, {})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted([own[-1], *users])


def test_what_can_be_loaded_but_not_saved_is_refused(tiny_folder):
    (tiny_folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false, "top_p": 0.9}')
    refuses("its generation config can be loaded but not saved.*do_sample", load_model, str(tiny_folder))
