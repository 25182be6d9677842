"""A sweep runs, resumes and keeps the right series. Verdicts and figures of runs with known values."""

import itertools
import json
import shutil
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
from helpers import Forked, rows_of
from results import claims, draw, settings, sweep
from results.series import Runs, interval
from tools.figures import QUADRANTS, plt

pytestmark = pytest.mark.slow
SETTINGS = settings.SWEEPS["walk"].settings

ROOT = Path(__file__).parents[1]


def script(name, *arguments):
    """(exit code, output) of a script of results/."""
    process = Forked(f"results.{name}", *arguments)
    output = process.communicate()[0]
    return process.returncode, output


def forked(command: list[str], *, stdout, **_) -> Forked | subprocess.Popen:
    """In the place of Popen: a run of the sweep in a fork, which saves the imports."""
    return Forked(*command[1:], output=stdout.name) if len(command) > 1 else subprocess.Popen(command)


def test_a_sweep_keeps_finished_runs_and_does_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep, "subprocess", types.SimpleNamespace(Popen=forked))
    small = {"train_data": rows_of("train", 256), "eval_data": rows_of("eval", 16), "prompts_per_step": 24}
    common = settings.SWEEPS["arithmetic"].common | small | {"max_kept_prompts": 24}
    monkeypatch.setitem(settings.SWEEPS, "arithmetic", replace(settings.SWEEPS["arithmetic"], common=common))
    results = tmp_path / "results.jsonl"
    names = ("grpo", "ce_gppo (1, 0.5)")
    options = {"results": str(results), "seeds": 1, "steps": 2, "settings": names, "out": tmp_path / "out", "lanes": 1}
    config = sweep.Config(sweep="arithmetic", first_seed=3, **options)
    sweep.main(config)
    rows = {row["setting"]: row for row in sweep.read(results)}
    assert sorted(rows) == ["ce_gppo (1, 0.5)", "grpo"]
    first = {name: row["series"]["entropy/mean"][0] for name, row in rows.items()}
    assert first["grpo"] == first["ce_gppo (1, 0.5)"]  # the same base, the same first rollout
    metrics = (tmp_path / "out" / "arithmetic" / "grpo-2-3" / "metrics.jsonl").read_text().splitlines()
    for name, values in rows["grpo"]["series"].items():
        there = [row for row in map(json.loads, metrics) if (name in row if name.startswith("eval/") else row["step"])]
        expected = [row.get(name) for row in there]  # None for a step without it
        assert [value is None for value in values] == [value is None for value in expected], name
        pairs = [pair for pair in zip(values, expected, strict=True) if None not in pair]
        assert all(value == pytest.approx(other, rel=1e-4) for value, other in pairs), name
    assert rows["grpo"]["eval_steps"] == [0, 2]
    times = [row.get(f"time/{part}", 0) for row in map(json.loads, metrics) for part in ("step", "eval")]
    assert rows["grpo"]["minutes"] == pytest.approx(sum(times) / 60, abs=0.01)
    # A misspelled series would be None everywhere. Few tokens are clipped in two steps, and grpo has no betas.
    always = set(sweep.series_of("arithmetic")) - {"clip/prob_low", "clip/prob_high", "optim/beta1", "optim/beta2"}
    assert all(value is not None for name in always for value in rows["grpo"]["series"][name])
    assert rows["ce_gppo (1, 0.5)"]["series"]["optim/beta1"] == [1.0, 1.0]
    assert "--objective grpo" in rows["grpo"]["arguments"] and "--seed 3" in rows["grpo"]["arguments"]
    assert "--beta1 1.0 --beta2 0.5" in rows["ce_gppo (1, 0.5)"]["arguments"]

    results.write_text(json.dumps(rows["ce_gppo (1, 0.5)"]) + "\n")  # as if killed before the other line was written
    capsys.readouterr()
    sweep.main(config)
    assert "1 of 2 runs are there" in capsys.readouterr().out
    assert {row["setting"]: row for row in sweep.read(results)} == rows

    code, output = script("claims", results)
    assert code == 0, output
    assert "| grpo | 1 |" in results.with_suffix(".md").read_text()
    assert plt.imread(results.with_suffix(".png")).shape[1] == 1650  # 11 inches
    assert (tmp_path / "results-velocity.svg").exists()


def test_results_of_other_arguments_are_not_mixed(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"setting": "grpo", "seed": 0, "arguments": "--lr 1"}) + "\n")
    code, output = script("sweep", "--results", results, "--settings", "grpo")
    assert code == 2 and "other arguments" in output
    code, output = script("sweep", "--settings", "grppo")
    assert code == 2 and "'grppo' is unknown" in output
    code, output = script("sweep", "--results", tmp_path / "results.jsonl" / "nested", "--settings", "grpo")
    assert code == 2 and "cannot be written" in output, "found before anything is trained"
    results.write_text(results.read_text() + '{"setting": "grpo", "se')
    for name, *options in (("sweep", "--results", results), ("claims", results)):
        code, output = script(name, *options)
        assert code == 2 and f"{results}:2: not a run" in output


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


def test_runs_of_a_killed_sweep_save_and_end_and_two_sweeps_do_not_mix(tmp_path):
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
    killed.kill()
    wait_for(lambda: "saved" in log.read_text())
    with (tmp_path / "results.jsonl").open("a") as file:
        wait_for(lambda: sweep.lock_file(file))


def test_a_finished_run_of_other_arguments_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "checkpoint-000002").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"command": ["train.py", "--lr", "1.0", "--out", "x"]}))
    for arguments, same in (("--lr 1.0", True), ("--lr 0.5", False)):
        run = types.SimpleNamespace(folder=tmp_path, arguments=arguments)
        assert sweep.Run.finished(run, 2) == same and not sweep.Run.finished(run, 3)


def test_train_py_accepts_every_setting():
    for one, (name, options) in itertools.product(settings.SWEEPS.values(), settings.SETTINGS.items()):
        config, recipe, resume = parse(train.Config, sweep.arguments(one, name, 3, 50).split())
        assert (config.seed, config.steps, recipe, resume) == (3, 50, one.common.get("recipe", ""), "")
        for key, value in (one.common | options).items():
            assert key == "recipe" or getattr(config, key) == value
        assert set(one.settings) <= set(settings.SETTINGS)


def test_series_are_those_of_the_list_of_metrics():
    kept = sweep.series_of("arithmetic")
    assert len(set(kept)) == len(kept) and not [name for name in kept if "<" in name]
    rows = sweep.read(ROOT / "results" / "arithmetic.jsonl")  # made before some of the series were kept
    assert set(rows[0]["series"]) < set(kept)


def test_the_kept_runs_still_give_the_published_verdicts(tmp_path):
    shutil.copy(ROOT / "results" / "arithmetic.jsonl", tmp_path)
    for options, stem in ((), "arithmetic"), (("--steps", "40"), "arithmetic-40"):
        code, output = script("claims", tmp_path / "arithmetic.jsonl", *options)
        assert code == 0, output
        cells = [
            [line.split("|")[1:3] for line in (folder / f"{stem}.md").read_text().splitlines() if line.startswith("|")]
            for folder in (tmp_path, ROOT / "results")
        ]
        assert cells[0] == cells[1] and len(cells[0]) == 2 + 12 + 2 + 13


def test_interval_is_student_s():
    mean, low, high = interval({0: 1.0, 1: 2.0, 2: 3.0})
    assert (mean, low, high) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert interval({0: 1.0})[1:] == (-np.inf, np.inf)
    for seeds, quantile in (2, 12.706), (11, 2.228), (31, 2.042):  # from a printed table
        values = np.arange(seeds) / np.std(range(seeds), ddof=1) * np.sqrt(seeds)
        mean, low, high = interval(dict(enumerate(values)))
        assert (mean - low, high - mean) == pytest.approx((quantile, quantile), abs=1e-3)


def made_up(entropy, accuracy, seeds=5, noise=0.002):
    """A sweep whose entropy falls from 0.3 to the given values, by setting."""
    rows = []
    for name in SETTINGS:
        for seed in range(seeds):
            random = np.random.default_rng([seed, SETTINGS.index(name)])
            course = np.linspace(0.3, entropy.get(name, 0.1), 50) + noise * random.standard_normal(50)
            series = {key: [0.01] * 50 for key in sweep.series_of("walk")}
            series |= {f"velocity/{quadrant}": [0.01 * sign] * 50 for quadrant, sign in claims.SIGNS.items()}
            series |= {"entropy/mean": course.tolist(), "clip/prob_low": [None, *[0.2] * 49]}
            series["eval/walk/avg_at_k"] = [0.3, accuracy.get(name, 0.8) + noise * random.standard_normal()]
            series["eval/walk/pass_at_k"], series["eval/walk/distinct_at_k"] = [0.9, 0.9], [2.0, 4.0]
            row = {"setting": name, "seed": seed, "arguments": "", "minutes": 1.0, "eval_steps": [0, 50]}
            rows.append(row | {"source": "walk", "series": series})
    return Runs(rows)


def test_part_of_a_sweep(tmp_path):
    """The first steps of all runs, as if they had ended there; and only the runs that end their responses."""
    rows = list(made_up({}, {}, seeds=2).rows.values())
    for row in rows:
        row["eval_steps"], entropy = [0, 20, 50], row["series"]["entropy/mean"]
        for name in ("eval/walk/avg_at_k", "eval/walk/pass_at_k", "eval/walk/distinct_at_k"):
            row["series"][name].insert(1, 0.5)
        row["series"]["response/truncated"] = [0.0] * 25 + [0.9 * row["seed"]] * 25
        part = claims.begin(row, 20)
        assert part["series"]["entropy/mean"] == entropy[:20] and part["series"]["eval/walk/avg_at_k"][-1] == 0.5
        assert draw.rows_of(part) == [r for r in draw.rows_of(row) if r["step"] <= 20]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options, stem, runs in (("--steps", "20"), "-20", 2), (("--without-idle",), "-without-idle", 1):
        code, output = script("claims", results, *options)
        assert code == 0, output
        assert f"| grpo | {runs} |" in (tmp_path / f"results{stem}.md").read_text()
    for steps, why in (("0", "steps = 0: must be at least 1"), ("21", "not evaluated there, only at [20, 50]")):
        code, output = script("claims", results, "--steps", steps)
        assert code == 2 and why in output
    results.write_text(json.dumps(rows[1]) + "\n")  # seed 1, whose responses no longer end
    code, output = script("claims", results, "--without-idle")
    assert code == 2 and "no such runs there" in output


def verdicts(runs):
    return {name.split()[0]: verdict for name, verdict, _ in claims.claims(runs)}


def test_verdicts_follow_the_runs():
    like_the_paper = {"grpo": 0.05, "ce_gppo (0, 1)": 0.3, "ce_gppo (0.5, 1)": 0.25, "ce_gppo (0.75, 1)": 0.2}
    like_the_paper |= {"ce_gppo (1, 0.5)": 0.1, "dapo": 0.2, "grpo, bonus 0.003": 0.4, "lp_only (1, 1)": 0.2}
    found = verdicts(made_up(like_the_paper, {"lp_only (1, 1)": 0.9}))
    held = {"1a.", "1b.", "2a.", "2b.", "3a.", "4a.", "5.", "6a.", "6b.", "6c.", "7a.", "7b.", "8."}
    assert {name for name, verdict in found.items() if verdict == "held"} == held
    assert {name for name in found if found[name] == "no difference"} == {"3b.", "4b.", "4c."}

    other_way = {"grpo": 0.25, "ce_gppo (0, 1)": 0.1, "ce_gppo (1, 0.5)": 0.3}
    found = verdicts(made_up(other_way, {"ce_gppo (0.75, 1)": 0.7}))
    assert {found[name] for name in ("1a.", "1b.", "2a.", "2b.", "4a.", "8.")} == {"not held"}

    found = verdicts(made_up(like_the_paper, {}, seeds=1))
    assert {verdict for name, verdict in found.items() if name not in ("6b.", "6c.")} == {"undecided"}


def test_a_difference_inside_the_margin_does_not_count():
    """5 % of 0.3 nats. The verdict of a claim of several parts is that of its worst part."""
    same = dict.fromkeys(SETTINGS, 0.1)
    found = verdicts(made_up(same | {"ce_gppo (0.5, 1)": 0.105}, {}))
    assert {found[name] for name in ("1b.", "2a.", "2b.", "7a.", "7b.", "8.")} == {"no difference"}
    wide = {0: 0.03, 1: -0.03, 2: 0.0}
    assert claims.compare(wide, 0, 0.015) == claims.compare(wide, 0, 0.07) == "undecided"
    assert claims.compare(wide, 0, 0.08) == "no difference"  # 0.03 * 4.303 / sqrt(3) = 0.0745
    assert claims.compare({0: 0.02, 1: 0.021}, 0, 0.015) == "held"  # [0.0141, 0.0269]: not inside
    assert claims.compare({0: -0.02, 1: -0.021}, 0, 0.015) == "not held"
    assert claims.decide("held", "no difference") == "no difference" and claims.decide("held", "held") == "held"
    assert claims.decide("undecided", "no difference") == "undecided"
    assert claims.decide("not held", "undecided", "held") == "not held"


@pytest.mark.parametrize("name", ["collapses", "explodes", "unlearns"])
def test_a_run_that_collapses_explodes_or_unlearns_is_not_steady(name):
    made = made_up({}, {}, noise=0)
    assert verdicts(made)["6c."] == "held"
    series = made.rows["ce_gppo (0.5, 1)", 2]["series"]  # one run of one seed
    if name == "unlearns":
        series["eval/walk/avg_at_k"] = [0.3, 0.8, 0.74]
    else:
        series["entropy/mean"] = series["entropy/mean"][:-1] + [{"collapses": 0.02, "explodes": 0.4}[name]]
    assert verdicts(made)["6c."] == "not held"


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def groups_of(runs):
    """{setting: its runs}, as `claims.main` draws them."""
    return {name: [row for (n, _), row in runs.rows.items() if n == name] for name in runs.settings}


def test_settings_of_a_sweep_have_different_colours():
    assert set(settings.SETTINGS) == {name for names in draw.ROWS.values() for name in names}
    for names in (one.settings for one in settings.SWEEPS.values()):
        assert set(names) <= set(draw.COLORS)
        assert len({to_hex(draw.COLORS[name]) for name in names}) == len(names)


def test_curves_show_each_seed_and_the_mean():
    made = made_up({"dapo": 0.2}, {}, seeds=3, noise=0.02)
    figure = draw.curves(groups_of(made), "walk")
    panels = np.reshape(figure.axes, (-1, 2))
    rows = list(draw.ROWS.items())[:3]
    for (title, members), (entropy, accuracy) in zip(rows, panels, strict=True):
        names = [name for name in members if name in SETTINGS]
        for axis, metric in (entropy, "entropy/mean"), (accuracy, "eval/walk/avg_at_k"):
            assert title in axis.get_title() and axis.get_xlabel() == "step" and axis.get_ylabel()
            thick = [line for line in axis.lines if line.get_linewidth() >= 2]
            assert len(thick) == len(names) and len(axis.lines) == len(names) * (1 + 3)
            assert len({to_hex(line.get_color()) for line in thick}) == len(names)
            for name, line in zip(names, thick, strict=True):
                runs = [row["series"][metric] for (other, _), row in made.rows.items() if other == name]
                assert line.get_ydata() == pytest.approx(np.mean(runs, axis=0))
                thin = [o for o in axis.lines if o is not line and to_hex(o.get_color()) == to_hex(line.get_color())]
                assert sorted(o.get_ydata()[-1] for o in thin) == pytest.approx(sorted(run[-1] for run in runs))
                assert all(o.get_linewidth() < 1 for o in thin)
        assert entropy.get_ylim()[0] == 0
        legend = accuracy.get_legend()
        keys = {text.get_text(): key for text, key in zip(legend.get_texts(), legend.legend_handles, strict=True)}
        assert {name: to_hex(key.get_color()) for name, key in keys.items()} == {
            name: to_hex(draw.COLORS[name]) for name in names
        }
    plt.close(figure)


@pytest.mark.parametrize("names, titles", [(("grpo",), ["objectives"]), (("grpo", "ce_gppo (0, 1)"), ["betas"])])
def test_curves_of_part_of_a_sweep_have_no_empty_panels(names, titles):
    made = made_up({}, {}, seeds=1)
    figure = draw.curves({name: runs for name, runs in groups_of(made).items() if name in names}, "walk")
    assert len(figure.axes) == 2 * len(titles)
    for axis, title in zip(figure.axes[::2], titles, strict=True):
        assert title in axis.get_title() and len(axis.lines) == len(names)
    plt.close(figure)


@pytest.mark.parametrize(
    "runs, title", [((3, 3), "mean of 3 seeds"), ((3, 2), "mean of 2 to 3 seeds"), ((1, 1), "one seed")]
)
def test_the_number_of_seeds_stands_above_the_panels(runs, title):
    made = groups_of(made_up({}, {}, seeds=3))
    figure = draw.curves({name: made[name][:some] for name, some in zip(("grpo", "dapo"), runs, strict=True)}, "walk")
    assert title in figure.get_suptitle()
    plt.close(figure)
    made["dapo"] = made["dapo"][:1]  # not one of the settings that the summary shows
    figure = draw.summary(made, "walk", [])
    assert "mean of 3 seeds" in figure.get_suptitle()
    plt.close(figure)


def test_settings_outside_the_sweeps_are_compared_in_the_same_table_and_figure():
    names = ("grpo", *(name for name in settings.SETTINGS if name not in draw.COLORS))
    rows = [row for row in sweep.read(ROOT / "results" / "arithmetic.jsonl") if row["setting"] == "grpo"]
    made = Runs([row | {"setting": name} for row in rows for name in names])
    lines = claims.table(made).splitlines()
    assert [line.split(" |")[0] for line in lines[2:]] == [f"| {name}" for name in names]
    entropy, accuracy = draw.curves(groups_of(made), made.source).axes
    assert "others" in entropy.get_title()
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == list(names)


def test_velocities_have_a_panel_for_each_setting():
    made = made_up({}, {}, seeds=2)
    for row in made.rows.values():
        row["series"]["velocity/pa_lp"] = [0.03 + 0.01 * row["seed"]] * 50
        row["series"]["velocity/total"] = [0.002 * made.settings.index(row["setting"])] * 50
    figure = draw.velocities(groups_of(made))
    assert [axis.get_title() for axis in figure.axes] == made.settings
    assert figure.get_supxlabel() == "step" and "nats per token" in figure.get_supylabel()
    for i, axis in enumerate(figure.axes):
        total = axis.lines[0]
        assert total.get_ydata() == pytest.approx([0.002 * i] * 50)
        tops = [patch.get_paths()[0].vertices[:, 1] for patch in axis.collections]
        assert (min(map(min, tops)), max(map(max, tops))) == pytest.approx((-0.02, 0.045))  # two quadrants either way
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*QUADRANTS.values(), "total"]
    plt.close(figure)
