"""Every bench at a tiny size: it runs, and its JSON line has what is to be recorded. Timings mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--layers", "2", "--hidden-size", "64", "--intermediate-size", "128", "--heads", "2", "--kv-heads", "1"]
TINY += ["--vocabulary", "512"]
# Runs a script where these cannot be imported, as on a GPU machine that has torch and transformers alone.
WITHOUT = [
    "-c",
    "import runpy, sys; sys.modules |= dict.fromkeys(['vllm', 'wandb', 'tyro']); del sys.argv[0]; "
    "sys.path.insert(0, 'bench'); runpy.run_path(sys.argv[0], run_name='__main__')",
]
STEPS = [
    {"step": 0, "time/eval": 5.0, "time/step": 5.0},
    {
        "step": 1,
        "time/rollout": 2.0,
        "time/update": 1.5,
        "time/reward": 0.1,
        "time/old_logprobs": 0.2,
        "time/step": 4.0,
    },
    {"step": 2, "time/rollout": 3.0, "time/update": 2.5, "time/sync": 0.3, "time/eval": 9.0, "time/step": 15.0},
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each bench printed. They run side by side: most of a tiny bench is imports."""
    metrics = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in STEPS))
    commands = {
        "update": ["--without-trl", "--rounds", "1", "--threads", "1", *TINY],
        "rollout": ["--prompts", "2", "--max-tokens", "8", "--rounds", "1", "--metrics", str(metrics), "--shapes"],
        "reward": ["--plain", "16", "--latex", "4", "--rounds", "1", "--hostile", "2"],
        "gpu": ["--device", "cpu", *TINY, "--lengths", "32", "64", "--prompt-tokens", "8", "--tokens", "128"],
        "attribution": ["--prompts", "8", "--repeats", "1"],
    }
    processes = {}
    for name, arguments in commands.items():
        command = [sys.executable, *(WITHOUT if name == "gpu" else []), f"bench/{name}.py", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes[name] = subprocess.Popen(command, cwd=ROOT, **pipes)
    return {name: (*process.communicate(), process.returncode) for name, process in processes.items()}


@pytest.fixture
def result(outputs, request):
    """The JSON line of the bench that the test is parametrized with."""
    stdout, stderr, code = outputs[request.param]
    assert code == 0, stderr
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1 and len(stdout.splitlines()) > 4, "one JSON line, and a table"
    return lines[0]


@pytest.mark.parametrize("result", ["update"], indirect=True)
def test_update(result):
    """That ours and the plain loop have the same gradient, the bench itself makes sure of."""
    assert result["tokens"] == 8 * 40 + 776
    for name in ("ours", "plain"):
        assert result[f"{name}/tokens_per_s"] * result[f"{name}/seconds"] == pytest.approx(1096)
        assert 0 < result[f"{name}/before_gib"] <= result[f"{name}/peak_gib"]
    assert result["plain/gradient_difference"] < 1e-3
    assert {"speed_over_plain", "memory_of_plain", "floor_s", "over_floor", "head_overhead"} <= result.keys()


@pytest.mark.parametrize("result", ["rollout"], indirect=True)
def test_rollout(result):
    assert result["engine/tokens_per_s"] > 0 and result["bare/tokens_per_s"] > 0
    assert {"engine_over_bare_with_logprobs", "engine_over_bare"} <= result.keys()
    assert [sync["parameters"] for sync in result["sync"]] == [888_192] and result["sync"][0]["seconds"] > 0
    expected = {"rollout": 0.5, "update": 0.4, "reward": 0.01, "old_logprobs": 0.02, "sync": 0.03, "rest": 0.04}
    assert {part: result[f"share/{part}"] for part in expected} == pytest.approx(expected)
    assert result["share/outside"] == pytest.approx(0.08)


@pytest.mark.parametrize("result", ["reward"], indirect=True)
def test_reward(result):
    for kind in ("plain", "latex"):
        assert result[f"{kind}/ours_right"] == 1.0 and result[f"{kind}/ours_over_bare"] > 0
    assert {"hostile/delay_s", "hostile/delay_of_next_s", "hostile/delay_all_s"} <= result.keys()
    assert len(result["hostile/each_s"]) == 2


@pytest.mark.parametrize("result", ["gpu"], indirect=True)
def test_gpu(result):
    """Ran without vLLM, W&B and tyro."""
    assert {"device", "matrix_tflops", "weights_and_gradients_gib", "parameters"} <= result.keys()
    for case, tokens in (("32", 128), ("64", 128), ("mixed", 96)):
        assert result[f"{case}/tokens"] == tokens and result[f"{case}/mfu"] > 0
        assert {f"{case}/peak_gib", f"{case}/logits_gib", f"{case}/head_over_products"} <= result.keys()


@pytest.mark.parametrize("result", ["attribution"], indirect=True)
def test_attribution(result):
    assert {"everything", "entropy only", "ratio"} <= result.keys()
