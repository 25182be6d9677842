"""Every bench at a tiny size: it runs, and its JSON line is complete. Its timings are not tested."""

import json
import math
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import train
from bench import common, contestants, gpu, scaling, update
from ce_gppo import checkpoint, config, metrics, parallel, perf, policy
from ce_gppo.messages import RunEnded, UserError
from helpers import Forked, refuses, resolved, rollout_of, rows_of

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
    assert min(result["speed_over_entropy_only"], result["memory_of_entropy_only"], result["head_s"]) > 0


def test_the_passes_of_an_update_are_those_of_the_definition(tmp_path):
    """Loss and gradients as with the logits of every token, of transformers itself; weights stay as they are."""
    shape = {"layers": 2, "hidden_size": 32, "intermediate_size": 32, "heads": 2, "kv_heads": 1, "vocabulary": 100}
    settings = update.Config(shared_prompt=True, response_tokens=(3, 5, 4), prompt_tokens=6, **shape)
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
    for _ in range(2):  # the second call clears the gradients of the first
        assert passes([0, 1, 2]) == pytest.approx(expected.item(), abs=1e-6)
    for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, other)
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_without_the_accounting(monkeypatch):
    """No moment and no sums over tokens, where `ours` has them; gradients are compared by test_update."""
    monkeypatch.setattr(contestants, "ours", lambda *_: None)
    inputs = torch.randn(4, 8), torch.randn(100, 8), torch.arange(4)
    for module, name in ((policy, "_fold"), (metrics, "token_sums")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored at the end
    assert policy.token_statistics(*inputs)[2].all()
    contestants.entropy_only(None, {})
    assert not policy.token_statistics(*inputs)[2].any() and not metrics.add([metrics.token_sums()] * 2).values()


def test_a_revision_is_checked_out_and_removed(monkeypatch, tmp_path):
    """Its contestant is its own: what runs there finds none of our modules."""

    def run(command, cwd, env, **_):
        assert command[2:4] == ["bench.contestants", "ours"] and env["PYTHONPATH"] == str(cwd)
        (tmp_path / "ours.pt").write_text(str(cwd))
        return types.SimpleNamespace(returncode=0, stdout='noise\n{"seconds": 1}\n')

    with pytest.raises(UserError, match="--against nowhere: git cannot check it out"), update.checked_out("nowhere"):
        pass
    with update.checked_out("HEAD") as folder:
        assert (folder / "bench" / "contestants.py").is_file() and folder != ROOT
    assert not folder.exists()
    monkeypatch.setattr(update.subprocess, "run", run)
    for name, root in (("before", folder), ("ours", ROOT)):
        assert update.run(name, tmp_path, 1, folder) == {"seconds": 1}
        assert (tmp_path / f"{name}.pt").read_text() == str(root)


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
    assert result["engine_over_bare"] * result["bare/tokens_per_s"] == pytest.approx(result["engine/tokens_per_s"])
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
    gpu.offload_part(gpu.read([*SMALL_GPU, "--tokens", "96"]))
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    assert found["passes_s"] > 0 and found["step_s"] > 0 and found["tokens"] == 96 and "pinned_gib" not in found


def test_gpu_s_run(capsys, monkeypatch):
    """Without a GPU a resumed step is the same. The run is a real one, in processes that need no imports."""

    def run_train(minutes, *words):
        process = Forked("train.py", *words)
        output = process.communicate(timeout=60 * minutes)[0]
        assert process.returncode == 0, output

    monkeypatch.setattr(gpu, "run_train", run_train)
    settings = "--prompts-per-step 8 --max-kept-prompts 4 --mini-batch-prompts 2 --dynamic-sampling off --beta2 0.9"
    data = f"--train-data {rows_of('train', 64)} --eval-data {rows_of('eval', 8)}"
    gpu.run_part(gpu.read(["--device", "cpu", "--train", f"{settings} {data}"]))
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    assert found["resume/same_responses"] == 1 and found["resume/entropy_difference"] == 0
    assert found["optim/updates"] == 2 and {"time/sync", "mismatch/mean", "kl/approx"} <= found.keys()


def test_gpu_continues_after_a_part_that_fails(monkeypatch, capsys):
    """Each part is its own process, with the options given; one that fails has a line, and is named."""
    commands = []

    def run(command, timeout, **_):
        commands.append(command[1:])
        if "offload" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=139 if "run" in command else 0)

    refuses("tokens = 0", gpu.read, ["--tokens", "0"])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tokens", "64"])
    monkeypatch.setattr(gpu.subprocess, "run", run)
    with pytest.raises(RunEnded, match="failed: run, offload; "):
        gpu.main()
    assert commands == [["-m", "bench.gpu", "--tokens", "64", "--part", part] for part in gpu.PARTS]
    failed = [json.loads(line)["failed"] for line in capsys.readouterr().out.splitlines()]
    assert failed == [139, "no result in 15 minutes"]


def test_gpu_shows_the_output_of_a_failed_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for code, minutes, end in (("exit(3)", 1.0, "3"), ("time.sleep(60)", 0.02, "no result in time")):
        (tmp_path / "train.py").write_text(f"import sys, time; print(sys.argv[1], flush=True); {code}")
        with pytest.raises(RuntimeError, match=f"^train.py --lr 1 ended with {end}: (--lr)?$"):
            gpu.run_train(minutes, "--lr", "1")


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


def test_decoding_is_the_sum_of_its_steps(monkeypatch):
    """Here step by step and sequence by sequence, with a floor that only the last steps are under."""
    lengths = scaling.sample_lengths(60, 40, 120)
    monkeypatch.setattr(scaling, "DECODE_FLOOR", 0.06)
    waiting, running, expected = list(lengths), [], 0.0
    while waiting or running:
        while waiting and len(running) < 8:
            running.append([0, waiting.pop(0)])
        running = [[done + 1, length] for done, length in running]
        expected += max(0.06, (50 + 2 * sum(10 + done for done, _ in running)) / 1000)
        running = [[done, length] for done, length in running if done < length]
    assert scaling.decode_seconds(lengths, 10, 8, 50, 2, 1000) == pytest.approx(expected, rel=0.002)
    assert scaling.decode_seconds([3], 10, 8, 50, 2, 1000) == pytest.approx(3 * (50 + 2 * 12) / 1000)


def test_operations_are_those_of_perf():
    """The one definition: forward and backward, without recomputation."""
    shape = types.SimpleNamespace(**dict(zip(SHAPE, scaling.SHAPES["1.5B"], strict=True)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(common.model_config(Qwen2Config, shape, tie_word_embeddings=False))
    batch = rollout_of([(200, length) for length in (10, 3000, 900)])
    assert scaling.flops("1.5B", 200, [10, 3000, 900]) == pytest.approx(perf.flops(model, batch), rel=2e-3)


def test_the_responses_of_a_step_are_those_that_learn_computes(tiny_model, monkeypatch):
    """In passes without gradients, and in updates; here with 8 groups of 4, of which 6 are trained on, 2 an update."""
    settings = resolved(max_kept_prompts=6, mini_batch_prompts=2, responses_per_prompt=4)
    found, inner = {True: 0, False: 0}, policy.Policy.forward

    def counting(self, packed, temperature):
        found[torch.is_grad_enabled()] += len(packed.targets) // 5
        return inner(self, packed, temperature)

    monkeypatch.setattr(policy.Policy, "forward", counting)
    whole = rollout_of([(3, 5)] * 32)
    whole = replace(whole, prompt_of=torch.arange(8).repeat_interleave(4), prompts=whole.prompts[:8])
    whole = replace(whole, index=torch.arange(32))
    mini_batches, state = list(torch.arange(24).split(8)), checkpoint.State("", step=1)
    models = [policy.Policy(tiny_model), torch.optim.AdamW(tiny_model.parameters(), lr=1e-4), None, None]
    objective, meter = train.objective_of_step(settings, state), mock.MagicMock(device="cpu")
    train.learn(*models, whole, mini_batches, objective, 1e-4, state, settings, Path(), meter)
    settings = scaling.Config(prompts=8, responses_per_prompt=4, kept_prompts=6, mini_batch_prompts=2)
    old, trained = scaling.passes(settings)
    assert (math.ceil(old), trained) == (found[False], found[True])


@pytest.mark.parametrize("result", ["scaling"], indirect=True)
def test_scaling(result):
    """More GPUs take less time; 1.5B fits on one GPU, and 32B does not."""
    rows = {(row["model"], row["gpus"]): row for row in result["rows"]}
    seconds = {key: row["seconds"] and row["seconds"]["step"] for key, row in rows.items()}
    assert seconds["1.5B", 1] > seconds["1.5B", 8] > seconds["1.5B", 64] and seconds["32B", 1] is None
    assert (rows["1.5B", 8]["shard"], rows["7B", 8]["shard"]) == ("no", "yes")
