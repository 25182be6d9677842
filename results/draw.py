"""Figures of a sweep: entropy and accuracy of its settings, and their velocities.

groups: {setting: its runs}, each run a row of the results, as results/sweep.py writes them.
"""

from results import effects
from results.settings import CE
from tools import figures
from tools.figures import plt

COLORS = {  # those of ce_gppo go from blue to red as beta2 - beta1 falls
    "grpo": "black",
    "dapo": "#e69f00",
    "gppo": "#2ca02c",
    "ce_gppo (0, 1)": "#1f4e9c",
    "ce_gppo (0.5, 1)": "#5fa8e6",
    "ce_gppo (0.75, 1)": "#e6398b",
    "ce_gppo (1, 0.5)": "#b2182b",
    "lp_only (1, 1)": "#ff7f0e",
    "grpo, bonus 0.001": "#b8b800",
    "grpo, bonus 0.003": "#7a5c00",
    "grpo, bonus 0.01": "#b8b800",
    "grpo, bonus 0.03": "#7a5c00",
    "ce_gppo, target 0.9": "#00897b",
}
ROWS = {  # of panels: title -> settings
    "objectives": ("grpo", "dapo", "gppo", "ce_gppo (0.75, 1)", "lp_only (1, 1)"),
    "betas of ce_gppo": ("grpo", *CE),
    "entropy bonus and target": ("grpo", *(name for name in COLORS if "bonus" in name or "target" in name)),
}
SUMMARY = ("grpo", "ce_gppo (0, 1)", "ce_gppo (0.5, 1)", "gppo", "lp_only (1, 1)")


def curves(groups: dict[str, list[dict]], source: str) -> plt.Figure:
    """Entropy and accuracy: a row for the objectives, one for the betas, and one for bonuses and target."""
    rows = {title: [name for name in names if name in groups] for title, names in ROWS.items()}
    rows = {title: names for title, names in rows.items() if set(names) - {"grpo"}} or {"objectives": list(groups)}
    size = {"figsize": (11, 0.4 + 3 * len(rows)), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(len(rows), 2, sharey="col", **size)
    for (left, right), (title, names) in zip(axes, rows.items(), strict=True):
        draw_panels(left, right, {name: groups[name] for name in names}, source)
        left.set_title(f"entropy: {title}")
        right.set_title(f"held-out accuracy: {title}")
    return finish(fig, groups)


def summary(groups: dict[str, list[dict]], source: str, rows: list[dict]) -> plt.Figure:
    """Five settings: entropy, accuracy, and the change of entropy in one step of each.

    rows: branches, as results/branch.py writes them; without rows there is no third panel.
    """
    columns = 3 if rows else 2
    fig, (left, right, *last) = plt.subplots(1, columns, figsize=(4.2 * columns + 1.5, 3.6), layout="constrained")
    groups = {name: groups[name] for name in SUMMARY if name in groups}
    draw_panels(left, right, groups, source)
    left.set_title("entropy")
    right.set_title("held-out accuracy")
    for axis in last:
        names = [name for name in effects.others(rows) if name in ("(0.5, 1)", "(1, 1)", "lp_only (1, 1)", "(0, 1)")]
        effects.draw_measured(axis, rows, names)
        axis.set_title(f"one step at lr {rows[0]['lr']:g}, less grpo's")
        axis.legend(frameon=False)
    return finish(fig, groups)


def draw_panels(left, right, groups: dict[str, list[dict]], source: str) -> None:
    """Entropy on the left, accuracy on the right, and beside it a legend for both."""
    for name, runs in groups.items():
        rows = list(map(rows_of, runs))
        figures.draw(left, rows, "entropy/mean", color=COLORS[name])
        figures.draw(right, rows, f"eval/{source}/avg_at_k", label=name, color=COLORS[name])
    left.set(xlabel="step", ylabel="nats per token")
    right.set(xlabel="step", ylabel="avg@8")
    left.set_ylim(bottom=0)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # inside, it would hide a run that unlearns


def velocities(groups: dict[str, list[dict]]) -> plt.Figure:
    """The parts of the quadrants in the entropy velocity, a panel for each setting."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = {"figsize": (3 * columns, 2.4 * rows), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(rows, columns, sharex=True, sharey=True, **size)
    for axis, (name, runs) in zip(axes.flat, groups.items(), strict=False):
        figures.draw_velocity(axis, list(map(rows_of, runs)))
        axis.set_title(name)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=5)
    fig.supxlabel("step")
    fig.supylabel("entropy velocity, nats per token, mean of the seeds")
    return finish(fig)


def rows_of(run: dict) -> list[dict]:
    """A run's series as rows of a metrics.jsonl, which tools/figures.py draws."""
    rows = {0: {"step": 0}}
    for name, values in run["series"].items():
        steps = run["eval_steps"] if name.startswith("eval/") else range(1, len(values) + 1)
        for step, value in zip(steps, values, strict=True):
            if value is not None:
                rows.setdefault(step, {"step": step})[name] = value
    return [rows[step] for step in sorted(rows)]


def finish(fig: plt.Figure, groups: dict[str, list[dict]] | None = None) -> plt.Figure:
    """Remove frames; with groups, also write the number of seeds above the panels."""
    for axis in fig.axes:
        axis.spines[["top", "right"]].set_visible(False)
    if groups:
        least, most = min(map(len, groups.values())), max(map(len, groups.values()))
        seeds = f"{most}" if least == most else f"{least} to {most}"
        fig.suptitle(f"thick lines: mean of {seeds} seeds; thin lines: each seed" if most > 1 else "one seed")
    return fig
