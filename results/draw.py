"""Figures of a sweep, and the table and figure of branches, whose values are {(seed, step): number}."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from ce_gppo.entropy import QUADRANTS
from results.series import difference, interval, markdown, read
from results.settings import CE, SETTINGS, STEADY, STRONG, WEAK

ROWS = {  # of panels: title -> settings
    "objectives": ("grpo", "dapo", "cispo", "gppo", "ce_gppo (0.75, 1)", "lp_only (1, 1)"),
    "betas of ce_gppo": ("grpo", *CE, "ce_gppo (1, 0)"),
    "what is kept decays, or another rule": ("grpo", *STEADY),
    "entropy bonus and target": ("grpo", *WEAK, *STRONG, "ce_gppo, target 0.9"),
}
FIVE = ("grpo", "ce_gppo (0, 1)", "ce_gppo (0.75, 1)", "gppo", "decaying (1, 1)")
SUMMARY = ("grpo", "ce_gppo (0, 1)", "ce_gppo (0.5, 1)", "gppo", "lp_only (1, 1)")
BASELINE, OWN = "grpo", "the run's own"
# Settings of a run that all branches in one file have in common.
SAME = ("model", "objective", "beta1", "beta2", "lr", "max_kept_prompts", "mini_batch_prompts", "responses_per_prompt")
MEASURED = {  # columns of the table of branches
    "on the rollout": "delta/rollout",
    "on held-out tokens": "delta/held_out",
    "to first order in the weights": "linear/rollout",
    "velocity": "predicted/velocity/total",
    "beyond first order": "beyond/rollout",
    "log p of right": "logprob/right",
    "of wrong": "logprob/wrong",
    "KL": "kl/rollout",
}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


def curves(groups: dict[str, list[dict]]) -> plt.Figure:
    """Entropy and accuracy: a row for the objectives, one for the betas, and one for bonuses and target."""
    rows = {title: [name for name in names if name in groups] for title, names in ROWS.items()}
    rows = {title: names for title, names in rows.items() if set(names) - {"grpo"}} or {"objectives": ["grpo"]}
    size = {"figsize": (11, 0.4 + 3 * len(rows)), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(len(rows), 2, sharey="col", **size)
    for pair, (title, names) in zip(axes, rows.items(), strict=True):
        panels(*pair, {name: groups[name] for name in names}, f": {title}")
    return fig


def summary(groups: dict[str, list[dict]], rows: list[dict]) -> plt.Figure:
    """Five settings: entropy, accuracy, and the change of entropy in one step of each. rows: branches."""
    fig, (left, right, last) = plt.subplots(1, 3, figsize=(14.1, 3.6), layout="constrained")
    panels(left, right, {name: groups[name] for name in SUMMARY if name in groups})
    bars(last, rows, [name for name in others(rows) if name in SUMMARY], "delta/rollout")
    last.set_title(f"entropy, one step at lr {rows[0]['lr']:g}")
    last.invert_yaxis()
    return fig


def coin_and_hot(coin: dict[str, list[dict]], hot: dict[str, list[dict]]) -> plt.Figure:
    """The figure of README: what a coin's rewards do to entropy, and the task's own to accuracy, in five settings."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
    for axis, groups, metric in (left, coin, "entropy/mean"), (right, hot, "eval/walk/avg_at_k"):
        lines(axis, {name: groups[name] for name in FIVE if name in groups}, metric)
        axis.set(xlabel="step", ylim=(0, None))
    left.set(title="rewards by the toss of a coin", ylabel="entropy, nats per token")
    right.set(title="rewards of the task", ylabel="held-out accuracy")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return fig


def lines(axis, groups: dict[str, list[dict]], metric: str) -> None:
    """The mean of a setting's seeds is thick, each seed thin."""
    for i, (name, runs) in enumerate(groups.items()):
        color = "black" if name == "grpo" else plt.colormaps["turbo"](i / len(groups))  # of betas: from blue to red
        values = np.array([run["series"][metric] for run in runs])  # [seeds, steps]
        steps = runs[0]["eval_steps"] if metric.startswith("eval/") else range(1, values.shape[1] + 1)
        axis.plot(steps, values.mean(0), color=color, linewidth=2, label=f"{name}, {len(runs)} seeds")
        axis.plot(steps, values.T, color=color, linewidth=0.5, alpha=0.6)


def panels(left, right, groups: dict[str, list[dict]], title: str = "") -> None:
    """Entropy and accuracy. The legend is of both."""
    lines(left, groups, "entropy/mean")
    lines(right, groups, f"eval/{next(iter(groups.values()))[0]['source']}/avg_at_k")
    left.set(title=f"entropy{title}", xlabel="step", ylabel="nats per token", ylim=(0, None))
    right.set(title=f"held-out accuracy{title}", xlabel="step", ylabel="avg@8")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # inside, it would hide a run that unlearns


# ----------------------------------------------------------------------------------------------------------------------
# Branches


def read_branches(path: Path) -> list[dict]:
    """The rows that results/branch.py wrote. If a branch was made twice, the later one counts."""
    rows = read(path, ("seed", "step", "setting", "delta/rollout", "linear/rollout", *SAME))
    rows = [row | {"beyond/rollout": row["delta/rollout"] - row["linear/rollout"]} for row in rows]
    return list({(row["seed"], row["step"], row["setting"]): row for row in rows}.values())


def values_of(rows: list[dict], setting: str, name: str) -> dict:
    return {(row["seed"], row["step"]): row[name] for row in rows if row["setting"] == setting and name in row}


def paired(rows: list[dict], setting: str, name: str) -> dict:
    """A metric of a setting minus the baseline's in the same branch, for the branches that have both."""
    own = values_of(rows, setting, name)
    return own if setting == BASELINE else difference(own, values_of(rows, BASELINE, name))


def others(rows: list[dict]) -> list[str]:
    """The settings that are compared with the baseline."""
    there = {row["setting"] for row in rows} - {BASELINE}
    return [name for name in (*SETTINGS, OWN) if name in there]


def text(values: dict, unit: float = 1e-4) -> str:
    mean, half = interval(value / unit for value in values.values())
    return f"{mean:+.2f}" * bool(values) + f" ± {half:.2f}" * bool(np.isfinite(half))


def rank(a: dict, b: dict) -> str:
    """Spearman's rank correlation over branches; none of fewer than four, or of equal values."""
    a, b = list(a.values()), [b[key] for key in a]
    return f"{stats.spearmanr(a, b).statistic:+.2f}" if len(a) > 3 and np.ptp(a) and np.ptp(b) else "none"


def table_of_branches(rows: list[dict]) -> str:
    """Markdown: differences to the baseline, and how well the predictions rank the measured changes."""
    lines, columns = [], MEASURED | {name: f"delta/{name}" for name in QUADRANTS}
    for name in (BASELINE, *others(rows)):
        cells = [text(paired(rows, name, key)) for key in columns.values()]
        clipped = [interval(values_of(rows, name, f"predicted/clip/{side}").values())[0] for side in ("low", "high")]
        ranked = rank(*(paired(rows, name, key) for key in ("beyond/rollout", "kl/rollout")))
        label = f"{name} (itself)" if name == BASELINE else name
        lines.append([label, *cells, ranked, ", ".join(f"{100 * share:.2f}" for share in clipped)])
    keys = ("delta/rollout", "predicted/velocity/total", "linear/rollout")
    measured, velocity, linear = (values_of(rows, BASELINE, key) for key in keys)
    return (
        f"{len(measured)} branches ({', '.join(f'{name} {rows[0][name]}' for name in SAME)}). Changes over a step, in "
        f"1e-4 nats per token, less {BASELINE}'s from the same state and rollout: of entropy, left of log p, and of "
        "the entropy of each quadrant, right of KL. The velocity is a rate. 95 % intervals over branches.\n\n"
        f"{markdown(['setting', *columns, 'rank correlation of KL and beyond', 'clipped below, above, %'], lines)}\n\n"
        f"Rank correlation with the measured change under {BASELINE}: of the velocity, over the tokens of a rollout "
        f"{text(values_of(rows, BASELINE, 'rank/tokens'), 1.0)} and over the branches {rank(velocity, measured)}; of "
        f"the first order, over the branches {rank(linear, measured)}.\n"
    )


def figure_of_branches(rows: list[dict]) -> plt.Figure:
    """Differences to the baseline: measured, to first order, and in the velocity."""
    fig, axes = plt.subplots(1, 4, figsize=(14, 1 + 0.3 * len(others(rows))), sharey=True, layout="constrained")
    for axis, (title, name) in zip(axes, MEASURED.items(), strict=False):  # the first four
        bars(axis, rows, others(rows), name)
        axis.set_title(title)
    axes[0].invert_yaxis()
    return fig


def bars(axis, rows: list[dict], settings: list[str], name: str) -> None:
    """The mean difference to the baseline of each setting, with its interval."""
    means, halves = 1e4 * np.array([interval(paired(rows, setting, name).values()) for setting in settings]).T
    halves[np.isinf(halves)] = np.nan  # of a single branch
    axis.barh(settings, means, 0.6, xerr=halves, color="#5fa8e6", error_kw={"linewidth": 1})
    axis.axvline(0, color="gray", linewidth=0.5)
    axis.set_xlabel("less grpo's, 1e-4 per token")
