"""Branches with a tiny model and given responses: states are exact, and measurements agree with float64."""

import copy
import json

import numpy as np
import pytest
import torch
from scipy import stats

from ce_gppo.forward import Policy, flatten
from ce_gppo.messages import UserError
from ce_gppo.perf import Meter
from helpers import group_of, resolved, responses_of
from tools import branch, branches
from tools.step import Step
from train import ADAMW

CONFIG = resolved(objective="grpo", lr=1e-3, warmup_steps=0, max_kept_prompts=4, mini_batch_prompts=1)
SETTINGS = {name: branch.variant(CONFIG, branch.SETTINGS[name]) for name in ("grpo", "(1, 1)", "bonus 0.003")}


@pytest.fixture(scope="module")
def given():
    """Four groups of four responses with rewards, and six held-out responses, as the engine would give them."""
    rollout = [group_of(3 + i, [5, 2, 7, 4], seed=i) for i in range(4)]
    held_out = responses_of([(4, 6)] * 6, seed=9)
    for i, r in enumerate(flatten([*rollout, held_out])):
        r.reward = r.verdict = float(i % 3 == 0)
        r.old_logprobs = r.entropy = r.advantages = None
    return rollout, held_out


@pytest.fixture
def step(tiny_model, given, tmp_path):
    """The tenth step of a run: the optimizer has moments, and tokens differ in entropy."""
    tiny_model.get_input_embeddings().weight.data *= 3
    policy = Policy(tiny_model)
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3, **ADAMW)
    one = Step(policy, optimizer, CONFIG, Meter(tiny_model, "cpu"), tmp_path, 10, (0.5, 0.0), given[0])
    one.learn(CONFIG)
    return one


def state_of(step: Step) -> list[torch.Tensor]:
    moments = step.optimizer.state_dict()["state"]
    return [*step.policy.state_dict().values(), *(value for one in moments.values() for value in one.values())]


def test_a_branch_changes_neither_state_nor_responses(step, given):
    before, responses = copy.deepcopy(state_of(step)), repr(given)
    step.branch(SETTINGS, given[1])
    assert len(before) > 30 and all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
    assert repr(given) == responses


def test_equal_settings_have_equal_effects_and_others_differ(step, given):
    rows = step.branch(SETTINGS | {"again": SETTINGS["grpo"]}, given[1])
    rows = {row.pop("setting"): row for row in rows}
    assert rows["grpo"] == rows["again"] == rows[branches.OWN]
    for name in ("(1, 1)", "bonus 0.003"):
        assert rows[name]["delta/rollout"] != rows["grpo"]["delta/rollout"]
        assert rows[name]["predicted/clip/low"] > 0
    assert abs(rows[branches.SMALL]["delta/rollout"]) < abs(rows["grpo"]["delta/rollout"])


def test_learn_does_the_same_as_the_branch_of_the_runs_own_setting(step, given):
    """Entropy changes by the same amount, and the metrics are the same."""
    own = step.branch({}, given[1])[0]
    before = step.measured(given[1])
    metrics = step.learn(CONFIG)
    after = step.measured(given[1])
    assert own["delta/held_out"] == (after["entropy"] - before["entropy"]).mean().item()
    assert own["predicted/velocity/total"] == metrics["velocity/total"]


def test_measurements_against_float64(step, given):
    """Entropy, logprobs and their parts, with the whole vocabulary in float64 and each sequence by itself."""

    def truth(responses):
        model = copy.deepcopy(step.policy.model).double()
        model.set_attn_implementation("eager")
        rows = []
        for r in responses:
            ids = torch.tensor([r.prompt_ids + r.response_ids])
            log_p = model(ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)  # [R, V]
            own = log_p.gather(1, torch.tensor(r.response_ids)[:, None])[:, 0]
            rows += zip(own.tolist(), (-log_p.exp() * log_p).sum(-1).tolist(), [r] * len(own), strict=True)
        return rows

    (row, *_), (rollout, held_out) = step.branch({}, given[1]), given
    before, held_before = truth(flatten(rollout)), truth(held_out)
    step.learn(CONFIG)
    after, held_after = truth(flatten(rollout)), truth(held_out)
    change = np.array([b[1] - a[1] for a, b in zip(before, after, strict=True)])
    assert row["delta/rollout"] == pytest.approx(change.mean(), abs=5e-6)
    assert row["delta/held_out"] == pytest.approx(
        np.mean([b[1] - a[1] for a, b in zip(held_before, held_after, strict=True)]), abs=5e-6
    )
    mean = {id(r): sum(x.reward for x in group) / 4 for group in rollout for r in group}
    improbable = np.array([logprob < -entropy and r.reward > mean[id(r)] for logprob, entropy, r in before])
    assert improbable.any() and row["delta/pa_lp"] == pytest.approx(change[improbable].mean(), abs=5e-6)
    assert row["delta/clipped"] + row["delta/others"] == pytest.approx(row["delta/rollout"])
    for name, wanted in (("right", 1.0), ("wrong", 0.0)):
        moved = [b[0] - a[0] for a, b in zip(held_before, held_after, strict=True) if a[2].verdict == wanted]
        assert row[f"logprob/{name}"] == pytest.approx(np.mean(moved), abs=5e-6)
    log_ratio = np.array([b[0] - a[0] for a, b in zip(before, after, strict=True)])
    assert row["kl/rollout"] == pytest.approx(np.mean(np.exp(log_ratio) - 1 - log_ratio), rel=1e-4)


def test_first_order_in_the_weights_is_exact_for_small_steps(step, given):
    small = step.branch({}, given[1])[1]
    for tokens in ("rollout", "held_out"):
        assert small[f"linear/{tokens}"] == pytest.approx(small[f"delta/{tokens}"], rel=0.1)


def test_without_a_gradient_momentum_moves_the_weights(step, given):
    """Against Adam's equations: m decays by 0.9 and v by 0.999 in each step, and weights decay."""
    p, state = next((p, state) for p, state in step.optimizer.state.items() if p.ndim == 2)
    weights, m, v, steps = p.double(), state["exp_avg"].double(), state["exp_avg_sq"].double(), int(state["step"])
    mini_batches = 4
    for k in range(steps + 1, steps + mini_batches + 1):
        m, v = 0.9 * m, 0.999 * v
        weights = weights * (1 - 1e-3 * 0.1) - 1e-3 * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    step.coast()
    torch.testing.assert_close(p.double(), weights, rtol=1e-4, atol=1e-6)


def test_a_setting_has_the_values_of_its_paper_instead_of_the_runs():
    run = resolved(beta1=0.3, eps_high=0.5, aggregation="seq-mean-token-mean", dual_clip=10.0, entropy_target=0.2)
    assert branch.variant(run, {"objective": "dapo"}).eps_high == 0.28
    cispo = branch.variant(run, {"objective": "cispo"})
    assert (cispo.eps_low, cispo.beta1, cispo.dual_clip, cispo.entropy_target) == (1.0, None, None, None)
    same = branch.variant(run, {"beta1": 1.0, "beta2": 0.0})
    assert (same.objective, same.beta1, same.beta2, same.eps_high) == ("ce_gppo", 1.0, 0.0, 0.2)
    assert (same.lr, same.overlong) == (run.lr, run.overlong)


def row(seed: int, step: int, setting: str, delta: float) -> dict:
    same = dict.fromkeys(branches.SAME, 0)
    names = (
        "delta/held_out",
        "delta/clipped",
        "linear/rollout",
        "linear/held_out",
        "logprob/right",
        "logprob/wrong",
        "kl/rollout",
    )
    names += ("predicted/velocity/total", "predicted/clip/low", "predicted/clip/high", "rank/tokens")
    names += ("predicted/clip/prob_low",)
    names += tuple(f"delta/{quadrant}" for quadrant in ("pa_lp", "na_hp", "pa_hp", "na_lp"))
    values = dict.fromkeys(names, 0.5) | {"delta/rollout": delta, "linear/rollout": delta, names[7]: -delta}
    return same | {"seed": seed, "step": step, "setting": setting} | values


def test_differences_are_paired_and_have_students_interval(tmp_path):
    """The branches differ much, and a setting adds nearly the same to each."""
    effects = [0.010, 0.012, 0.011, 0.013]
    rows = []
    for i, effect in enumerate(effects):
        rows += [row(0, i, "grpo", float(i)), row(0, i, "(0, 1)", i + effect), row(0, i, branches.OWN, float(i))]
    rows += [row(1, 0, "(0, 1)", 99.0)]  # a branch without its baseline
    rows += [row(2, 0, "grpo", 1.0), row(2, 0, "(0, 1)", 1.0115)]  # another run, which keeps the mean
    effects.append(0.0115)
    values = branches.paired(rows, "(0, 1)", "delta/rollout")
    assert values == pytest.approx(effects)
    mean, width = branches.interval(values)
    expected = stats.ttest_1samp(effects, 0).confidence_interval(0.95)
    assert (mean - width, mean + width) == pytest.approx((expected.low, expected.high))
    text = branches.table(rows)
    change = f"115.00 ± {1e4 * width:.2f}"
    assert f"| (0, 1) | +{change} | +0.00 ± 0.00 | +{change} | -{change} | 100%, 0% |" in text
    assert "| (0, 1) | +115.00 ± 20.54 |  | +115.00 |" in text, "by run: of four branches, of none, of one"
    assert "| velocity, over the branches | -1.00 |" in text and "| first order, over the branches | +1.00 |" in text
    assert branches.rank(values, -values) == "-1.00" and branches.rank(values[:3], values[:3]) == ""
    assert "| (0, 1) | +0.00 ± 0.00 |" in text, "prediction and measurement are equal"
    branches.figure(rows).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_results_files(tmp_path):
    path = tmp_path / "results.jsonl"
    assert branches.read(path) == []
    path.write_text(json.dumps({"seed": 0}) + "\n")
    with pytest.raises(UserError, match="results.jsonl: not a file of branches"):
        branches.read(path)
    path.write_text(json.dumps({"seed": 0, "step": 1, "setting": "grpo"}) + "\n")
    with pytest.raises(UserError, match="results.jsonl: not a file of branches .KeyError: 'model'"):
        branches.read(path)
    twice = [row(0, 1, "grpo", 1.0), row(0, 1, "grpo", 2.0)]
    path.write_text("".join(json.dumps(r) + "\n" for r in twice))
    assert [r["delta/rollout"] for r in branches.read(path)] == [2.0]


def test_a_start_without_a_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["branch.py", "--run", ""])
    with pytest.raises(UserError, match="--run is empty"):
        branch.main()
    (tmp_path / "checkpoint-000004").mkdir()
    with pytest.raises(UserError, match="checkpoint-000004: no whole checkpoint there"):
        branch.start_of(str(tmp_path / "checkpoint-000004"))
