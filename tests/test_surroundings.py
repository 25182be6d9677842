"""Faults around a run: variables, locks, signals, disks, pipes, other processes."""

import errno
import os
import signal
import types
from pathlib import Path

import pytest
import torch

import reward
from bench import rollout, update
from ce_gppo import config, parallel, runs, tracking
from ce_gppo.messages import UserError
from ce_gppo.problems import check_vocabulary, load_sets
from ce_gppo.report import Report
from ce_gppo.types import STARTING, Problem, Update, starting
from ce_gppo.verifier.answers import can_be_given
from data import convert
from data.words import prepare as words
from helpers import resolved
from results import sweep
from tools import figures
from train import Config

ROW = {"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2", "source": "sums"}


def ended(main, capsys) -> tuple[int, str]:
    """(exit code, stderr) of a command."""
    with pytest.raises(SystemExit) as end:
        config.command(main)
    return end.value.code, capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The environment


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two', where a whole number is needed"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE in the environment is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE in the environment is '-1'"),
        ({"RANK": "1.0"}, "RANK in the environment is '1.0'"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment: ranks go from 0 to WORLD_SIZE - 1"),
        ({"RANK": None}, "RANK in the environment is 'missing'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK in the environment is 'x'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT in the environment is 'http'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR in the environment is ''"),
        ({"MASTER_ADDR": "node 1"}, "MASTER_ADDR in the environment is 'node 1', where a machine's name"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment: a port is at most 65535"),
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
    assert (
        parallel.init() == "cpu"
        and "WORLD_SIZE=8 in the environment counts only with torchrun" in capsys.readouterr().err
    )
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="more processes are started here than the 2 GPUs"):
        parallel.init()


@pytest.mark.parametrize("space", ["abc", "0", "0.5", "-1"])
def test_a_size_of_the_cache_that_vllm_cannot_read(space, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    with pytest.raises(UserError, match=f"VLLM_CPU_KVCACHE_SPACE={space} .* a whole number of GiB"):
        config.parse(Config, [])


def test_where_wandb_keeps_its_key(tmp_path, monkeypatch):
    """A file that is damaged, or that others may read, has no key; one for a server of one's own is found."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    file.write_text("machine api.wandb.ai login")
    assert tracking.wandb_mode() == "offline"
    file.write_text("machine wandb.example.org login user password 0123\n")
    file.chmod(0o600)
    assert tracking.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
    assert tracking.wandb_mode() is None
    monkeypatch.setenv("NETRC", "~/.netrc")
    assert tracking.wandb_mode() is None


# ----------------------------------------------------------------------------------------------------------------------
# Other processes and signals


def test_the_folder_of_a_running_process_is_refused_before_a_model_is_loaded(tmp_path):
    settings = resolved(out=str(tmp_path), run_name="mine")
    folder = tmp_path / "mine"
    runs.claim(folder, settings, "", 0)
    try:
        for again, resume in (
            (settings, ""),
            (settings, str(folder)),
            (resolved(out=str(tmp_path), run_name="mine", seed=1), ""),
        ):
            with pytest.raises(UserError, match="another process is training there"):
                runs.locate(again, resume)
    finally:
        runs._locks.clear()
    assert runs.locate(settings, "") == (folder, None)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again(tmp_path):
    """A new start would overwrite its metrics."""
    settings = resolved(out=str(tmp_path), run_name="mine")
    runs.claim(tmp_path / "mine", settings, "", 0)
    runs._locks.clear()
    (tmp_path / "mine" / "checkpoint-000002").mkdir()
    for resume in ("", str(tmp_path / "mine")):
        with pytest.raises(UserError, match="no checkpoint is whole, so it cannot go on"):
            runs.locate(settings, resume)
    (tmp_path / "mine" / "checkpoint-000002" / "manifest.json").touch()
    with pytest.raises(UserError, match=f"this is a checkpoint; name the folder of its run, {tmp_path}/mine"):
        config.parse(Config, ["--resume", str(tmp_path / "mine" / "checkpoint-000002")])


def test_a_signal_that_nohup_ignores_stays_ignored():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = runs.StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Disks and pipes


def test_a_full_disk_is_a_sentence_whenever_it_is_full(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x.jsonl")

    def later():
        starting("")
        full()

    code, said = ended(later, capsys)
    assert code == 1 and "no space is left on the disk ([Errno 28] No space left on device: 'x.jsonl')" in said

    monkeypatch.setattr(config.tempfile, "NamedTemporaryFile", full)  # no place for the traceback of another error
    code, said = ended(lambda: int("x"), capsys)
    assert code == 2 and "invalid literal" in said and "its traceback cannot be kept" in said


def test_a_run_goes_on_if_the_inputs_of_a_skipped_update_cannot_be_written(tmp_path, capsys):
    (tmp_path / "skipped").touch()  # no folder can be made
    state = runs.checkpoint.State("")
    runs.watch_skipped(tmp_path / "skipped", state, 1, [], Update({}, [float("nan")], 0.0, True, 0.0), 1e-5)
    assert state.skipped == 1 and "are not kept" in capsys.readouterr().err


def test_files_of_a_run_that_cannot_be_opened_are_named_at_the_start(tmp_path):
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.raises(OSError):
        Report(tmp_path, resolved(), 0, "")
    assert STARTING[0] == f"the files in {tmp_path} cannot be written"


def test_a_pipe_that_closes_ends_a_command_without_a_traceback(monkeypatch, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(config.sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        config.command(lambda: print("x" * 1_000_000))
    assert end.value.code == 1

    def other():
        raise BrokenPipeError

    with (tmp_path / "output").open("w") as file, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(config.sys, "stdout", file)
        config.command(other)


def test_data_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    convert.write([ROW], tmp_path / "train.jsonl")
    written = (tmp_path / "train.jsonl").read_text()
    with pytest.raises(UserError, match="--out .*train.jsonl/x: cannot be written"):
        convert.write([ROW], tmp_path / "train.jsonl" / "x" / "eval.jsonl")

    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        convert.write([ROW, ROW], tmp_path / "train.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == written


# ----------------------------------------------------------------------------------------------------------------------
# Data and answers


@pytest.mark.parametrize(
    "answer", ["$$", r"\boxed{}", "\\ ", r"\text{ }", ".", "\u200b", r"\frac{1}{2", "5}", r"\boxed{5", "{}"]
)
def test_an_answer_that_no_response_could_give_is_refused(answer):
    assert not can_be_given(answer) and convert.answer_of({"answer": answer}) is None
    with pytest.raises(UserError, match="no response could equal it"):
        reward.assign("", [Problem("", [1], answer, "sums")])
    reward.assign("exact", [Problem("", [1], answer, "sums")])


@pytest.mark.parametrize(
    "answer", [r"\emptyset", "∅", r"\{\}", r"\pi", "5\\", r"\left\{1,2\right.", "∞", r"so \boxed{5}"]
)
def test_an_answer_without_a_letter_or_digit_is_accepted(answer):
    assert can_be_given(answer)


def test_held_out_problems_that_are_trained_on_and_tokens_that_the_model_lacks(tokenizer, write_rows, capsys):
    path = write_rows(ROW)
    settings = resolved(train_data=path, eval_data=path)
    model_config = types.SimpleNamespace(max_position_embeddings=512, vocab_size=len(tokenizer))
    load_sets(settings, tokenizer, model_config, reward.assign)
    assert "1 held-out problems are also trained on" in capsys.readouterr().err
    check_vocabulary([Problem("", [3, 9], "", "")], 10)
    with pytest.raises(UserError, match="has the token 10, and the model only has 10"):
        check_vocabulary([Problem("", [3, 10], "", "")], 10)


# ----------------------------------------------------------------------------------------------------------------------
# The other commands


@pytest.mark.parametrize(
    "settings",
    [sweep.Config(lanes=0), sweep.Config(seeds=-1), update.Config(response_tokens=(30, 0)), update.Config(rounds=0)],
)
def test_numbers_that_a_tool_cannot_use(settings):
    with pytest.raises(UserError, match="must be at least 1"):
        config.check_ranges(settings)


def test_missing_inputs_are_named_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    for settings, message in (
        ({"metrics": str(tmp_path / "none.jsonl")}, "none.jsonl: not the metrics.jsonl of a run"),
        ({"metrics": str(tmp_path / "metrics.jsonl")}, "metrics.jsonl: no step in it"),
        ({"shapes": ("256",)}, "--shapes 256: hidden size x layers is needed"),
    ):
        with pytest.raises(UserError, match=message):
            rollout.main(rollout.Config(**settings))
    with pytest.raises(UserError, match="name the folders"):
        figures.main(figures.Config(runs=()))
    monkeypatch.setattr("sys.argv", ["prepare", "--out", str(tmp_path), "--held-out", "397"])
    with pytest.raises(UserError, match="--held-out 397: there are 397 problems"):
        words.main()
