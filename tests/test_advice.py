"""The sentences at the end of a run, on stored runs of every kind."""

import json
import re

import pytest

import loss
from ce_gppo import metrics
from ce_gppo.advice import CALM, advice
from helpers import ROOT, resolved

CASES = [json.loads(line) for line in (ROOT / "tests/cases/advice.jsonl").read_text().splitlines()]
EXPECTED = {  # a pattern for each sentence, in order
    "calm": ["No metric", "Entropy fell by 60%, from 0.225 to 0.090 .* 0.303 to 0.912"],
    "calm, betas (0, 1)": [
        "No metric",
        "Entropy fell by 59%",
        r"entropy up: .*\. For more entropy raise entropy_coef \(0\); lower beta2 \(1\) for less\.",
    ],
    "unlearning": [
        r"In 4 of 40 steps, first in step 5, sure .* 0\.50 .* 0\.079 nats; lower lr \(0\.0002\) or beta1 \(0\.75\)",
        r"from 0\.303 to 0\.237: the policy became worse; lower lr",
        r"entropy down: .* -5\.9e-4 .* \+1\.0e-4, of -20\.6e-4 in all\. For more entropy lower beta1 \(0\.75\) or",
    ],
    "unlearning at once": [r"In 1 of 7 steps, first in step 1, .* 0\.56 nats", "rose by 218%.* worse", "entropy down"],
    "far updates": [r"In 7 of 40 steps .* reached 0\.025; lower lr \(0\.0002\)", "Entropy fell by 60%"],
    "truncation": ["100% .* raise max_response_tokens", "100% only wrong ones; train on easier", "Entropy fell by 4%"],
    "no signal": [
        r"40% of all groups had only right answers, 54% only wrong .* raise temperature \(0\.01\)",
        "with one update",
        "worse",
    ],
    "idle betas": [r"almost nothing: 0\.00% .* or raise lr \(1e-07\)", "Entropy fell by 3%"],
    "one update": [r"with one update per rollout .* lower mini_batch_prompts \(32\)", "Entropy"],
    "mismatch": [r"mismatch/kl 0\.004 nats .* set rollout_correction to tis", "Entropy fell by 60%"],
    "entropy spent for nothing": [r"fell by 59%, .* without a gain; raise entropy_coef \(0\)", "entropy up"],
    "missed target": [
        r"0\.081 nats .* entropy_target is 0\.11: .* end of their range, \(0, 1\)\. Lower eps_low \(0\.2\)",
        "Entropy fell by",
        r"entropy down: .*; entropy_target moved the betas\.",
    ],
    "useless critic": [r"\(value/explained_variance -0\.20\): change critic_lr \(0\.0003\)", "Entropy fell by 60%"],
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_stored_run_gets_its_sentences(case):
    sentences = advice(case["history"], resolved(**case["settings"]))
    expected = EXPECTED[case["name"]]
    assert len(sentences) == len(expected) <= 4, sentences
    for sentence, pattern in zip(sentences, expected, strict=True):
        assert re.search(pattern, sentence), sentence
    assert (CALM in sentences) == case["name"].startswith("calm")


def test_groups_without_a_signal_are_named_only_if_nothing_is_learned_from_them():
    """A critic learns from every response. If right answers differ in other parts of the reward, most are used."""
    case = next(case for case in CASES if case["name"] == "no signal")
    used = [row | {"rollout/unused": 0.2} for row in case["history"]]
    for history, settings in ((used, {}), (case["history"], {"advantages": "gae", "filter_groups": "on"})):
        assert not [s for s in advice(history, resolved(**case["settings"] | settings)) if "had a signal" in s]
    unused = [row | {"rollout/unused": 0.95} for row in case["history"]]
    assert "had a signal" in advice(unused, resolved(**case["settings"]))[0]


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_the_settings_that_it_names_can_be_changed(objective):
    """Every `name (value)` is a setting with its value that the objective does not ignore."""
    named = set()
    for case in CASES[: len(CASES) if objective == "ppo" else -1]:  # the last one is a critic's
        settings = case["settings"] | {"objective": objective}
        settings |= {name: None for name in ("beta1", "beta2") if not loss.OBJECTIVES[objective].has_betas}
        config = resolved(**settings)
        for sentence in advice(case["history"], config):
            for name, told in re.findall(r"\b([a-z][a-z_0-9]+) \(([-+.e\d]+)\)", sentence):
                value = getattr(config, name)
                assert float(told) == pytest.approx(value, rel=1e-4), sentence
                less = {"beta1": value / 2, "beta2": value / 2, "mini_batch_prompts": value // 2}
                other = less.get(name, 2 * value or 0.01)
                assert getattr(resolved(**settings | {name: other}), name) == other
                named.add(name)
    assert {"lr", "max_response_tokens"} <= named and ("temperature" in named) == (objective != "ppo")
    assert ("beta1" in named) == loss.OBJECTIVES[objective].has_betas and ("critic_lr" in named) == (objective == "ppo")


def test_sentences_that_depend_on_other_settings():
    by_name = {case["name"]: case for case in CASES}

    def first(name: str, **settings) -> str:
        return advice(by_name[name]["history"], resolved(**by_name[name]["settings"] | settings))[0]

    assert "set old_logprobs to trainer and rollout_correction to tis" in first("mismatch", old_logprobs="sampler")
    assert "lower lr (0.0002) or beta1 (0.75) or epochs (3)" in first("unlearning", epochs=3)
    assert "take objective ce_gppo, whose" in first("unlearning", objective="gppo", beta1=None, beta2=None)
    assert "in all 5 steps lr still grew (warmup_steps 8)" in first("idle betas", warmup_steps=8)
    assert "entropy_coef was still growing" in first("missed target", objective="grpo")
    assert first("missed target", objective="grpo", entropy_target=0.05) == CALM  # a bonus cannot lower entropy
    assert "the betas were still moving; raise steps (80)" in first("missed target", entropy_target=0.05)


def test_beta2_is_lowered_for_less_entropy_only_where_it_raised_it():
    case = next(case for case in CASES if case["name"] == "calm, betas (0, 1)")
    for sign, said in ((1, True), (-1, False)):
        history = [
            row | {"velocity/clipped_high": sign * row["velocity/clipped_high"]}
            if "velocity/clipped_high" in row
            else row
            for row in case["history"]
        ]
        assert ("lower beta2" in advice(history, resolved(**case["settings"]))[-1]) == said


def test_every_kind_of_run_is_stored():
    assert [case["name"] for case in CASES] == list(EXPECTED)


def test_a_history_with_holes_gets_sentences_or_none():
    """Missing metrics, and runs of two steps, must not raise an error at the end of a run."""
    assert advice([], resolved()) == [] == advice([{"step": 0, "eval/x/avg_at_k": 0.5}], resolved())
    for case in CASES:
        config = resolved(**case["settings"])
        for name in {name for row in case["history"] for name in row} - {"step"}:
            history = [{key: value for key, value in row.items() if key != name} for row in case["history"]]
            assert (advice(history, config) == []) == (name == "entropy/mean")
        assert 1 <= len(advice(case["history"][:2], config)) <= 4


def test_the_names_that_it_reads_are_metrics():
    read = re.findall(r'"([a-z]+/[a-z_{}]+)"', (ROOT / "ce_gppo/advice.py").read_text())
    patterns = [metric.pattern() for metric in metrics.ALL]
    assert len(read) > 8
    assert all(any(p.fullmatch(name.replace("{name}", "all")) for p in patterns) for name in read), read
