"""Table and figure of the branches that results/branch.py made: differences to grpo's, their intervals, predictions.

Values are {(seed, step): number}, one for each branch.
"""

from pathlib import Path

import numpy as np
from scipy import stats

from results import series
from results.series import difference, interval, markdown
from results.settings import SETTINGS
from tools.figures import QUADRANTS, plt

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BASELINE, OWN = "grpo", "the run's own"
# Settings of a run that all branches in one file have in common.
SAME = ("model", "objective", "beta1", "beta2", "lr", "max_kept_prompts", "mini_batch_prompts", "responses_per_prompt")
MEASURED = {  # columns of the table
    "on the rollout": "delta/rollout",
    "to first order in the weights": "linear/rollout",
    "beyond it": "beyond/rollout",
    "velocity": "predicted/velocity/total",
    "on held-out tokens": "delta/held_out",
    "log p of right": "logprob/right",
    "of wrong": "logprob/wrong",
    "KL": "kl/rollout",
}


def read(path: Path) -> list[dict]:
    """The rows of a results file, none if there is no file. If a branch was made twice, the later one counts."""
    rows = series.read(path, ("seed", "step", "setting", "delta/rollout", "linear/rollout", *SAME))
    rows = [row | {"beyond/rollout": row["delta/rollout"] - row["linear/rollout"]} for row in rows]
    return list({(row["seed"], row["step"], row["setting"]): row for row in rows}.values())


def values(rows: list[dict], setting: str, name: str) -> dict:
    return {(row["seed"], row["step"]): row[name] for row in rows if row["setting"] == setting and name in row}


def paired(rows: list[dict], setting: str, name: str) -> dict:
    """A metric of a setting minus the baseline's in the same branch, for the branches that have both."""
    own = values(rows, setting, name)
    return own if setting == BASELINE else difference(own, values(rows, BASELINE, name))


def others(rows: list[dict]) -> list[str]:
    """The settings that are compared with the baseline."""
    there = {row["setting"] for row in rows} - {BASELINE}
    return [name for name in (*SETTINGS, OWN) if name in there]


def text(found: dict, unit: float = 1e-4) -> str:
    mean, half = interval(value / unit for value in found.values())
    return f"{mean:+.2f}" * bool(found) + f" ± {half:.2f}" * bool(np.isfinite(half))


def rank(a: dict, b: dict) -> str:
    """Spearman's rank correlation over branches; empty for fewer than four, and for equal values."""
    a, b = list(a.values()), [b[key] for key in a]
    return f"{stats.spearmanr(a, b).statistic:+.2f}" if len(a) > 3 and np.ptp(a) and np.ptp(b) else ""


def table(rows: list[dict]) -> str:
    """Markdown: differences to the baseline, and how well the predictions rank the measured changes."""
    about = ", ".join(f"{name} {rows[0][name]}" for name in SAME)
    lines, columns = [], MEASURED | {quadrant: f"delta/{name}" for name, quadrant in QUADRANTS.items()}
    for name in (BASELINE, *others(rows)):
        kl_rank = rank(*(paired(rows, name, key) for key in ("beyond/rollout", "kl/rollout")))
        clipped = [interval(values(rows, name, f"predicted/clip/{side}").values())[0] for side in ("low", "high")]
        label = f"{name} (itself)" if name == BASELINE else name
        cells = (text(paired(rows, name, key)) for key in columns.values())
        lines.append([label, *cells, kl_rank, ", ".join(f"{100 * share:.2f}" for share in clipped)])
    measured = values(rows, BASELINE, "delta/rollout")
    velocity, linear = (
        rank(values(rows, BASELINE, name), measured) for name in ("predicted/velocity/total", "linear/rollout")
    )
    tokens = text(values(rows, BASELINE, "rank/tokens"), 1.0)
    return (
        f"{count(rows)} branches of {len({row['seed'] for row in rows})} runs ({about}). Changes over one step, in "
        f"1e-4 nats per token, less {BASELINE}'s from the same state and rollout: of entropy, left of log p, and of "
        "entropy of each quadrant, right of KL. Mean and 95 % interval over branches.\n\n"
        f"{markdown(['setting', *columns, 'rank correlation of KL and beyond', 'clipped below, above, %'], lines)}\n\n"
        f"Rank correlation with the measured change under {BASELINE}: of the velocity, over the tokens of a rollout "
        f"{tokens} and over the branches {velocity}; of the first order, over the branches {linear}.\n"
    )


def count(rows: list[dict]) -> int:
    """The number of branches."""
    return len({(row["seed"], row["step"]) for row in rows})


def figure(rows: list[dict]) -> plt.Figure:
    """Differences to the baseline: measured, to first order, and in the velocity."""
    names = ("on the rollout", "on held-out tokens", "to first order in the weights", "velocity")
    fig, axes = plt.subplots(1, 4, figsize=(14, 1 + 0.3 * len(others(rows))), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        bars(axis, rows, others(rows), MEASURED[name])
        axis.set_title(name)
    axes[0].invert_yaxis()
    fig.suptitle(f"change of entropy in a step, less {BASELINE}'s, {count(rows)} branches")
    return fig


def bars(axis, rows: list[dict], settings: list[str], name: str) -> None:
    """The mean difference to the baseline of each setting, with its interval."""
    means, halves = 1e4 * np.array([interval(paired(rows, setting, name).values()) for setting in settings]).T
    halves[np.isinf(halves)] = np.nan  # of a single branch
    axis.barh(settings, means, 0.6, xerr=halves, color="#5fa8e6", error_kw={"linewidth": 1})
    axis.axvline(0, color="gray", linewidth=0.5)
    axis.set_xlabel("1e-4 nats per token")
