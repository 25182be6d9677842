"""Table and figure of the branches that tools/branch.py made: paired differences, their intervals, the predictions."""

import json
from pathlib import Path

import numpy as np
from scipy import stats

from ce_gppo.messages import UserError
from tools.figures import plt

BASELINE = "grpo"
OWN, SMALL, COAST = "the run's own", "the run's own, lr / 10", "no gradient"  # controls, in every branch
# Settings of a run that all branches in one file have in common.
SAME = ("model", "objective", "beta1", "beta2", "lr", "max_kept_prompts", "mini_batch_prompts", "responses_per_prompt")


def read(path: Path) -> list[dict]:
    """The rows of a results file, none if there is no file. If a branch was made twice, the later one counts."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        named = [[row[name] for name in ("seed", "step", "setting", *SAME)] for row in rows]  # each must have them
        return list({tuple(names[:3]): row for names, row in zip(named, rows, strict=True)}.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of branches ({type(error).__name__}: {error})") from None


def paired(rows: list[dict], setting: str, name: str, baseline: str | None = BASELINE) -> np.ndarray:
    """A metric of a setting minus the baseline's in the same branch, for each branch that has both."""
    values = {(row["seed"], row["step"]): row[name] for row in rows if row["setting"] == setting and name in row}
    if baseline is None:
        return np.array(list(values.values()))
    base = {(row["seed"], row["step"]): row[name] for row in rows if row["setting"] == baseline and name in row}
    return np.array([value - base[key] for key, value in values.items() if key in base])


def interval(values: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval): Student's, over branches. NaN of none; width NaN of one."""
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def text(values: np.ndarray, unit: float = 1e-4, digits: int = 2) -> str:
    mean, width = interval(values / unit)
    if np.isnan(mean):
        return ""
    return f"{mean:+.{digits}f}" + ("" if np.isnan(width) else f" ± {width:.{digits}f}")


def clipped_text(rows: list[dict], setting: str, side: str) -> str:
    """Share of tokens beyond one end of the clip interval, and their mean probability before the step."""
    share = 100 * paired(rows, setting, f"predicted/clip/{side}", None).mean()
    probability = paired(rows, setting, f"predicted/clip/prob_{side}", None)  # only branches with such tokens
    return f"{share:.2f}" + (f" ({probability.mean():.2f})" if len(probability) else "")


def agreement(predicted: np.ndarray, measured: np.ndarray) -> str:
    """Share of the branches in which the prediction has the sign of the measured change."""
    moved = measured != 0
    return f"{np.mean(np.sign(predicted[moved]) == np.sign(measured[moved])):.0%}" if moved.any() else ""


def table(rows: list[dict]) -> str:
    """Markdown: paired differences to the baseline, and how well the predictions rank the measured changes."""
    seeds = sorted({row["seed"] for row in rows})
    about = ", ".join(f"{name} {rows[0][name]}" for name in SAME)
    coast, own = (text(paired(rows, name, "delta/rollout", None)) for name in (COAST, OWN))
    lines = [
        f"{count(rows)} branches of {len(seeds)} runs ({about}). Entropy: change over one step, in 1e-4 nats per "
        f"token, less {BASELINE}'s from the same state and rollout. Mean and 95 % interval over branches.",
        *("", *by_setting(rows)),
        *("", f"The run's own setting: {own}. As many optimizer steps without a gradient, by momentum: {coast}."),
        *("", *by_quadrant(rows)),
        *(("", *by_seed(rows, seeds)) if len(seeds) > 1 else ()),
        *("", *beyond_first_order(rows)),
        *("", *ranks(rows)),
    ]
    return "\n".join(lines) + "\n"


def by_setting(rows: list[dict]) -> list[str]:
    """A line for each setting: changes of entropy and logprobs, their predictions, and clipped tokens."""
    lines = [
        "| setting | on the rollout | of it on clipped tokens | to first order in the weights | velocity | same sign: "
        "first order, velocity | on held-out tokens | log p of right | of wrong | KL "
        "| clipped below, above, % (their probability) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = (
        *("delta/rollout", "delta/clipped", "linear/rollout", "predicted/velocity/total", "delta/held_out"),
        *("logprob/right", "logprob/wrong", "kl/rollout"),
    )
    for name in [BASELINE, *others(rows)]:
        columns = [paired(rows, name, key, baseline_of(name)) for key in keys]
        measured, own, linear, velocity, held_out, right, wrong, kl = columns
        clipped = ", ".join(clipped_text(rows, name, side) for side in ("low", "high"))
        signs = f"{agreement(linear, measured)}, {agreement(velocity, measured)}"
        cells = [*map(text, (measured, own, linear, velocity)), signs, *map(text, (held_out, right, wrong, kl))]
        lines.append(f"| {label(name)} | {' | '.join(cells)} | {clipped} |")
    return lines


def by_quadrant(rows: list[dict]) -> list[str]:
    lines = ["| by quadrant | PA&LP | NA&HP | PA&HP | NA&LP |", "|---|---|---|---|---|"]
    for name in [BASELINE, *others(rows)]:
        quadrants = ("pa_lp", "na_hp", "pa_hp", "na_lp")
        cells = (text(paired(rows, name, f"delta/{quadrant}", baseline_of(name))) for quadrant in quadrants)
        lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    return lines


def by_seed(rows: list[dict], seeds: list[int]) -> list[str]:
    lines = [f"| less {BASELINE}'s, on the rollout | {' | '.join(f'seed {seed}' for seed in seeds)} |"]
    lines.append("|---|" + "---|" * len(seeds))
    for name in others(rows):
        each = (paired([row for row in rows if row["seed"] == seed], name, "delta/rollout") for seed in seeds)
        lines.append(f"| {name} | {' | '.join(map(text, each))} |")
    return lines


def beyond_first_order(rows: list[dict]) -> list[str]:
    """The part of each change that its first order in the weights does not predict."""
    lines = [f"| less {BASELINE}'s | measured - first order | its rank correlation with KL |", "|---|---|---|"]
    for name in others(rows):
        beyond = paired(rows, name, "delta/rollout") - paired(rows, name, "linear/rollout")
        lines.append(f"| {name} | {text(beyond)} | {rank(beyond, paired(rows, name, 'kl/rollout'))} |")
    return lines


def ranks(rows: list[dict]) -> list[str]:
    """Rank correlations of the predictions with the measured changes, at the run's step and at a tenth of it."""
    lines = ["| rank correlation with the measured change | at the run's step | at a tenth of it |", "|---|---|---|"]
    tokens = (text(paired(rows, name, "rank/tokens", None), 1.0) for name in (OWN, SMALL))
    lines.append(f"| velocity, over the tokens of a rollout, mean | {' | '.join(tokens)} |")
    for name, key in (("velocity", "predicted/velocity/total"), ("first order", "linear/rollout")):
        cells = (over_branches(rows, setting, key) for setting in (OWN, SMALL))
        lines.append(f"| {name}, over the branches | {' | '.join(cells)} |")
    return lines


def baseline_of(setting: str) -> str | None:
    """The setting that is subtracted: none from the baseline itself."""
    return None if setting == BASELINE else BASELINE


def label(setting: str) -> str:
    return f"{setting} (itself)" if setting == BASELINE else setting


def over_branches(rows: list[dict], setting: str, key: str) -> str:
    """Rank correlation of a prediction with the change of entropy on the rollout, over branches."""
    return rank(*(paired(rows, setting, name, None) for name in (key, "delta/rollout")))


def rank(a: np.ndarray, b: np.ndarray) -> str:
    """Spearman's rank correlation over branches; empty for fewer than four, and for equal values."""
    return f"{stats.spearmanr(a, b).statistic:+.2f}" if len(a) > 3 and np.ptp(a) and np.ptp(b) else ""


def figure(rows: list[dict]) -> plt.Figure:
    """Bars: differences to the baseline in the measured change of entropy, and in the velocity that predicts it."""
    settings = others(rows)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 1 + 0.5 * len(settings)), sharey=True, layout="constrained")
    draw_measured(left, rows, settings)
    linear = [1e4 * paired(rows, name, "linear/rollout").mean() for name in settings]
    left.plot(linear, np.arange(len(settings)) - 0.2, "k|", markersize=12, label="first order in the weights")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=3)
    means, widths = np.array([interval(1e4 * paired(rows, name, "predicted/velocity/total")) for name in settings]).T
    right.barh(np.arange(len(settings)), means, 0.5, xerr=widths, color="gray", error_kw={"linewidth": 1})
    right.set(title=f"predicted, less {BASELINE}'s", xlabel="entropy velocity, 1e-4 nats per token")
    right.axvline(0, color="gray", linewidth=0.5)
    right.spines[["top", "right"]].set_visible(False)
    return fig


def count(rows: list[dict]) -> int:
    """The number of branches."""
    return len({(row["seed"], row["step"]) for row in rows})


def others(rows: list[dict]) -> list[str]:
    """The settings that are compared with the baseline."""
    return [name for name in dict.fromkeys(row["setting"] for row in rows) if name not in (BASELINE, OWN, SMALL, COAST)]


def draw_measured(axis, rows: list[dict], settings: list[str]) -> None:
    """The measured differences to the baseline, with their intervals, a pair of bars for each setting."""
    y, bars = np.arange(len(settings)), {"delta/rollout": "on the rollout", "delta/held_out": "on held-out tokens"}
    for offset, color, (key, label) in zip((-0.2, 0.2), ("#1f4e9c", "#e69f00"), bars.items(), strict=True):
        means, widths = np.array([interval(1e4 * paired(rows, name, key)) for name in settings]).T
        axis.barh(y + offset, means, 0.38, xerr=widths, color=color, label=label, error_kw={"linewidth": 1})
    axis.set(
        title=f"measured, less {BASELINE}'s, {count(rows)} branches", xlabel="change of entropy in a step, 1e-4 nats"
    )
    axis.set_yticks(y, settings)
    axis.invert_yaxis()
    axis.axvline(0, color="gray", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
