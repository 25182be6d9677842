"""Table and figure of the branches that results/branch.py made: paired differences, their intervals, the predictions.

Values are {(seed, step): number}, one for each branch.
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

from ce_gppo.messages import UserError
from results.series import difference, interval, markdown
from tools.figures import QUADRANTS, plt

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


def values_of(rows: list[dict], setting: str, name: str) -> dict:
    return {(row["seed"], row["step"]): row[name] for row in rows if row["setting"] == setting and name in row}


def paired(rows: list[dict], setting: str, name: str) -> dict:
    """A metric of a setting minus the baseline's in the same branch, for the branches that have both."""
    own = values_of(rows, setting, name)
    return own if setting == BASELINE else difference(own, values_of(rows, BASELINE, name))


def text(values: dict, unit: float = 1e-4) -> str:
    mean, half = interval(value / unit for value in values.values())
    return f"{mean:+.2f}" * bool(values) + f" ± {half:.2f}" * bool(np.isfinite(half))


def clipped_text(rows: list[dict], setting: str, side: str) -> str:
    """Share of tokens beyond one end of the clip interval, and their mean probability before the step."""
    share, probability = (values_of(rows, setting, f"predicted/clip/{name}") for name in (side, f"prob_{side}"))
    known = f" ({np.mean(list(probability.values())):.2f})" if probability else ""  # only branches with such tokens
    return f"{100 * np.mean(list(share.values())):.2f}{known}"


def agreement(predicted: dict, measured: dict) -> str:
    """Share of the branches in which the prediction has the sign of the measured change."""
    same = [np.sign(predicted[key]) == np.sign(value) for key, value in measured.items() if value]
    return f"{np.mean(same):.0%}" if same else ""


def rank(a: dict, b: dict) -> str:
    """Spearman's rank correlation over branches; empty for fewer than four, and for equal values."""
    a, b = list(a.values()), [b[key] for key in a]
    return f"{stats.spearmanr(a, b).statistic:+.2f}" if len(a) > 3 and np.ptp(a) and np.ptp(b) else ""


def table(rows: list[dict]) -> str:
    """Markdown: paired differences to the baseline, and how well the predictions rank the measured changes."""
    seeds = sorted({row["seed"] for row in rows})
    about = ", ".join(f"{name} {rows[0][name]}" for name in SAME)
    coast, own = (text(values_of(rows, name, "delta/rollout")) for name in (COAST, OWN))
    parts = [
        f"{count(rows)} branches of {len(seeds)} runs ({about}). Entropy: change over one step, in 1e-4 nats per "
        f"token, less {BASELINE}'s from the same state and rollout. Mean and 95 % interval over branches.",
        by_setting(rows),
        f"The run's own setting: {own}. As many optimizer steps without a gradient, by momentum: {coast}.",
        markdown(
            ["by quadrant", *QUADRANTS.values()],
            [
                [label(name), *(text(paired(rows, name, f"delta/{quadrant}")) for quadrant in QUADRANTS)]
                for name in (BASELINE, *others(rows))
            ],
        ),
        by_seed(rows, seeds),
        beyond_first_order(rows),
        ranks(rows),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def by_setting(rows: list[dict]) -> str:
    """Changes of entropy and logprobs of each setting, their predictions, and clipped tokens."""
    head = (
        "setting|on the rollout|of it on clipped tokens|to first order in the weights|velocity|same sign: first order, "
        "velocity|on held-out tokens|log p of right|of wrong|KL|clipped below, above, % (their probability)"
    )
    keys = ("delta/rollout", "delta/clipped", "linear/rollout", "predicted/velocity/total", "delta/held_out")
    lines = []
    for name in (BASELINE, *others(rows)):
        columns = [paired(rows, name, key) for key in (*keys, "logprob/right", "logprob/wrong", "kl/rollout")]
        signs = ", ".join(agreement(predicted, columns[0]) for predicted in columns[2:4])
        clipped = ", ".join(clipped_text(rows, name, side) for side in ("low", "high"))
        lines.append([label(name), *map(text, columns[:4]), signs, *map(text, columns[4:]), clipped])
    return markdown(head.split("|"), lines)


def by_seed(rows: list[dict], seeds: list[int]) -> str:
    parts = [[row for row in rows if row["seed"] == seed] for seed in seeds]
    lines = [[name, *(text(paired(part, name, "delta/rollout")) for part in parts)] for name in others(rows)]
    head = [f"less {BASELINE}'s, on the rollout", *(f"seed {seed}" for seed in seeds)]
    return markdown(head, lines) if len(seeds) > 1 else ""


def beyond_first_order(rows: list[dict]) -> str:
    """The part of each change that its first order in the weights does not predict."""
    lines = []
    for name in others(rows):
        beyond = difference(paired(rows, name, "delta/rollout"), paired(rows, name, "linear/rollout"))
        lines.append([name, text(beyond), rank(beyond, paired(rows, name, "kl/rollout"))])
    return markdown([f"less {BASELINE}'s", "measured - first order", "its rank correlation with KL"], lines)


def ranks(rows: list[dict]) -> str:
    """Rank correlations of the predictions with the measured changes, at the run's step and at a tenth of it."""
    tokens = (text(values_of(rows, name, "rank/tokens"), 1.0) for name in (OWN, SMALL))
    lines = [["velocity, over the tokens of a rollout, mean", *tokens]]
    for name, key in (("velocity", "predicted/velocity/total"), ("first order", "linear/rollout")):
        cells = (rank(*(values_of(rows, setting, k) for k in (key, "delta/rollout"))) for setting in (OWN, SMALL))
        lines.append([f"{name}, over the branches", *cells])
    return markdown(["rank correlation with the measured change", "at the run's step", "at a tenth of it"], lines)


def label(setting: str) -> str:
    return f"{setting} (itself)" if setting == BASELINE else setting


def count(rows: list[dict]) -> int:
    """The number of branches."""
    return len({(row["seed"], row["step"]) for row in rows})


def others(rows: list[dict]) -> list[str]:
    """The settings that are compared with the baseline."""
    return [name for name in dict.fromkeys(row["setting"] for row in rows) if name not in (BASELINE, OWN, SMALL, COAST)]


# ----------------------------------------------------------------------------------------------------------------------


def figure(rows: list[dict]) -> plt.Figure:
    """Bars: differences to the baseline in the measured change of entropy, and in the velocity that predicts it."""
    settings = others(rows)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 1 + 0.5 * len(settings)), sharey=True, layout="constrained")
    draw_measured(left, rows, settings)
    linear = [1e4 * interval(paired(rows, name, "linear/rollout").values())[0] for name in settings]
    left.plot(linear, np.arange(len(settings)) - 0.2, "k|", markersize=12, label="first order in the weights")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=3)
    bars(right, rows, settings, "predicted/velocity/total", height=0.5, color="gray")
    right.set(title=f"predicted, less {BASELINE}'s", xlabel="entropy velocity, 1e-4 nats per token")
    return fig


def draw_measured(axis, rows: list[dict], settings: list[str]) -> None:
    """The measured differences to the baseline, with their intervals, a pair of bars for each setting."""
    bars(axis, rows, settings, "delta/rollout", -0.2, color="#1f4e9c", label="on the rollout")
    bars(axis, rows, settings, "delta/held_out", 0.2, color="#e69f00", label="on held-out tokens")
    axis.set_title(f"measured, less {BASELINE}'s, {count(rows)} branches")
    axis.set_xlabel("change of entropy in a step, 1e-4 nats")
    axis.set_yticks(range(len(settings)), settings)
    axis.invert_yaxis()


def bars(axis, rows: list[dict], settings: list[str], name: str, offset: float = 0.0, height=0.38, **style) -> None:
    means, halves = np.array([interval(paired(rows, setting, name).values()) for setting in settings]).T * 1e4
    halves[np.isinf(halves)] = np.nan  # of a single branch
    axis.barh(np.arange(len(settings)) + offset, means, height, xerr=halves, error_kw={"linewidth": 1}, **style)
    axis.axvline(0, color="gray", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
