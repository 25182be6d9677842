"""The program as its user runs it: real vLLM, real data, whole runs in processes of their own."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loss
import policy
import settings
import train
import workspace
from prompts import Problem, UserError
from rollout import Response

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--steps", "4", "--prompts-per-step", "16", "--max-kept-prompts", "8", "--mini-batch-prompts", "2"),
    *("--eval-every", "2", "--eval-samples", "2", "--checkpoint-every", "2", "--max-micro-batch-tokens", "2048"),
    *("--entropy-target", "0.2"),  # so that every test of a run is one of the controller too
]


def start(out: Path, *arguments: str, mode: str = "disabled") -> subprocess.Popen:
    where = [] if "--resume" in arguments else ["--out", str(out)]
    command = [sys.executable, "train.py", *where, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"WANDB_MODE": mode}, **pipes)


def run(out: Path, *arguments: str, mode: str = "disabled") -> str:
    process = start(out, *arguments, mode=mode)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_a_run_leaves_everything_behind(finished):
    folder, output = finished
    assert {p.name for p in folder.iterdir()} >= {"config.json", "metrics.jsonl", "samples.jsonl", "source", "wandb"}
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["steps"] == 4 and record["config"]["objective"] == "ce_gppo"
    assert (folder / "source" / "loss.py").read_text() == (ROOT / "loss.py").read_text()
    for phrase in ("accuracy, eval/arithmetic/avg_at_k", "entropy, nats a token", "tokens/s", "checkpoint-000004"):
        assert phrase in output
    assert "wandb sync" in output and list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_every_metric_is_there_finite_and_sane(finished):
    rows = metrics_of(finished[0])
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    quadrants = ["pa_hp", "pa_lp", "na_hp", "na_lp"]
    expected = {
        **{"entropy": ["mean", "p10", "p90", *quadrants], "tokens": quadrants},
        "velocity": [*quadrants, "clipped_low", "clipped_high", "total"],
        **{
            "clip": ["low", "high"],
            "weight": ["low", "high", "inside"],
            "ratio": ["mean", "min", "max"],
            "kl": ["old"],
        },
        "mismatch": ["kl", "ratio_max", "ratio_p99"],
        "reward": ["mean", "std", "group_solved_all", "group_solved_none", "pass_at_g"],
        "response": ["length_mean", "length_max", "truncated"],
        "optim": ["loss", "grad_norm", "lr", "beta1", "beta2", "skipped"],
        "time": ["rollout", "reward", "old_logprobs", "update", "sync", "step"],
        "perf": ["rollout_tokens_per_s", "update_tokens_per_s", "padding", "mfu", "peak_memory_gib"],
    }
    for row in rows[1:]:
        missing = {f"{group}/{name}" for group, names in expected.items() for name in names} - row.keys()
        assert not missing
        assert all(math.isfinite(value) for value in row.values())
        assert sum(row[f"tokens/{q}"] for q in quadrants) == pytest.approx(1)
        assert sum(row[f"velocity/{q}"] for q in quadrants) == pytest.approx(row["velocity/total"], abs=1e-9)
        assert row["update_1/clip_low"] == row["update_1/clip_high"] == 0, "the first update is at ratio 1"
        assert row["update_1/ratio_max"] == pytest.approx(1, abs=1e-4)
        assert row["entropy/p10"] <= row["entropy/mean"] <= row["entropy/p90"]
    for row in rows[::2]:
        assert 0 <= row["eval/arithmetic/avg_at_k"] <= row["eval/arithmetic/pass_at_k"] <= 1
    assert rows[3]["entropy/delta"] == pytest.approx(rows[3]["entropy/mean"] - rows[2]["entropy/mean"])


def test_vllm_and_trainer_agree_after_every_sync(finished):
    rows = metrics_of(finished[0])[1:]
    assert all(math.log(row["mismatch/ratio_max"]) < 1e-4 for row in rows)
    assert rows[-1]["kl/old"] > 0, "the weights moved in between"


def test_the_workspace_charts_what_is_logged(finished):
    """Every chart of the W&B view shows metrics that a run has; entropy comes first."""
    logged = {name for row in metrics_of(finished[0]) for name in row} | {"clip/prob_low", "clip/prob_high"}
    for charts in workspace.SECTIONS.values():
        for metrics in charts:
            assert set(metrics) <= logged or any(re.fullmatch(metrics[0], name) for name in logged), metrics
    view = json.loads(workspace.workspace("me", "ce-gppo")._to_model().model_dump_json(by_alias=True))
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:2] == ["Entropy", "Reward and evaluation"]
    charted = [metric for section in sections for panel in section["panels"] for metric in panel["config"]["metrics"]]
    assert charted[0] == "entropy/mean" and len(charted) > 40
    assert all(panel["config"]["xAxis"] == "step" for section in sections for panel in section["panels"])


def test_samples_can_be_read(finished):
    rows = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    for row in rows:
        assert row["reward"] == float(row["extracted"] == row["answer"]) and row["prompt"].endswith("<|assistant|>")


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    run(tmp_path, "--run-name", "again", *SMALL)
    assert without_timings(metrics_of(tmp_path / "again")) == without_timings(metrics_of(finished[0]))


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    """SIGTERM saves and says how to continue; the resumed run is the uninterrupted one, bit for bit."""
    process = start(tmp_path, "--run-name", "cut", *SMALL, mode="offline")
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 1,' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 0 and f"--resume {tmp_path / 'cut'}" in output, output
    assert len(metrics_of(tmp_path / "cut")) < 5, "the signal came too late to test anything"
    run(tmp_path, "--resume", str(tmp_path / "cut"), mode="offline")
    ids = [path.name.rpartition("-")[2] for path in (tmp_path / "cut" / "wandb").glob("offline-run-*")]
    assert len(ids) == 2 and ids[0] == ids[1], "both parts go into one W&B run"
    assert without_timings(metrics_of(tmp_path / "cut")) == without_timings(metrics_of(finished[0]))
    ours, expected = (load_file(f / "checkpoint-000004" / "model.safetensors") for f in (tmp_path / "cut", finished[0]))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_evaluate_is_a_command(finished, tmp_path):
    checkpoint = finished[0] / "checkpoint-000004"
    command = [sys.executable, "evaluate.py", "--model", checkpoint, "--k", "2", "--temperature", "1", "--top-p", "1"]
    command += ["--out", tmp_path / "responses.jsonl"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "256 problems x 2 samples" in output
    accuracy = float(output.split("arithmetic ")[-1].split()[1])
    # The run itself evaluated the same weights with the same seed, at another length limit.
    assert accuracy == pytest.approx(metrics_of(finished[0])[-1]["eval/arithmetic/avg_at_k"], abs=0.05)


def test_a_padded_vocabulary_and_a_policy_that_solves_nothing(tokenizer, tmp_path):
    """Random weights: ids past the tokenizer's vocabulary, every group without signal, and the run goes on."""
    from base import make_model

    torch.manual_seed(0)
    model = make_model(tokenizer, hidden_size=64, num_layers=1)
    model.resize_token_embeddings(len(tokenizer) + 60)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    run(tmp_path, "--run-name", "hopeless", "--model", str(tmp_path / "padded"), *SMALL, "--steps", "2")
    rows = metrics_of(tmp_path / "hopeless")
    assert [row["reward/group_solved_none"] for row in rows[1:]] == [1.0, 1.0]
    assert all(row["optim/updates"] == 0 and row["entropy/mean"] > 1 for row in rows[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes of the user's: one sentence, exit code 2, nothing left behind


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rate", "1"], r"unknown setting --learning-rate; known: .*\blr\b"),
        (["--objective", "ppo"], "objective 'ppo' is unknown; known: ce_gppo, gppo, grpo"),
        (["--aggregation", "mean"], "aggregation 'mean' is unknown; known: token-mean"),
        (["--mini-batch-prompts", "5"], "mini_batch_prompts = 5 does not divide max_kept_prompts = 64"),
        (["--max-kept-prompts", "100"], "max_kept_prompts = 100 is more than prompts_per_step = 64"),
        (["--responses-per-prompt", "1"], "a group needs at least 2"),
        (["--steps", "0"], "steps = 0: must be at least 1"),
        (["--top-p", "0.9"], "top_p = 0.9, top_k = 0: rollouts to train on need 1.0"),
        (["--top-k", "20"], "top_k = 20: rollouts to train on need 1.0 and 0"),
        (["--lr", "nan"], "lr = nan: must be a number"),
        (["--eval-temperature", "-1"], "eval_temperature = -1.0: must be a number from 0"),
        (["--eval-top-p", "2"], "eval_top_p = 2.0: must be above 0, and at most 1"),
        (["--adam-betas", "0.9", "1.0"], "adam_betas = .*: must be from 0 to below 1"),
        (["--dual-clip", "0.5"], "dual_clip = 0.5: must be above 1"),
        (["--beta1", "1.5"], "beta1 = 1.5: must be from 0 to 1"),
        (["--entropy-target", "-1"], "entropy_target = -1.0: must be above 0 nats"),
        (
            ["--entropy-target", "0.1", "--objective", "grpo"],
            "entropy_target moves the betas: it needs",
        ),
        (["--rollout-correction", "is"], "rollout_correction 'is' is unknown; known: none, tis, mask"),
        (["--temperature", "0"], "temperature = 0.0: must be above 0"),
        (["--model", "no/such/model"], "model 'no/such/model': no such folder"),
        (["--train-data", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--max-response-tokens", "4096"], "= 4160 is beyond the model's context of 512"),
        (["--resume", "nowhere", "--lr", "1"], "--resume continues a run with its own settings"),
        (["--resume", "nowhere"], "--resume nowhere: no config.json there"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys, "argv", ["train.py", *arguments, *(["--out", str(tmp_path)] * (arguments[0] != "--resume"))]
    )
    with pytest.raises(SystemExit) as end:
        train.main()
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(message, printed) and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_run_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    with pytest.raises(UserError, match="belongs to a run that is finished or has other settings"):
        settings.locate(settings.resolve(train.Config(out=str(tmp_path), run_name="mine")))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]


def test_every_setting_says_what_it_is(capsys):
    with pytest.raises(SystemExit) as end:
        settings.parse(train.Config, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name.replace('_', '-')}" in printed
    assert "clip interval, below 1" in printed


def test_a_stale_engine_ends_the_run():
    with pytest.raises(train.RunEnded, match="do not hold the same weights"):
        train.check_mismatch({"mismatch/mean": 0.2}, train.Config())
    with pytest.raises(train.RunEnded, match="do not hold the same weights"):
        train.check_mismatch({"mismatch/mean": math.nan}, train.Config())


def test_problems_of_a_step_cover_the_data_once_an_epoch():
    problems = [Problem("", [i], "", "") for i in range(10)]
    config = train.Config(prompts_per_step=4)
    chosen = [p.prompt_ids[0] for step in range(1, 6) for p in train.problems_of_step(problems, step, config)]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10)) and chosen[:10] != chosen[10:]
    other = [p.prompt_ids[0] for p in train.problems_of_step(problems, 1, train.Config(prompts_per_step=4, seed=1))]
    assert other != chosen[:4]


def test_one_setting_makes_a_baseline():
    """What the papers set is filled in, and what the user sets stays."""
    dapo = settings.resolve(train.Config(objective="dapo", max_response_tokens=100))
    assert (dapo.eps_low, dapo.eps_high, dapo.overlong_buffer, dapo.aggregation) == (0.2, 0.28, 20, "token-mean")
    gspo = settings.resolve(train.Config(objective="gspo"))
    assert (gspo.eps_low, gspo.eps_high, gspo.aggregation) == (3e-4, 4e-4, "seq-mean-token-mean")
    ours = settings.resolve(train.Config())
    assert (ours.eps_low, ours.eps_high, ours.overlong_buffer, ours.aggregation) == (0.2, 0.2, 0, "token-mean")
    assert settings.resolve(train.Config(objective="dapo", eps_high=0.3, overlong_buffer=0)).eps_high == 0.3
    assert settings.resolve(dapo) == dapo


def test_betas_move_linearly():
    config = train.Config(steps=5, beta1=0.5, beta2=1.0, beta1_end=1.0, beta2_end=0.0)
    moved = [train.betas_of_step(config, step, (0.1, 0.0)) for step in range(1, 6)]
    assert moved == [(0.5, 1.0), (0.625, 0.75), (0.75, 0.5), (0.875, 0.25), (1.0, 0.0)]
    assert train.betas_of_step(train.Config(), 3, (0.1, 0.0)) == (0.75, 1.0)
    assert train.betas_of_step(train.Config(entropy_target=0.1), 3, (0.2, 0.0)) == pytest.approx((0.6, 0.2))


def test_the_controller_moves_the_betas_of_a_run(finished):
    """The betas of each step follow from the entropies of the steps before, and from nothing else."""
    rows, control = metrics_of(finished[0])[1:], (0.5, 0.0)
    for row in rows:
        assert (row["optim/beta1"], row["optim/beta2"]) == pytest.approx(loss.steered_betas(control[0], 0.75, 1.0))
        control = loss.steer(control, row["entropy/mean"], 0.2)
    assert len({row["optim/beta1"] for row in rows}) == 4


def response(length: int, truncated: bool, reward: float, prompt: int) -> Response:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(97, 107, (length,), generator=generator).tolist()
    return Response([prompt], ids, torch.full((length,), -2.0), truncated, "", reward)


def test_truncated_responses_can_be_kept_out_of_the_update(tiny_model):
    """Their group's advantages know them; the gradient is that of the rest alone, over the tokens of the rest alone."""
    groups = [
        [response(5, False, 1.0, 3), response(9, True, 0.0, 3), response(7, False, 0.0, 3)],
        [response(9, True, 0.0, 4), response(8, True, 1.0, 4)],
    ]
    for group in groups:
        rewards = torch.tensor([[r.reward for r in group]])
        for r, advantage in zip(group, loss.group_advantages(rewards, True)[0].tolist(), strict=True):
            r.advantage = advantage
            r.old_logprobs, r.entropy = r.rollout_logprobs, torch.ones(len(r.response_ids))
    kept = [train.without_truncated(group) for group in groups]
    assert [[len(r.response_ids) for r in group] for group in kept] == [[5, 7], []]
    assert kept[0][0].advantage != pytest.approx(-kept[0][1].advantage), "the truncated one counts in the mean"

    config = settings.resolve(train.Config(max_grad_norm=1e9))
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    train.update(policy.Policy(tiny_model), optimizer, kept[0], 0.0, 0.5, 1.0, config, "cpu")
    tiny_model.set_attn_implementation("sdpa")
    expected = 0.0  # by hand: -delta A, averaged over 5 + 7 tokens
    for r in kept[0]:
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        logprobs = tiny_model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        ratio = (logprobs - r.old_logprobs).exp()
        low, high = (ratio < 0.8) & (r.advantage < 0), (ratio > 1.2) & (r.advantage > 0)
        weight = torch.where(low, 0.5 * 0.8 / ratio.detach(), torch.where(high, 1.2 / ratio.detach(), 1.0))
        expected = expected - (weight * ratio * r.advantage).sum() / 12
    gradients = torch.autograd.grad(expected, list(tiny_model.parameters()))
    for parameter, gradient in zip(tiny_model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_a_step_whose_responses_are_all_truncated(tmp_path):
    """Nothing is left to update on; the run goes on."""
    changed = ["--steps", "1", "--max-response-tokens", "2", "--mask-truncated", "--no-dynamic-sampling"]
    run(tmp_path, "--run-name", "cut", *SMALL, *changed)
    row = metrics_of(tmp_path / "cut")[1]
    assert row["response/truncated"] == 1 and row["optim/updates"] == 0


def test_split_evenly():
    assert [len(part) for part in train.split_evenly(list(range(37)), 3)] == [12, 12, 13]
    assert train.split_evenly([], 0) == []
    assert sum(train.split_evenly(list(range(37)), 5), []) == list(range(37))
