"""Metrics against loops; the files, the table and W&B of a run; figures."""

import dataclasses
import io
import json
import math
import os
import types

import numpy as np
import pytest
import torch
import wandb
from wandb.errors import CommError

from ce_gppo import log, metrics, perf, tracking
from ce_gppo.checkpoint import State
from ce_gppo.entropy import QUADRANTS, entropy_velocity
from ce_gppo.messages import RunEnded
from ce_gppo.metrics import Details, Learned, Sums, Update
from ce_gppo.problems import Problem
from helpers import refuses, resolved, rollout_of
from loss import Objective
from reward import extract_answer
from tools import figures, speedrun
from tools import metrics as page


def groups(P=6, G=4, seed=0):
    """P groups of G with all columns; the first group is solved, the second is not. Prompt p has p + 1 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (P * G,), generator=g).tolist()
    part = rollout_of([(1, length) for length in lengths], seed)
    correct = torch.rand(P, G, generator=g) < 0.5
    correct[0], correct[1], correct[2, 0], correct[2, 1] = True, False, True, False
    rewards = correct.double() - 0.25 * (torch.arange(P * G).view(P, G) % 3 == 0)
    columns = {"prompts": [[1] * (p + 1) for p in range(P)], "prompt_of": torch.arange(P).repeat_interleave(G)}
    columns |= {"correct": correct.flatten(), "rewards": rewards.flatten(), "truncated": part.lengths == 8}
    columns["components"] = [{"correctness": float(c), "format": 0.5} for c in correct.flatten()]
    columns["texts"] = [f"\\boxed{{{i}}}" for i in range(P * G)]
    columns["old_logprobs"] = (part.rollout_logprobs + 0.1 * torch.randn(len(part.tokens), generator=g)).clamp(max=0)
    columns["index"] = torch.arange(P * G)
    return dataclasses.replace(part, **columns)


def learned(measured, others, updates=(), **objective) -> Learned:
    return Learned(list(updates), measured, others, {"value/mean": 0.5}, Objective(**objective), 1e-4)


def problems(sources: str) -> list[Problem]:
    return [Problem(f"prompt {p}", [1], str(4 * p), source) for p, source in enumerate(sources)]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def test_rollout_metrics_against_loops():
    whole = groups()
    chosen = problems("aabbab")
    mini_batches = [torch.arange(8, 16), torch.arange(16, 22)]
    found, details = metrics.step_metrics(
        whole, chosen, mini_batches, learned([whole[8:22]], whole[:8][::3], beta1=None, beta2=None), 0.25
    )
    rewards, correct = whole.rewards.view(6, 4).numpy(), whole.correct.view(6, 4).numpy()
    lengths = whole.lengths.numpy()
    expected = {
        "entropy/delta": found["entropy/mean"] - 0.25,
        "reward/mean": rewards.mean(),
        "reward/std": np.mean([row.std(ddof=1) for row in rewards]),
        "reward/pass_at_g": np.mean([row.any() for row in correct]),
        "reward/group_solved_all": np.mean([row.all() for row in correct]),
        "reward/group_solved_none": np.mean([not row.any() for row in correct]),
        "rollout/prompts": 6,
        "rollout/unused": 10 / 24,
        "response/length_mean": lengths.mean(),
        "response/length_max": lengths.max(),
        "response/truncated": (lengths == 8).mean(),
        "optim/lr": 1e-4,
        "optim/updates": 0,
        "optim/skipped": 0,
        "value/mean": 0.5,
    }
    for source, rows in (("a", [0, 1, 4]), ("b", [2, 3, 5])):
        expected[f"reward/{source}/correctness"] = correct[rows].mean()
        expected |= {f"reward/{source}/format": 0.5, f"reward/{source}/mean": correct[rows].mean() + 0.5}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert details.entropies == {i: pytest.approx(whole[[i]].entropy.mean().item()) for i in (0, 3, 6, *range(8, 22))}
    assert not {"optim/beta1", "optim/beta2"} & found.keys() and found["optim/entropy_coef"] == 0
    shown = learned([whole], whole[:0], beta1=0.0, beta2=1.0, entropy_coef=0.1)
    found, _ = metrics.step_metrics(whole, chosen, [torch.arange(24)], shown, None)
    assert [found[f"optim/{name}"] for name in ("beta1", "beta2", "entropy_coef")] == [0, 1, 0.1]
    assert "entropy/delta" not in found and found["rollout/unused"] == 0
    one = {"prompts": [[1]] * 24, "prompt_of": torch.arange(24), "components": [{"correctness": 1.0}] * 24}
    found = metrics.rollout_metrics(dataclasses.replace(whole, **one), ["a"] * 24, 0)
    assert found["reward/std"] == 0 and found["reward/a/mean"] == 1 and "reward/a/correctness" not in found


def test_entropy_and_mismatch_against_lists(monkeypatch):
    """Over two ranks. Each measured token of the others is repeated for each token that it stands for."""
    whole = groups()
    trained, others = whole[8:], whole[:8][::3]
    own = [
        [[], metrics.measured_sums([trained[a:b]]), metrics.measured_sums([others[c:d]]), {}]
        for a, b, c, d in ((0, 10, 0, 1), (10, 16, 1, 3))
    ]
    monkeypatch.setattr(metrics.parallel, "all_gather", lambda value: own)
    found, _ = metrics.step_metrics(whole, problems("aaaaaa"), [torch.arange(8, 24)], learned([], whole[:0]), None)
    all_others = int(whole[:8].lengths.sum())
    repeated = np.concatenate([trained.entropy.repeat(len(others.tokens)), others.entropy.repeat(all_others)])
    gap = torch.cat([p.old_logprobs - p.rollout_logprobs for p in (trained, others)]).double().numpy()
    expected = {
        "entropy/mean": repeated.astype(np.float64).mean(),
        "entropy/p10": np.quantile(repeated, 0.1, method="inverted_cdf"),
        "entropy/p90": np.quantile(repeated, 0.9, method="inverted_cdf"),
        "mismatch/mean": np.abs(gap).mean(),
        "mismatch/kl": np.mean([math.exp(x) - 1 - x for x in gap]),
        "mismatch/ratio_max": math.exp(np.abs(gap).max()),
        "mismatch/ratio_p99": math.exp(np.quantile(np.abs(gap), 0.99, method="inverted_cdf")),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=4e-3 if "p" in name[-3:] else 1e-5), name


@pytest.mark.parametrize("values", [[0.0], [0.0, 1e-9, 2.0], [0.5] * 9 + [3.0], list(range(1, 101)), [40.0, 50.0]])
def test_quantiles_are_those_of_nearest_rank(values):
    counts = metrics.histogram(torch.tensor(values))
    for q in (0.1, 0.5, 0.9, 0.99):
        exact = min(32.0, np.quantile(values, q, method="inverted_cdf"))
        assert metrics.quantile(counts, q) == pytest.approx(exact, rel=4e-3, abs=1e-8)
    assert metrics.quantile(metrics.histogram(torch.zeros(3)), 0.5) == 0 and counts.sum() == len(values)


def tokens(seed=0, size=60):
    """A micro-batch, policy_loss's info, logprobs, entropy and moment; random, with tokens of every kind."""
    part = groups(seed=seed)
    g, n = torch.Generator().manual_seed(seed), len(part.tokens)
    A = torch.randint(-1, 2, (n,), generator=g).float()
    logprobs = (part.old_logprobs + 0.4 * torch.randn(n, generator=g)).clamp(max=0)
    log_ratio = logprobs - part.old_logprobs
    ratio = log_ratio.exp()
    info = {"log_ratio": log_ratio, "ratio": ratio, "weight": A * ratio, "kl_reference": torch.rand(n, generator=g)}
    info |= {"clipped_low": (ratio < 0.8) & (A < 0), "clipped_high": (ratio > 1.2) & (A > 0)}
    info["unclipped_weight"] = A * ratio * (0.5 + torch.rand(n, generator=g))
    return (
        dataclasses.replace(part, advantages=A),
        info,
        logprobs,
        torch.rand(n, generator=g),
        torch.rand(n, generator=g) / 9,
    )


def test_token_sums_against_loops():
    """In two micro-batches and an empty one, added; each mean has its own denominator."""
    part, info, *columns = tokens()
    cut = int(part[:10].lengths.sum())
    pieces = [(part[:10], slice(None, cut), 100), (part[10:], slice(cut, None), 200), (part[:0], slice(0, 0), 1)]
    sums = [
        metrics.token_sums(p, {k: v[where] for k, v in info.items()}, *(c[where] for c in columns), places)
        for p, where, places in pieces
    ]
    found = metrics.add(sums).values()
    logprobs, entropy, moment = columns
    velocity = entropy_velocity(info["weight"], logprobs, entropy, moment).double().numpy()
    A, old, H = part.advantages.numpy(), part.old_logprobs.numpy(), part.entropy.numpy()
    ratio, weight, n = info["ratio"].numpy(), np.abs(info["weight"].numpy()), len(A)
    low, high = info["clipped_low"].numpy(), info["clipped_high"].numpy()
    expected = {
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "kl/approx": np.mean(ratio - 1 - np.log(ratio)),
        "kl/reference": info["kl_reference"].numpy().mean(),
        "weight/inside": weight[~(low | high)].sum() / weight.sum(),
        "velocity/total": velocity.mean(),
        "clip/amplification": (info["weight"] / info["unclipped_weight"]).numpy()[low | high].mean(),
        "perf/padding": 1 - int(part.sizes.sum()) / 300,
    }
    for side, members in (("low", low), ("high", high)):
        expected |= {f"clip/{side}": members.mean(), f"clip/prob_{side}": np.exp(old[members]).mean()}
        expected[f"weight/{side}"] = weight[members].sum() / weight.sum()
        expected[f"velocity/clipped_{side}"] = velocity[members].sum() / n
    for name in QUADRANTS:
        members = (A > 0 if "pa" in name else A < 0) & (old < -H if "lp" in name else old >= -H)
        assert members.sum() > 3
        expected |= {f"tokens/{name}": members.mean(), f"entropy/{name}": H[members].mean()}
        expected[f"velocity/{name}"] = velocity[members].sum() / n
        counts = metrics.add(sums).counts[f"probability/{name}"].numpy()
        assert counts.tolist() == np.histogram(np.exp(old[members]), bins=64, range=(0, 1))[0].tolist()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4, abs=1e-7), name
    counts = metrics.add(sums).counts["amplification"]
    amplification = (info["weight"] / info["unclipped_weight"]).numpy()[low | high]
    exact = np.quantile(amplification, 0.99, method="inverted_cdf")
    assert metrics.quantile(counts, 0.99) == pytest.approx(exact, rel=4e-3)
    assert metrics.add(sums[2:]).values() == {}, "means over nothing, and extremes of nothing, are left out"


def sums_of(mean: tuple[float, float], ratio: float) -> Sums:
    value = torch.tensor(mean, dtype=torch.float64)
    low, high = {"ratio/min": torch.tensor(ratio)}, {"ratio/max": torch.tensor(ratio)}
    counts = {"probability/pa_hp": torch.full((64,), mean[1]), "amplification": metrics.histogram(torch.tensor([2.0]))}
    return Sums({"clip/low": value, "kl/approx": value}, high, low, counts)


def test_updates_of_all_ranks_as_one_without_a_skipped_one():
    """Two ranks with other numbers of tokens, three updates; the second's gradient was not finite."""
    skipped = sums_of((math.nan, 9), 9), math.nan, math.inf, True
    ranks = [
        [(sums_of((1, 10), 0.5), 0.25, 2.0, False), skipped, (sums_of((3, 10), 1.5), 0.5, 4.0, False)],
        [(sums_of((5, 50), 0.7), 1.0, 2.0, False), skipped, (sums_of((8, 30), 1.1), 2.0, 4.0, False)],
    ]
    ranks = [[Update(*update, followed=[]) for update in rank] for rank in ranks]
    found, histograms = metrics.update_metrics(ranks)
    expected = {"optim/updates": 3, "optim/skipped": 1, "optim/loss": (0.25 + 1 + 0.5 + 2) / 2, "optim/grad_norm": 3.0}
    expected |= {"clip/low": 0.17, "kl/approx": 0.17, "ratio/min": 0.5, "ratio/max": 1.5}
    expected |= {
        "update_1/clip_low": 0.1,
        "update_1/ratio_min": 0.5,
        "update_1/ratio_max": 0.7,
        "update_1/kl_approx": 0.1,
    }
    expected |= {"update_3/clip_low": 0.275, "update_3/ratio_min": 1.1, "update_3/ratio_max": 1.5}
    assert found.pop("clip/amplification_p99") == pytest.approx(2, rel=4e-3)
    assert found == pytest.approx(expected | {"update_3/kl_approx": 0.275})
    assert histograms["probability/pa_hp"].tolist() == [100.0] * 64
    assert metrics.update_metrics([[ranks[0][1]]]) == ({"optim/updates": 1, "optim/skipped": 1}, {})
    assert metrics.update_metrics([[]])[0]["optim/updates"] == 0


def test_the_page_of_metrics_is_made_from_the_docstrings():
    assert page.PAGE.read_text() == page.page(), "python -m tools.metrics"
    names = [name for row in page.rows() for name in row[1].split(", ")]
    assert len(names) == len(set(names)) > 75 and all(" " not in name and "/" in name for name in names)
    assert {row[0] for row in page.rows()} == {*page.SECTIONS, "Speed"} and all(row[3] for row in page.rows())


# ----------------------------------------------------------------------------------------------------------------------
# Seconds and operations


def test_seconds_and_tokens_of_a_step(tiny_model, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 8.0, 10.0, 10.0, 15.0, 20.0])
    monkeypatch.setattr(perf, "matrix_rate", lambda device: 1e6)
    monkeypatch.setattr(perf, "now", lambda device: next(clock))
    meter, whole = perf.Meter(tiny_model, "cpu"), groups()
    for part in ("rollout", "update"):
        with meter(part):
            pass
    found = meter.take(whole, [torch.arange(4), torch.arange(8)], 2)
    batches, seconds = [whole[:4], whole[:8]], {"time/rollout": 2, "time/update": 4, "time/step": 10}
    assert found.items() >= seconds.items()
    assert found["perf/rollout_tokens_per_s"] == len(whole.tokens) / 2 and 0.1 < found["perf/peak_memory_gib"] < 50
    assert found["perf/update_tokens_per_s"] == sum(int(batch.sizes.sum()) for batch in batches) / 2
    operations = sum(perf.flops(tiny_model, batch) for batch in batches)
    assert found["perf/matmul_utilization"] == pytest.approx(operations / 2 / 1e6)
    with meter("eval"):
        pass
    assert meter.take_part("eval") == {"time/eval": 5}
    with pytest.raises(KeyError):  # a step always samples
        meter.take(whole, [], 1)
    assert meter.start == 20


def test_operations_of_a_pass(tiny_model):
    """By hand: a group's prompt once, the head for response tokens, half of each squared length in attention."""
    part = rollout_of([(5, 3), (5, 4)], shared=True)
    other = rollout_of([(2, 6)])
    c, body = tiny_model.config, tiny_model.model
    weights = sum(p.numel() for p in (*body.layers.parameters(), *body.norm.parameters()))
    head, width = tiny_model.lm_head.weight.numel(), body.layers[0].self_attn.q_proj.out_features
    expected = 6 * (weights * (5 + 7) + head * 7 + c.num_hidden_layers * width * (8**2 + 9**2))
    assert perf.flops(tiny_model, part) == expected
    assert perf.flops(tiny_model, other) == 6 * (weights * 8 + head * 6 + c.num_hidden_layers * width * 8**2)
    assert 1e8 < perf.matrix_rate("cpu") < 1e14


# ----------------------------------------------------------------------------------------------------------------------
# Files


def make_log(folder, step=0, **settings):
    return log.Log(folder, resolved(**settings), State("abcd1234", step=step), None, extract_answer)


def read(path) -> list[dict]:
    def refuse(name):
        raise AssertionError(name)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_samples_tokens_and_histograms(tmp_path, quiet, monkeypatch):
    """Samples at each step; at the first, evaluations and the last also tokens, and a table and histograms for W&B."""
    given = [{"correctness": 1.0, "format": 0.1}, {"correctness": 0.0}, {"correctness": 0.0, "short": 0.2}, {}]
    whole = groups()
    for i, parts in enumerate(given):
        whole.components[4 * i] = parts
    chosen, logged = problems("tttttt"), {}
    writer = make_log(tmp_path, steps=5, eval_every=2)
    writer.wandb = types.SimpleNamespace(log=lambda values: logged.update({values["step"]: values}))
    monkeypatch.setattr(log, "token_rows", lambda updates, problems, tokenizer: [{"of": updates}])
    details = Details(["u"], {"probability/pa_hp": torch.arange(64)}, {0: 0.123456789, 4: math.nan})
    for step in range(1, 6):
        writer.step(step, {"entropy/mean": 0.5}, whole, chosen, details)
    rows = read(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(1, 6) for _ in range(4)]
    parts = [{k: v for k, v in row.items() if k.startswith("reward/")} for row in rows[:4]]
    assert parts == [{f"reward/{name}": value for name, value in each.items()} for each in given]
    assert [row["extracted"] for row in rows[:4]] == ["0", "4", "8", "12"] == [row["answer"] for row in rows[:4]]
    assert [row["reward"] for row in rows[:4]] == [whole.rewards[4 * i].item() for i in range(4)]
    assert [row["entropy"] for row in rows[:4]] == [0.12346, None, None, None] and rows[1]["tokens"] == whole.lengths[4]
    assert rows[1].items() >= {"prompt": "prompt 1", "response": r"\boxed{4}"}.items()
    assert [row["step"] for row in read(tmp_path / "tokens.jsonl")] == [1, 2, 4, 5]
    assert [step for step in logged if "samples" in logged[step]] == [1, 2, 4, 5]
    table, histogram = logged[2]["samples"], logged[2]["probability/pa_hp"]
    column = {name: [row[i] for row in table.data] for i, name in enumerate(table.columns)}
    assert column["reward/short"] == [None, None, 0.2, None] and len(column["prompt"]) == 4
    assert histogram.histogram == list(range(64)) and histogram.bins == [i / 64 for i in range(65)]


def test_rows_of_tokens(tokenizer):
    """A right and a wrong response of the first, the last and two updates between, from any rank; long ones in part."""
    ids = tokenizer.encode("start =17\ntarget =30\n")
    part, length = rollout_of([(1, 2500), (1, 3)]), 2500
    part = dataclasses.replace(part, tokens=torch.tensor((ids * 999)[: length + 3]))
    columns = {"ratio": torch.arange(length) / 3, "weight": torch.full((length,), math.nan)}
    right = {"response": part[[0]], "columns": columns}
    wrong = {"response": part[[1]], "columns": {name: column[:3] for name, column in columns.items()}}
    updates = [[Update(None, 0, 0, False, own)] * 12 for own in ([wrong, wrong], [right])]  # by rank
    rows = tracking.token_rows(updates, problems("aa"), tokenizer)
    assert [(row["update"], row["correct"]) for row in rows] == [(k, c) for k in (1, 5, 8, 12) for c in (True, False)]
    row = rows[0]
    assert row["length"] == 2500 and len(row["tokens"]) == len(row["ratio"]) == 2000 and row["updates"] == 12
    assert row["ratio"][999:1001] == [333.0, 500.0] and row["ratio"][-1] == 833.0 and row["weight"] == [None] * 2000
    asked = {"prompt": "prompt 0", "answer": "0", "reward": 1.0, "components": {"correctness": 1.0}}
    assert row.items() >= asked.items()
    assert rows[1]["prompt"] == "prompt 1" and rows[1]["length"] == 3
    assert tracking.token_rows([[], []], problems("a"), tokenizer) == []
    one = [[Update(None, 0, 0, False, [wrong])]]
    assert [row["update"] for row in tracking.token_rows(one, problems("aa"), tokenizer)] == [1]


def test_a_response_of_each_kind_is_followed():
    part, info, *columns = tokens()
    found = tracking.follow(part, info, *columns)
    assert [bool(each["response"].correct) for each in found] == [True, False]
    for each, i in zip(found, [part.correct.nonzero()[0].item(), (~part.correct).nonzero()[0].item()], strict=True):
        own = part.sequence == i
        assert each["response"].index.tolist() == [i]
        clipped = info["clipped_high"].float() - info["clipped_low"].float()
        expected = {"old_logprobs": part.old_logprobs, "entropy": part.entropy, "advantage": part.advantages}
        expected |= {"ratio": info["ratio"], "clipped": clipped, "weight": info["weight"]}
        expected["velocity"] = entropy_velocity(info["weight"], *columns)
        assert each["columns"].keys() == expected.keys()
        assert all(each["columns"][name].equal(column[own]) for name, column in expected.items())


def test_a_resumed_run_keeps_all_rows_beside_those_that_it_goes_on_from(tmp_path, quiet):
    text = "".join(json.dumps({"step": i, "entropy/mean": 1.0 / (i + 1)}) + "\n" for i in range(6))
    for name in log.FILES:
        (tmp_path / f"{name}.jsonl").write_text(text + '{"step": 6, "entr' * (name == "tokens"))  # as after a full disk
    for name in ("metrics.until-step-000005.jsonl", "metrics.until-step-000005-2.jsonl"):
        assert not (tmp_path / name).exists()
        again = make_log(tmp_path, step=3)
        assert [row["step"] for row in read(tmp_path / name)] == list(range(6))
        for step in (4, 5):
            again.add(step, {"entropy/mean": 0.5})
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6)) and rows[4]["entropy/mean"] == 0.5
    assert [row["step"] for row in read(tmp_path / "samples.jsonl")] == [0, 1, 2, 3]
    assert make_log(tmp_path, step=0).history == [], "the evaluation before step 1 is done again"


def test_metrics_are_always_json_and_whole(tmp_path, quiet, capsys):
    """Values that are not finite are left out; after errors of the disk all rows are written again."""
    writer = make_log(tmp_path)
    writer.add(1, {"optim/loss": math.nan, "optim/grad_norm": math.inf, "optim/skipped": 8, "entropy/mean": 0.5})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "aside")
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be opened
    writer.add(2, {"entropy/mean": 0.4})
    assert "not written" in capsys.readouterr().err and writer.incomplete
    (tmp_path / "metrics.jsonl").rmdir()
    writer.add(3, {"entropy/mean": 0.3})
    writer.add(3, {"eval/a/avg_at_k": 0.7})
    rows = {1: {"optim/skipped": 8, "entropy/mean": 0.5}, 2: {"entropy/mean": 0.4}}
    rows[3] = {"entropy/mean": 0.3, "eval/a/avg_at_k": 0.7}
    assert read(tmp_path / "metrics.jsonl") == [{"step": step} | row for step, row in rows.items()]
    assert writer.has_evaluation(3) and not writer.has_evaluation(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step 3/60 entropy 0.300", "step 3/60 accuracy 0.700"]
    (tmp_path / "x.jsonl").write_text('[1]\n{"a": 1}\n{"step": "b"}\n{"step": 2}\n{"st')
    assert log.read_rows(tmp_path / "x.jsonl") == [{"step": 2}]


def test_the_table_at_the_end(tmp_path, quiet, capsys):
    writer = make_log(tmp_path, steps=3)
    writer.add(0, {"eval/a/avg_at_k": 0.25, "time/eval": 2.0})
    for step, speed in ((1, 1000.0), (2, 3000.0), (3, 2000.0)):
        seconds = {"time/step": 6.0, "time/rollout": 3.0, "time/update": 1.5, "perf/rollout_tokens_per_s": speed}
        writer.add(step, seconds | {"entropy/mean": 1.0 / step, "reward/mean": 0.5})
    writer.add(3, {"eval/a/avg_at_k": 0.75})
    assert "step 2/3 reward 0.500 entropy 0.500\n" in capsys.readouterr().out
    writer.wandb = types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"), url="https://w", finish=None)
    codes = []
    writer.wandb.finish = lambda exit_code: codes.append(exit_code)
    writer.close([tmp_path / "old", tmp_path / "new"], exit_code=1, sentence="stopped.")
    table, advice = capsys.readouterr().out.strip().split("\n\n")
    assert advice.endswith("\nstopped.")
    cells = dict(line.split("  ", 1) for line in table.splitlines())
    assert {name: value.strip() for name, value in cells.items()} == {
        "accuracy, eval/a/avg_at_k": "0.250 -> 0.750",
        "entropy, nats per token": "1.000 -> 0.333",
        "rollout tokens/s, median": "2,000",
        "time, 20 s": "rollout 45%, update 22%, eval 10%",
        "checkpoint": f"{tmp_path}/new",
        "metrics": f"{tmp_path}/metrics.jsonl",
        "W&B": "https://w",
    }
    assert advice.startswith("- Entropy went from 1.000 to 0.333") and codes == [1]


def test_a_bar_on_a_terminal(tmp_path, quiet, monkeypatch, capsys):
    """A line for each step above it, and below what the run does now."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    writer = make_log(tmp_path, step=2, steps=4)
    writer.doing("rollout")
    assert "rollout:  50%" in terminal.getvalue()
    writer.add(3, {"entropy/mean": 0.5, "reward/mean": 0.25, "reward/a/mean": 0.25, "reward/a/format": 0.125})
    writer.add(3, {"eval/a/avg_at_k": 0.75})
    assert capsys.readouterr().out.splitlines() == [
        "step 3/4 reward 0.250 entropy 0.500 format 0.125",
        "step 3/4 accuracy 0.750",
    ]
    assert writer.bar.n == 3
    monkeypatch.setattr(writer.bar, "set_description", lambda part: (_ for _ in ()).throw(OSError("closed")))
    writer.doing("update")
    monkeypatch.setattr(writer.bar, "write", lambda line: (_ for _ in ()).throw(OSError("closed")))
    writer.add(4, {"entropy/mean": 0.5})
    assert writer.bar is None, "the terminal was closed"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "64 prompts x 8 = 512 responses, then up to 8 updates of 64 responses; 60 steps"),
        ({"objective": "dapo"}, "responses, up to 3 times, then"),
        ({"mini_batch_prompts": 64}, "nothing is clipped, as a step's only update has ratio 1"),
        ({"shard": "yes"}, "shard does nothing, with one process"),
        ({"shard": "offload"}, "in the host's memory"),
        ({"advantages": "gae"}, "and a critic with learning rate 0.0003"),
        ({"objective": "grpo", "eps_low": 0.1}, "grpo, no betas, clip interval [0.9, 1.2], learning rate 0.0001"),
        ({"beta1": 0.5}, "beta1 0.5, beta2 1.0"),
    ],
)  # fmt: skip
def test_the_plan_before_the_first_step(tiny_model, tmp_path, settings, said):
    text = log.plan(resolved(lr=1e-4, **settings), tmp_path, tiny_model, "cpu", "7 problems", 3)
    millions = sum(p.numel() for p in tiny_model.parameters()) / 1e6
    assert said in text and f"{tmp_path}, continued after step 3\n" in text and f"{millions:.2f} M parameters" in text
    plain = log.plan(resolved(), tmp_path, tiny_model, "cpu", "7 problems", 0)
    for part in ("continued", "up to 3", "critic", "nothing is", "processes", "host", "shard"):
        assert part not in plain


# ----------------------------------------------------------------------------------------------------------------------
# W&B


def test_errors_of_wandb_do_not_end_the_run(tmp_path, quiet, capsys):
    writer = make_log(tmp_path)

    def fail(*args, **kwargs):
        raise ConnectionError("the network is gone")

    writer.wandb = types.SimpleNamespace(log=fail, finish=fail, settings=types.SimpleNamespace(mode="online"))
    assert tracking.finish_wandb(writer.wandb, 0) == {"W&B has failed": "the network is gone"}
    writer.add(0, {"entropy/mean": 0.5})
    assert writer.wandb is None and "the network is gone" in capsys.readouterr().err


def test_without_a_network_it_logs_offline_into_the_same_run(monkeypatch, tmp_path, capsys):
    calls, fails = [], ["online"]

    def init(**options):
        calls.append(options)
        if options["mode"] in fails:
            raise CommError("no route to host")
        return types.SimpleNamespace(define_metric=lambda *a, **k: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracking.start_wandb(tmp_path, resolved(lr=1e-4), "abc")
    found = [(c["mode"], c["id"], c.get("resume")) for c in calls]
    assert found == [("online", "abc", "allow"), ("offline", "abc", None)]
    assert calls[0]["settings"].init_timeout == 30 and calls[0]["config"]["lr"] == 1e-4
    assert "logging offline (no route to host)" in capsys.readouterr().err
    fails.append("offline")
    assert tracking.start_wandb(tmp_path, resolved(), "abc") is None and "it is off" in capsys.readouterr().err


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_without_a_home_wandb_writes_beside_the_run(monkeypatch, tmp_path, home):
    monkeypatch.setenv("HOME", home or str(tmp_path))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, "")  # and so restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    assert tracking.start_wandb(tmp_path, resolved(), "abc") is run
    assert os.environ.get("WANDB_DATA_DIR") == (str(tmp_path / "wandb") if home else None)


def test_wandb_names_and_keys(tmp_path, monkeypatch, capsys):
    """WANDB_PROJECT, an empty WANDB_MODE, a key in $NETRC; and all parts of an offline run are to be uploaded."""
    seen, real = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: seen.append(options) or real(**options))
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "quiet")
    refuses("WANDB_MODE=quiet: online, offline", tracking.check_wandb)
    monkeypatch.setenv("WANDB_MODE", "")
    for step, project in enumerate(("", "sums")):
        monkeypatch.setenv("WANDB_PROJECT", project)
        writer = make_log(tmp_path, step=step)
        writer.add(step + 1, {"entropy/mean": 0.5})
        writer.close([], exit_code=0, sentence="")
    assert [(o["project"], o["mode"]) for o in seen] == [("ce-gppo", "offline"), ("sums", "offline")]
    parts = sorted(str(path) for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and f"sync --id abcd1234 {' '.join(parts)}" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    refuses("WANDB_PROJECT=a/b: Invalid project name.*WANDB_ENTITY names its owner", tracking.check_wandb)
    assert tracking.wandb_mode() == "offline"
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password " + "0" * 40)
    (tmp_path / "keys").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert tracking.wandb_mode() is None, "online, as there is a key"
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking.wandb_mode() is None
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert tracking.wandb_mode() == "disabled"


def test_a_run_of_a_sweep_keeps_its_id_and_runs_are_grouped_by_all_but_the_seed(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "swrun001")
    assert tracking.new_id() != tracking.new_id() != "swrun001"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    assert tracking.new_id() == "swrun001"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert len(tracking.new_id()) == 8
    name = tracking.group_of(resolved())
    assert name == tracking.group_of(resolved(seed=3, run_name="x", out="y")) and len(name) == len("ce_gppo-") + 6
    assert name.startswith("ce_gppo-") and name != tracking.group_of(resolved(lr=3e-5))


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def write_run(folder, seed: int, **settings):
    """A run's folder with the metrics that the figures need."""
    folder.mkdir()
    config = {"objective": "ce_gppo", "beta1": 0.75, "beta2": 1.0, "seed": seed, "run_name": folder.name} | settings
    (folder / "config.json").write_text(json.dumps({"config": config}))
    rng, names = np.random.default_rng(seed), ["entropy/mean", "clip/low", "clip/high", "velocity/total"]
    names += [f"velocity/{q}" for q in figures.QUADRANTS]
    rows = [{"step": step} | {name: float(rng.random()) for name in names if step} for step in range(11)]
    for row in rows[::5]:
        row["eval/test/avg_at_k"] = float(rng.random())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "ent')


def test_figures_group_runs_by_all_settings_except_the_seed(tmp_path):
    variants = {"a": {}, "b": {}, "lr": {"lr": 1e-3}, "grpo": {"objective": "grpo", "beta1": None, "beta2": None}}
    for seed, (name, settings) in enumerate(variants.items()):
        write_run(tmp_path / name, seed, prompt_suffix="in $\\boxed{}$ and $x_{$", **settings)
    found = figures.group_runs([figures.load(tmp_path / name) for name in variants])
    labels = {"ce_gppo (0.75, 1)": 2, "ce_gppo (0.75, 1), lr 0.001": 1, "grpo": 1}
    assert {label: len(runs) for label, runs in found.items()} == labels
    entropy, accuracy, *_ = figures.figure(found).axes
    thick = [line for line in entropy.lines if line.get_linewidth() == 2]
    assert len({line.get_color() for line in thick}) == len(thick) == 3 and len(entropy.lines) == 3 + 2
    runs = found["ce_gppo (0.75, 1)"]
    expected = [np.mean([rows[step]["entropy/mean"] for rows in runs]) for step in range(1, 11)]
    np.testing.assert_allclose(thick[0].get_ydata(), expected)
    assert entropy.get_ylim()[0] == accuracy.get_ylim()[0] == 0
    names = [*variants, "../" + tmp_path.name + "/a"]  # one is named twice
    figures.main(figures.Config(tuple(tmp_path / name for name in names), out=tmp_path / "figures"))
    assert (tmp_path / "figures" / "curves.svg").exists()


def test_the_row_of_the_leaderboard(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "git_commit": "0123456789"}))
    rows = [{"step": 0, "eval/walk/avg_at_k": 0.4, "time/eval": 6.0}, {"step": 1, "time/step": 30.0}]
    rows += [
        {"step": 2, "time/step": 60.0, "time/eval": 6.0, "eval/walk/avg_at_k": 0.8},
        {"step": 3, "time/step": 99.0},
    ]
    log.rewrite(tmp_path / "metrics.jsonl", rows)
    assert speedrun.row_of(tmp_path, "--seed 1") == "| 1.7 | 2 | `--seed 1` | 0123456 | |"
    log.rewrite(tmp_path / "metrics.jsonl", rows[:2])
    with pytest.raises(RunEnded, match="never reached 0.8"):
        speedrun.row_of(tmp_path, "")


def test_a_run_draws_its_curves(tmp_path, quiet, capsys):
    """At an evaluation and at its end, from the tenth step on."""
    (tmp_path / "config.json").write_text(json.dumps({"config": dataclasses.asdict(resolved())}))
    writer = make_log(tmp_path, steps=12)
    for step in range(10):
        writer.add(step, {"entropy/mean": 1.0, "eval/a/avg_at_k": 0.5})
    assert writer.drawing is None, "too few steps for a curve"
    writer.add(10, {"entropy/mean": 1.0, "eval/a/avg_at_k": 0.5})
    assert writer.drawing.wait() == 0
    (tmp_path / "curves.png").unlink()
    writer.close([], 0, "")
    assert (tmp_path / "curves.png").exists() and f"{tmp_path}/curves.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, metrics, message",
    [
        ("[]", '{"step": 1, "entropy/mean": 0.1}', "not the folder of a run"),
        ('{"config": {"objective": "x", "beta1": "x"}}', '{"step": 1, "entropy/mean": 0.1}', "not the folder of a run"),
        ('{"config": {"objective": "x"}}', "", "no step of training yet"),
        ('{"config": {"objective": "x"}}', '[1]\n{"step": "a", "entropy/mean": "x"}\n', "no step of training yet"),
    ],
)
def test_figures_of_what_is_no_run_or_has_no_step_are_refused(tmp_path, config, metrics, message):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "metrics.jsonl").write_text(metrics)
    refuses(message, figures.main, figures.Config((tmp_path,), out=tmp_path))
