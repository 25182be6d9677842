"""Every bench at a tiny size: it runs, and its JSON line is complete. Its timings are not tested."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import train
from bench import common, contestants, gpu, scaling, update
from ce_gppo import config, metrics, parallel, policy
from ce_gppo.messages import RunEnded, UserError
from helpers import Forked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = ["--layers", "2", "--hidden-size", "64", "--intermediate-size", "128", "--heads", "2", "--kv-heads", "1"]
TINY += ["--vocabulary", "512"]
SMALL_GPU = ["--device", "cpu", *TINY, "--prompt-tokens", "8", "--repeats", "1", "--lengths", "32", "64"]
SHAPE = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "vocabulary")
TIMES = {"rollout": 2.0, "update": 1.5, "reward": 0.1, "old_logprobs": 0.2, "step": 4.0}
STEPS = [
    {"step": 0, "time/eval": 5.0},
    {"step": 1, **{f"time/{part}": value for part, value in TIMES.items()}},
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
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in STEPS))
    missing = ["vllm", "wandb", "tyro", "scipy", "accelerate", "datasets", "math_verify", "psutil", "PIL"]
    alone = [sys.executable, *run_without(missing, "bench.gpu"), "--part", "update", *SMALL_GPU, "--tokens", "128"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {
        "update": Forked("bench.update", "--accounting", "--rounds", "1", "--threads", "1", *TINY),
        "rollout": Forked("bench.rollout", "--prompts", "2", "--max-tokens", "8", "--rounds", "1", "--metrics", path),
        "gpu": subprocess.Popen(alone, cwd=ROOT, **pipes),
        "scaling": Forked("bench.scaling"),
    }
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
    """Without the accounting the gradients are the same, bit for bit."""
    assert result["tokens"] == 8 * 40 + 776
    for name in ("ours", "entropy_only"):
        assert result[f"{name}/tokens_per_s"] * result[f"{name}/seconds"] == pytest.approx(1096)
        assert 0 < result[f"{name}/before_gib"] <= result[f"{name}/peak_gib"]
    assert result["entropy_only/gradient_difference"] == 0 and result["entropy_only/loss"] == result["ours/loss"]
    assert {"speed_over_entropy_only", "memory_of_entropy_only", "head_overhead"} <= result.keys()


def test_the_passes_of_an_update_are_those_of_the_definition(tmp_path):
    """Loss and gradients as with the logits of every token, of transformers itself; weights stay as they are."""
    settings = update.Config(layers=2, hidden_size=32, intermediate_size=32, heads=2, kv_heads=1, vocabulary=100)
    settings.response_tokens, settings.prompt_tokens, settings.shared_prompt = (3, 5, 4), 6, True
    common.save_random_model(tmp_path, common.model_config(LlamaConfig, settings, pad_token_id=0))
    batch = update.write_batch(tmp_path, settings)
    model, passes = contestants.ours(tmp_path, batch)
    plain, losses = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), []
    for prompt, ids, advantage in zip(batch["prompt_ids"], batch["response_ids"], batch["advantages"], strict=True):
        logits = plain(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        losses.append(-(advantage * (logprobs - logprobs.detach()).exp()))
    expected = torch.cat(losses).mean()
    expected.backward()
    assert passes([0, 1, 2]) == pytest.approx(expected.item(), abs=1e-6)
    assert passes([0, 1, 2]) == pytest.approx(expected.item(), abs=1e-6), "gradients of the pass before are cleared"
    for (name, ours), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, other), name
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_without_the_accounting(tmp_path, monkeypatch):
    """The moment is 0 and no metrics are computed; logprobs, entropy and gradients are the same."""
    for module, name in ((policy, "_fold"), (metrics, "token_sums")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored at the end
    monkeypatch.setattr(contestants, "ours", lambda *_: None)
    hidden, weight = torch.randn(40, 8).requires_grad_(), torch.randn(1000, 8).requires_grad_()
    found = []
    for switch in (lambda *_: None, contestants.entropy_only):
        switch(tmp_path, {})
        logprobs, H, S = policy.token_statistics(hidden, weight, torch.arange(40), width=256)
        found.append(((logprobs, H, *torch.autograd.grad((logprobs + H).sum(), (hidden, weight))), S))
    (with_all, S), (without, no_S) = found
    assert all(torch.equal(a, b) for a, b in zip(with_all, without, strict=True))
    assert S.abs().max() > 0 and not no_S.any() and not metrics.add([metrics.token_sums()] * 2).values()


def test_a_revision_is_checked_out_and_removed():
    with update.checked_out("HEAD") as folder:
        assert (folder / "bench" / "contestants.py").is_file() and folder != ROOT
    assert not folder.exists()
    with update.checked_out("") as folder:
        assert folder == ROOT
    with pytest.raises(UserError, match="--against nowhere: git cannot check it out"), update.checked_out("nowhere"):
        pass


def test_the_contestant_of_a_revision_runs_in_its_folder(monkeypatch, tmp_path):
    calls = []

    def run(command, cwd, env, **_):
        calls.append((command[2:4], cwd, env["PYTHONPATH"]))
        (tmp_path / "ours.pt").write_text(str(cwd))
        return types.SimpleNamespace(returncode=0, stdout='noise\n{"seconds": 1}\n')

    monkeypatch.setattr(update.subprocess, "run", run)
    before = tmp_path / "before"
    assert update.run("before", tmp_path, 1, before) == update.run("ours", tmp_path, 1, before) == {"seconds": 1}
    name = ["bench.contestants", "ours"]
    assert calls == [(name, before, str(before)), (name, ROOT, str(ROOT))]
    assert (tmp_path / "before.pt").read_text() == str(before) and (tmp_path / "ours.pt").read_text() == str(ROOT)


@pytest.mark.parametrize("wrong", [{"loss": 0.1}, {"gradient": 1.1}])
def test_contestants_that_differ_end_the_bench(monkeypatch, wrong):
    def run(name, folder, *_):
        own = {"loss": 0.0, "gradient": 1.0} | (wrong if name == "trl" else {})
        torch.save({"weight": torch.tensor([own["gradient"]])}, folder / f"{name}.pt")
        return {"seconds": 1.0, "loss": own["loss"]}

    monkeypatch.setattr(update, "run", run)
    monkeypatch.setattr(common, "save_random_model", lambda *_: None)
    assert update.compete(["ours", "before"], None, update.Config())[2] == {"before": 0}
    with pytest.raises(RunEnded, match="ours and 'trl' compute different gradients, by .*, or losses"):
        update.compete(["ours", "trl"], None, update.Config())


@pytest.mark.parametrize("result", ["rollout"], indirect=True)
def test_rollout(result):
    assert result["engine/tokens_per_s"] > 0 and result["bare/tokens_per_s"] > 0
    assert {"engine_over_bare_with_logprobs", "engine_over_bare"} <= result.keys()
    expected = {"rollout": 0.5, "update": 0.4, "reward": 0.01, "old_logprobs": 0.02, "sync": 0.03, "rest": 0.04}
    assert {part: result[f"share/{part}"] for part in expected} == pytest.approx(expected)
    assert result["share/outside"] == pytest.approx(0.08)


@pytest.mark.parametrize("result", ["gpu"], indirect=True)
def test_gpu(result):
    """It ran in an environment with only torch, transformers and their requirements."""
    assert {"device", "matrix_tflops", "weights_and_gradients_gib", "parameters"} <= result.keys()
    for case, tokens in (("32", 128), ("64", 128), ("mixed", 96)):
        assert result[f"{case}/tokens"] == tokens and result[f"{case}/mfu"] > 0
        assert {f"{case}/peak_gib", f"{case}/head_over_products"} <= result.keys()


def test_gpu_s_offload(capsys, one_process):
    """On a CPU nothing is pinned."""
    gpu.offload_part(gpu.read([*SMALL_GPU, "--tokens", "96"]))
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    assert found["passes_s"] > 0 and found["step_s"] > 0 and found["tokens"] == 96 and "pinned_gib" not in found


def test_gpu_compares_a_resumed_step(tmp_path):
    """Equal responses are counted, and only the second step is read."""
    for name, second in (("whole", "b"), ("again", "c")):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "entropy/mean": 0.5 * step, "time/rollout": 1.0, "optim/lr": 1.0} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        samples = [{"step": step, "response": text} for step, text in ((1, second), (2, "a"), (2, second))]
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    found = gpu.summary(tmp_path / "whole", tmp_path / "again")
    resume = {"resume/same_responses": 0.5, "resume/entropy_difference": 0.0}
    assert found == resume | {"entropy/mean": 1.0, "time/rollout": 1.0}


def test_gpu_continues_after_a_part_that_fails(monkeypatch, capsys):
    """Each part is its own process, with the options given; one that fails has a line, and is named."""
    commands = []

    def run(command, timeout, **_):
        commands.append(command[1:])
        if "offload" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=139 if "run" in command else 0)

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tokens", "64"])
    monkeypatch.setattr(gpu.subprocess, "run", run)
    with pytest.raises(RunEnded, match="failed: run, offload; "):
        gpu.main()
    assert commands == [["-m", "bench.gpu", "--tokens", "64", "--part", part] for part in gpu.PARTS]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = [(line["bench"], line["part"], line["failed"]) for line in lines]
    assert failed == [("gpu", "run", 139), ("gpu", "offload", "no result in 15 minutes")]


@pytest.mark.parametrize("words, problem", [("--part head", "part 'head' is unknown"), ("--tokens 0", "tokens = 0")])
def test_gpu_s_options_are_checked(words, problem):
    with pytest.raises(UserError, match=problem):
        gpu.read(words.split())


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

    monkeypatch.setattr(gpu, "run_train", run_train)
    monkeypatch.setattr(gpu, "summary", lambda *_: {})
    gpu.run_part(gpu.read(["--device", "cpu", "--train", "--lr 1e-6 --shard offload"]))
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
    shape = types.SimpleNamespace(**dict(zip(SHAPE, scaling.SHAPES["7B"], strict=True)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(common.model_config(Qwen2Config, shape, tie_word_embeddings=False))
    sizes = [4 * p.numel() for p in model.parameters()]
    assert sum(sizes) / 4 == pytest.approx(scaling.parameters("7B")[0], rel=1e-3) == pytest.approx(7.616e9, rel=1e-3)
    for limit, gib in ((math.inf, 165), (parallel.PINNED_CACHED_MIB, 114), (0, 113)):
        pinned = sum(n if n > limit * 2**20 else 2 ** math.ceil(math.log2(n)) for n in sizes)
        found = scaling.host_memory("7B", limit)
        assert found["update"] == pytest.approx(2 * (pinned + sum(sizes)) / 2**30, rel=1e-3)
        assert round(found["update"]) == gib and round(found["checkpoint"]) == 85
    comment = (config.RECIPES / "r1-distill-7b-offload.toml").read_text()
    assert f"{scaling.host_memory('7B')['update']:.0f} GiB, are in the host's memory" in comment


@pytest.mark.parametrize("result", ["scaling"], indirect=True)
def test_scaling(result):
    """More GPUs take less time; 1.5B fits on one GPU, and 32B does not."""
    rows = {(row["model"], row["gpus"]): row for row in result["rows"]}
    seconds = {key: row["seconds"] and row["seconds"]["step"] for key, row in rows.items()}
    assert seconds["1.5B", 1] > seconds["1.5B", 8] > seconds["1.5B", 64] and seconds["32B", 1] is None
    assert (rows["1.5B", 8]["shard"], rows["7B", 8]["shard"]) == ("no", "yes")


def test_the_rank_that_has_the_most_tokens():
    """Between an even share and 2 % more, where no response is longer than that share; a whole response otherwise."""
    assert 1 / 8 <= scaling.largest_share(8, 128, 6000, 16384) < 1.02 / 8
    assert scaling.largest_share(64, 64, 6000, 6000) > 1.1 / 64
