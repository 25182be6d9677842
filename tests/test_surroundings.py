"""Faults around a run: variables, locks, signals, disks, pipes, other processes."""

import errno
import json
import math
import os
import re
import signal
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import reward
from ce_gppo import checkpoint, messages, parallel, ranges, run
from ce_gppo import config as settings_of
from ce_gppo.messages import RunEnded, UserError
from ce_gppo.problems import Problem
from ce_gppo.verifier.answers import can_be_given
from data import common, convert
from data.words import prepare as words
from helpers import refuses, resolved
from tools import figures
from train import Config

ROW = {"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2", "source": "sums"}


def ended(main, capsys) -> tuple[int, str]:
    """(exit code, stderr) of a command."""
    with pytest.raises(SystemExit) as end:
        settings_of.command(main)
    return end.value.code, capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The environment


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: torchrun sets a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment: ranks go from 0 to WORLD_SIZE - 1"),
        ({"RANK": None}, "RANK=missing in"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x in"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http in"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment: torchrun sets a whole number, at most 65535"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR= in the environment: torchrun sets a machine's name or address"),
        ({"MASTER_ADDR": "node 1"}, "MASTER_ADDR=node 1 in"),
    ],
)
def test_wrong_values_of_the_variables_that_torchrun_sets(variables, message, monkeypatch, capsys):
    usual = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1234"}
    usual["MASTER_ADDR"] = "node-1.local"
    for name, value in (usual | variables).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    code, said = ended(lambda: pytest.fail("it began"), capsys)
    assert code == 2 and message in said, said


def test_more_processes_than_gpus_and_processes_without_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parallel.init() == "cpu"
    assert "WORLD_SIZE=8 in the environment counts only with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuses("more processes are started here than the 2 GPUs", parallel.init)


@pytest.mark.parametrize("size, rank, own", [(1, 0, range(10)), (4, 3, [1, 3, 5, 7, 9]), (4, 1, [0, 2, 4, 6, 8])])
def test_what_a_rank_knows_of_itself(monkeypatch, capsys, size, rank, own):
    """Two ranks share an engine. Without torchrun the variables say nothing."""
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("RANK", str(rank))
    assert (parallel.world_size(), parallel.rank()) == (1, 0) and parallel.all_gather(5) == [5]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert (parallel.world_size(), parallel.rank(), parallel.is_main()) == (size, rank, rank == 0)
    assert parallel.round_robin(10, min(2, size)) == list(own)
    messages.say("from rank 0")
    assert bool(capsys.readouterr().out) == (rank == 0)


def test_the_longest_goes_to_the_rank_with_the_least_load_that_has_its_prompt():
    assert parallel.deal([0, 1, 2, 3, 4], [4, 10, 6, 5, 2], [3, 9, 5, 4, 1], 2) == [0, 0, 1, 1, 1]
    assert parallel.deal([0, 0, 1, 1], [104, 103, 104, 103], [4, 3, 4, 3], 2) == [0, 0, 1, 1]
    assert parallel.deal([0, 0, 0, 0], [14, 13, 12, 11], [4, 3, 2, 1], 2) == [0, 1, 1, 0], "split above an even load"
    assert parallel.deal([], [], [], 2) == []


def test_what_several_ranks_say_together(monkeypatch):
    values = [(1, 2.5), (3, 4.0)]
    monkeypatch.setattr(parallel, "all_gather", lambda value: values)
    assert parallel.all_sum(1, 2.5) == [4, 6.5]
    for flags in ([False, True], [False, False]):
        monkeypatch.setattr(parallel, "all_gather", lambda value, flags=flags: flags)
        assert parallel.any_rank(False) == any(flags)
    monkeypatch.setattr(parallel, "all_gather", lambda value: [value])
    assert parallel.rank0_then_broadcast(lambda: 7) == 7
    with pytest.raises(ValueError, match="mine"):
        parallel.rank0_then_broadcast(lambda: (_ for _ in ()).throw(ValueError("mine")))


@pytest.mark.parametrize("cuda", [False, True])
def test_the_trainer_has_all_threads_on_a_gpu_where_vllm_leaves_it_one(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(parallel, "THREADS", 3)
    before = torch.get_num_threads()
    with parallel.host_threads():
        assert torch.get_num_threads() == (3 if cuda else before)
    assert torch.get_num_threads() == before


# ----------------------------------------------------------------------------------------------------------------------
# Other processes and signals


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run that has begun in tmp_path/out/mine, in a small project: (settings, folder, {changed file: its text})."""
    project, base, rows, scorer = (tmp_path / name for name in ("project", "base", "rows.jsonl", "mine.py"))
    (project / "ce_gppo").mkdir(parents=True)
    (base / "chat_templates").mkdir(parents=True)
    files = {project / "loss.py": "a", project / "ce_gppo" / "b.py": "b", base / "model.safetensors": "w"}
    files |= {base / "chat_templates" / "tool.jinja": "t", rows: "r" * 5000, scorer: "s"}
    for path, text in files.items():
        path.write_text(text)
    monkeypatch.setattr(run, "ROOT", project)
    names = {"out": str(tmp_path / "out"), "run_name": "mine", "model": str(base)}
    config = resolved(**names, train_data=str(rows), eval_data=str(rows))
    claim(tmp_path / "out" / "mine", config, 0, [scorer])
    return config, tmp_path / "out" / "mine", files, [scorer]


def claim(folder, config, step=0, files=()):
    """As a process that then ends."""
    run.claim(folder, config, "", step, list(files))
    run.take.cache_clear()


def locate(config, resume="", files=()):
    found = run.locate(config, str(resume), list(files))
    run.take.cache_clear()
    return found


def test_what_has_changed_since_a_run_began_is_named(begun, capsys):
    """Edited code, data, base model or reward file: refused, or noted with --resume. The base model may be missing."""
    config, folder, files, scorers = begun
    assert locate(config, files=scorers) == (folder, None)
    for path, text in files.items():
        path.write_text(text[: len(text) // 2] + "!" + text[len(text) // 2 + 1 :])  # in the middle, of the same length
        refuses(f"have changed since .*{path.name};.*--resume {folder}, or .*--run-name", locate, config, files=scorers)
        assert locate(config, folder, scorers) == (folder, None)
        assert f"changed since the run began: {path}".replace(f"{run.ROOT}/", "") in capsys.readouterr().err
        path.write_text(text)
    (Path(config.model) / "model.safetensors").unlink()
    assert locate(config, files=scorers) == (folder, None)
    (run.ROOT / "loss.py").write_text("c")
    (run.ROOT / "new.py").write_text("c")
    claim(folder, config, 20, scorers)
    assert (folder / "source-from-step-000021" / "loss.py").read_text() == "c"
    assert (folder / "source" / "loss.py").read_text() == "a" and locate(config, files=scorers) == (folder, None)
    (run.ROOT / "new.py").write_text("d")
    refuses("have changed .* new.py;", locate, config, files=scorers)


def test_of_a_large_file_only_size_and_end_are_compared_and_unknown_marks_count_as_changed(begun, monkeypatch):
    config, folder, files, scorers = begun
    monkeypatch.setattr(run, "HASHED", 1000)
    claim(folder, config, 0, scorers)
    for text, same in (("x" + "r" * 4999, True), ("r" * 4998 + "xr", False), ("r" * 5001, False)):
        Path(config.train_data).write_text(text)
        assert (run.changes(folder, config, scorers) == []) == same
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": ["a.jsonl"]}))
    with pytest.raises(UserError, match="changed since the run began: inputs in config.json, which cannot be compared"):
        locate(config, files=scorers)
    assert locate(config, folder, scorers) == (folder, None)


def test_a_name_belongs_to_its_settings_and_no_other_folder_is_searched(begun, tmp_path):
    config, folder, _, scorers = begun
    for changes, message in (
        ({"lr": 2e-5}, "lr = 8e-05, not 2e-05; choose another name with --run-name"),
        ({"lr": 2e-5, "seed": 1}, "seed = 0, not 1, lr = 8e-05, not 2e-05;"),
    ):
        with pytest.raises(UserError, match=f"{folder} belongs to a run with other settings: .*{message}"):
            locate(replace(config, **changes), files=scorers)
    assert locate(replace(config, out=f"{tmp_path}/out/."), files=scorers) == (folder, None)
    unnamed = replace(config, run_name="", seed=7)
    new = locate(unnamed, files=scorers)[0]
    assert new.parent == folder.parent and new.name.startswith("ce_gppo-seed7-") and not new.exists()
    claim(new, unnamed, files=scorers)
    assert locate(replace(unnamed, run_name=new.name), files=scorers) == (new, None)
    (folder.parent / "yours").mkdir()
    (folder.parent / "yours" / "precious").touch()
    refuses("yours has files, but no config.json", locate, replace(config, run_name="yours"), files=scorers)
    for text in ("[" * 100_000, "{}", '{"config": 3}'):
        (folder / "config.json").write_text(text)
        refuses("config.json: not the settings of a run", locate, config, files=scorers)


STEPS = Config.steps
EVALUATED = {"step": STEPS, "eval/x/avg_at_k": 0.5}


@pytest.mark.parametrize(
    "rows, checkpoints, said",
    [
        ([], [], "from its start, as there is no checkpoint yet; a new"),
        ([{"step": 0}, {"step": 30}], [], "from its start, .*; later steps, up to 30, are done again, and their rows"),
        ([{"step": 30}, [1], {"step": None}], [20], "after checkpoint-000020; later steps, up to 30, are done again"),
        ([{"step": 40}], [20, 40], "after checkpoint-000040; a new run of the same settings needs its own name"),
        ([{"step": STEPS}], [40, STEPS], f"after checkpoint-{STEPS:06d}; a new"),  # only its last evaluation is missing
        ([EVALUATED | {"step": 40}], [], "from its start"),
        ([{"step": 0}, EVALUATED], [40, STEPS], None),
        ([EVALUATED], [], None),
        ([{"step": STEPS}, EVALUATED], [20], None),
    ],
)
def test_where_a_run_goes_on_or_that_it_is_finished(begun, monkeypatch, capsys, rows, checkpoints, said):
    config, folder, _, scorers = begun
    monkeypatch.setattr(checkpoint, "damage", lambda folder: None)
    for step in checkpoints:
        (folder / f"checkpoint-{step:06d}").mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"ste')
    for resume in ("", folder):
        if said is None:
            before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
            refuses(f"{folder} is finished: .* has all {STEPS} steps; .*--run-name", locate, config, resume, scorers)
            assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        else:
            last = folder / f"checkpoint-{checkpoints[-1]:06d}" if checkpoints else None
            assert locate(config, resume, scorers) == (folder, last)
            assert re.search(f"going on with {folder} {said}", capsys.readouterr().out)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again(begun):
    config, folder, _, scorers = begun
    (folder / "checkpoint-000002").mkdir()
    for resume in ("", folder):
        refuses("no checkpoint is whole, so it cannot go on", locate, config, resume, scorers)
    (folder / "checkpoint-000002" / "manifest.json").touch()
    with pytest.raises(UserError, match=f"this is a checkpoint; name the folder of its run, {folder}"):
        settings_of.parse(Config, ["--resume", str(folder / "checkpoint-000002")])


def test_a_folder_has_one_run_at_a_time(begun):
    """Also before a model is loaded."""
    config, folder, _, scorers = begun
    run.claim(folder, config, "", 0, scorers)
    run.claim(folder, config, "", 0, scorers)  # this process has it
    held = [run.take(folder)]
    run.take.cache_clear()  # as another process, which knows of no locks
    for resume in ("", folder):
        refuses("another process is training there", run.locate, config, str(resume), scorers)
    refuses("another process is training there", run.claim, folder, config, "", 0, scorers)
    held.clear()
    assert locate(config, files=scorers) == (folder, None)


def test_locks_that_a_file_system_or_a_user_does_not_have(begun, tmp_path, monkeypatch, capsys):
    config, folder, _, scorers = begun
    with monkeypatch.context() as patch:
        missing = OSError(errno.ENOSYS, "Function missing")
        patch.setattr(run.fcntl, "flock", lambda *_: (_ for _ in ()).throw(missing))
        claim(folder, config)
        assert "cannot be locked (Function missing)" in capsys.readouterr().err
    (tmp_path / "theirs" / ".lock").mkdir(parents=True)  # cannot be opened, as without the permission
    refuses(f"--out {tmp_path}/theirs/.lock: cannot be written", claim, tmp_path / "theirs", config)


@pytest.fixture
def signals(monkeypatch):
    """(ask for a signal, those that ended the process); the handlers are put back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
    before, ended = [signal.getsignal(number) for number in numbers], []
    monkeypatch.setattr(run.os, "_exit", ended.append)
    yield lambda number: os.kill(os.getpid(), number), ended
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_second_signal_ends_the_program_but_not_after_a_schedulers_warning(signals, first, capsys):
    kill, ended = signals
    stop, number = run.StopRequest(), signal.Signals[first]
    assert not stop()
    kill(number)
    assert stop() and capsys.readouterr().out.startswith(f"\n{first}: finishing this step's updates") and not ended
    for again in (signal.SIGXCPU, signal.SIGUSR1):
        kill(again)
    kill(signal.SIGTERM)
    warning = first in ("SIGUSR1", "SIGXCPU")
    assert ended == ([] if warning else [128 + signal.SIGTERM]) and stop()
    kill(signal.SIGINT)
    assert ended[-1:] == [128 + signal.SIGINT] and capsys.readouterr().out == ""


def test_a_signal_that_nohup_ignores_stays_ignored(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = run.StopRequest()
    signals[0](signal.SIGHUP)
    assert not stop() and signal.getsignal(signal.SIGTERM) == stop._handle


# ----------------------------------------------------------------------------------------------------------------------
# Disks and pipes


def test_errors_of_a_command(monkeypatch, capsys):
    """A full disk, wherever it is found, is a sentence, and so is an explained error; any other is a traceback."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x.jsonl")

    @messages.explained("model 'm' cannot be loaded")
    def failing(error: Exception):
        raise error

    for main in (full, lambda: failing(OSError(errno.EDQUOT, "No space left on device", "x.jsonl"))):
        code, said = ended(main, capsys)
        assert code == 1 and "no space is left on the disk (" in said and "No space left on device: 'x.jsonl')" in said
    code, said = ended(lambda: failing(ValueError("first line\nsecond")), capsys)
    assert code == 2 and "model 'm' cannot be loaded: ValueError: first line; " in said and "Traceback" not in said
    file = Path(re.search(r"; (\S+) has the whole traceback", said)[1])
    assert "second" in file.read_text()
    file.unlink()
    for error, number in ((UserError("mine"), 2), (RunEnded("mine"), 1)):
        assert ended(lambda: failing(error), capsys) == (number, f"{Path(sys.argv[0]).name}: mine\n")  # noqa: B023
    monkeypatch.setattr(messages.tempfile, "NamedTemporaryFile", full)  # no place for the traceback
    code, said = ended(lambda: failing(ValueError("x")), capsys)
    assert code == 2 and "its traceback cannot be kept ([Errno 28]" in said
    for error in (ValueError("x"), OSError(errno.EIO, "x")):
        with pytest.raises(type(error), match="x"):
            settings_of.command(lambda: (_ for _ in ()).throw(error))  # noqa: B023
    assert ended(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), capsys) == (130, "")


def test_skipped_updates_are_kept_and_counted_and_end_the_run_after_it_is_saved(tmp_path, capsys):
    state, lr = checkpoint.State("", step=6), 1e-5
    saver = types.SimpleNamespace(run=tmp_path, finish=lambda state: done.append(state.skipped))
    batch = types.SimpleNamespace(tokens=torch.tensor([1, 2]), texts=["a"], rewards=None)
    bad, good = (types.SimpleNamespace(skipped=skipped, loss=0.5, grad_norm=math.nan) for skipped in (True, False))
    done = []
    for skipped, count in ((bad, 1), (bad, 2), (good, 0), *((bad, n) for n in range(1, 6))):
        assert run.watch_skipped(tmp_path / "skipped", state, 3, batch, skipped, lr) == (count == 5)
        assert state.skipped == count and (count == 5 or run.check_end(state, saver, lr) is None)
    saved = torch.load(tmp_path / "skipped" / "step-000007-update-3-rank-0.pt", weights_only=True)
    assert saved["batch"]["tokens"].tolist() == [1, 2] and saved["lr"] == lr
    assert math.isnan(saved["grad_norm"]) and saved["loss"] == 0.5
    with pytest.raises(RunEnded, match=f"5 updates in a row .* {tmp_path}/skipped has .* a lower lr than 1e-05"):
        run.check_end(state, saver, lr)
    with pytest.raises(RunEnded, match="20 rollouts in a row had no group with unequal rewards"):
        run.check_end(checkpoint.State("", no_signal=20), saver, lr)
    assert run.check_end(checkpoint.State("", no_signal=19), saver, lr) is None and done == [5, 0]
    (tmp_path / "file").touch()  # no folder can be made
    run.watch_skipped(tmp_path / "file", state, 1, batch, bad, lr)
    assert "are not kept" in capsys.readouterr().err


def test_a_pipe_that_closes_ends_a_command_without_a_traceback(monkeypatch, tmp_path):
    """Output's, that is: another pipe that breaks is a fault."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        settings_of.command(lambda: print("x" * 1_000_000))
    assert end.value.code == 1
    with (tmp_path / "output").open("w") as file, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", file)
        settings_of.command(lambda: (_ for _ in ()).throw(BrokenPipeError()))


def test_messages_in_a_signal_handler_raise_nothing(monkeypatch):
    def busy(text):
        raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=busy))
    messages.say("x")


def test_data_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    common.write([ROW], tmp_path / "train.jsonl")
    written = (tmp_path / "train.jsonl").read_text()
    with pytest.raises(UserError, match="--out .*train.jsonl/x: cannot be written"):
        common.write([ROW], tmp_path / "train.jsonl" / "x" / "eval.jsonl")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", lambda path, text: path.touch() or (_ for _ in ()).throw(full))
    refuses("No space left", common.write, [ROW, ROW], tmp_path / "train.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == written


@pytest.mark.parametrize("answer", ["$$", r"\boxed{}", "\\ ", r"\text{ }", ".", "\u200b", r"\frac{1}{2", "5}", "{}"])
def test_an_answer_that_no_response_could_give_is_refused(answer):
    assert not can_be_given(answer) and convert.answer_of({"answer": answer}) is None
    refuses("no response could equal it", reward.assign, "", [Problem("", [1], answer, "sums")])
    reward.assign("exact", [Problem("", [1], answer, "sums")])


def test_answers_without_a_letter_or_digit_are_accepted_but_not_what_is_neither_text_nor_number():
    assert all(map(can_be_given, [r"\emptyset", "∅", r"\{\}", "5\\", r"\left\{1,2\right.", r"so \boxed{5}"]))
    no_answers = [math.nan, {"value": 2}, [{"value": 2}], [2, math.nan]]
    assert not any(convert.answer_of({"answer": answer}) for answer in no_answers)


def test_ranges_of_values_in_a_tuple_and_of_those_that_may_be_missing():
    @dataclass
    class Settings:
        lanes: ranges.Count = 1
        tokens: tuple[ranges.Count, ...] = (1, 2)
        seeds: ranges.Count | None = None
        text: str = ""

    ranges.check_ranges(Settings())
    for wrong in ({"lanes": 0}, {"tokens": (30, 0)}, {"seeds": -1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} = .*: must be at least 1 and at most 2147483647"):
            ranges.check_ranges(Settings(**wrong))


def test_missing_inputs_of_tools_are_named(tmp_path, monkeypatch):
    refuses("name the folders", figures.main, figures.Config(runs=()))
    monkeypatch.setattr("sys.argv", ["prepare", "--out", str(tmp_path), "--held-out", "397"])
    refuses("--held-out 397: there are 397 problems", words.main)
