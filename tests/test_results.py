"""A sweep runs, resumes and keeps the right series. Verdicts and figures of runs with known values."""

import itertools
import json
import subprocess
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

import train
from ce_gppo.config import parse
from ce_gppo.messages import UserError
from helpers import Forked, metrics_of, refuses, rows_of
from results import claims, coin, draw, series, settings, sweep

ROOT = Path(__file__).parents[1]
SETTINGS = (*settings.SWEEPS["walk"].settings, *settings.STEADY)
STORED = sorted(path for path in (ROOT / "results").glob("*.jsonl") if "series" in path.read_text()[:2000])


def forked(command: list[str], *, stdout, **_) -> Forked | subprocess.Popen:
    """In the place of Popen: a run of the sweep in a fork, which saves the imports."""
    return Forked(*command[1:], output=stdout.name) if len(command) > 1 else subprocess.Popen(command)


@pytest.mark.slow
def test_a_sweep_keeps_finished_runs_and_does_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep, "subprocess", types.SimpleNamespace(Popen=forked))
    small = {"train_data": rows_of("train", 256), "eval_data": rows_of("eval", 16), "prompts_per_step": 24}
    common = settings.SWEEPS["walk"].common | small | {"max_kept_prompts": 24, "eval_samples": 2}
    monkeypatch.setitem(settings.SWEEPS, "walk", replace(settings.SWEEPS["walk"], common=common))
    results = tmp_path / "results.jsonl"
    names = ("grpo", "ce_gppo (1, 0.5)")
    options = {"results": str(results), "seeds": 1, "steps": 2, "settings": names, "out": tmp_path / "out", "lanes": 1}
    config = sweep.Config(first_seed=3, **options)
    sweep.main(config)
    rows = {row["setting"]: row for row in series.read(results, series.RUN)}
    assert sorted(rows) == sorted(names)
    assert len({row["series"]["entropy/mean"][0] for row in rows.values()}) == 1  # the same base and first rollout
    metrics = metrics_of(tmp_path / "out" / "walk" / "grpo-2-3")
    for name, values in rows["grpo"]["series"].items():
        there = [row for row in metrics if (name in row if name.startswith("eval/") else row["step"])]
        assert values == [pytest.approx(row[name], rel=1e-4) if name in row else None for row in there], name
    assert rows["grpo"]["eval_steps"] == [0, 2]
    times = [row.get(f"time/{part}", 0) for row in metrics for part in ("step", "eval")]
    assert rows["grpo"]["minutes"] == pytest.approx(sum(times) / 60, abs=0.01)
    # The names that verdicts and tables use are those of a run. Few tokens are clipped in two steps.
    used = {f"velocity/{quadrant}" for quadrant in claims.SIGNS} | {name for name, *_ in claims.COLUMNS if "/" in name}
    used |= {"entropy/mean", "response/truncated", "kl/approx"} | {f"eval/walk/{n}_at_k" for n in ("avg", "distinct")}
    assert not any(None in rows["grpo"]["series"][name] for name in used)
    assert rows["ce_gppo (1, 0.5)"]["series"]["optim/beta1"] == [1.0, 1.0]
    assert "--beta1 1.0 --beta2 0.5 --steps 2 --seed 3" in rows["ce_gppo (1, 0.5)"]["arguments"]

    results.write_text(json.dumps(rows["ce_gppo (1, 0.5)"]) + "\n")  # as if killed before the other line was written
    capsys.readouterr()
    sweep.main(config)
    assert "1 of 2 runs are there" in capsys.readouterr().out
    assert {row["setting"]: row for row in series.read(results, series.RUN)} == rows


def test_results_of_other_arguments_are_not_mixed(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"setting": "grpo", "seed": 0, "arguments": "--lr 1"}) + "\n")
    with pytest.raises(UserError, match="results.jsonl has grpo with other arguments"):
        sweep.main(sweep.Config(results=str(results), settings=("grpo",)))
    with pytest.raises(UserError, match="cannot be written"):  # found before anything is trained
        sweep.main(sweep.Config(results=str(results / "nested")))
    results.write_text(results.read_text() + '{"setting": "grpo", "se')
    for main, config in ((sweep.main, sweep.Config(results=str(results))), (claims.main, claims.Config(results))):
        refuses(r"results.jsonl:2: not a row with setting, seed, arguments", main, config)
    refuses("no.jsonl: no runs there", claims.main, claims.Config(tmp_path / "no.jsonl"))


SWEEP = """
import sys, types
from pathlib import Path
from results import sweep
results, out, program = map(Path, sys.argv[1:])
sweep.sys = types.SimpleNamespace(executable=str(program), stderr=sys.stderr, exit=sys.exit)
sweep.main(sweep.Config(results=str(results), out=out, settings=("grpo",), seeds=1, lanes=1))
"""
TRAINING = """#!/bin/bash
trap 'echo saved; exit' TERM
echo began
while :; do sleep 0.05; done
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [9, 15, 2])
def test_runs_of_a_killed_sweep_save_and_end_and_two_sweeps_do_not_mix(tmp_path, number):
    (tmp_path / "sweep.py").write_text(SWEEP)
    (tmp_path / "training").write_text(TRAINING)
    (tmp_path / "training").chmod(0o755)
    arguments = [tmp_path / name for name in ("sweep.py", "results.jsonl", "out", "training")]
    log = tmp_path / "out" / "walk" / "grpo-150-0.log"

    def wait_for(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    killed = Forked(*map(str, arguments))
    wait_for(lambda: log.exists() and "began" in log.read_text())
    with pytest.raises(UserError, match="another sweep, or a run of one that was killed, is at work"):
        sweep.main(sweep.Config(results=str(tmp_path / "results.jsonl"), out=tmp_path / "out"))
    killed.send_signal(number)
    wait_for(lambda: "saved" in log.read_text())
    with (tmp_path / "results.jsonl").open("a") as file:
        wait_for(lambda: sweep.lock_file(file))


def test_a_run_is_finished_with_its_last_evaluation_and_the_same_arguments(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "command": ["train.py", "--lr", "1.0", "--out"]}))
    rows = [{"step": 0, "eval/walk/avg_at_k": 0.3}, {"step": 1}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = types.SimpleNamespace(folder=tmp_path, source="walk", arguments="--lr 1.0")
    assert not sweep.Run.finished(run, 2)  # killed before the evaluation
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "eval/walk/avg_at_k": 0.4}) + "\n")
    assert sweep.Run.finished(run, 2) and not sweep.Run.finished(run, 3)
    run.arguments = "--lr 0.5"
    assert not sweep.Run.finished(run, 2)


def test_train_py_accepts_every_setting():
    for one, (name, options) in itertools.product(settings.SWEEPS.values(), settings.SETTINGS.items()):
        config, recipe, resume = parse(train.Config, sweep.arguments(one, name, 3, 50).split())
        assert (config.seed, config.steps, recipe, resume) == (3, 50, one.common.get("recipe", ""), "")
        for key, value in (one.common | options).items():
            assert key == "recipe" or getattr(config, key) == value
        assert set(one.settings) <= set(settings.SETTINGS)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_runs_give_the_stored_pages(path):
    """The sweeps could also be continued: their settings are still those of the stored runs."""
    rows = series.read(path, series.RUN)
    groups, page = series.by_setting(rows), path.with_suffix(".md").read_text()
    assert sum(map(len, groups.values())) == len(rows)
    assert claims.table(groups) in page and len(claims.claims(groups)) >= 3
    assert all(f"| {' | '.join(row)} |\n" in page for row in claims.claims(groups))
    assert all(sweep.KEPT.fullmatch(name) for row in rows for name in row["series"])
    if path.stem in settings.SWEEPS:
        one = settings.SWEEPS[path.stem]
        for row in rows:
            assert row["arguments"] == sweep.arguments(one, row["setting"], row["seed"], one.steps)


def test_interval_is_student_s():
    mean, half = series.interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2, 2.4843), abs=1e-3)
    assert series.interval([1.0])[1] == np.inf and series.interval([2.0, 2.0]) == (2, 0)
    for seeds, quantile in (2, 12.706), (11, 2.228), (31, 2.042):  # from a printed table
        values = np.arange(seeds) / np.std(range(seeds), ddof=1) * np.sqrt(seeds)
        assert series.interval(values)[1] == pytest.approx(quantile, abs=1e-3)


def made_up(entropy, accuracy, seeds=5, noise=0.002):
    """A sweep whose entropy falls from 0.3 to the given values, by setting."""
    rows = []
    for name in SETTINGS:
        for seed in range(seeds):
            random = np.random.default_rng([seed, SETTINGS.index(name)])
            course = np.linspace(0.3, entropy.get(name, 0.1), 50) + noise * random.standard_normal(50)
            one = {f"velocity/{quadrant}": [0.01 * sign] * 50 for quadrant, sign in claims.SIGNS.items()}
            one |= {"entropy/mean": course.tolist(), "response/truncated": [0.0] * 40 + [0.5] * 10}
            one |= {"clip/prob_low": [None, *[0.2] * 49], "clip/prob_high": [0.01] * 50}
            one["eval/walk/avg_at_k"] = [0.3, accuracy.get(name, 0.8) + noise * random.standard_normal()]
            one |= {"eval/walk/pass_at_k": [0.9, 0.9], "eval/walk/distinct_at_k": [2.0, 4.0]}
            row = {"setting": name, "seed": seed, "arguments": "", "minutes": 1.0, "eval_steps": [0, 50]}
            rows.append(row | {"source": "walk", "series": one})
    return series.by_setting(rows)


def verdicts(groups):
    """{number of a claim: the verdicts on its parts}"""
    found = {}
    for name, verdict, _ in claims.claims(groups):
        found.setdefault(name.split()[0], set()).add(verdict)
    return {name: min(parts) if len(parts) == 1 else parts for name, parts in found.items()}


def test_verdicts_follow_the_runs():
    like_the_paper = {"grpo": 0.05, "ce_gppo (0, 1)": 0.3, "ce_gppo (0.5, 1)": 0.25, "ce_gppo (0.75, 1)": 0.2}
    like_the_paper |= {"ce_gppo (1, 0.5)": 0.1, "dapo": 0.2, "grpo, bonus 0.003": 0.4, "lp_only (1, 1)": 0.2}
    found = verdicts(made_up(like_the_paper, {"lp_only (1, 1)": 0.9}))
    held = {"1a.", "1b.", "2a.", "2b.", "3a.", "4a.", "5.", "6a.", "6b.", "6c.", "7a.", "7b.", "8.", "9b."}
    assert {name for name, verdict in found.items() if verdict == "held"} == held
    assert {name for name in found if found[name] == "no difference"} == {"3b.", "4b.", "4c.", "9a."}

    against = {"grpo": 0.25, "ce_gppo (0, 1)": 0.1, "ce_gppo (1, 0.5)": 0.3}
    found = verdicts(made_up(against, {"ce_gppo (0.75, 1)": 0.7}))
    assert {found[name] for name in ("1a.", "1b.", "2a.", "2b.", "4a.", "8.")} == {"not held"}

    found = verdicts(made_up(like_the_paper, {}, seeds=1))
    assert {verdict for name, verdict in found.items() if name not in ("6b.", "6c.")} == {"undecided"}

    assert verdicts(made_up({}, {"decaying (1, 1)": 0.9}))["9a."] == "held"
    assert verdicts(made_up({}, {"decaying (1, 1)": 0.75}))["9b."] == "not held"

    groups = made_up({}, {})
    del groups["dapo"], groups["gppo"]  # claims on these are left out
    assert set(verdicts(groups)) == {"1a.", "1b.", "2a.", "2b.", "5.", "6a.", "6b.", "6c.", "8.", "9b."}
    groups["grpo"][0]["series"]["velocity/pa_hp"] = [0.01] * 50  # 1 of 9 * 5 runs
    assert verdicts(groups)["6b."] == "not held"


def test_a_difference_inside_the_margin_does_not_count():
    """5 % of 0.3 nats. The verdict of a claim of several parts is that of its worst part."""
    same = dict.fromkeys(SETTINGS, 0.1)
    found = verdicts(made_up(same | {"ce_gppo (0.5, 1)": 0.105}, {}))
    assert {found[name] for name in ("1b.", "2a.", "2b.", "7a.", "7b.", "8.")} == {"no difference"}
    wide, held, not_held, none = {0: 0.03, 1: -0.03, 2: 0.0}, {0: 0.02, 1: 0.021}, {0: -0.02, 1: -0.021}, {0: 0, 1: 0}
    assert claims.verdict([wide], 0.015) == claims.verdict([wide], 0.07) == "undecided"
    assert claims.verdict([wide], 0.08) == "no difference"  # 0.03 * 4.303 / sqrt(3) = 0.0745
    assert claims.verdict([held], 0.015) == claims.verdict([held, held]) == "held"  # [0.0141, 0.0269]: not inside
    assert claims.verdict([not_held], 0.015) == "not held" and claims.verdict([not_held], 0.015, -0.05) == "held"
    assert claims.verdict([held, none], 0.015) == "no difference"
    assert claims.verdict([wide, none], 0.015) == claims.verdict([held, wide], 0.015) == "undecided"
    assert claims.verdict([not_held, wide, held], 0.015) == "not held"
    assert claims.verdict([{0: np.nan, 1: np.nan}], 0.015) == claims.verdict([{}]) == "undecided"


def test_with_a_coin_s_rewards_a_run_that_leaves_the_band_is_seen():
    """All runs of gppo must leave it, and none of grpo, at which step is told; no claim on accuracy is made."""
    groups = made_up(dict.fromkeys(SETTINGS, 0.3) | {"gppo": 0.1}, {}, seeds=2)
    for row in (row for group in groups.values() for row in group):
        row["arguments"] = "--rewards results/coin.py:score"
    (first, *numbers), *others = claims.claims(groups)
    told = "first step with entropy outside (0.75, 1.25) of the first step's, gppo: 20, 21; grpo: never, never"
    assert first.startswith("10a. ") and numbers == ["held", told]
    assert [name.split()[0] for name, *_ in others] == ["10c.", "10d.", "10e."]
    groups["grpo"][1]["series"]["entropy/mean"][30] = 0.4
    assert claims.claims(groups)[0][1] == "not held"
    tosses = [coin.score(str(i), "17 30") for i in range(400)]
    assert 150 < sum(tosses) < 250 and set(tosses) == {0.0, 1.0}


@pytest.mark.parametrize(
    "metric, values",
    [("entropy/mean", [0.3] * 49 + [0.02]), ("entropy/mean", [0.3] * 49 + [0.4]), ("eval/walk/avg_at_k", [0.8, 0.74])],
)
def test_a_run_that_collapses_explodes_or_unlearns_is_not_steady(metric, values):
    groups = made_up({}, {}, noise=0)
    assert verdicts(groups)["6c."] == "held"
    groups["ce_gppo (0.5, 1)"][2]["series"][metric] = values  # one run of one seed
    assert verdicts(groups)["6c."] == "not held"


def test_curves_show_each_seed_and_the_mean():
    groups = made_up({"dapo": 0.2}, {}, seeds=3, noise=0.02)
    assert set(settings.SETTINGS) == {name for names in draw.ROWS.values() for name in names}
    pairs = np.reshape(draw.curves(groups).axes, (-1, 2))
    for (title, members), (entropy, accuracy) in zip(draw.ROWS.items(), pairs, strict=True):
        names = [name for name in members if name in SETTINGS]
        for axis, metric in (entropy, "entropy/mean"), (accuracy, "eval/walk/avg_at_k"):
            assert title in axis.get_title() and axis.get_xlabel() == "step" and axis.get_ylabel()
            thick = [line for line in axis.lines if line.get_linewidth() >= 2]
            assert len(thick) == len(names) and len(axis.lines) == len(names) * (1 + 3)
            assert len({to_hex(line.get_color()) for line in thick}) == len(names)
            for name, line in zip(names, thick, strict=True):
                runs = np.array([row["series"][metric] for row in groups[name]])
                assert line.get_ydata() == pytest.approx(runs.mean(0))
                assert list(line.get_xdata()) == ([0, 50] if axis is accuracy else list(range(1, 51)))
                thin = [o.get_ydata() for o in axis.lines if o is not line and o.get_color() == line.get_color()]
                assert np.array(thin) == pytest.approx(runs)
        assert entropy.get_ylim()[0] == 0
        labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
        assert labels == [f"{name}, 3 seeds" for name in names]
        ours, others = ([x.get_color() for x in axis.lines if x.get_linewidth() >= 2] for axis in (entropy, accuracy))
        assert ours == others  # one legend for both
    left, right = draw.coin_and_hot(groups, groups).axes
    assert len(left.lines) == len(right.lines) == 4 * len(draw.FIVE) and "coin" in left.get_title()
    part = {name: groups[name] for name in ("grpo", "ce_gppo (0, 1)")}
    for names, title in ((list(part)[:1], "objectives"), (list(part), "betas")):
        left, _ = draw.curves({name: part[name] for name in names}).axes  # no empty panels
        assert title in left.get_title() and len(left.lines) == 4 * len(names)
    draw.plt.close("all")


def test_the_page_and_figures_of_a_sweep(tmp_path, capsys):
    rows = [row for group in made_up({}, {}, seeds=2).values() for row in group]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    claims.main(claims.Config(results, branches=ROOT / "results" / "walk-branches.jsonl"))
    assert "| grpo | 2 |" in results.with_suffix(".md").read_text()
    assert "0.015 nats of entropy, 0.02 of accuracy. 30 runs; whole, they took 0.5 hours" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"results.png", "results-summary.png"}
    assert draw.plt.imread(results.with_suffix(".png")).shape[1] == 1650  # 11 inches
