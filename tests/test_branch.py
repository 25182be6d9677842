"""Branches with a tiny model and given responses: states are exact, and measurements agree with float64."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from scipy import stats

import train
from ce_gppo.checkpoint import State
from ce_gppo.perf import Meter
from ce_gppo.policy import Policy
from ce_gppo.problems import Problem
from helpers import Forked, naive_outputs, quick, refuses, resolved, rollout_of
from results import branch, draw
from results.settings import SETTINGS

FOUR = dict.fromkeys(("prompts_per_step", "responses_per_prompt", "max_kept_prompts"), 4)
CONFIG = resolved(objective="grpo", lr=1e-3, warmup_steps=0, mini_batch_prompts=1, **FOUR)
COMPARED = {name: branch.variant(CONFIG, SETTINGS[name]) for name in ("grpo", "gppo", "grpo, bonus 0.003")}


@pytest.fixture(scope="module")
def given():
    """Four groups of four responses with rewards, and six held-out responses, as the engine would give them."""
    rollout = rollout_of([(3 + i // 4, [5, 2, 7, 4][i % 4]) for i in range(16)])
    rollout = replace(rollout, prompts=rollout.prompts[::4], prompt_of=torch.arange(4).repeat_interleave(4))
    correct = torch.arange(16) % 3 == 0
    columns = {"advantages": None, "old_logprobs": None, "entropy": None}
    components = [{"correctness": float(right)} for right in correct]
    rollout = replace(rollout, correct=correct, rewards=correct.double(), components=components, **columns)
    held_out = rollout_of([(4, 6)] * 6, seed=9)
    return rollout, replace(held_out, correct=torch.arange(6) % 3 == 0, **columns)


@pytest.fixture
def step(tiny_model, given, tmp_path):
    """The tenth step of a run: the optimizer has moments, and tokens differ in entropy."""
    tiny_model.get_input_embeddings().weight.data *= 3
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3, **train.ADAMW)
    one = Step((Policy(tiny_model), optimizer, None, None), (tmp_path, Meter(tiny_model, "cpu")), given)
    one.learn()
    return one


class Step:
    problems = [Problem([], "", "", "walk", "walk")] * 4

    def __init__(self, learner, place, given):
        self.learner, self.place, self.given, self.policy = learner, place, given, learner[0]

    def learn(self) -> None:
        branch.train_step(self.learner, self.given[0], State("", step=9), CONFIG, *self.place)

    def branch(self, settings: dict) -> dict[str, dict]:
        rows = branch.branch(self.learner, settings, self.problems, *self.given, State("", step=9), *self.place)
        return {row.pop("setting"): row for row in rows}

    def state(self) -> list[torch.Tensor]:
        moments = self.learner[1].state_dict()["state"]
        return [*self.policy.state_dict().values(), *(value for one in moments.values() for value in one.values())]


def test_settings_have_their_own_effects_from_a_state_that_does_not_change(step, given):
    before, responses = copy.deepcopy(step.state()), repr(given)
    rows = step.branch(COMPARED | {"again": COMPARED["grpo"]})
    assert len(before) > 30 and all(torch.equal(a, b) for a, b in zip(before, step.state(), strict=True))
    assert repr(given) == responses and rows["grpo"] == rows["again"]
    small = step.branch({"small": replace(CONFIG, lr=1e-4)})["small"]
    for tokens in ("rollout", "held_out"):  # the first order in the weights is exact for small steps
        assert small[f"linear/{tokens}"] == pytest.approx(small[f"delta/{tokens}"], rel=0.1)
    for name in ("gppo", "grpo, bonus 0.003"):
        assert rows[name]["delta/rollout"] != rows["grpo"]["delta/rollout"]
        assert rows[name]["predicted/clip/low"] > 0 and "predicted/kl/approx" in rows[name]


def test_measurements_against_float64(step, given):
    """Entropy, logprobs and their parts, with the whole vocabulary in float64 and each sequence by itself."""

    def truth(rollout):
        return torch.stack(naive_outputs(copy.deepcopy(step.policy.model).double(), rollout)).detach()  # [2, N]

    row, (rollout, held_out) = step.branch({"grpo": CONFIG})["grpo"], given
    before, held_before = truth(rollout), truth(held_out)
    step.learn()
    (log_ratio, change), (moved, held_change) = truth(rollout) - before, truth(held_out) - held_before
    assert row["delta/rollout"] == pytest.approx(change.mean().item(), abs=5e-6)
    assert row["delta/held_out"] == pytest.approx(held_change.mean().item(), abs=5e-6)
    above = rollout.rewards > rollout.rewards.reshape(4, 4).mean(1).repeat_interleave(4)  # [B]
    improbable = above[rollout.sequence] & (before[0] < -before[1])
    assert improbable.any() and row["delta/pa_lp"] == pytest.approx(change[improbable].mean().item(), abs=5e-6)
    right = held_out.correct[held_out.sequence]
    for name, members in (("right", right), ("wrong", ~right)):
        assert row[f"logprob/{name}"] == pytest.approx(moved[members].mean().item(), abs=5e-6)
    assert row["kl/rollout"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)


def test_rank_correlation_of_the_tokens_velocities(step, given):
    """v = A h_a at ratio 1 against each token's change of entropy."""
    rollout = train.select(given[0], CONFIG)[0]
    logprobs, before, moment = step.policy(branch.pack(rollout), 1.0)
    row = step.branch({"grpo": CONFIG})["grpo"]
    step.learn()
    change = step.policy(branch.pack(rollout), 1.0)[1] - before
    velocity = rollout.advantages * (moment - logprobs.exp() * (logprobs + before))
    parts = (part[rollout.advantages != 0].detach() for part in (velocity, change))
    assert row["rank/tokens"] == pytest.approx(stats.spearmanr(*parts).statistic, abs=0.01)


def test_a_setting_has_the_values_of_its_paper_instead_of_the_runs():
    run = resolved(beta1=0.3, eps_high=0.5, aggregation="seq-mean-token-mean", dual_clip=10.0, entropy_target=0.2)
    assert branch.variant(run, {"objective": "dapo"}).eps_high == 0.28
    cispo = branch.variant(run, {"objective": "cispo"})
    assert (cispo.eps_low, cispo.beta1, cispo.dual_clip, cispo.entropy_target) == (1.0, None, None, None)
    same = branch.variant(run, {"beta1": 1.0, "beta2": 0.0})
    assert (same.objective, same.beta1, same.beta2, same.eps_high) == ("ce_gppo", 1.0, 0.0, 0.2)
    assert (same.lr, same.overlong) == (run.lr, run.overlong)


def row(seed: int, step: int, setting: str, delta: float) -> dict:
    values = dict.fromkeys([*draw.SAME, *draw.MEASURED.values(), "rank/tokens"], 0.5)
    values |= {f"delta/{quadrant}": 0.5 for quadrant in draw.QUADRANTS} | {"predicted/clip/low": 0.02}
    values |= {"delta/rollout": delta, "linear/rollout": delta, "predicted/velocity/total": -delta}
    return values | {"seed": seed, "step": step, "setting": setting, "predicted/clip/high": 0.01}


def test_differences_are_paired_and_have_students_interval(tmp_path):
    """The branches differ much, and a setting adds nearly the same to each."""
    effects = [0.010, 0.012, 0.011, 0.013]
    rows = []
    for i, effect in enumerate(effects):
        rows += [row(0, i, "grpo", float(i)), row(0, i, "ce_gppo (0, 1)", i + effect), row(0, i, draw.OWN, float(i))]
    rows += [row(1, 0, "ce_gppo (0, 1)", 99.0)]  # a branch without its baseline
    rows += [row(2, 0, "grpo", 1.0), row(2, 0, "ce_gppo (0, 1)", 1.0115)]  # another run, which keeps the mean
    effects.append(0.0115)
    values = draw.paired(rows, "ce_gppo (0, 1)", "delta/rollout")
    assert list(values.values()) == pytest.approx(effects)
    mean, width = draw.interval(values.values())
    expected = stats.ttest_1samp(effects, 0).confidence_interval(0.95)
    assert (mean - width, mean + width) == pytest.approx((expected.low, expected.high))
    path = tmp_path / "branches.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = draw.table_of_branches(rows := draw.read_branches(path))
    change = f"115.00 ± {1e4 * width:.2f}"
    assert f"| ce_gppo (0, 1) | +{change} | +0.00 ± 0.00 | +{change} | -{change} | +0.00 ± 0.00 |" in text
    assert text.startswith("5 branches (model 0.5,") and f"| {draw.OWN} | +0.00 ± 0.00 |" in text
    assert "| grpo (itself) |" in text and "| 2.00, 1.00 |" in text
    assert "rollout +0.50 ± 0.00 and over the branches -1.00; of the first order, over the branches +1.00." in text
    axes = draw.figure_of_branches(rows).axes
    assert [axis.get_title() for axis in axes] == list(draw.MEASURED)[:4]
    assert [bar.get_width() for bar in axes[0].patches] == pytest.approx([115, 0])
    draw.plt.close("all")


def test_results_files(tmp_path):
    path = tmp_path / "results.jsonl"
    assert draw.read_branches(path) == []
    for line in (json.dumps({"seed": 0}), "{", "[]", json.dumps({"seed": 0, "step": 1, "setting": "grpo"})):
        path.write_text(json.dumps(row(0, 0, "grpo", 1.0)) + "\n" + line + "\n")
        refuses(r"results.jsonl:2: not a row with seed, step, .*model.*; remove this line", draw.read_branches, path)
    twice = [row(0, 1, "grpo", 1.0), row(0, 1, "grpo", 2.0)]
    path.write_text("".join(json.dumps(r) + "\n" for r in twice))
    assert [r["delta/rollout"] for r in draw.read_branches(path)] == [2.0]


def test_a_start_without_a_whole_checkpoint(tmp_path, monkeypatch):
    mistakes = (["--run", ""], "empty"), (["--settings", "grppo"], "settings 'grppo'"), (["--lora-rank", "8"], "whole")
    monkeypatch.chdir(tmp_path)
    for arguments, problem in mistakes:
        monkeypatch.setattr("sys.argv", ["branch.py", *arguments])
        refuses(problem, branch.main)
    (tmp_path / "checkpoint-000004").mkdir()
    refuses("checkpoint-000004: no whole checkpoint there", branch.start_of, str(tmp_path / "checkpoint-000004"))


def test_stored_branches_give_the_stored_pages():
    for path in (draw.Path(branch.__file__).parent).glob("*-branches.jsonl"):
        assert draw.table_of_branches(draw.read_branches(path)) == path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_with_vllm_the_command_branches_and_draws(tmp_path):
    results = tmp_path / "branches.jsonl"
    process = Forked(
        *("results.branch", "--results", str(results), "--branches", "2", "--settings", "gppo"),
        *("--held-out", "8", *quick(tmp_path), "--prompts-per-step", "8", "--max-kept-prompts", "8"),
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    rows = draw.read_branches(results)
    assert {(r["setting"], r["step"]) for r in rows} >= {(name, step) for name in ("grpo", "gppo") for step in (1, 6)}
    assert results.with_suffix(".png").stat().st_size > 10_000 and "gppo" in results.with_suffix(".md").read_text()
