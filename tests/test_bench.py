"""Every bench at a tiny size: it runs, and its JSON line is complete. Its timings are not tested."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from bench import gpu, scaling, update
from ce_gppo import config, parallel
from ce_gppo.messages import RunEnded, UserError
from helpers import Forked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = ["--layers", "2", "--hidden-size", "64", "--intermediate-size", "128", "--heads", "2", "--kv-heads", "1"]
TINY += ["--vocabulary", "512"]
STEPS = [
    {"step": 0, "time/eval": 5.0},
    {
        "step": 1,
        "time/rollout": 2.0,
        "time/update": 1.5,
        "time/reward": 0.1,
        "time/old_logprobs": 0.2,
        "time/step": 4.0,
    },
    {"step": 2, "time/rollout": 3.0, "time/update": 2.5, "time/sync": 0.3, "time/eval": 9.0, "time/step": 6.0},
]


def run_without(modules: list[str], module: str) -> list[str]:
    """The options with which Python runs a module on a machine where these modules cannot be imported."""
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({modules}); sys.argv[0] = '{module}'; "
    return ["-c", code + f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"]


def test_the_contestant_trl_imports_none_of_our_modules(tmp_path):
    """TRL's environment has only its own packages. TRL's `datasets` is the first import to fail here."""
    (tmp_path / "batch.json").write_text(json.dumps({"threads": 1}))
    ours = ["ce_gppo", "train", "loss", "reward", "rollout", "vllm", "wandb", "tyro", "scipy", "datasets"]
    command = [sys.executable, *run_without(ours, "bench.contestants"), "trl", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: import of datasets halted; None in sys.modules"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """(stdout, stderr or None, exit code) of each bench. They run side by side: a tiny bench is mostly imports."""
    metrics = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in STEPS))
    commands = {
        "update": ["--without-trl", "--rounds", "1", "--threads", "1", *TINY],
        "rollout": ["--prompts", "2", "--max-tokens", "8", "--rounds", "1", "--metrics", str(metrics), "--shapes"],
        "gpu": [
            "--part",
            "update",
            "--device",
            "cpu",
            *TINY,
            "--lengths",
            "32",
            "64",
            "--prompt-tokens",
            "8",
            "--tokens",
            "128",
        ],
        "scaling": [],
    }
    processes = {}
    for name, arguments in commands.items():
        if name == "gpu":
            missing = ["vllm", "wandb", "tyro", "scipy", "accelerate", "datasets", "math_verify", "psutil", "PIL"]
            alone = [sys.executable, *run_without(missing, "bench.gpu"), *arguments]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes[name] = subprocess.Popen(alone, cwd=ROOT, **pipes)
        else:
            processes[name] = Forked(f"bench.{name}", *arguments)
    return {name: (*process.communicate(), process.returncode) for name, process in processes.items()}


@pytest.fixture
def result(outputs, request):
    """The JSON line of the bench that the test is parametrized with."""
    stdout, stderr, code = outputs[request.param]
    assert code == 0, stderr or stdout
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1 and len(stdout.splitlines()) > 4, "one JSON line, and a table"
    return lines[0]


@pytest.mark.parametrize("result", ["update"], indirect=True)
def test_update(result):
    assert result["tokens"] == 8 * 40 + 776
    for name in ("ours", "plain"):
        assert result[f"{name}/tokens_per_s"] * result[f"{name}/seconds"] == pytest.approx(1096)
        assert 0 < result[f"{name}/before_gib"] <= result[f"{name}/peak_gib"]
    assert result["plain/gradient_difference"] < 1e-5 and result["plain/loss"] == pytest.approx(result["ours/loss"])
    assert {"speed_over_plain", "memory_of_plain", "floor_s", "over_floor", "head_overhead"} <= result.keys()


@pytest.mark.parametrize("result", ["rollout"], indirect=True)
def test_rollout(result):
    assert result["engine/tokens_per_s"] > 0 and result["bare/tokens_per_s"] > 0
    assert {"engine_over_bare_with_logprobs", "engine_over_bare"} <= result.keys()
    assert [sync["parameters"] for sync in result["sync"]] == [888_192] and result["sync"][0]["seconds"] > 0
    expected = {"rollout": 0.5, "update": 0.4, "reward": 0.01, "old_logprobs": 0.02, "sync": 0.03, "rest": 0.04}
    assert {part: result[f"share/{part}"] for part in expected} == pytest.approx(expected)
    assert result["share/outside"] == pytest.approx(0.08)


@pytest.mark.parametrize("result", ["gpu"], indirect=True)
def test_gpu(result):
    """It ran in an environment with only torch, transformers and their requirements."""
    assert {"device", "matrix_tflops", "weights_and_gradients_gib", "parameters"} <= result.keys()
    for case, tokens in (("32", 128), ("64", 128), ("mixed", 96)):
        assert result[f"{case}/tokens"] == tokens and result[f"{case}/mfu"] > 0
        assert {f"{case}/peak_gib", f"{case}/logits_gib", f"{case}/head_over_products"} <= result.keys()


def test_gpu_s_layers_and_head(monkeypatch, capsys):
    """In this process: with and without compiling, and by width of a tile."""
    small = ["--device", "cpu", "--lengths", "16", "24", "--prompt-tokens", "4", "--tokens", "48", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *TINY, *small, "--backend", "eager"])
    options = gpu.arguments()
    gpu.layers_part(options)
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    for case in ("16", "24", "mixed"):
        assert found[f"{case}/eager_over_compiled"] == pytest.approx(
            found[f"{case}/eager_s"] / found[f"{case}/compiled_s"]
        )
        assert found[f"{case}/first_s"] > 0
    gpu.head_part(options)
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    assert found["1024/over_products"] > 0 and found["1024/gib"] is None


def test_gpu_s_offload(monkeypatch, capsys, one_process):
    """On a CPU nothing is pinned."""
    small = ["--device", "cpu", "--lengths", "16", "24", "--prompt-tokens", "4", "--tokens", "40", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *TINY, *small])
    gpu.offload_part(gpu.arguments())
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    assert found["passes_s"] > 0 and found["step_s"] > 0 and found["tokens"] == 40 and found["pinned_gib"] is None


def test_another_revision_is_checked_out_and_removed():
    with update.checked_out("HEAD") as folder:
        assert (folder / "bench" / "contestants.py").is_file() and folder != ROOT
    assert not folder.exists()
    with update.checked_out("") as folder:
        assert folder == ROOT
    with pytest.raises(UserError, match="--against nowhere: git cannot check it out"), update.checked_out("nowhere"):
        pass


def test_gpu_compares_a_resumed_step(tmp_path):
    """Equal responses are counted, and only the second step is read."""
    for name, second in (("whole", "b"), ("again", "c")):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "entropy/mean": 0.5 * step, "time/rollout": 1.0, "optim/lr": 1.0} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        samples = [{"step": step, "response": text} for step, text in ((1, second), (2, "a"), (2, second))]
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    found = gpu.summary(tmp_path / "whole", tmp_path / "again")
    expected = {
        "resume/same_responses": 0.5,
        "resume/entropy_difference": 0.0,
        "entropy/mean": 1.0,
        "time/rollout": 1.0,
    }
    assert found == expected


def test_gpu_continues_after_a_part_that_fails(monkeypatch, capsys):
    """Each part is its own process, with the options given; one that fails has a line, and is named."""
    commands = []

    def run(command, timeout, **_):
        commands.append(command[1:])
        if "layers" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=139 if "run" in command else 0)

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tokens", "64"])
    monkeypatch.setattr(gpu.subprocess, "run", run)
    with pytest.raises(RunEnded, match="failed: run, layers; "):
        gpu.main()
    assert commands == [["-m", "bench.gpu", "--part", part, "--tokens", "64"] for part in gpu.PARTS]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = {"run": 139, "layers": "no result in 15 minutes"}
    assert lines == [{"bench": "gpu", "part": part, "failed": code} for part, code in failed.items()]


def test_gpu_s_run_has_valid_settings_and_resumes(monkeypatch, capsys):
    """Two steps with a checkpoint after each, and the second step again from the first checkpoint."""
    configs, resumed = [], []

    def run_train(minutes, *words):
        if words[0] == "--resume":
            resumed.append(sorted(path.name for path in Path(words[1]).iterdir()))
            return
        configs.append(config.parse(train.Config, list(words))[0])
        for step in (1, 2):
            (Path(configs[0].out) / configs[0].run_name / f"checkpoint-00000{step}").mkdir(parents=True)

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--train", "--lr 1e-6 --shard offload"])
    monkeypatch.setattr(gpu, "run_train", run_train)
    monkeypatch.setattr(gpu, "summary", lambda *_: {})
    gpu.run_part(gpu.arguments())
    assert (configs[0].steps, configs[0].checkpoint_every, configs[0].lr, configs[0].shard) == (2, 1, 1e-6, "offload")
    assert resumed == [["checkpoint-000001"]] and '"part": "run"' in capsys.readouterr().out


def test_gpu_shows_the_output_of_a_failed_run(monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text("import sys, time; print(sys.argv[1], flush=True); time.sleep(60)")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=r"^train.py --lr 1 ended with no result in time: (--lr)?$"):
        gpu.run_train(0.02, "--lr", "1")
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[1], file=sys.stderr); exit(3)")
    with pytest.raises(RuntimeError, match=r"^train.py --lr 1 ended with 3: --lr$"):
        gpu.run_train(1.0, "--lr", "1")


def test_the_host_s_memory_with_offload():
    """Counted from the sizes of the matrices, and here from every tensor of the model; and where torch rounds them."""
    layers, hidden, intermediate, heads, key_heads, vocabulary = scaling.SHAPES["7B"]
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, tie_word_embeddings=False))
    sizes = [4 * p.numel() for p in model.parameters()]
    assert sum(sizes) / 4 == pytest.approx(scaling.parameters("7B")[0], rel=1e-3) == pytest.approx(7.616e9, rel=1e-3)
    for limit, gib in ((math.inf, 165), (parallel.PINNED_CACHED_MIB, 114), (0, 113)):
        pinned = sum(n if n > limit * 2**20 else 2 ** math.ceil(math.log2(n)) for n in sizes)
        found = scaling.host_memory("7B", limit)
        assert found["update"] == pytest.approx(2 * (pinned + sum(sizes)) / 2**30, rel=1e-3)
        assert round(found["update"]) == gib and round(found["checkpoint"]) == 85
    comment = (scaling.RECIPES / "r1-distill-7b-offload.toml").read_text()
    assert f"{scaling.host_memory('7B')['update']:.0f} GiB, are in the host's memory" in comment


@pytest.mark.parametrize("result", ["scaling"], indirect=True)
def test_scaling(result):
    """More GPUs take less time; 1.5B fits on one GPU, and 32B does not."""
    rows = {(row["model"], row["gpus"]): row for row in result["rows"]}
    seconds = {key: row["seconds"] and row["seconds"]["step"] for key, row in rows.items()}
    assert seconds["1.5B", 1] > seconds["1.5B", 8] > seconds["1.5B", 64] and seconds["32B", 1] is None
    assert (rows["1.5B", 8]["shard"], rows["7B", 8]["shard"]) == ("no", "yes")
    for deal in result["imbalance"].values():  # least: above 1 if one response is longer than the mean
        assert deal["dealt"] < 1.02 * deal["least"] < deal["round_robin"]
