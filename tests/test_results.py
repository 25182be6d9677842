"""The sweep: what it runs, what it keeps, what it goes on with; and verdicts on runs whose truth is known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import claims
import sweep

ROOT = Path(__file__).parents[1]


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, f"results/{name}.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_a_sweep_keeps_what_ends_and_goes_on_with_the_rest(tmp_path):
    results = tmp_path / "results.jsonl"
    options = "--results", results, "--seeds", "1", "--steps", "2", "--out", tmp_path / "out"
    options += "--settings", "grpo", "ce_gppo (1, 0.5)"
    done = script("sweep", *options)
    assert done.returncode == 0, done.stderr
    rows = {row["setting"]: row for row in sweep.read(results)}
    assert sorted(rows) == ["ce_gppo (1, 0.5)", "grpo"]
    first = {name: row["series"]["entropy/mean"][0] for name, row in rows.items()}
    assert first["grpo"] == first["ce_gppo (1, 0.5)"]  # the same base, the same first rollout
    metrics = (tmp_path / "out" / "grpo-2-0" / "metrics.jsonl").read_text().splitlines()
    for name, values in rows["grpo"]["series"].items():
        assert values == [
            pytest.approx(row.get(name), rel=1e-4)
            for row in map(json.loads, metrics)
            if (name in row if name.startswith("eval/") else row["step"])
        ], name
    assert rows["grpo"]["eval_steps"] == [0, 2]
    assert "--objective grpo" in rows["grpo"]["arguments"]
    assert "--beta1 1.0 --beta2 0.5" in rows["ce_gppo (1, 0.5)"]["arguments"]

    results.write_text(json.dumps(rows["ce_gppo (1, 0.5)"]) + "\n")  # as if killed before the other line was written
    again = script("sweep", *options)
    assert again.returncode == 0 and "1 of 2 runs are there" in again.stdout
    assert {row["setting"]: row for row in sweep.read(results)} == rows

    drawn = script("claims", results)
    assert drawn.returncode == 0, drawn.stderr
    assert "| grpo | 1 |" in results.with_suffix(".md").read_text()
    assert results.with_suffix(".png").stat().st_size > 10_000
    assert (tmp_path / "results-velocity.svg").stat().st_size > 10_000


def test_results_of_other_arguments_are_not_mixed(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"setting": "grpo", "seed": 0, "arguments": "--lr 1"}) + "\n")
    refused = script("sweep", "--results", results, "--settings", "grpo")
    assert refused.returncode == 2 and "other arguments" in refused.stderr
    unknown = script("sweep", "--settings", "grppo")
    assert unknown.returncode == 2 and "'grppo' is unknown" in unknown.stderr
    results.write_text(results.read_text() + '{"setting": "grpo", "se')
    for name, *options in (("sweep", "--results", results), ("claims", results)):
        broken = script(name, *options)
        assert broken.returncode == 2 and f"{results}:2: not a run" in broken.stderr


def test_every_setting_is_train_py_s():
    import settings
    import train

    for name in sweep.SETTINGS:
        settings.parse(train.Config, sweep.arguments(name, 3, 50).split())


def test_interval_is_student_s():
    mean, low, high = claims.interval({0: 1.0, 1: 2.0, 2: 3.0})
    assert (mean, low, high) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert claims.interval({0: 1.0})[1:] == (-np.inf, np.inf)


def made_up(entropy, accuracy, seeds=5, noise=0.002):
    """Runs whose entropy falls from 0.3 to what is given, by setting."""
    rows = []
    for name in sweep.SETTINGS:
        for seed in range(seeds):
            random = np.random.default_rng([seed, list(sweep.SETTINGS).index(name)])
            course = np.linspace(0.3, entropy.get(name, 0.1), 50) + noise * random.standard_normal(50)
            series = {key: [0.01] * 50 for key in sweep.SERIES}
            series |= {f"velocity/{quadrant}": [0.01 * sign] * 50 for quadrant, sign in claims.SIGNS.items()}
            series |= {"entropy/mean": course.tolist(), "clip/prob_low": [None, *[0.2] * 49]}
            series["eval/arithmetic/avg_at_k"] = [0.3, accuracy.get(name, 0.8) + noise * random.standard_normal()]
            series["eval/arithmetic/pass_at_k"] = [0.9, 0.9]
            row = {"setting": name, "seed": seed, "arguments": "", "minutes": 1.0, "eval_steps": [0, 50]}
            rows.append(row | {"series": series})
    return claims.Sweep(rows)


def test_part_of_a_sweep(tmp_path):
    """The first steps of all runs, as if they had ended there; and the runs that still end their responses."""
    rows = list(made_up({}, {}, seeds=2).rows.values())
    for row in rows:
        row["eval_steps"], entropy = [0, 20, 50], row["series"]["entropy/mean"]
        for name in ("eval/arithmetic/avg_at_k", "eval/arithmetic/pass_at_k"):
            row["series"][name].insert(1, 0.5)
        row["series"]["response/truncated"] = [0.0] * 25 + [0.9 * row["seed"]] * 25
        part = claims.begin(row, 20)
        assert part["series"]["entropy/mean"] == entropy[:20] and part["series"]["eval/arithmetic/avg_at_k"][-1] == 0.5
        assert claims.rows_of(part) == [r for r in claims.rows_of(row) if r["step"] <= 20]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options, stem, runs in (("--steps", "20"), "-20", 2), (("--without-idle",), "-without-idle", 1):
        drawn = script("claims", results, *options)
        assert drawn.returncode == 0, drawn.stderr
        assert f"| grpo | {runs} |" in (tmp_path / f"results{stem}.md").read_text()
    for steps in ("0", "21"):
        refused = script("claims", results, "--steps", steps)
        assert refused.returncode == 2 and "not evaluated there, only at [20, 50]" in refused.stderr
    results.write_text(json.dumps(rows[1]) + "\n")  # seed 1, which idles
    refused = script("claims", results, "--without-idle")
    assert refused.returncode == 2 and "no such runs there" in refused.stderr


def test_verdicts_follow_the_runs():
    like_the_paper = {"grpo": 0.05, "ce_gppo (0, 1)": 0.3, "ce_gppo (0.5, 1)": 0.25, "ce_gppo (0.75, 1)": 0.2}
    like_the_paper |= {"ce_gppo (1, 0.5)": 0.1, "dapo": 0.2, "grpo, bonus 0.03": 0.4}
    found = {name.split()[0]: verdict for name, verdict, _ in claims.claims(made_up(like_the_paper, {}))}
    held = {"1a.", "1b.", "2a.", "2b.", "3a.", "4a.", "5.", "6a.", "6b."}
    assert {name for name, verdict in found.items() if verdict == "held"} == held
    assert found["4b."] == found["3b."] == "undecided"

    other_way = {"grpo": 0.25, "ce_gppo (0, 1)": 0.1, "ce_gppo (1, 0.5)": 0.3}
    found = {n.split()[0]: v for n, v, _ in claims.claims(made_up(other_way, {"ce_gppo (0.75, 1)": 0.7}))}
    assert {found[name] for name in ("1a.", "1b.", "2a.", "2b.", "4a.")} == {"not held"}

    one_seed = claims.claims(made_up(like_the_paper, {}, seeds=1))
    assert {verdict for name, verdict, _ in one_seed if not name.startswith("6b")} == {"undecided"}
