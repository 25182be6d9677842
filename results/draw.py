"""Figures of a sweep: entropy and accuracy of its settings."""

from results import effects
from results.series import Runs
from results.settings import CE, STRONG, WEAK
from tools import figures
from tools.figures import plt

ROWS = {  # of panels: title -> settings
    "objectives": ("grpo", "dapo", "cispo", "gppo", "ce_gppo (0.75, 1)", "lp_only (1, 1)"),
    "betas of ce_gppo": ("grpo", *CE, "ce_gppo (1, 0)"),
    "entropy bonus and target": ("grpo", *WEAK, *STRONG, "ce_gppo, target 0.9"),
}
SUMMARY = ("grpo", "ce_gppo (0, 1)", "ce_gppo (0.5, 1)", "gppo", "lp_only (1, 1)")


def curves(runs: Runs) -> plt.Figure:
    """Entropy and accuracy: a row for the objectives, one for the betas, and one for bonuses and target."""
    rows = {title: [name for name in names if name in runs.groups] for title, names in ROWS.items()}
    rows = {title: names for title, names in rows.items() if set(names) - {"grpo"}} or {"objectives": ["grpo"]}
    size = {"figsize": (11, 0.4 + 3 * len(rows)), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(len(rows), 2, sharey="col", **size)
    for pair, (title, names) in zip(axes, rows.items(), strict=True):
        draw_panels(*pair, runs, names, f": {title}")
    return fig


def summary(runs: Runs, rows: list[dict]) -> plt.Figure:
    """Five settings: entropy, accuracy, and the change of entropy in one step of each. rows: branches."""
    fig, (left, right, last) = plt.subplots(1, 3, figsize=(14.1, 3.6), layout="constrained")
    draw_panels(left, right, runs, [name for name in SUMMARY if name in runs.groups])
    effects.bars(last, rows, [name for name in effects.others(rows) if name in SUMMARY], "delta/rollout")
    last.set_title(f"change in one step at lr {rows[0]['lr']:g}, less grpo's")
    return fig


def draw_panels(left, right, runs: Runs, names: list[str], title: str = "") -> None:
    """Entropy on the left, accuracy on the right, and beside it a legend for both. Thin lines: each seed."""
    for i, name in enumerate(names):
        color = "black" if name == "grpo" else plt.colormaps["turbo"](i / len(names))  # of betas: from blue to red
        rows = list(map(rows_of, runs.groups[name]))
        figures.draw(left, rows, "entropy/mean", color=color)
        figures.draw(right, rows, f"eval/{runs.source}/avg_at_k", label=f"{name}, {len(rows)} seeds", color=color)
    left.set(title=f"entropy{title}", xlabel="step", ylabel="nats per token", ylim=(0, None))
    right.set(title=f"held-out accuracy{title}", xlabel="step", ylabel="avg@8")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # inside, it would hide a run that unlearns


def rows_of(run: dict) -> list[dict]:
    """A run's series as rows of a metrics.jsonl, which tools/figures.py draws."""
    rows = {0: {"step": 0}}
    for name, values in run["series"].items():
        steps = run["eval_steps"] if name.startswith("eval/") else range(1, len(values) + 1)
        for step, value in zip(steps, values, strict=True):
            if value is not None:
                rows.setdefault(step, {"step": step})[name] = value
    return [rows[step] for step in sorted(rows)]
