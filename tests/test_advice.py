"""The sentences at the end of a run: each at its limit, with the settings to change."""

import re

import pytest

import loss
from ce_gppo import log
from helpers import ROOT, resolved

CALM = {"kl/approx": 0.001, "clip/low": 0.002, "clip/high": 0.002, "mismatch/kl": 1e-5, "response/truncated": 0.0}
CALM |= {"reward/group_solved_all": 0.2, "reward/group_solved_none": 0.2, "rollout/unused": 0.4}


def run(steps: int = 20, accuracies=(), last: int = 20, **changed: float) -> list[dict]:
    """The history of a run whose entropy falls from 1 to 0.5. changed: metrics of the last steps, `kl_approx=1`."""
    named = {name.replace("_", "/", 1): value for name, value in changed.items()}
    entropies = [1 - 0.5 * i / (steps - 1) for i in range(steps)]
    rows = [{"step": 0}, *({"step": i, "entropy/mean": H, **CALM} for i, H in enumerate(entropies, start=1))]
    for row in rows[-last:]:
        row |= named
    for row, accuracy in zip(rows[:: max(1, steps // max(1, len(accuracies) - 1))], accuracies, strict=False):
        row |= {"eval/a/avg_at_k": accuracy - 0.1, "eval/b/avg_at_k": accuracy + 0.1}
    return rows


def faults(history: list[dict], **settings) -> list[str]:
    return log.advice(history, resolved(**{"lr": 1e-4} | settings))[:-1]


def test_a_calm_run_has_one_sentence():
    assert log.advice(run(), resolved()) == ["Entropy went from 1.000 to 0.500 nats per token."]
    assert log.advice([], resolved()) == [] == log.advice([{"step": 0, "eval/a/avg_at_k": 0.5}], resolved())


@pytest.mark.parametrize(
    "accuracies, said",
    [
        ((0.3, 0.9), r"held-out accuracy from 0\.300 to 0\.900\.$"),
        ((0.3, 0.34), r"from 0\.300 to 0\.340: no gain that chance would not explain\.$"),
        ((0.3, 0.36), r"from 0\.300 to 0\.360\.$"),
        ((0.3, 0.5, 0.44), r"to 0\.440, after 0\.500 at its best: the policy became worse; lower lr\.$"),
        ((0.3, 0.5, 0.46), r"from 0\.300 to 0\.460\.$"),
        ((0.3,), r"nats per token\.$"),
    ],
)
def test_the_last_sentence_is_on_entropy_and_accuracy(accuracies, said):
    (sentence,) = log.advice(run(accuracies=accuracies), resolved())
    assert sentence.startswith("Entropy went from 1.000 to 0.500") and re.search(said, sentence), sentence


@pytest.mark.parametrize(
    "name, limit, margin, pattern",
    [
        ("mismatch_kl", 1e-3, 1e-4, r"mismatch/kl 0\.0011 nats.: set rollout_correction to tis\.$"),
        ("response_truncated", 0.1, 0.01, r"At the end 11% .* \(samples\.jsonl\), lower lr"),
        ("reward_group_solved_all", 0.7, 0.01, r"71% .* right answers, 20% .* harder"),
        ("reward_group_solved_none", 0.7, 0.01, r"20% .* answers, 71% .* easier"),
    ],
)
def test_the_mean_of_the_last_ten_steps_is_held_against_a_limit(name, limit, margin, pattern):
    """Of a short run, that of its second half."""
    below, above = ({name: value, "rollout_unused": 0.95} for value in (limit - margin, limit + margin))
    assert faults(run(last=10, **below)) == faults(run(last=9, **above)) == faults(run(4, last=1, **above)) == []
    for history in (run(last=10, **above), run(4, last=2, **above)):
        (sentence,) = faults(history)
        assert re.search(pattern, sentence), sentence


@pytest.mark.parametrize(
    "steps, last, kl, told",
    [
        (20, 1, 0.1, False),  # one step
        (20, 1, 0.101, True),  # at ten times the limit
        (20, 2, 0.01, False),
        (20, 2, 0.011, True),
        (60, 2, 0.011, False),  # fewer than one step in twenty
        (60, 3, 0.011, True),
    ],
)
def test_updates_that_moved_far(steps, last, kl, told):
    found = faults(run(steps, last=last, kl_approx=kl))
    assert bool(found) == told
    if told:
        said = rf"In {last} of {steps} steps, first in step {steps - last + 1}, .* up to {kl:.2g} nats.: lower lr "
        assert re.search(said + r"\(0\.0001\) or beta1 \(0\.75\)\.$", found[0])


def test_the_betas_did_nothing_where_nothing_is_clipped():
    idle = {"clip_low": 0.0002, "clip_high": 0.0007}
    assert faults(run(clip_low=0.0003, clip_high=0.0007)) == []
    (sentence,) = faults(run(**idle))
    assert re.search(r"0\.09% .*: raise lr \(0\.0001\), or lower mini_batch_prompts \(8\)", sentence)
    assert "lr still grew in all of them (warmup_steps 20)" in faults(run(**idle), warmup_steps=20)[0]
    assert "raise lr" in faults(run(**idle), warmup_steps=19)[0]
    assert faults(run(**idle), objective="grpo") == [], "it has no betas"


def test_at_most_two_faults_the_gravest_first():
    everything = {"mismatch_kl": 0.1, "kl_approx": 1, "response_truncated": 1, "clip_low": 0, "clip_high": 0}
    found = log.advice(run(**everything), resolved())
    assert len(found) == 3 and "mismatch/kl" in found[0] and "kl/approx" in found[1] and "Entropy" in found[2]


def test_sentences_that_depend_on_other_settings():
    assert "set rollout_correction to tis" in faults(run(mismatch_kl=1), rollout_correction="bypass")[0]
    assert faults(run(mismatch_kl=1), rollout_correction="tis") == []
    assert "lower lr (0.0001) or beta1 (0.75) or epochs (3)." in faults(run(kl_approx=1), epochs=3)[0]
    assert "lower lr (0.0001)." in faults(run(kl_approx=1), objective="grpo")[0]
    assert "or take objective ce_gppo with a lower beta1." in faults(run(kl_approx=1), objective="gppo")[0]
    assert faults(run(response_truncated=0.2))[0].endswith("length limit: raise max_response_tokens (16).")
    equal = {"reward_group_solved_all": 0.5, "reward_group_solved_none": 0.45}
    assert "raise temperature (1)" in faults(run(**equal, rollout_unused=0.95))[0]
    assert faults(run(**equal, rollout_unused=0.89)) == [], "their right answers differ in other components"
    assert faults(run(**equal, rollout_unused=0.89), dynamic_sampling="off") != []
    assert faults(run(**equal), advantages="gae", dynamic_sampling="filter") == [], "a critic needs no groups"


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_the_settings_that_it_names_can_be_changed(objective):
    """Every `name (value)` is a setting with its value that the objective does not ignore."""
    config, far = resolved(objective=objective), run(kl_approx=1, response_truncated=1, last=10)
    for history in (run(mismatch_kl=1, reward_group_solved_none=0.9), far, run(clip_low=-1)):
        for sentence in log.advice(history, config):
            for name, told in re.findall(r"\b([a-z][a-z_0-9]+) \(([-+.e\d]+)\)", sentence):
                value = getattr(config, name)
                assert float(told) == pytest.approx(value, rel=1e-4), sentence
                other = value // 2 if name == "mini_batch_prompts" else value / 2 if name == "beta1" else 2 * value
                assert getattr(resolved(objective=objective, **{name: other}), name) == other


def test_a_history_with_holes_gets_sentences():
    """Missing metrics, and runs of two steps, must not raise an error at the end of a run."""
    history = run(accuracies=(0.3, 0.5), mismatch_kl=1, kl_approx=1, response_truncated=1, clip_low=-1)
    for name in CALM:
        assert 1 <= len(log.advice([{k: v for k, v in row.items() if k != name} for row in history], resolved())) <= 3
    assert 1 <= len(log.advice(history[:2], resolved())) <= 3


def test_the_names_that_it_reads_are_metrics():
    from tools.metrics import rows

    source = (ROOT / "ce_gppo/log.py").read_text()
    read = set(re.findall(r'"((?:kl|clip|mismatch|response|reward|rollout)/[a-z_]+)"', source))
    assert len(read) >= 9 and read <= {name for row in rows() for name in row[1].split(", ")}
