"""Faults of long runs: kills, full disks, gradients that are not finite. Whole runs, real vLLM."""

import json
import math
import os
import random
import select
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import (
    SMALL,
    Forked,
    metrics_of,
    quick,
    run,
    start,
    wandb_of,
    without_timings,
)

pytestmark = pytest.mark.slow

# train.py with a few lines that cause a fault, such as `at(train, "update", [10], die)`.
PROGRAM = """
import os, signal, sys, time
import loss, rollout, torch, train
from ce_gppo import parallel
from ce_gppo.config import command
count = 0
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def stop():
    open("{asked}", "w").write(str(time.time()))
    os.kill(os.getpid(), signal.SIGTERM)
def fail(error):
    raise error
def at(module, name, numbers, fault):
    inner, calls = getattr(module, name), []
    def function(*args, **options):
        calls.append(0)
        if len(calls) in numbers: fault()
        return inner(*args, **options)
    setattr(module, name, function)
{line}
command(train.main)
"""
KILLED = {
    "mid-rollout": 'at(train, "sample", [2], lambda: at(rollout, "decode", [20], die))',
    "mid-update": 'at(train, "update", [10], die)',  # steps of up to four updates
    "mid-checkpoint": 'at(torch, "save", [1], die)',
}
STOPPED = [  # (part, line, newest checkpoint afterwards)
    ("old logprobs", 'at(train, "with_old_logprobs", [2], stop)', 2),
    ("update", 'at(train, "update", [2], stop)', 3),
    ("checkpoint", 'at(torch, "save", [1], stop)', 4),
    ("evaluation", 'at(rollout, "decode", [6], stop)', 4),
]
FULL = 'lambda: fail(OSError(28, "No space left on device"))'


def program(folder: Path, line: str) -> Path:
    (script := folder / "program.py").write_text(PROGRAM.format(line=line, asked=folder / "asked"))
    return script


def run_program(folder: Path, line: str, *arguments: str, mode: str = "disabled") -> tuple[int, str]:
    quickly = [] if "--resume" in arguments else quick(folder / "out")
    process = Forked(str(program(folder, line)), *quickly, *arguments, WANDB_MODE=mode)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def assert_same_run(ours: Path, expected: Path, last: str) -> None:
    assert without_timings(metrics_of(ours)) == without_timings(metrics_of(expected))
    assert_same_weights(ours, expected, last)


def assert_same_weights(ours: Path, expected: Path, last: str) -> None:
    weights, expected_weights = (load_file(folder / last / "model.safetensors") for folder in (ours, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def test_a_run_killed_three_times_and_started_again_is_the_same_run(finished, tmp_path, monkeypatch):
    """kill -9 in a rollout, an update and a checkpoint. The same command continues the run each time.

    W&B has the same rows as metrics.jsonl: of a step that was done again, the last ones. A W&B process of the
    program that starts the runs is not theirs.
    """
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/another's")
    arguments, folder = [*SMALL, "--run-name", "killed"], tmp_path / "out" / "killed"
    for moment, line in KILLED.items():
        code, output = run_program(tmp_path, line, *arguments, mode="offline")
        assert code == -signal.SIGKILL, (moment, output)
    assert list(folder.glob("*.partial")), "the last kill was not in the middle of a checkpoint"
    output = run(tmp_path / "out", *arguments, mode="offline")
    assert f"going on with {folder} after checkpoint-000002" in output
    by_step = {}
    for row in wandb_of(folder)[0]:
        own = {name: value for name, value in row.items() if name[0] != "_" and "." not in name}  # not W&B's, no parts
        numbers = {name: value for name, value in own.items() if type(value) in (int, float)}
        by_step[row["step"]] = by_step.get(row["step"], {}) | numbers
    assert list(by_step.values()) == metrics_of(folder), output
    assert list((tmp_path / "out").iterdir()) == [folder]
    assert_same_run(folder, finished[0], "checkpoint-000004")


def test_a_run_stopped_in_any_part_of_a_step_ends_within_20_seconds_and_loses_at_most_that_step(finished, tmp_path):
    """SIGTERM in the old logprobs, an update, a checkpoint and an evaluation; rollouts are in test_train.py."""
    asked, folder = tmp_path / "asked", tmp_path / "out" / "stopped"
    for what, line, newest in STOPPED:
        settings = ["--resume", str(folder)] if what == "evaluation" else [*SMALL, "--run-name", "stopped"]
        code, output = run_program(tmp_path, line, *settings)
        assert code == 0 and "SIGTERM" in output and "Traceback" not in output, (what, output)
        assert time.time() - float(asked.read_text()) < 20, what
        assert max(path.name for path in folder.glob("checkpoint-*")) == f"checkpoint-{newest:06d}", what
        asked.unlink()
    rows, expected = (without_timings(metrics_of(run)) for run in (folder, finished[0]))
    assert rows[:-1] == expected[:-1] and not any(name.startswith("eval/") for name in rows[-1])
    assert_same_weights(folder, finished[0], "checkpoint-000004")


@pytest.mark.skipif("KILLS" not in os.environ, reason="make torture")
def test_torture(tmp_path):
    """A run of twelve steps with many kills at random moments equals a run without kills."""
    longer = ("--prompts-per-step", "32", "--max-kept-prompts", "32", "--mini-batch-prompts", "4")  # steps
    arguments = [*SMALL, *longer, "--steps", "12", "--checkpoint-every", "1", "--run-name", "it"]
    whole, cut = tmp_path / "whole" / "it", tmp_path / "cut" / "it"
    run(tmp_path / "whole", *arguments)
    seconds = sum(row["time/step"] for row in metrics_of(whole)[1:]) / 12
    rng, kills = random.Random(0), int(os.environ["KILLS"])
    for kill in range(kills):
        beginning = time.time()
        process = start(tmp_path / "cut", *arguments)
        # Wait until the run has started and has reached this kill's part of the steps; then a random time.
        while rows_since(beginning, cut) < 1 + kill * 11 / kills:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(rng.random() * 1.5 * seconds)
        process.kill()
        process.communicate()
        print(f"kill {kill + 1}: {rows_since(beginning, cut)} rows", flush=True)
        if (cut / "checkpoint-000012").exists():
            break
    else:
        run(tmp_path / "cut", *arguments)
    assert kill >= 0.9 * kills - 1
    assert_same_run(cut, whole, "checkpoint-000012")


def rows_since(beginning: float, folder: Path) -> int:
    """Rows of metrics.jsonl if it was written since then, else 0. A resumed run first writes the rows that it keeps."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() and path.stat().st_mtime > beginning else 0


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path):
    process = start(tmp_path, "--run-name", "early", *SMALL)
    while process.poll() is None and not (tmp_path / "early" / "config.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert "stopped after step 0" in output and not list(tmp_path.glob("early/checkpoint*"))


def test_with_a_full_disk_only_a_checkpoint_is_missing(finished, tmp_path):
    code, output = run_program(tmp_path, f'at(torch, "save", [1], {FULL})', *SMALL, "--run-name", "full")
    assert code == 0, output
    assert "checkpoint not written, training goes on" in output and "No space left on device" in output
    assert [path.name for path in tmp_path.glob("out/full/checkpoint*")] == ["checkpoint-000004"]
    assert_same_run(tmp_path / "out" / "full", finished[0], "checkpoint-000004")


def test_a_run_whose_last_checkpoint_is_not_written_ends_with_an_error(tmp_path):
    always = f'at(torch, "save", range(99), {FULL})'
    code, output = run_program(tmp_path, always, *SMALL, "--steps", "2", "--run-name", "full")
    assert code == 1 and "train.py" not in output.split("program.py:")[0], output
    assert "the checkpoint of step 2 could not be written" in output and "Traceback" not in output, output
    assert "metrics.jsonl" in output, "the table at the end is printed all the same"


NOT_FINITE = """
policy_loss = loss.policy_loss
def broken(*args, **options):
    global count
    count += 1
    value, info = policy_loss(*args, **options)
    return (value * float("nan") if count == 2 or count > 6 else value), info
loss.policy_loss = broken
"""


def test_gradients_that_are_not_finite_are_skipped_and_end_the_run_when_there_are_many(tmp_path):
    arguments = [*SMALL, "--checkpoint-every", "1", "--run-name", "nan"]
    code, output = run_program(tmp_path, NOT_FINITE, *arguments)
    assert code == 1 and "5 updates in a row had no finite gradient" in output and "Traceback" not in output, output
    rows = metrics_of(tmp_path / "out" / "nan")
    assert rows[1]["optim/skipped"] == 1
    last = rows[-1]["step"]
    assert rows[last]["optim/skipped"] > 0, "the step that ends the run is logged"
    saved = torch.load(tmp_path / "out" / "nan" / "skipped" / "step-000001-update-2-rank-0.pt", weights_only=True)
    assert len(saved["batch"]["tokens"]) == saved["batch"]["lengths"].sum() and math.isnan(saved["loss"])
    weights = load_file(tmp_path / "out" / "nan" / f"checkpoint-{last:06d}" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("output", ["/dev/full", "closed pipe"])
def test_output_that_cannot_be_written_does_not_change_a_run(finished, tmp_path, output):
    if pipe := output == "closed pipe":
        output = tmp_path / "pipe"
        os.mkfifo(output)
        reader = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
    process = Forked("train.py", *quick(tmp_path), *SMALL, "--run-name", "mute", output=output)
    if pipe:
        select.select([reader], [], [])  # the first line is there
        os.close(reader)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert_same_run(tmp_path / "mute", finished[0], "checkpoint-000004")


def test_a_run_that_lacks_only_its_last_evaluation_makes_it(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "whole")
    rows = metrics_of(folder)
    evaluation = {name: rows[-1].pop(name) for name in list(rows[-1]) if name.startswith("eval/")}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, "--resume", str(folder))
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2, 3, 4]
    assert metrics_of(folder)[-1].items() >= evaluation.items()
