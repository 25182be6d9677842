"""Whole runs, as a user starts them: real vLLM, real data, in their own processes. And the parts of a step."""

import copy
import dataclasses
import json
import math
import re
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from ce_gppo import checkpoint, metrics, perf, runs, statistics
from ce_gppo import config as settings
from ce_gppo.betas import betas_of_step, steer, steered_betas
from ce_gppo.checkpoint import State
from ce_gppo.entropy import QUADRANTS
from ce_gppo.forward import Policy, compute_old_logprobs
from ce_gppo.messages import RunEnded, UserError
from ce_gppo.perf import Meter
from ce_gppo.problems import problems_of_batch
from ce_gppo.types import Problem, Response
from helpers import ROOT, SMALL, Forked, group_of, metrics_of, resolved, rows_of, run, start, without_timings


def test_a_run_leaves_everything_behind(finished):
    folder, output = finished
    files = {"config.json", "metrics.jsonl", "samples.jsonl", "tokens.jsonl", "source", "wandb"}
    assert {p.name for p in folder.iterdir()} >= files
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["steps"] == 4 and record["config"]["objective"] == "ce_gppo"
    for source in ("loss.py", "ce_gppo/forward.py"):
        assert (folder / "source" / source).read_text() == (ROOT / source).read_text()
    for phrase in ("accuracy, eval/arithmetic/avg_at_k", "entropy, nats per token", "tokens/s", "checkpoint-000004"):
        assert phrase in output
    assert re.search("^- Entropy .* while held-out accuracy went from", output, re.M)
    assert "wandb sync" in output and list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_every_metric_is_there_finite_and_sane(finished):
    rows = metrics_of(finished[0])
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    always = {name for metric in metrics.ALL if metric.always for name in metric.each()}
    with_updates = {"velocity/total", "clip/low", "weight/inside", "ratio/mean", "optim/loss", "perf/mfu", "kl/old"}
    for row in rows[1:]:
        assert not (always | with_updates) - row.keys()
        for name in row.keys() - {"step"}:
            assert sum(bool(metric.pattern().fullmatch(name)) for metric in metrics.ALL) == 1, f"{name} has no line"
        assert all(math.isfinite(value) for value in row.values())
        assert sum(row[f"tokens/{q}"] for q in QUADRANTS) == pytest.approx(1)
        parts = [row[f"velocity/{q}"] for q in QUADRANTS]  # float32 sums, which nearly cancel
        assert sum(parts) == pytest.approx(row["velocity/total"], rel=0, abs=1e-6 * sum(map(abs, parts)))
        assert row["update_1/clip_low"] == row["update_1/clip_high"] == 0, "the first update is at ratio 1"
        assert row["update_1/ratio_max"] == pytest.approx(1, abs=1e-4)
        assert row["entropy/p10"] <= row["entropy/mean"] <= row["entropy/p90"]
    k = json.loads((finished[0] / "config.json").read_text())["config"]["eval_samples"]
    for row in rows[::2]:
        right, passed, distinct = (row[f"eval/arithmetic/{name}_at_k"] for name in ("avg", "pass", "distinct"))
        assert 0 <= right <= passed <= 1 and passed <= distinct <= k * right + 1e-9
    assert rows[3]["entropy/delta"] == pytest.approx(rows[3]["entropy/mean"] - rows[2]["entropy/mean"])


def test_vllm_and_trainer_agree_after_every_sync(finished):
    rows = metrics_of(finished[0])[1:]
    assert all(math.log(row["mismatch/ratio_max"]) < 1e-4 for row in rows)
    assert rows[-1]["kl/old"] > 0, "the weights moved in between"


def test_the_workspace_charts_what_is_logged(finished):
    """Every chart of the W&B view shows metrics that a run has; entropy comes first."""
    from tools import workspace  # here, as its import of W&B is slow

    logged = {name for row in metrics_of(finished[0]) for name in row} | {"clip/prob_low", "clip/prob_high"}
    logged |= {"kl/reference", "optim/entropy_coef", "time/critic"}  # with other settings
    logged |= {metric.names for metric in metrics.METRICS["Critic, with advantages gae"]}
    for metric in metrics.ALL:
        assert set(metric.each()) <= logged or any(metric.pattern().fullmatch(name) for name in logged), metric
    view = json.loads(workspace.workspace("me", "ce-gppo")._to_model().model_dump_json(by_alias=True))
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:2] == ["Entropy", "Reward and evaluation"]
    charted = [metric for section in sections for panel in section["panels"] for metric in panel["config"]["metrics"]]
    assert charted[0] == "entropy/mean" and len(charted) > 40
    assert all(panel["config"]["xAxis"] == "step" for section in sections for panel in section["panels"])


def test_samples_have_prompt_answer_and_reward(finished):
    rows = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    for row in rows:
        assert row["reward"] == float(row["extracted"] == row["answer"]) and row["prompt"].endswith("<|assistant|>")


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    run(tmp_path, "--run-name", "again", *SMALL)
    assert without_timings(metrics_of(tmp_path / "again")) == without_timings(metrics_of(finished[0]))


def test_a_resumed_run_equals_the_uninterrupted_one(finished, tmp_path):
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
    assert (tmp_path / "cut" / "tokens.jsonl").read_text() == (finished[0] / "tokens.jsonl").read_text()
    ours, expected = (load_file(f / "checkpoint-000004" / "model.safetensors") for f in (tmp_path / "cut", finished[0]))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_evaluate_is_a_command(finished, tmp_path):
    checkpoint = finished[0] / "checkpoint-000004"
    arguments = [
        "--model",
        checkpoint,
        "--bench",
        rows_of("eval", 32),
        "--k",
        "2",
        "--temperature",
        "1",
        "--top-p",
        "1",
    ]
    process = Forked("tools.evaluate", *arguments, "--out", tmp_path / "responses.jsonl")
    output = process.communicate()[0]
    assert process.returncode == 0 and "32 problems x 2 samples" in output, output
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()[1:]]
    accuracy = sum(row["correct"] for row in rows) / 64
    assert re.search(rf"^arithmetic +32 +{accuracy:.4f} ", output, re.M) and len(rows) == 64
    assert all(row["correct"] == (row["extracted"] == row["answer"]) for row in rows)


@pytest.mark.slow
def test_a_padded_vocabulary_and_a_policy_that_solves_nothing(tokenizer, tmp_path):
    """Random weights give ids beyond the tokenizer's vocabulary, and no group has a signal. The run continues."""
    from data.arithmetic.base import make_model

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
        (["--objective", "ppg"], "objective 'ppg' is unknown; known: ce_gppo, gppo, grpo"),
        (["--aggregation", "mean"], "aggregation 'mean' is unknown; known: token-mean"),
        (["--mini-batch-prompts", "5"], "mini_batch_prompts = 5 does not divide max_kept_prompts = 48"),
        (["--max-kept-prompts", "100"], "max_kept_prompts = 100 is more than prompts_per_step = 48"),
        (["--responses-per-prompt", "1"], "responses_per_prompt = 1: must be at least 2"),
        (["--steps", "0"], "steps = 0: must be at least 1"),
        (["--seed", "4294967296"], "seed = 4294967296: must be at least 0 and at most 4294967295"),
        (["--lr", "nan"], "lr = nan: must be above 0"),
        (["--lr", "0"], "lr = 0.0: must be above 0"),
        (["--filter-groups", "always"], "filter_groups 'always' is unknown; known: off, on, refill"),
        (["--entropy-coef", "nan"], "entropy_coef = nan: must be at least 0"),
        (["--overlong", "0"], "overlong '0' is unknown; known: score, mask, or a number of tokens"),
        (["--overlong", "65"], "overlong = 65 is more than max_response_tokens = 64"),
        (["--eval-temperature", "-1"], "eval_temperature = -1.0: must be 0, or at least 0.01"),
        (["--eval-temperature", "0.005"], "eval_temperature = 0.005: must be 0, or at least 0.01"),
        (["--eps-low", "2"], "eps_low = 2.0: must be at least 0 and at most 1"),
        (["--eval-temperature", "0"], "eval_temperature = 0 gives 4 equal samples"),
        (["--eval-top-p", "2"], "eval_top_p = 2.0: must be above 0 and at most 1"),
        (["--objective", "grpo", "--beta1", "0.75"], "beta1 = 0.75: objective grpo ignores it"),
        (["--objective", "gppo", "--beta1", "0.75"], "beta1 = 0.75: objective gppo ignores it"),
        (["--objective", "cispo", "--dual-clip", "10"], "dual_clip = 10.0: objective cispo ignores it"),
        (["--objective", "sapo", "--dual-clip", "10"], "dual_clip = 10.0: objective sapo ignores it"),
        (["--objective", "rloo", "--eps-low", "0.1"], "eps_low = 0.1: objective rloo ignores it"),
        (["--advantages", "std"], "advantages 'std' is unknown; known: group, group-mean, leave-one-out, gae"),
        (["--objective", "ppo", "--advantages", "group"], "objective ppo has those of its critic, gae; objective grpo"),
        (["--objective", "rloo", "--advantages", "gae"], "objective rloo is one by its advantages, leave-one-out;"),
        (["--critic-lr", "1e-5"], "critic_lr = 1e-05: advantages = group have no critic, those of gae have one"),
        (["--run-name", "/tmp/x"], "run_name = /tmp/x: a name is needed, not a path"),
        (["--dual-clip", "0.5"], "dual_clip = 0.5: must be above 1"),
        (["--beta1", "1.5"], "beta1 = 1.5: must be at least 0 and at most 1"),
        (["--entropy-target", "-1"], "entropy_target = -1.0: must be above 0"),
        (["--entropy-target", "0.1", "--beta1", "0", "--beta2", "0"], "entropy_target moves the betas .* both are 0"),
        (["--objective", "ppo", "--steps", "5"], "steps = 5: .* only the critic learns in the first warmup_steps = 5"),
        (["--beta-schedule", "9:0,1", "--objective", "grpo"], "beta_schedule = 9:0,1: objective grpo ignores it"),
        (["--objective", "sapo", "--eps-high", "0.1"], "eps_high = 0.1: objective sapo ignores it"),
        (["--rollout-correction", "is"], "rollout_correction 'is' is unknown; known: none, tis, mask, seq-tis"),
        (["--temperature", "nan"], "temperature = nan: must be at least 0.01"),
        (["--model", "no/such/model"], "model 'no/such/model': no such folder"),
        (["--train-data", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--max-response-tokens", "4096"], "= 4160 is beyond the model's context of 512"),
        (["--resume", "nowhere", "--lr", "1"], "--resume continues a run with its own settings"),
        (["--resume", ""], "--recipe or --resume is empty"),
        (["--recipe", ""], "--recipe or --resume is empty"),
        (["--resume", "nowhere"], "--resume nowhere: no config.json there"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys, "argv", ["train.py", *arguments, *(["--out", str(tmp_path)] * (arguments[0] != "--resume"))]
    )
    with pytest.raises(SystemExit) as end:
        settings.command(train.main)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(message, printed) and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_run_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    with pytest.raises(UserError, match="belongs to a run that is finished or has other settings"):
        runs.locate(resolved(out=str(tmp_path), run_name="mine"), "")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as end:
        settings.parse(train.Config, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    fields = dataclasses.fields(train.Config)
    assert len(fields) <= 50
    source = (ROOT / "train.py").read_text()
    for field in fields:
        comment = re.search(rf"^    {field.name}: .*?  # (.+)$", source, re.M)
        assert f"--{field.name.replace('_', '-')}" in printed and comment, field.name
        assert comment[1].split()[0] in printed, field.name


@pytest.mark.parametrize(
    "gap, entropy, message",
    [(0.25, 0.5, "do not have the same weights"), (math.nan, 0.5, "not finite"), (0.0, math.nan, "not finite")],
)
def test_a_stale_engine_or_a_broken_policy_ends_the_run(gap, entropy, message):
    with pytest.raises(RunEnded, match=message):
        statistics.check_mismatch({"mismatch/mean": gap, "entropy/mean": entropy}, "cpu")


@pytest.mark.parametrize("device, level", [("cpu", 0.001), ("cuda:0", 0.05)])
def test_a_mismatch_above_rounding_is_warned_of_once_at_each_level(device, level, capsys):
    statistics._warn_of_mismatch.cache_clear()
    for gap in (0.9 * level, 1.1 * level, 1.2 * level, 3.9 * level, 3.8 * level):
        statistics.check_mismatch({"mismatch/mean": gap, "entropy/mean": 0.5}, device)
    lines = capsys.readouterr().err.splitlines()
    assert [f"more than {factor * level:g} nats" in line for factor, line in zip((1, 2), lines, strict=True)] == [
        True
    ] * 2


def test_problems_of_batches_cover_the_data_once_an_epoch():
    problems = [Problem("", [i], "", "") for i in range(10)]
    chosen = [p.prompt_ids[0] for batch in range(1, 6) for p in problems_of_batch(problems, batch, 4, seed=0)]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10)) and chosen[:10] != chosen[10:]
    assert [p.prompt_ids[0] for p in problems_of_batch(problems, 1, 4, seed=1)] != chosen[:4]


def test_an_objective_has_the_settings_of_its_paper():
    """Settings of the papers are filled in; settings of the user stay."""
    dapo = resolved(objective="dapo", max_response_tokens=100)
    assert (dapo.eps_low, dapo.eps_high, dapo.overlong, dapo.aggregation) == (0.2, 0.28, "20", "token-mean")
    gspo = resolved(objective="gspo")
    assert (gspo.eps_low, gspo.eps_high, gspo.aggregation) == (3e-4, 4e-4, "seq-mean-token-mean")
    ours = resolved()
    assert (dapo.filter_groups, ours.filter_groups) == ("refill", "on")
    assert (ours.eps_low, ours.eps_high, ours.overlong, ours.aggregation) == (0.2, 0.2, "score", "token-mean")
    dr_grpo, rloo = resolved(objective="dr_grpo"), resolved(objective="rloo")
    assert (dr_grpo.advantages, dr_grpo.aggregation) == ("group-mean", "seq-mean-token-sum-norm")
    assert (rloo.advantages, rloo.aggregation) == ("leave-one-out", "seq-mean-token-sum")
    assert train.objective_of_step(dr_grpo, 1, (0.5, 0.0)).max_response_tokens == 64
    assert resolved(objective="dapo", eps_high=0.3, overlong="score").eps_high == 0.3
    ppo, gae = resolved(objective="ppo"), resolved(advantages="gae", lr=1e-6)
    assert (ppo.advantages, ppo.filter_groups, ppo.beta1) == ("gae", "off", None)
    assert (gae.critic_lr, gae.beta1, ours.critic_lr) == (pytest.approx(3e-6), 0.75, None)
    assert settings.resolve(dapo) == dapo


def test_betas_move_on_a_schedule():
    """In straight lines between its points, from the betas at step 1. After the last point they stay."""
    config = resolved(beta1=0.5, beta2=1.0, beta_schedule="5:1,0 6:0,1 8:0.5,1")
    moved = [betas_of_step(config, step, 0.1) for step in range(1, 10)]
    assert moved[:5] == [(0.5, 1.0), (0.625, 0.75), (0.75, 0.5), (0.875, 0.25), (1.0, 0.0)]
    assert moved[5:] == [(0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (0.5, 1.0)]
    assert betas_of_step(resolved(), 3, 0.1) == (0.75, 1.0)
    assert betas_of_step(resolved(entropy_target=0.1), 3, 0.2) == pytest.approx((0.6, 0.2))
    assert betas_of_step(resolved(objective="grpo"), 3, 0.1) == (None, None)


def test_the_controller_moves_the_betas_of_a_run(finished):
    """The betas of each step follow from the entropies of the steps before."""
    rows, control = metrics_of(finished[0])[1:], (0.5, 0.0)
    for row in rows:
        assert (row["optim/beta1"], row["optim/beta2"]) == pytest.approx(steered_betas(control[0], 0.75, 1.0))
        control = steer(control, row["entropy/mean"], 0.2)
    assert rows[0]["optim/beta1"] == 0.375 != rows[1]["optim/beta1"]


def response(length: int, truncated: bool, reward: float, prompt: int) -> Response:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(97, 107, (length,), generator=generator).tolist()
    return Response([prompt], ids, torch.full((length,), -2.0), truncated, "", reward, reward)


def test_truncated_responses_can_be_kept_out_of_the_update(tiny_model, monkeypatch):
    """Their group's advantages count them; the gradient is that of the others, over the tokens of the others."""
    groups = [
        [response(5, False, 1.0, 3), response(9, True, 0.0, 3), response(7, False, 0.0, 3)],
        [response(9, True, 0.0, 4), response(8, True, 1.0, 4), response(6, True, 0.0, 4)],
    ]
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e9)
    config = resolved(overlong="mask", beta1=0.5)
    groups, (kept,) = train.select(groups, config)
    assert [len(r.response_ids) for r in kept] == [5, 7]
    assert kept[0].advantages[0] != pytest.approx(-kept[1].advantages[0]), "the truncated one counts in the mean"
    for r in kept:
        r.old_logprobs, r.entropy = r.rollout_logprobs, torch.ones(len(r.response_ids))
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    objective = train.objective_of_step(config, 1, (0.5, 0.0))
    train.update(Policy(tiny_model), optimizer, kept, objective, 0.0, config, "cpu")
    tiny_model.set_attn_implementation("sdpa")
    expected = 0.0  # by hand: -delta A, averaged over 5 + 7 tokens
    for r in kept:
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        logprobs = tiny_model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        ratio = (logprobs - r.old_logprobs).exp()
        low, high = (ratio < 0.8) & (r.advantages < 0), (ratio > 1.2) & (r.advantages > 0)
        weight = torch.where(low, 0.5 * 0.8 / ratio.detach(), torch.where(high, 1.2 / ratio.detach(), 1.0))
        expected = expected - (weight * ratio * r.advantages).sum() / 12
    gradients = torch.autograd.grad(expected, list(tiny_model.parameters()))
    for parameter, gradient in zip(tiny_model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_epochs_go_over_the_same_mini_batches_with_the_same_old_logprobs(tiny_model, tmp_path):
    """Two epochs by train.learn are four updates by hand, whose old logprobs are those before the first of them."""
    by_hand = copy.deepcopy(tiny_model)
    groups = [[response(5 + p, False, 1.0, p), response(9 - p, False, 0.0, p)] for p in range(1, 5)]
    config = resolved(epochs=2, mini_batch_prompts=2, max_kept_prompts=4, eps_low=0.01, eps_high=0.01)
    groups, mini_batches = train.select(groups, config)
    copies = copy.deepcopy(mini_batches)
    objective, state = train.objective_of_step(config, 1, (0.5, 0.0)), State("")
    sgd = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    arguments = groups, mini_batches, objective, 0.05, state, config, tmp_path, Meter(tiny_model, "cpu")
    updates = train.learn(Policy(tiny_model), sgd, *arguments)

    compute_old_logprobs(Policy(by_hand), sum(copies, []), 1.0, 10_000, "cpu")
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.0)
    for batch in (*copies, *copies):
        train.update(Policy(by_hand), sgd, batch, objective, 0.05, config, "cpu")
    for ours, expected in zip(tiny_model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    logged = statistics.updates_to_metrics([updates])
    assert logged["optim/updates"] == 4 and logged["update_1/kl_old"] < 1e-9 < logged["update_3/kl_old"]
    assert logged["update_3/clip_low"] + logged["update_3/clip_high"] > 0 and "update_4/clip_low" in logged


def test_tokens_are_chosen_before_the_first_update(tiny_model, tmp_path):
    """Also in the first mini-batch, which needs old logprobs before its update only for that: a fifth of its tokens."""
    groups = [[response(5 + p, False, 1.0, p), response(9 - p, False, 0.0, p)] for p in range(1, 5)]
    config = resolved(objective="high_entropy", mini_batch_prompts=2, max_kept_prompts=4, max_micro_batch_tokens=20)
    groups, mini_batches = train.select(groups, config)
    arguments = train.objective_of_step(config, 1, (0.5, 0.0)), 1e-9, State(""), config, tmp_path
    sgd = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    updates = train.learn(Policy(tiny_model), sgd, groups, mini_batches, *arguments, Meter(tiny_model, "cpu"))
    for batch, done in zip(mini_batches, updates, strict=True):
        entropy, chosen = torch.cat([r.entropy for r in batch]), torch.cat([r.chosen for r in batch])
        count = len(chosen) // 5
        assert chosen.sum() == count and entropy[chosen == 1].min() > entropy[chosen == 0].max()
        assert done.sums["weight/inside"] > 0


@pytest.mark.slow
def test_a_step_whose_responses_are_all_truncated(tmp_path):
    """There is nothing to train on; the run continues."""
    changed = ["--steps", "1", "--max-response-tokens", "2", "--overlong", "mask", "--filter-groups", "off"]
    run(tmp_path, "--run-name", "cut", *SMALL, *changed)
    row = metrics_of(tmp_path / "cut")[1]
    assert row["response/truncated"] == 1 and row["optim/updates"] == 0


class Sampler:
    """In vLLM's place: both responses to a problem of an odd number are right, and one of two to an even number."""

    def __init__(self, stops_after: int = 99):
        self.seeds, self.stops_after, self.asleep = [], stops_after, False

    def generate(self, prompts, count, *, seed, on_group, **options):
        assert not self.asleep
        self.seeds.append(seed)
        groups = []
        for index, (number,) in enumerate(prompts):
            texts = [r"\boxed{7}", r"\boxed{7}" if number % 2 else r"\boxed{8}"]
            groups.append([Response([number], [1, 2], torch.zeros(2), False, text) for text in texts])
            on_group(index, groups[-1])
        return groups

    def sleep(self):
        self.asleep = True

    def stopped(self) -> bool:
        return len(self.seeds) >= self.stops_after


def test_dynamic_sampling_refills_and_the_next_step_begins_after_it(tiny_model):
    """Batches are sampled until enough groups have a signal. The next step begins after them, and so does a resumed
    run, which has only their number."""
    problems = [Problem("", [number], "7", "") for number in range(48)]
    settings = {"prompts_per_step": 8, "max_kept_prompts": 8, "mini_batch_prompts": 8, "responses_per_prompt": 2}
    meter = Meter(tiny_model, "cpu")

    def step(batches: int, engine: Sampler, **more) -> tuple[list[int], list[list[Response]]]:
        config = resolved(**settings, **more)
        chosen, groups = train.sample(engine, problems, batches, config, meter, engine.stopped)
        numbers = [problem.prompt_ids[0] for problem in chosen]
        assert numbers == [group[0].prompt_ids[0] for group in groups]
        return numbers, groups

    engine = Sampler()
    numbers, groups = step(0, engine, filter_groups="refill")
    batches = len(numbers) // 8
    assert batches in (2, 3) and len(set(engine.seeds)) == len(engine.seeds) == batches and engine.asleep
    assert sum(number % 2 == 0 for number in numbers[:-8]) < 8 <= sum(number % 2 == 0 for number in numbers)
    _, mini_batches = train.select(groups, resolved(**settings))
    even = [number for number in numbers if number % 2 == 0]
    assert [r.prompt_ids[0] for r in mini_batches[0][::2]] == even[:8]
    for r in sum(groups, []):
        r.old_logprobs = r.entropy = r.rollout_logprobs
    found = statistics.step_metrics(groups, mini_batches, [], None)
    assert found["rollout/prompts"] == 8 * batches and found["rollout/unused"] == pytest.approx(1 - 1 / batches)

    later, resumed = Sampler(), Sampler()
    assert step(batches, later)[0] == step(batches, resumed)[0] and later.seeds == resumed.seeds != engine.seeds
    order = [p.prompt_ids[0] for batch in range(1, 7) for p in problems_of_batch(problems, batch, 8, seed=0)]
    assert numbers + step(batches, Sampler())[0] == order[: 8 * (batches + 1)], "one batch more, without a refill"
    stopped = Sampler(stops_after=2)
    assert step(0, stopped, filter_groups="refill") == ([], []) and not stopped.asleep


def test_select_filters_caps_and_cuts_evenly():
    """It does not change the responses that it gets."""
    groups = [[response(3, False, float(p % 3 > 0), p), response(4, False, 0.0, p)] for p in range(60)]
    config = resolved(max_kept_prompts=40, mini_batch_prompts=10, responses_per_prompt=2)
    with_advantages, mini_batches = train.select(groups, config)
    assert all(r.advantages is None for group in groups for r in group)
    assert [len(group) for group in with_advantages] == [2] * 60
    kept = [p for p in range(60) if p % 3 > 0]  # 40 groups have a signal
    assert [[r.prompt_ids[0] for r in batch[::2]] for batch in mini_batches] == [
        kept[i : i + 10] for i in (0, 10, 20, 30)
    ]
    for batch in mini_batches:
        for right, wrong in zip(batch[::2], batch[1::2], strict=True):
            assert right.advantages.tolist() == [pytest.approx(0.5**0.5, rel=1e-5)] * 3
            assert wrong.advantages.tolist() == [-right.advantages[0]] * 4
    _, capped = train.select(groups, resolved(max_kept_prompts=8, mini_batch_prompts=8))
    assert [r.prompt_ids[0] for r in capped[0][::2]] == kept[:8]
    _, (plain,) = train.select(groups, resolved(max_kept_prompts=8, mini_batch_prompts=8, advantages="group-mean"))
    assert [r.advantages.unique().tolist() for r in plain] == [[0.5], [-0.5]] * 8
    _, uneven = train.select(groups[:57], resolved(max_kept_prompts=40, mini_batch_prompts=10))
    assert [len(batch) // 2 for batch in uneven] == [9, 10, 9, 10]
    _, everything = train.select(
        groups, resolved(filter_groups="off", max_kept_prompts=60, mini_batch_prompts=60, prompts_per_step=60)
    )
    assert len(everything[0]) == 120
    assert train.select([[response(3, False, 1.0, 0)] * 2], config)[1] == []


def learn(model, folder, **settings):
    """(groups, mini-batches, updates, metrics) of train.learn on six random groups, of which two have no signal."""
    groups = [group_of(4, [3 + (5 * p + 3 * i) % 7 for i in range(8)], seed=p) for p in range(6)]
    for p, group in enumerate(groups):
        for i, r in enumerate(group):
            r.old_logprobs = r.entropy = None
            r.reward = r.verdict = float(p == 0 or (p > 1 and i % 2))
    config = resolved(mini_batch_prompts=2, max_kept_prompts=4, **settings)
    groups, mini_batches = train.select(groups, config)
    state, meter = checkpoint.State("id"), perf.Meter(model, "cpu")
    objective = train.objective_of_step(config, 1, state.control)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    updates = train.learn(Policy(model), optimizer, groups, mini_batches, objective, 0.5, state, config, folder, meter)
    return groups, mini_batches, updates, statistics.step_metrics(groups, mini_batches, updates, None)


def test_old_logprobs_only_of_what_trains(tiny_model, tmp_path):
    """And the entropy of one in three of the others, by the weights before the first update. No gradient is left."""
    before = copy.deepcopy(tiny_model)
    groups, mini_batches, _, row = learn(tiny_model, tmp_path)
    everything = [r for group in groups for r in group]
    others = [r for group in groups[:2] for r in group]
    measured = [r for batch in mini_batches for r in batch] + others[:: statistics.MEASURED]
    assert {id(r) for r in everything if r.entropy is not None} == {id(r) for r in measured} and len(measured) == 38
    found = [(r.old_logprobs, r.entropy) for r in measured]
    compute_old_logprobs(Policy(before), everything, 1.0, 4096, "cpu")
    for (old_logprobs, entropy), r in zip(found, measured, strict=True):
        torch.testing.assert_close(old_logprobs, r.old_logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy, r.entropy, atol=1e-5, rtol=0)
    exact = torch.cat([r.entropy for r in everything]).mean().item()
    assert row["entropy/mean"] == pytest.approx(exact, rel=0.01)
    assert all(parameter.grad is None for parameter in tiny_model.parameters()), "vLLM needs the memory"


def test_old_logprobs_of_the_sampler(tiny_model, tmp_path, monkeypatch):
    """From the second mini-batch on they are vLLM's, without a pass; the first has the trainer's, which are free."""
    passes = []
    monkeypatch.setattr(train, "compute_old_logprobs", lambda policy, responses, *_: passes.append(responses))
    _, (first, second), updates, row = learn(tiny_model, tmp_path, old_logprobs="sampler")
    assert [len(responses) for responses in passes] == [6], "a sample of the groups without a signal, for entropy/mean"
    assert all(r.entropy is not None and not torch.equal(r.old_logprobs, r.rollout_logprobs) for r in first)
    assert all(r.entropy is None and r.old_logprobs is r.rollout_logprobs for r in second)
    assert row["update_1/ratio_max"] == 1 and row["mismatch/mean"] > 0
    old = torch.cat([r.rollout_logprobs for r in second]).sum()
    assert old < 0 and row["update_2/ratio_max"] != pytest.approx(1, abs=1e-3)
    assert sum(updates[1].sums[f"tokens/{q}"] for q in QUADRANTS) == sum(len(r.response_ids) for r in second)
