"""Curves of runs, from their metrics.jsonl alone.

    python figures.py out/run-a out/run-b ... --out figures        or: make figures RUNS="out/run-a out/run-b"

Runs that differ only in their seed are one curve, the mean, with a band from the smallest to the largest. Writes
curves.png and curves.svg: entropy, held-out accuracy, clip shares, and for each objective what pushes its entropy.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

from prompts import UserError

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

QUADRANTS = {"pa_lp": "PA&LP", "na_hp": "NA&HP", "pa_hp": "PA&HP", "na_lp": "NA&LP"}  # the first two push entropy up
QUADRANT_COLORS = {"pa_lp": "#2a9d8f", "na_hp": "#8ecae6", "pa_hp": "#f4a261", "na_lp": "#d62828"}


@dataclass
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of runs
    out: Path = field(default_factory=lambda: Path("figures"))  # folder to write to


def load(folder: Path) -> tuple[str, list[dict]]:
    """(label, rows) of a run; the label names the objective, and what else sets it apart."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no metrics.jsonl there, so it is not the folder of a run")
    config = json.loads((folder / "config.json").read_text())["config"]
    label = config["objective"]
    if label == "ce_gppo":
        label += f" ({config['beta1']:g}, {config['beta2']:g})"
    if config.get("entropy_coef"):
        label += f", bonus {config['entropy_coef']:g}"
    return label, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(runs: list[list[dict]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [K], values [runs, K]) of a metric, where all the runs have it."""
    values = [{row["step"]: row[name] for row in rows if name in row} for rows in runs]
    steps = sorted(set.intersection(*(set(v) for v in values)))
    return np.array(steps), np.array([[v[step] for step in steps] for v in values])


def draw(axis, runs: list[list[dict]], name: str, **style) -> None:
    steps, values = series(runs, name)
    if len(steps) == 0:
        return
    axis.plot(steps, values.mean(0), **style)
    if len(values) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def draw_velocity(axis, runs: list[list[dict]]) -> None:
    """Stacked: what pushes entropy up above the line, what pushes it down below; black is the sum."""
    up = down = 0.0
    for quadrant, label in QUADRANTS.items():
        steps, values = series(runs, f"velocity/{quadrant}")
        if len(steps) == 0:
            return
        mean = values.mean(0)
        base = np.where(mean >= 0, up, down)
        axis.fill_between(steps, base, base + mean, color=QUADRANT_COLORS[quadrant], label=label, linewidth=0)
        up, down = up + np.maximum(mean, 0), down + np.minimum(mean, 0)
    steps, values = series(runs, "velocity/total")
    axis.plot(steps, values.mean(0), color="black", linewidth=1, label="total")
    axis.axhline(0, color="gray", linewidth=0.5)


def figure(groups: dict[str, list[list[dict]]]) -> plt.Figure:
    accuracy = sorted(
        {key for runs in groups.values() for rows in runs for row in rows for key in row if "avg_at_k" in key}
    )
    columns = max(3, len(groups))
    fig = plt.figure(figsize=(4 * columns, 7), layout="constrained")
    top, bottom = fig.subfigures(2, 1)
    for axis, title, ylabel in zip(
        top.subplots(1, 3),
        (
            "entropy",
            f"held-out accuracy{', ' + accuracy[0].split('/')[1] if accuracy else ''}",
            "tokens out of the clip interval",
        ),
        ("nats a token", "avg@k", "share"),
        strict=True,
    ):
        axis.set(title=title, ylabel=ylabel, xlabel="step")
        for i, (label, runs) in enumerate(groups.items()):
            color = f"C{i}"
            if title == "entropy":
                draw(axis, runs, "entropy/mean", color=color, label=f"{label}, {len(runs)} run{'s' * (len(runs) > 1)}")
            elif "accuracy" in title and accuracy:
                draw(axis, runs, accuracy[0], color=color)
            else:
                draw(axis, runs, "clip/low", color=color, label="low (A < 0)" if i == 0 else None)
                draw(axis, runs, "clip/high", color=color, linestyle="--", label="high (A > 0)" if i == 0 else None)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
        axis.set_ylim(bottom=0)
    for i, (axis, (label, runs)) in enumerate(
        zip(bottom.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups.items(), strict=True)
    ):
        draw_velocity(axis, runs)
        axis.set(title=f"entropy velocity, {label}", xlabel="step")
        if i == 0:
            axis.set_ylabel("nats a token")
            axis.legend(frameon=False, ncols=2)
    for axis in fig.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return fig


def main(config: Config) -> None:
    groups: dict[str, list[list[dict]]] = defaultdict(list)
    for folder in config.runs:
        label, rows = load(folder)
        groups[label].append(rows)
    fig = figure(groups)
    config.out.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        path = config.out / f"curves.{suffix}"
        fig.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"figures.py: {error}", file=sys.stderr)
        sys.exit(2)
