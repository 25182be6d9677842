"""Curves of runs, from their metrics.jsonl.

    python -m tools.figures out/run-a out/run-b ... --out figures        or: make figures RUNS="out/run-a out/run-b"

Runs that differ only in their seed have one colour: a thin line each, and their mean as a thick one. Writes curves.png
and curves.svg: entropy, held-out accuracy, clip shares, and for each group of runs the quadrants that move its entropy.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from ce_gppo.config import command
from ce_gppo.log import numbers, read_rows
from ce_gppo.messages import UserError

QUADRANTS = {"pa_lp": "PA&LP", "na_hp": "NA&HP", "pa_hp": "PA&HP", "na_lp": "NA&LP"}  # the first two raise entropy
QUADRANT_COLORS = {"pa_lp": "#2a9d8f", "na_hp": "#8ecae6", "pa_hp": "#f4a261", "na_lp": "#d62828"}
NOT_SETTINGS = ("seed", "run_name", "out", "resume")  # runs of one group may differ in these


@dataclass
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of runs
    out: Path = field(default_factory=lambda: Path("figures"))  # folder to write to


def load(folder: Path) -> tuple[dict, list[dict]]:
    """(settings without the seed, rows) of a run."""
    try:
        config = json.loads((folder / "config.json").read_text())["config"]
        rows = [numbers(row) for row in read_rows(folder / "metrics.jsonl")]
        label_of(config)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: not the folder of a run, with config.json and metrics.jsonl ({error})") from None
    if not any("entropy/mean" in row for row in rows):
        raise UserError(f"{folder}: metrics.jsonl has no step of training yet")
    return {name: value for name, value in config.items() if name not in NOT_SETTINGS}, rows


def label_of(config: dict) -> str:
    betas = "" if config.get("beta1") is None else f" ({config['beta1']:g}, {config['beta2']:g})"
    return f"{config['objective']}{betas}"


def group_runs(runs: list[tuple[dict, list[dict]]]) -> dict[str, list[list[dict]]]:
    """label -> the runs with the same settings. A label has the objective, and each setting that groups differ in."""
    groups: dict[str, list[list[dict]]] = defaultdict(list)
    names = dict.fromkeys(name for config, _ in runs for name in config if name not in ("objective", "beta1", "beta2"))
    differing = [name for name in names if len({json.dumps(config.get(name)) for config, _ in runs}) > 1]
    for config, rows in runs:
        others = (f"{name} {config[name]}" for name in differing if config.get(name) is not None)
        label = ", ".join([label_of(config), *others])
        groups[label.replace("$", r"\$")].append(rows)  # matplotlib would read text between two $ as a formula
    return groups


def series(runs: list[list[dict]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [K], values [runs, K]) of a metric, at the steps at which all runs have it."""
    values = [{row["step"]: row[name] for row in rows if name in row} for rows in runs]
    steps = sorted(set.intersection(*(set(v) for v in values)))
    return np.array(steps), np.array([[v[step] for step in steps] for v in values])


def draw(axis, runs: list[list[dict]], name: str, **style) -> None:
    """The mean of the runs as a thick line, and each of several runs as a thin one."""
    steps, values = series(runs, name)
    if len(steps) == 0:
        return
    axis.plot(steps, values.mean(0), **{"linewidth": 2} | style)
    for run in values if len(values) > 1 else ():
        axis.plot(steps, run, **style | {"linewidth": 0.5, "alpha": 0.6, "label": None})


def draw_velocity(axis, runs: list[list[dict]]) -> None:
    """The quadrants' velocities, stacked: positive ones above the axis, negative ones below. Black is the sum."""
    steps, totals = series(runs, "velocity/total")
    if len(steps) == 0:
        return
    by_step = [{row["step"]: row for row in rows if "velocity/total" in row} for rows in runs]
    for sign in (1, -1):
        bottom = np.zeros(len(steps))
        for quadrant, label in QUADRANTS.items():
            values = [[rows[step].get(f"velocity/{quadrant}", 0.0) for step in steps] for rows in by_step]
            # A quadrant keeps its place in the stack; its height is 0 at steps at which it has the other sign.
            top = bottom + sign * np.maximum(sign * np.mean(values, 0), 0)
            style = {"color": QUADRANT_COLORS[quadrant], "linewidth": 0, "label": label if sign == 1 else None}
            axis.fill_between(steps, bottom, top, **style)
            bottom = top
    axis.plot(steps, totals.mean(0), color="black", linewidth=1, label="total")
    axis.axhline(0, color="gray", linewidth=0.5)


def figure(groups: dict[str, list[list[dict]]]) -> plt.Figure:
    names = sorted({name for runs in groups.values() for rows in runs for row in rows for name in row})
    accuracy = next((name for name in names if name.endswith("/avg_at_k")), None)
    fig = plt.figure(figsize=(4 * max(3, len(groups)), 7.5), layout="constrained")
    top, bottom = fig.subfigures(2, 1)
    entropy, held_out, clipped = top.subplots(1, 3)
    entropy.set(title="entropy", ylabel="nats per token")
    held_out.set(title="held-out accuracy" + (f", {accuracy.split('/')[1]}" if accuracy else ""), ylabel="avg@k")
    clipped.set(title="tokens outside the clip interval", ylabel="share")
    colors = plt.colormaps["tab10" if len(groups) <= 10 else "turbo"].resampled(max(10, len(groups)))
    for i, (label, runs) in enumerate(groups.items()):
        color, seeds = colors(i), f", {len(runs)} seeds" if len(runs) > 1 else ""
        draw(entropy, runs, "entropy/mean", color=color, label=label + seeds)
        if accuracy:
            draw(held_out, runs, accuracy, color=color)
        draw(clipped, runs, "clip/low", color=color)
        draw(clipped, runs, "clip/high", color=color, linestyle="--")
    clipped.plot([], [], color="gray", label="below, A < 0")
    clipped.plot([], [], color="gray", linestyle="--", label="above, A > 0")
    clipped.legend(frameon=False)
    top.legend(*entropy.get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=min(4, len(groups)))
    for axis in (entropy, held_out, clipped):
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
    below = bottom.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, (label, runs) in zip(below, groups.items(), strict=True):
        draw_velocity(axis, runs)
        axis.set(title=f"entropy velocity, {label}", xlabel="step")
    below[0].set_ylabel("rate in the logits")
    if below[0].get_legend_handles_labels()[0]:
        below[-1].legend(*below[0].get_legend_handles_labels(), frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in (entropy, held_out, clipped, *below):
        axis.spines[["top", "right"]].set_visible(False)
    return fig


def main(config: Config) -> None:
    if not config.runs:
        raise UserError("name the folders of one or more runs")
    folders = {folder.resolve(): folder for folder in config.runs}  # each once: it would count as another seed
    fig = figure(group_runs([load(folder) for folder in folders.values()]))
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "svg"):
            path = config.out / f"curves.{suffix}"
            fig.savefig(path, dpi=110)
            print(path)
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error})") from None


if __name__ == "__main__":
    command(main, Config, __doc__)
