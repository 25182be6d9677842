"""Wrong files, settings and streams: each gets one sentence."""

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch

import reward
from ce_gppo import checkpoint, config, messages, parallel, perf
from ce_gppo.messages import UserError, first_line
from ce_gppo.problems import Problem
from ce_gppo.ranges import OneOf, Range
from helpers import ROOT, environment, refuses, resolved
from tools import doctor, evaluate
from train import Config

ROW = {"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2", "source": "sums"}


@pytest.mark.parametrize(
    "range_, inside, outside, said",
    [
        (Range(1), [1, 2, 10**400], [0.999, math.nan, math.inf, -math.inf], "must be at least 1 and finite"),
        (Range(0, 1), [0, 1], [-1e-9, 1.001, math.nan, math.inf, 10**400], "must be at least 0 and at most 1"),
        (Range(0, 1, above=True), [1e-9, 1], [0, -1, 2], "must be above 0 and at most 1"),
        (Range(0.5, 2, or_zero=True), [0, 0.5, 2], [0.1, -1, 3], "must be 0, or at least 0.5 and at most 2"),
    ],
)
def test_ranges(range_, inside, outside, said):
    assert {range_.problem(value) for value in inside} == {None}
    assert {range_.problem(value) for value in outside} == {said}


@pytest.mark.parametrize("value, right", [("score", True), ("1", True), ("0012", True), ("0", False), ("", False)])
def test_names_or_a_number(value, right):
    assert (OneOf(("score", "mask"), or_count=True).problem(value) is None) == right
    assert (OneOf(("score", "mask")).problem(value) is None) == (value == "score")


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"lr": "fast"}, "lr = 'fast', where float is needed"),
        ({"steps": 1.5}, "steps = 1.5, where int is needed"),
        ({"lr": None}, "lr = None, where float is needed"),
        ({"lr": 10**400}, "where float is needed"),
        ([], "not the settings of a run"),
        (None, "not the settings of a run"),
        ({"steps": 10**30}, "at most 2147483647"),
    ],
)
def test_the_settings_of_a_resumed_run_have_their_types(tmp_path, saved, message):
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    refuses(re.escape(message), config.parse, Config, ["--resume", str(tmp_path)])


def test_what_a_resumed_run_may_change(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": resolved().__dict__}))
    assert config.parse(Config, ["--resume", str(tmp_path), "--steps", "80"])[0] == resolved(steps=80)
    with pytest.raises(UserError, match="--resume: lr cannot change within a run; these can: steps, eval_every"):
        config.parse(Config, ["--resume", str(tmp_path), "--lr", "1e-5"])


@pytest.mark.parametrize("name, value", [("lr", "1e-4"), ("lr", (1e-4,)), ("thinking", "false"), ("steps", 60.0)])
def test_the_settings_at_the_top_of_train_py_have_their_types(name, value):
    edited = dataclasses.make_dataclass("Config", [(name, Config.__annotations__[name], value)], bases=(Config,))
    edited.__module__ = "train"
    with pytest.raises(UserError, match=re.escape(f"train.py: {name} = {value!r}, where ")):
        config.parse(edited, [])


def test_help_lists_the_values_of_a_choice(capsys):
    with pytest.raises(SystemExit):
        config.parse(Config, ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert "--rollout-correction{none,bypass,tis,mask,seq-tis," in shown and "--overlong{score,mask,N}" in shown


def test_a_resumed_run_that_lacks_a_setting_gets_the_default_and_a_note(tmp_path, capsys):
    settings = resolved().__dict__.copy()
    del settings["kl_coef"]
    (tmp_path / "config.json").write_text(json.dumps({"config": settings}))
    assert config.parse(Config, ["--resume", str(tmp_path)])[0] == resolved()
    assert "has no kl_coef: the defaults are used" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("body", ["while True: pass", "import os; os.kill(os.getpid(), 9)", "raise KeyboardInterrupt"])
def test_a_verifier_that_never_answers_is_refused_before_the_first_step(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def score(response, answer):\n    {body}\n")
    with pytest.raises(UserError, match="takes over 3 s for an empty response, or ends its process"):
        reward.assign(f"{tmp_path}/mine.py:score", [Problem("", [1], "2", "sums")])


@pytest.mark.parametrize(
    "value, message",
    [("x" * 300, "too long"), ("a\0b", "cannot be printed"), ("a\nb", "cannot be printed"), (" ", "blank")]
    + [("\ud800", "cannot be printed"), ("", "blank"), ("~/x", "begins with ~"), ("a,,b", "beside a comma")]
    + [("x/" * 2500, "too long")],
)
@pytest.mark.parametrize("name", ["run-name", "out", "model", "train-data", "eval-data"])
def test_a_name_that_no_file_can_have_is_refused(name, value, message):
    if name == "run-name" and not value:
        assert config.parse(Config, ["--run-name="])[0].run_name == ""
        return
    refuses(f"^{name.replace('-', '_')} .*{message}", config.parse, Config, [f"--{name}={value}"])


@pytest.mark.parametrize(
    "names, value, message",
    [
        ("steps", "1" + "0" * 30, " = 10.*: must be at least 1 and at most 2147483647"),
        ("warmup-steps responses-per-prompt", str(2**31), ".* at most 2147483647"),
        ("overlong", "9" * 5000, ".* number of tokens"),
        ("lr temperature eval-temperature kl-coef entropy-coef eps-high", "1e30", " = 1e.30: must be .* and at most 1"),
        ("lr", "1e-30", " = 1e-30: must be at least 1e-10"),  # rounded away
        ("temperature", "0.001", r" = 0\.001: must be at least 0\.01"),  # vLLM would raise it
        ("system-prompt prompt-suffix rewards", "x \udcc3\udca9", " .* is not text in utf-8"),
    ],
)
def test_a_value_that_the_libraries_cannot_use_is_refused(names, value, message):
    for name in names.split():
        refuses(f"^{name.replace('-', '_')}{message}", config.parse, Config, [f"--{name}={value}"])
    assert config.parse(Config, ["--system-prompt", "日本 \U0001f600"])[0].system_prompt == "日本 \U0001f600"


def test_a_setting_that_is_given_twice_is_told(capsys):
    settings = config.parse(Config, ["--lr", "1e-5", "--run_name=a", "--thinking", "--lr=2e-5", "--run-name", "b"])[0]
    assert settings.lr == 2e-5 and settings.run_name == "b"
    assert capsys.readouterr().err == "WARNING: --lr, --run-name given more than once: the last one counts\n"


@pytest.mark.parametrize("columns, used", [("3", "40"), ("41", "41")])
def test_help_in_a_narrow_terminal_has_40_columns(monkeypatch, capsys, columns, used):
    """With three or fewer tyro never ends it."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        config.cli(doctor.Config, ["--help"])
    assert os.environ["COLUMNS"] == used and "--out" in capsys.readouterr().out


def test_an_overlong_value_is_shortened_in_the_sentence(capsys):
    def main():
        config.parse(Config, ["--objective", "x" * 5000])

    with pytest.raises(SystemExit):
        config.command(main)
    assert len(said := capsys.readouterr().err) < 500 and "xxx...xxx" in said and "known: ce_gppo" in said


def test_a_library_error_whose_first_line_only_announces_it_is_told_with_the_second():
    assert first_line(ValueError("\nValidation error for field 'x':\n    expected int\nmore")).endswith("expected int")
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(ValueError(" \n")) == "no message"
    assert first_line(ValueError("x" * 1000)) == "x" * 300


def test_a_source_that_is_a_verifier_but_for_its_case_is_refused():
    problem = Problem("", [1], "2", "GSM8K")
    refuses("source 'GSM8K' is not 'gsm8k', .*--rewards GSM8K=gsm8k, or GSM8K=math", reward.assign, "", [problem])
    for chosen in ("GSM8K=math", "math"):
        assert reward.assign(chosen, [problem])[1][0][0].verifier == "math"


@pytest.mark.parametrize("deep", ["[" * 100_000, "[]", "{}", "3", '{"config.json": "0"}'])
def test_what_is_no_settings_no_recipe_and_no_manifest(tmp_path, monkeypatch, deep):
    for name, text in {"config.json": deep, "deep.toml": f"steps = {deep}"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    refuses("not the settings of a run", config.parse, Config, ["--resume", str(tmp_path)])
    if deep != "3":
        refuses("not TOML|steps = .* where int is needed", config.parse, Config, ["--recipe", "deep"])
    (tmp_path / "manifest.json").write_text(deep)
    assert checkpoint.damage(tmp_path)
    for option, message in (("--recipe", "is unknown; known: "), ("--resume", "no config.json there")):
        refuses(message, config.parse, Config, [option, "x" * 300])  # too long for a file's name


def test_text_left_in_a_closed_pipe_does_not_change_the_exit_code(monkeypatch):
    """Python flushes its streams at the end, and exits with 120 if that fails."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", stream := os.fdopen(writer, "w"))
    stream.write("from a library")
    messages.flush_streams()
    stream.flush()


@pytest.mark.slow
def test_closed_streams_and_an_encoding_without_the_characters_raise_nothing():
    code = (
        "import sys; from ce_gppo.config import command; from ce_gppo import messages\n"
        "def main():\n    messages.say('\\u03b2 \\ud800'); print('more', file=sys.stderr); sys.exit(7)\ncommand(main)"
    )
    for redirections in ("", "<&- >&- 2>&-"):
        line = f'{sys.executable} -c "$CODE" {redirections}'
        variables = environment(CODE=code, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 7 and done.stdout == ("" if redirections else "\\u03b2 \\ud800\n"), done


def test_results_that_cannot_be_written_are_told_before_the_engine_starts(tiny_folder, write_rows):
    bench = write_rows(ROW)
    with pytest.raises(UserError, match="--out .*: cannot be written"):
        evaluate.main(evaluate.Config(model=str(tiny_folder), bench=bench, max_response_tokens=8, out="/dev/null/x"))
    with pytest.raises(UserError, match="--out /tmp: a folder is there"):
        evaluate.main(evaluate.Config(model=str(tiny_folder), bench=bench, max_response_tokens=8, out="/tmp"))
    for settings in (evaluate.Config(bench=""), evaluate.Config(model="x" * 300), doctor.Config(out="x" * 300)):
        refuses("blank|too long", config.check_ranges, settings)


def test_doctor_names_what_a_gpu_lacks(monkeypatch, tmp_path):
    """Of a driver that is too old, torch for CPUs, and what vLLM's compiler needs."""
    seen = types.SimpleNamespace(returncode=0, stdout="NVIDIA H100, 570, 80 GiB\n")
    present, cuda = {"nvidia-smi", "gcc"}, [False]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: seen)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: cuda[0])
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    for version, said in (
        ("2.13.0+cpu", "it is a build for CPUs, perhaps from a folder"),
        ("2.13.0", "make clean, then make setup; the driver must be 580 or newer"),
    ):
        monkeypatch.setattr(doctor.torch, "__version__", version)
        refuses(f"NVIDIA H100.* cannot use it: {said}", doctor.check_gpu)
    cuda[0] = True
    for there in ({"nvidia-smi", "gcc"}, {"nvidia-smi"}):  # without Python.h, and with it but without gcc
        present &= there
        refuses("needs gcc and .*/Python.h: install gcc and python3-dev", doctor.main, doctor.Config(gpu=True))
        (tmp_path / "Python.h").touch()
    present.add("gcc")
    assert "torch sees" in doctor.check_gpu()
    present.clear()
    cuda[0] = False
    assert doctor.check_gpu().startswith("none")
    assert "GiB free" in doctor.check_out(tmp_path / "new" / "out")
    refuses("cannot be made", doctor.check_out, tmp_path / "Python.h" / "out")


def test_the_lock_for_gpus_refuses_a_build_for_cpus():
    """A local label, 2.13.0+cpu, sorts above 2.13.0, and == accepts it."""
    (line,) = [line for line in (ROOT / "requirements" / "cuda.txt").read_text().splitlines() if line[:6] == "torch="]
    assert line.startswith("torch===")


@pytest.mark.parametrize(
    "share, ranks, shard, advantages, most",
    [(0.5, 1, "no", "group", None), (0.81, 1, "no", "group", "0.8 "), (0.75, 8, "no", "group", "0.74")]
    + [(0.9, 8, "yes", "group", None), (0.9, 1, "offload", "group", None), (0.7, 1, "no", "gae", "0.64")],
)
def test_a_gpu_that_the_policy_would_not_fit_beside_vllm(monkeypatch, share, ranks, shard, advantages, most):
    """1.15 G parameters at 12 bytes, or with DDP 16, on a GPU of 80 GiB."""
    model = types.SimpleNamespace(parameters=lambda: [torch.empty(1_150_000_000, device="meta", requires_grad=True)])
    monkeypatch.setattr(parallel, "world_size", lambda: ranks)
    gpu = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    settings = config.resolve(Config(gpu_memory_utilization=share, advantages=advantages, shard=shard))
    refused = pytest.raises(UserError, match=f"gpu_memory_utilization = {share}: of 80 .*at most {most}")
    with refused if most else contextlib.nullcontext():
        perf.check_memory(settings, model, "cuda")
    perf.check_memory(settings, model, "cpu")
