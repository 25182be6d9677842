"""Metrics of a rollout, against loops; the files of a run; W&B; the figures."""

import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
import wandb
import yaml

import train
from ce_gppo import config, metrics, report, statistics, tracking
from ce_gppo.messages import UserError
from ce_gppo.types import Problem, Response
from helpers import ROOT, resolved
from reward import extract_answer
from tools import figures


def groups_of(P: int = 6, G: int = 4, seed: int = 0) -> tuple[list[list[Response]], torch.Tensor]:
    """Random groups as they are after `compute_old_logprobs`, and rewards [P, G]; one group solved, one not at all."""
    g = torch.Generator().manual_seed(seed)
    rewards = (torch.rand(P, G, generator=g) < 0.5).float()
    rewards[0], rewards[1] = 1.0, 0.0
    groups = []
    for p in range(P):
        group = []
        for i in range(G):
            R = int(torch.randint(1, 9, (1,), generator=g))
            r = Response([1, 2], list(range(R)), -torch.rand(R, generator=g), R == 8, f"\\boxed{{{p}}}")
            r.old_logprobs = (r.rollout_logprobs + 0.1 * torch.randn(R, generator=g)).clamp(max=0)
            r.entropy = torch.rand(R, generator=g)
            r.reward = r.verdict = rewards[p, i].item()
            r.advantages = (rewards[p, i] - rewards[p].mean()).repeat(R)
            group.append(r)
        groups.append(group)
    return groups, rewards


def test_rollout_metrics_against_loops():
    groups, rewards = groups_of()
    responses = [r for group in groups for r in group]
    cuts = [(0, 1), (1, 4), (4, 6)]  # three ranks with different shares
    parts = [[r for group in groups[2:] for r in group], [r for group in groups[:2] for r in group]]
    own = [[groups[max(a, 2) : b], groups[a : min(b, 2)]] for a, b in cuts]
    measured = [[statistics.own_values([r for group in part for r in group]) for part in rank] for rank in own]
    found = statistics.rollout_metrics(groups, parts, measured, previous_entropy=0.25)
    entropy = np.concatenate([r.entropy.numpy() for r in responses]).astype(np.float64)
    gap = np.concatenate([(r.old_logprobs - r.rollout_logprobs).numpy() for r in responses]).astype(np.float64)
    expected = {
        "entropy/mean": entropy.mean(),
        "entropy/delta": entropy.mean() - 0.25,
        "entropy/p10": np.quantile(entropy, 0.1, method="inverted_cdf"),
        "entropy/p90": np.quantile(entropy, 0.9, method="inverted_cdf"),
        "mismatch/kl": np.mean([math.exp(x) - 1 - x for x in gap]),
        "mismatch/ratio_max": np.exp(np.abs(gap).max()),
        "mismatch/ratio_p99": np.exp(np.quantile(np.abs(gap), 0.99, method="inverted_cdf")),
        "reward/mean": rewards.mean(),
        "reward/group_solved_all": np.mean([row.min() == 1 for row in rewards.numpy()]),
        "reward/group_solved_none": np.mean([row.max() == 0 for row in rewards.numpy()]),
        "reward/pass_at_g": np.mean([row.max() == 1 for row in rewards.numpy()]),
        "response/truncated": np.mean([r.truncated for r in responses]),
        "response/length_mean": np.mean([len(r.response_ids) for r in responses]),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name


def test_a_sample_of_the_other_responses_counts_for_all_of_them():
    """entropy/mean and quantiles, against a list with each measured value once for every token that it represents."""
    groups, _ = groups_of()
    parts = [[r for group in groups[2:] for r in group], [r for group in groups[:2] for r in group]]
    for i, r in enumerate(parts[1]):
        r.entropy = r.entropy * 2 if i % 4 == 0 else None
    found = statistics.rollout_metrics(groups, parts, [[statistics.own_values(part) for part in parts]], None)
    trained = torch.cat([r.entropy for r in parts[0]])
    sample = torch.cat([r.entropy for r in parts[1][::4]])
    tokens = sum(len(r.response_ids) for r in parts[1])
    repeated = np.concatenate([trained.repeat(len(sample)).numpy(), sample.repeat(tokens).numpy()]).astype(np.float64)
    assert len(sample) < tokens and found["entropy/mean"] == pytest.approx(repeated.mean(), rel=1e-5)
    for q in (0.1, 0.9):
        expected = np.quantile(repeated, q, method="inverted_cdf")
        assert found[f"entropy/p{round(100 * q)}"] == pytest.approx(expected, rel=1e-5)


def test_histograms_hold_every_trained_token_once():
    groups, _ = groups_of()
    kept = [r for group in groups[2:] for r in group]
    histograms = report.probability_histograms(kept)
    tokens = sum((r.advantages != 0).sum() for r in kept)
    assert sum(len(values) for values in histograms.values()) == tokens
    assert all(((values > 0) & (values <= 1)).all() for values in histograms.values())
    assert report.probability_histograms([]) == {}


def test_sample_rows_have_the_extracted_answers():
    groups, _ = groups_of()
    problems = [Problem(f"prompt {p}", [1, 2], str(p), "test") for p in range(6)]
    rows = report.sample_rows(groups, problems, extract_answer)
    assert [row["extracted"] for row in rows] == ["0", "1", "2", "3"] == [row["answer"] for row in rows]
    assert json.loads(json.dumps(rows)) == rows


def test_samples_have_the_parts_of_their_rewards(tmp_path, monkeypatch):
    """In samples.jsonl at each step. At evaluations W&B's table has a column for each part of any source."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    groups, _ = groups_of()
    given = [{"correctness": 1.0, "format": 0.1}, {"correctness": 0.0}, {"correctness": 0.0, "short": 0.2}, {}]
    for group, parts in zip(groups, given, strict=False):
        group[0].parts = parts
    problems = [Problem(f"prompt {p}", [1, 2], str(p), "test") for p in range(6)]
    log, logged = report.Report(tmp_path, resolved(steps=5, eval_every=2), 0, "id"), {}
    log.wandb = types.SimpleNamespace(log=lambda values, step: logged.update({step: values}))
    for step in range(1, 6):
        log.log_step(step, {"entropy/mean": 0.5}, groups, [], problems, extract_answer)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    expected = [{f"reward/{name}": value for name, value in parts.items()} for parts in given]
    assert [{name: row[name] for name in row if name.startswith("reward/")} for row in rows] == 5 * expected
    assert [step for step in logged if "samples" in logged[step]] == [2, 4, 5]
    table = logged[2]["samples"]
    column = {name: [row[i] for row in table.data] for i, name in enumerate(table.columns)}
    assert column["reward/correctness"] == [1.0, 0.0, 0.0, None] and column["reward/format"] == [0.1, None, None, None]
    assert column["reward/short"] == [None, None, 0.2, None] and len(column["prompt"]) == 4


def test_a_resumed_report_drops_the_steps_that_will_be_done_again(tmp_path):
    rows = [{"step": step, "entropy/mean": 1.0 / (step + 1)} for step in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "entr'  # as after a full disk
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "samples.jsonl").write_text(text)
    (tmp_path / "tokens.jsonl").write_text(text)
    again = report.Report(tmp_path, resolved(steps=10), 3, "x")
    again.log(4, {"entropy/mean": 0.5})
    again.close([])
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 1, 2, 3]
    assert (tmp_path / "tokens.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text()
    assert [row["step"] for row in kept] == [0, 1, 2, 3, 4] and kept[4]["entropy/mean"] == 0.5


def test_without_a_key_nothing_asks_for_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    assert not tracking._has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking._has_wandb_key()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.start_wandb(tmp_path, None, "x") is None


def test_without_a_network_it_logs_offline_into_the_same_run(monkeypatch, tmp_path, capsys):
    calls = []

    def init(**options):
        calls.append(options)
        if options["mode"] != "offline":
            raise wandb.errors.CommError("no route to host")
        return types.SimpleNamespace(define_metric=lambda *a, **k: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    tracking.start_wandb(tmp_path, resolved(), "abc")
    assert [(call["mode"], call["id"]) for call in calls] == [("online", "abc"), ("offline", "abc")]
    assert "no route to host" in capsys.readouterr().err


class BrokenWandb:
    def log(self, *args, **kwargs):
        raise ConnectionError("the network is gone")


def test_errors_of_reporting_do_not_end_the_run(tmp_path, capsys, monkeypatch):
    """W&B that breaks, and a disk that is full for a while: metrics.jsonl ends up whole."""
    log = report.Report(tmp_path, types.SimpleNamespace(steps=10), 0, "x")
    log.wandb = BrokenWandb()
    log.log(0, {"entropy/mean": 0.5}, [], {})
    assert log.wandb is None and "the network is gone" in capsys.readouterr().err

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    log.file = Full()
    log.log(1, {"entropy/mean": 0.4}, [], {})
    assert "No space left on device" in capsys.readouterr().err
    log.log(2, {"entropy/mean": 0.3}, [], {})
    log.log(3, {"entropy/mean": 0.2}, [], {})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def write_run(folder, seed: int, **settings):
    """A run's folder with the metrics that the figures need."""
    folder.mkdir()
    config = {"objective": "ce_gppo", "beta1": 0.75, "beta2": 1.0, "seed": seed, "run_name": folder.name} | settings
    (folder / "config.json").write_text(json.dumps({"config": config}))
    rng = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(11):
            row = {"step": step}
            if step:
                names = ["entropy/mean", "clip/low", "clip/high", "velocity/total"]
                names += [f"velocity/{q}" for q in figures.QUADRANTS]
                row |= {name: float(rng.random()) for name in names}
            if step % 5 == 0:
                row["eval/test/avg_at_k"] = float(rng.random())
            file.write(json.dumps(row) + "\n")


def test_figures_group_runs_by_all_settings_except_the_seed(tmp_path):
    variants = {"a": {}, "b": {}, "lr": {"lr": 1e-3}, "grpo": {"objective": "grpo", "beta1": None, "beta2": None}}
    for seed, (name, settings) in enumerate(variants.items()):
        write_run(tmp_path / name, seed, **settings)
    groups = figures.group_runs([figures.load(tmp_path / name) for name in variants])
    assert {label: len(runs) for label, runs in groups.items()} == {
        "ce_gppo (0.75, 1)": 2,
        "ce_gppo (0.75, 1), lr 0.001": 1,
        "grpo": 1,
    }
    entropy, accuracy, clipped, *velocities = figures.figure(groups).axes
    thick = [line for line in entropy.lines if line.get_linewidth() == 2]
    assert len({line.get_color() for line in thick}) == len(thick) == 3 and len(entropy.lines) == 3 + 2
    runs = groups["ce_gppo (0.75, 1)"]
    expected = [np.mean([rows[step]["entropy/mean"] for rows in runs]) for step in range(1, 11)]
    np.testing.assert_allclose(thick[0].get_ydata(), expected)
    assert all(axis.get_title() and axis.get_xlabel() == "step" for axis in (entropy, accuracy, clipped, *velocities))
    assert entropy.get_ylim()[0] == accuracy.get_ylim()[0] == 0
    figures.main(figures.Config(tuple(tmp_path / name for name in variants), out=tmp_path / "figures"))
    assert (tmp_path / "figures" / "curves.svg").exists()


def test_a_quadrant_of_zero_keeps_its_place_in_the_stack():
    """PA&LP raises entropy in the first and third step, and is exactly 0 in the second."""
    up = {"pa_lp": [1.0, 0.0, 1.0], "na_hp": [2.0, 2.0, 2.0], "pa_hp": [-1.0, -1.0, -1.0], "na_lp": [-1.0, -1.0, -1.0]}
    rows = [
        {"step": i, "velocity/total": 0.0} | {f"velocity/{q}": values[i] for q, values in up.items()} for i in range(3)
    ]
    axis = figures.plt.figure().subplots()
    figures.draw_velocity(axis, [rows])
    extents = [collection.get_datalim(axis.transData) for collection in axis.collections]
    above, below = extents[:4], extents[4:]
    assert [(e.y0, e.y1) for e in above[:2]] == [(0, 1), (0, 3)] and [e.y0 for e in below[2:]] == [-1, -2]
    assert all(e.y0 == e.y1 == 0 for e in below[:2]), "positive velocities have no height below the axis"


def test_figures_name_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"not the folder of a run.*config\.json"):
        figures.main(figures.Config((tmp_path,)))


@pytest.mark.parametrize(
    "config, metrics, message",
    [
        ("[]", '{"step": 1, "entropy/mean": 0.1}', "not the folder of a run"),
        ('{"config": {}}', '{"step": 1, "entropy/mean": 0.1}', "not the folder of a run"),
        ('{"config": {"objective": "x", "beta1": "x"}}', '{"step": 1, "entropy/mean": 0.1}', "not the folder of a run"),
        ('{"config": {"objective": "x"}}', "", "no step of training yet"),
        ('{"config": {"objective": "x"}}', '{"step": 0, "eval/a/avg_at_k": 0.1}\n', "no step of training yet"),
        ('{"config": {"objective": "x"}}', '[1]\n{"step": "a", "entropy/mean": "x"}\n', "no step of training yet"),
    ],
)
def test_figures_of_what_is_no_run_or_has_no_step_are_refused(tmp_path, config, metrics, message):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(UserError, match=message):
        figures.main(figures.Config((tmp_path,), out=tmp_path))


def test_figures_of_a_run_that_goes_on_or_is_named_twice(tmp_path):
    """A half-written line, a quadrant without tokens in a step, and settings with a formula in them."""
    write_run(tmp_path / "a", 0, prompt_suffix="in $\\boxed{}$ and $x_{$")
    write_run(tmp_path / "b", 1, prompt_suffix="")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    del rows[3]["velocity/pa_lp"]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "ent')
    names = ("a", "b", "../" + tmp_path.name + "/a")
    figures.main(figures.Config(tuple(tmp_path / name for name in names), out=tmp_path))
    assert "2 seeds" not in (tmp_path / "curves.svg").read_text()


def test_metrics_are_always_json(tmp_path, monkeypatch):
    """Values that are not finite are left out: NaN is no JSON."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = report.Report(tmp_path, resolved(), 0, "id")
    log.log(1, {"optim/loss": math.nan, "optim/grad_norm": math.inf, "optim/skipped": 8, "entropy/mean": 0.5})

    def refuse(name):
        raise AssertionError(name)

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "optim/skipped": 8, "entropy/mean": 0.5}]


def test_wandb_names_and_keys(tmp_path, monkeypatch, capsys):
    """WANDB_PROJECT, an empty WANDB_MODE, a key in $NETRC; and all parts of an offline run are to be uploaded."""
    seen = []
    real = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: seen.append(options) or real(**options))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "quiet")
    with pytest.raises(UserError, match="WANDB_MODE=quiet: online, offline"):  # before anything else
        config.parse(train.Config, [])
    monkeypatch.setenv("WANDB_MODE", "")
    for step, project in enumerate(("", "sums")):
        monkeypatch.setenv("WANDB_PROJECT", project)
        log = report.Report(tmp_path, resolved(), step, "abcd1234")
        log.log(step + 1, {"entropy/mean": 0.5})
        log.close([])
    assert [(o["project"], o["mode"]) for o in seen] == [("ce-gppo", "offline"), ("sums", "offline")]
    parts = sorted(str(path) for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and f"sync --id abcd1234 {' '.join(parts)}" in capsys.readouterr().out
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password " + "0" * 40)
    (tmp_path / "keys").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert tracking._has_wandb_key()


def test_runs_are_grouped_by_everything_except_the_seed():
    name = tracking.group_of(resolved())
    assert name == tracking.group_of(resolved(seed=3, run_name="x", out="y"))
    assert name.startswith("ce_gppo-") and name != tracking.group_of(resolved(lr=3e-5))


def test_a_run_of_a_sweep_keeps_its_id(monkeypatch):
    """Otherwise, resumed without the agent, it would continue as another run."""
    monkeypatch.setenv("WANDB_RUN_ID", "swrun001")
    assert tracking.new_id() != tracking.new_id() != "swrun001"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    assert tracking.new_id() == "swrun001"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert len(tracking.new_id()) == 8


def test_wandb_turns_the_sweep_file_into_a_command_line_of_train():
    """For every combination of the file's values, through JSON and W&B's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args  # takes 2 s

    sweep = yaml.safe_load((ROOT / "tools/sweep.yaml").read_text())
    choices = {name: choice.get("values", [choice.get("value")]) for name, choice in sweep["parameters"].items()}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    for wanted in json.loads(json.dumps(combinations)):
        arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in wanted.items()}})[
            "args"
        ]
        given, _, _ = config.parse(train.Config, arguments)
        assert {name: getattr(given, name) for name in wanted} == wanted
    assert len(combinations) == 36
    patterns = [metric.pattern() for metric in metrics.ALL]
    assert any(pattern.fullmatch(sweep["metric"]["name"]) for pattern in patterns)
    command = [part for part in sweep["command"] if not part.startswith("$")]
    assert command == [".venv/bin/python"] and (ROOT / sweep["program"]).exists()
