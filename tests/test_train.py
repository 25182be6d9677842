"""Whole runs, as a user starts them: real vLLM, real data, in their own processes. And the parts of a step."""

import copy
import dataclasses
import json
import math
import re
import signal
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file

import train
from ce_gppo import config as settings
from ce_gppo import metrics
from ce_gppo.advantages import Critic
from ce_gppo.batch import Rollout
from ce_gppo.checkpoint import State
from ce_gppo.entropy import QUADRANTS, next_control
from ce_gppo.perf import Meter
from ce_gppo.policy import Policy, with_old_logprobs
from ce_gppo.problems import Problem, problems_of_batch
from helpers import ROOT, SMALL, metrics_of, naive_outputs, resolved, rollout_of, run, start, without_timings
from tools.metrics import rows as metric_rows


def test_a_run_leaves_everything_behind(finished):
    folder, output = finished
    files = {"config.json", "metrics.jsonl", "samples.jsonl", "tokens.jsonl", "source", "wandb"}
    assert {p.name for p in folder.iterdir()} >= files
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["steps"] == 4 and record["config"]["objective"] == "ce_gppo"
    for source in ("loss.py", "ce_gppo/batch.py"):
        assert (folder / "source" / source).read_text() == (ROOT / source).read_text()
    for phrase in ("accuracy, eval/walk/avg_at_k", "entropy, nats per token", "tokens/s", "checkpoint-000004"):
        assert phrase in output
    assert re.search("^- Entropy went from .* and held-out accuracy from", output, re.M)
    assert "wandb sync" in output and list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_every_metric_is_described_finite_and_sane(finished):
    rows = metrics_of(finished[0])
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    names = {name for row in metric_rows() for name in row[1].split(", ")}
    described = re.compile("|".join(re.sub("<[a-z]+>", "[a-z_0-9]+", name) for name in names))
    always = {
        name
        for name in names
        if "<" not in name and not name.startswith(("value/", "clip/prob", "clip/ampl", "kl/ref"))
    }
    always -= {"time/critic", "time/checkpoint", "time/eval", "entropy/delta"}
    for row in rows[1:]:
        assert not always - row.keys() and all(math.isfinite(value) for value in row.values())
        assert all(described.fullmatch(name) for name in row.keys() - {"step"}), row.keys()
        assert sum(row[f"tokens/{q}"] for q in QUADRANTS) == pytest.approx(1)
        parts = [row[f"velocity/{q}"] for q in QUADRANTS]  # float32 sums, which nearly cancel
        assert sum(parts) == pytest.approx(row["velocity/total"], rel=0, abs=1e-6 * sum(map(abs, parts)))
        assert row["update_1/clip_low"] == row["update_1/clip_high"] == 0, "the first update is at ratio 1"
        assert row["update_1/ratio_max"] == 1 and math.log(row["mismatch/ratio_max"]) < 1e-4
        assert row["entropy/p10"] <= row["entropy/mean"] <= row["entropy/p90"]
    for row in rows[::2]:
        right, passed, distinct = (row[f"eval/walk/{name}_at_k"] for name in ("avg", "pass", "distinct"))
        assert 0 <= right <= passed <= 1 and passed <= distinct <= 2 * right + 1e-9
    assert rows[3]["entropy/delta"] == pytest.approx(rows[3]["entropy/mean"] - rows[2]["entropy/mean"])
    assert rows[-1]["kl/approx"] > 0, "the weights moved"
    control = (0.5, 0.0)  # the betas of each step follow from the entropies of the steps before
    for row in rows[1:]:
        assert (row["optim/beta1"], row["optim/beta2"]) == pytest.approx(((1 - control[0]) * 0.75, control[0]))
        control = next_control(resolved(entropy_target=1.0), control, row["entropy/mean"])
    samples = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert all(row["prompt"].endswith("<|assistant|>") and row["reward"] in (0, 1) for row in samples)


def test_a_resumed_run_equals_the_uninterrupted_one(finished, tmp_path):
    """SIGTERM saves and says how to continue; the resumed run is the uninterrupted one, bit for bit."""
    process = start(tmp_path, "--run-name", "cut", *SMALL, mode="offline")
    rows = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and '"step": 1,' in rows.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 0 and f"--resume {tmp_path / 'cut'}" in output, output
    assert len(metrics_of(tmp_path / "cut")) < 5, "the signal came too late to test anything"
    run(tmp_path, "--resume", str(tmp_path / "cut"), mode="offline")
    ids = [path.name.rpartition("-")[2] for path in (tmp_path / "cut" / "wandb").glob("offline-run-*")]
    assert len(ids) == 2 and ids[0] == ids[1], "both parts go into one W&B run"
    assert without_timings(metrics_of(tmp_path / "cut")) == without_timings(metrics_of(finished[0]))
    for name in ("tokens.jsonl", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (finished[0] / name).read_text()
    ours, expected = (load_file(f / "checkpoint-000004" / "model.safetensors") for f in (tmp_path / "cut", finished[0]))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    run(tmp_path, "--resume", str(tmp_path / "cut"), "--steps", "5")  # a finished run is trained longer
    assert [row["step"] for row in metrics_of(tmp_path / "cut")] == list(range(6))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["config"]["steps"] == 5


@pytest.mark.slow
def test_a_padded_vocabulary_and_a_policy_that_solves_nothing(tokenizer, tmp_path):
    """Random weights give ids beyond the tokenizer's vocabulary, and no group teaches. The run continues."""
    from data.base import make_model

    torch.manual_seed(0)
    model = make_model(tokenizer, hidden_size=64, num_layers=1)
    model.resize_token_embeddings(len(tokenizer) + 60)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    longer = ["--max-prompt-tokens", "64"]  # its tokens are bytes
    run(tmp_path, "--run-name", "hopeless", "--model", str(tmp_path / "padded"), *longer, *SMALL, "--steps", "2")
    rows = metrics_of(tmp_path / "hopeless")
    assert [row["reward/group_solved_none"] for row in rows[1:]] == [1.0, 1.0]
    assert all(row["optim/updates"] == 0 and row["entropy/mean"] > 1 for row in rows[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes of the user's: one sentence, exit code 2, nothing left behind


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rate", "1"], r"unknown setting --learning-rate; known: .*\blr\b"),
        (["--mini-batch-prompts", "5"], "mini_batch_prompts = 5 does not divide max_kept_prompts = 64"),
        (["--max-kept-prompts", "100"], "max_kept_prompts = 100 is more than prompts_per_step = 64"),
        (["--responses-per-prompt", "1"], "responses_per_prompt = 1: must be at least 2"),
        (["--dynamic-sampling", "always"], "dynamic_sampling 'always' is unknown; known: off, filter, refill"),
        (["--overlong", "17"], "overlong = 17 is more than max_response_tokens = 16"),
        (["--seed", "4294967296"], "seed = 4294967296: must be at least 0 and at most 4294967295"),
        (["--eps-low", "2"], "eps_low = 2.0: must be at least 0 and at most 1"),
        (["--dual-clip", "0.5"], "dual_clip = 0.5: must be above 1"),
        (["--eval-temperature", "0.005"], "eval_temperature = 0.005: must be 0, or at least 0.01"),
        (["--eval-temperature", "0"], "eval_temperature = 0 gives 4 equal samples"),
        (["--objective", "grpo", "--beta1", "0.75"], "beta1 = 0.75: objective grpo ignores it"),
        (["--objective", "ppo", "--advantages", "group"], "advantages = group: objective ppo "),
        (["--objective", "rloo", "--advantages", "gae"], "advantages = gae: objective rloo .*leave-one-out"),
        (["--critic-lr", "1e-5"], "critic_lr = 1e-05: advantages = group have no critic, those of gae have one"),
        (["--run-name", "/tmp/x"], "run_name = /tmp/x: a name is needed, not a path"),
        (["--entropy-target", "0.1", "--beta1", "0", "--beta2", "0"], "entropy_target moves the betas .* both are 0"),
        (["--objective", "ppo", "--steps", "5"], "steps = 5: .* only the critic learns in the first warmup_steps = 5"),
        (["--model", "no/such/model"], "model 'no/such/model': no such folder"),
        (["--train-data", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--max-response-tokens", "4096"], "= 4112 is beyond the model's context of 512"),
        (["--resume", "nowhere", "--recipe", "walk"], "--resume continues a run with its own settings"),
        (["--recipe", ""], "--recipe or --resume is empty"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    out = ["--out", str(tmp_path)] * (arguments[0] != "--resume")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *out])
    with pytest.raises(SystemExit) as end:
        settings.command(train.main)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(message, printed) and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as end:
        settings.parse(train.Config, ["--help"])
    printed, source = " ".join(capsys.readouterr().out.split()), (ROOT / "train.py").read_text()
    fields = dataclasses.fields(train.Config)
    assert end.value.code == 0 and len(fields) <= 52
    for field in fields:
        comment = re.search(rf"^    {field.name}: .*?  # (.+)$", source, re.M)
        assert f"--{field.name.replace('_', '-')}" in printed and comment[1].split()[0] in printed, field.name


def test_an_objective_has_the_settings_of_its_paper():
    """Those of loss.py's table are filled in, and with them what depends on other settings; the user's stay."""
    dapo, ours, dr_grpo = resolved(objective="dapo", max_response_tokens=100), resolved(), resolved(objective="dr_grpo")
    assert (dapo.eps_low, dapo.eps_high, dapo.overlong, dapo.dynamic_sampling) == (0.2, 0.28, "20", "refill")
    assert (dr_grpo.advantages, dr_grpo.aggregation) == ("group-mean", "seq-mean-token-sum-norm")
    assert train.objective_of_step(dr_grpo, State("")).max_response_tokens == 16
    assert resolved(objective="dapo", eps_high=0.3, overlong="score").eps_high == 0.3
    ppo, gae = resolved(objective="ppo", kl_coef=0.1), resolved(advantages="gae", lr=1e-6)
    assert (ppo.advantages, ppo.dynamic_sampling, ppo.beta1) == ("gae", "off", None)
    assert (gae.critic_lr, gae.beta1, ours.critic_lr) == (pytest.approx(3e-6), 0.75, None)
    assert train.objective_of_step(ppo, State("")).kl_coef == 0, "it is in the critic's reward"
    assert train.objective_of_step(resolved(kl_coef=0.1), State("")).kl_coef == 0.1
    assert settings.resolve(dapo) == dapo


def test_learning_rate_and_betas_move():
    """lr grows; with gae after the critic's warm-up. The objective of a step has the betas of the schedule."""
    ours, gae = resolved(lr=1.0), resolved(lr=1.0, advantages="gae")
    assert [train.lr_of_step(ours, step) for step in (1, 4, 5, 6)] == [0.2, 0.8, 1, 1]
    assert [train.lr_of_step(gae, step) for step in (1, 5, 6, 10, 11)] == [0, 0, 0.2, 1, 1]
    assert [train.lr_of_step(resolved(lr=1.0, warmup_steps=0, advantages=a), 1) for a in ("group", "gae")] == [1, 1]
    config = resolved(beta1=0.5, beta2=1.0, beta_schedule="5:1,0")
    objective = train.objective_of_step(config, State("", step=2))
    assert (objective.beta1, objective.beta2, objective.name) == (0.75, 0.5, "ce_gppo")


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a step


def six_groups(wrong=(1,), right=(0,), G=8) -> Rollout:
    """Six prompts with G responses each, scored: one group all right, one all wrong, the others half and half."""
    part = rollout_of([(4, 3 + (5 * i + i // G) % 7) for i in range(6 * G)])
    correct = [p in right or (p not in wrong and i % 2 == 0) for p in range(6) for i in range(G)]
    columns = dict.fromkeys(("old_logprobs", "entropy", "advantages"))
    columns |= {"prompts": part.prompts[:6], "prompt_of": torch.arange(6).repeat_interleave(G)}
    columns |= {"correct": torch.tensor(correct), "rewards": torch.tensor(correct).double()}
    columns["components"] = [{"correctness": float(c)} for c in correct]
    return dataclasses.replace(part, **columns)


def learn(model, folder, critic=None, lr=0.5, steps=0, **changed):
    """(rollout, mini-batches, what train.learn returns) on six random groups, of which two teach nothing."""
    config = resolved(**{"mini_batch_prompts": 2, "max_kept_prompts": 4} | changed)
    rollout, mini_batches = train.select(six_groups(), config)
    state = State("id", step=steps)
    arguments = train.objective_of_step(config, state), lr, state, config, folder, Meter(model, "cpu")
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    critic = critic and critic(config)
    return rollout, mini_batches, train.learn(Policy(model), sgd, None, critic, rollout, mini_batches, *arguments)


def measured(model, rollout) -> list[torch.Tensor]:
    """Logprobs and entropy of each token, naively."""
    with torch.no_grad():
        return [column.float() for column in naive_outputs(model, rollout)]


def test_old_logprobs_only_of_what_trains(tiny_model, tmp_path):
    """And the entropy of one in three of the others, by the weights before the first update. No gradient is left."""
    before = copy.deepcopy(tiny_model)
    rollout, mini_batches, learned = learn(tiny_model, tmp_path)
    others = rollout[rollout.without(mini_batches)[::3]]
    assert learned.others.index.tolist() == others.index.tolist() == [0, 3, 6, 9, 12, 15]
    assert [part.index.tolist() for part in learned.measured] == [rows.tolist() for rows in mini_batches]
    for part in (*learned.measured, learned.others):
        logprobs, entropy = measured(before, part)
        torch.testing.assert_close(part.old_logprobs, logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(part.entropy, entropy, atol=1e-5, rtol=0)
    row, _ = metrics.step_metrics(rollout, [Problem("", [], "", "a")] * 6, mini_batches, learned, None)
    assert row["entropy/mean"] == pytest.approx(measured(before, rollout)[1].mean().item(), rel=0.01)
    assert row["update_1/ratio_max"] == 1 and row["update_2/ratio_max"] != pytest.approx(1, abs=1e-3)
    assert all(parameter.grad is None for parameter in tiny_model.parameters()), "vLLM needs the memory"
    assert not torch.equal(tiny_model.lm_head.weight, before.lm_head.weight) and learned.lr == 0.5


def test_bypass_takes_the_old_logprobs_of_the_sampler(tiny_model, tmp_path):
    """From the second mini-batch on they are vLLM's, without a pass; the first has the trainer's, which are free."""
    rollout, (first, second), learned = learn(tiny_model, tmp_path, rollout_correction="bypass")
    assert [part.index.tolist() for part in learned.measured] == [first.tolist()]
    by_hand = [update.sums.values() for update in learned.updates]
    assert by_hand[0]["ratio/max"] == 1 and by_hand[1]["kl/approx"] > 1, "vLLM's are around -0.5, the policy's -6"
    bypass = resolved(rollout_correction="bypass")
    assert train.origins_of_old_logprobs(bypass, 3, False) == ["update", "sampler", "sampler"]
    assert train.origins_of_old_logprobs(resolved(), 3, False) == ["update", "pass", "pass"]
    assert train.origins_of_old_logprobs(resolved(objective="kl_cov"), 2, False) == ["pass", "pass"]
    assert train.origins_of_old_logprobs(resolved(), 2, True) == ["pass", "pass"]
    assert train.origins_of_old_logprobs(resolved(), 0, False) == []


def test_the_critic_learns_first_and_old_logprobs_stay(tiny_model, tiny_folder, tmp_path):
    """In its warm-up the policy stays as it is. Later the second mini-batch keeps its old logprobs."""
    before = copy.deepcopy(tiny_model)
    make = lambda config: Critic(config, str(tiny_folder), "cpu")  # noqa: E731
    changed = {"advantages": "gae", "dynamic_sampling": "filter"}
    _, mini_batches, learned = learn(tiny_model, tmp_path, make, steps=4, **changed)
    assert learned.updates == [] and torch.equal(tiny_model.lm_head.weight, before.lm_head.weight)
    assert all(part.entropy is not None for part in learned.measured), "entropy/mean is that of all tokens"
    assert learned.values["value/loss"] > 0 and len(learned.measured) == 2
    _, mini_batches, learned = learn(tiny_model, tmp_path, make, steps=5, **changed)
    for part, rows in zip(learned.measured, mini_batches, strict=True):
        assert part.index.tolist() == rows.tolist() and part.advantages is not None
        torch.testing.assert_close(part.old_logprobs, measured(before, part)[0], atol=1e-5, rtol=0)
    assert learned.updates[1].sums.values()["ratio/max"] != pytest.approx(1, abs=1e-3)


def test_epochs_go_over_the_same_mini_batches_with_the_same_old_logprobs(tiny_model, tmp_path):
    """Two epochs by train.learn are four updates by hand, whose old logprobs are those before the first of them."""
    by_hand = copy.deepcopy(tiny_model)
    changed = {"epochs": 2, "eps_low": 0.01, "eps_high": 0.01}
    rollout, mini_batches, learned = learn(tiny_model, tmp_path, lr=0.05, **changed)
    config = resolved(mini_batch_prompts=2, max_kept_prompts=4, **changed)
    parts = with_old_logprobs(Policy(by_hand), [rollout[rows] for rows in mini_batches], 1.0, 10_000, "cpu")
    sgd, objective = torch.optim.SGD(by_hand.parameters(), lr=0.0), train.objective_of_step(config, State(""))
    for part in (*parts, *parts):
        train.update(Policy(by_hand), sgd, part, objective, 0.05, config, "cpu")
    torch.testing.assert_close([*tiny_model.parameters()], [*by_hand.parameters()], atol=1e-6, rtol=1e-4)
    logged, _ = metrics.update_metrics([learned.updates])
    assert logged["optim/updates"] == 4 and logged["update_1/kl_approx"] < 1e-9 < logged["update_3/kl_approx"]
    assert logged["update_3/clip_low"] + logged["update_3/clip_high"] > 0 and "update_4/clip_low" in logged


def test_tokens_are_chosen_before_the_first_update(tiny_model, tmp_path):
    """Also in the first mini-batch, which needs old logprobs before its update only for that: a fifth of its tokens."""
    *_, learned = learn(tiny_model, tmp_path, objective="high_entropy", max_micro_batch_tokens=20, lr=1e-9)
    for part, done in zip(learned.measured, learned.updates, strict=True):
        count, chosen = math.ceil(len(part.tokens) / 5), part.token_mask
        assert chosen.sum() == count and part.entropy[chosen].min() > part.entropy[~chosen].max()
        assert done.sums.values()["weight/inside"] > 0


def test_truncated_responses_can_be_kept_out_of_the_update(tiny_model, monkeypatch):
    """Their group's advantages count them; the gradient is that of the others, over the tokens of the others."""
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e9)
    config = resolved(overlong="mask", beta1=0.5)
    whole = six_groups(G=3)
    cut = torch.arange(18) % 3 > 0
    cut[8], cut[10] = False, False  # in group 2 the first and the last one are whole; in 3 the first two
    rollout, (kept,) = train.select(dataclasses.replace(whole, truncated=cut), config)
    assert kept.tolist() == [6, 8, 9, 10, 12, 15] and not rollout.truncated[kept].any()
    part = rollout[kept]
    old = part.rollout_logprobs - 5
    part = dataclasses.replace(part, old_logprobs=old, entropy=torch.ones(len(part.tokens)))
    objective = train.objective_of_step(config, State(""))
    sgd = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    _, done = train.update(Policy(tiny_model), sgd, part, objective, 0.0, config, "cpu")
    ratio, A = (naive_outputs(tiny_model, part)[0] - old).exp(), part.advantages
    low, high = (ratio < 0.8) & (A < 0), (ratio > 1.2) & (A > 0)
    weight = torch.where(low, 0.5 * 0.8 / ratio.detach(), torch.where(high, 1.2 / ratio.detach(), 1.0))
    expected = -(weight * ratio * A).mean()  # by hand: -delta A
    gradients = torch.autograd.grad(expected, list(tiny_model.parameters()))
    torch.testing.assert_close([p.grad for p in tiny_model.parameters()], [*gradients], atol=1e-6, rtol=1e-5)
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt().item()
    assert done.grad_norm == pytest.approx(norm, rel=1e-4) and not done.skipped


def test_an_update_that_is_not_finite_changes_nothing(tiny_model):
    before, config = copy.deepcopy(tiny_model), resolved()
    part = rollout_of([(3, 5), (2, 4)])
    part.advantages[0] = math.inf
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=0.1)
    objective = train.objective_of_step(config, State(""))
    _, done = train.update(Policy(tiny_model), optimizer, part, objective, 0.1, config, "cpu")
    assert done.skipped and not optimizer.state
    assert all(map(torch.equal, tiny_model.parameters(), before.parameters()))


def pairs(count: int) -> Rollout:
    """Two responses to each prompt; the first one is right, but every third prompt has no right one."""
    part, correct = rollout_of([(3, 2)] * 2 * count), torch.tensor([[p % 3 > 0, False] for p in range(count)]).flatten()
    columns = {"prompts": [[p] for p in range(count)], "prompt_of": torch.arange(count).repeat_interleave(2)}
    columns |= {"correct": correct, "rewards": correct.double(), "advantages": None}
    return dataclasses.replace(part, **columns, components=[{"correctness": float(c)} for c in correct])


def test_select_filters_caps_and_cuts_evenly():
    """It does not change the rollout that it gets."""
    whole = pairs(60)
    config = resolved(max_kept_prompts=40, mini_batch_prompts=10, responses_per_prompt=2)
    chosen, mini_batches = train.select(whole, config)
    assert whole.advantages is None and whole.index is None and chosen.index.tolist() == list(range(120))
    kept = [p for p in range(60) if p % 3 > 0]  # the prompts of unequal rewards

    def prompts(rows):
        return chosen.prompt_of[rows][::2].tolist()

    assert [prompts(rows) for rows in mini_batches] == [kept[i : i + 10] for i in (0, 10, 20, 30)]
    sizes = chosen.advantages.view(60, 2, 2)[kept]  # prompts, responses, tokens
    assert (sizes[:, 0] - 0.5**0.5).abs().max() < 1e-5 and sizes[:, 1].equal(-sizes[:, 0])
    assert prompts(train.select(whole, resolved(max_kept_prompts=8, mini_batch_prompts=8))[1][0]) == kept[:8]
    plain, _ = train.select(whole, resolved(advantages="group-mean"))
    assert plain.advantages.view(60, 2, 2)[kept[0]].tolist() == [[0.5] * 2, [-0.5] * 2]
    _, uneven = train.select(pairs(57), resolved(max_kept_prompts=40, mini_batch_prompts=10))
    assert sorted(len(rows) // 2 for rows in uneven) == [9, 9, 10, 10]
    everything = resolved(dynamic_sampling="off", max_kept_prompts=60, mini_batch_prompts=60, prompts_per_step=60)
    assert len(train.select(whole, everything)[1][0]) == 120
    assert train.select(pairs(1), config)[1] == []


class Sampler:
    """In vLLM's place: both responses to a problem of an odd number are right, and one of two to an even number."""

    def __init__(self, stops_after: int = 99):
        self.seeds, self.stops_after, self.asleep = [], stops_after, False

    def generate(self, prompts, count, *, seed, on_group, **options):
        assert not self.asleep and options["max_tokens"] == 16 and options["temperature"] == 1
        self.seeds.append(seed)
        texts = [[r"\boxed{7}", r"\boxed{7}" if number % 2 else r"\boxed{8}"] for (number,) in prompts]
        for index, pair in enumerate(texts):
            on_group(index, pair)
        part = rollout_of([(1, 2)] * 2 * len(prompts))
        none = dict.fromkeys(("components", "correct", "rewards", "advantages", "old_logprobs", "entropy"))
        of = {"prompts": prompts, "prompt_of": torch.arange(len(prompts)).repeat_interleave(2), "texts": sum(texts, [])}
        return None if self.stopped() else dataclasses.replace(part, **none, **of)

    def sleep(self):
        self.asleep = True

    def stopped(self) -> bool:
        return len(self.seeds) >= self.stops_after


def test_dynamic_sampling_refills_and_the_next_step_begins_after_it(tiny_model):
    """Batches are sampled until enough groups have unequal rewards. The next step begins after them, and so does a
    resumed run, which has only their number."""
    problems = [Problem("", [number], "7", "") for number in range(48)]
    sizes = {"prompts_per_step": 8, "max_kept_prompts": 8, "mini_batch_prompts": 8, "responses_per_prompt": 2}

    def step(batches: int, engine: Sampler, **more) -> tuple[list[int], Rollout | None]:
        config = resolved(**sizes, **more)
        chosen, rollout = train.sample(engine, problems, batches, config, Meter(tiny_model, "cpu"), engine.stopped)
        numbers = [problem.prompt_ids[0] for problem in chosen]
        assert rollout is None or [[number] for number in numbers] == rollout.prompts
        return numbers, rollout

    engine = Sampler()
    numbers, rollout = step(0, engine, dynamic_sampling="refill")
    batches = len(numbers) // 8
    assert batches in (2, 3) and len(set(engine.seeds)) == len(engine.seeds) == batches and engine.asleep
    assert sum(number % 2 == 0 for number in numbers[:-8]) < 8 <= sum(number % 2 == 0 for number in numbers)
    assert rollout.correct.tolist() == [right for number in numbers for right in (True, number % 2 == 1)]
    rollout, mini_batches = train.select(rollout, resolved(**sizes))
    even = [number for number in numbers if number % 2 == 0]
    assert [numbers[p] for p in rollout.prompt_of[mini_batches[0]][::2]] == even[:8]

    later, resumed = Sampler(), Sampler()
    assert step(batches, later)[0] == step(batches, resumed)[0] and later.seeds == resumed.seeds != engine.seeds
    order = [p.prompt_ids[0] for batch in range(1, 7) for p in problems_of_batch(problems, batch, 8, seed=0)]
    assert numbers + step(batches, Sampler())[0] == order[: 8 * (batches + 1)], "one batch more, without a refill"
    assert sorted(order) == list(range(48)), "the data once an epoch"
    stopped = Sampler(stops_after=2)
    assert step(0, stopped, dynamic_sampling="refill") == ([], None) and not stopped.asleep


def test_a_step_is_reported_before_it_ends_the_run(tiny_model, tmp_path):
    """State and metrics go on by a step; a mismatch ends the run only after the log has it."""
    rollout, mini_batches, learned = learn(tiny_model, tmp_path)
    config = resolved(entropy_target=1.0, prompts_per_step=3, max_kept_prompts=3, mini_batch_prompts=3)
    state, logged, meter = State("id", 4, 7, 0.5, no_signal=3), [], Meter(tiny_model, "cpu")
    log = types.SimpleNamespace(step=lambda *arguments: logged.append(arguments))
    for part in ("rollout", "update"):
        with meter(part):
            pass
    problems = [Problem("", [], "", "a")] * 6
    returned = train.report(log, problems, rollout, mini_batches, learned, state, config, meter)
    [(step, row, *_)] = logged
    with pytest.raises(train.messages.RunEnded, match="same weights"):  # rollout_of's logprobs are not the model's
        train.check_mismatch(returned, False)
    assert step == state.step == 5 and state.batches == 7 + 2 and state.no_signal == 0
    assert state.entropy == row["entropy/mean"] and row["entropy/delta"] == pytest.approx(state.entropy - 0.5)
    assert state.control == next_control(config, (0.5, 0.0), state.entropy) and row["time/step"] > 0
