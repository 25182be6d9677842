"""Figures, table and verdicts from the runs of a sweep.

    .venv/bin/python -m results.claims results/reproduction.jsonl              writes reproduction.md and two figures
    .venv/bin/python -m results.claims results/reproduction.jsonl --steps 40   of the first 40 steps: reproduction-40.md

Start it from the repository root. A claim is decided by 95 % intervals over seeds: Student's t, of differences between
runs of the same seed, which share the order of the problems. "held": all intervals of the claim are on the right side.
"not held": one is on the wrong side. "undecided": neither. The rules were written before the runs were made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import t as student

from ce_gppo.config import command
from ce_gppo.types import UserError
from results.sweep import MORE, SETTINGS, read
from tools import figures
from tools.figures import plt

LAST = 10  # steps; "the end" of a run is their mean
EARLY = 15  # first steps, for claim 3
IDLE = 0.05  # a run is idle from this share of responses that are cut at the limit, at its end
MARGIN = 0.02  # "at least" allows for so much less accuracy
CE = ("ce_gppo (0, 1)", "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)", "ce_gppo (1, 0.5)")  # by beta2 - beta1, falling
LOW_BETA, DEFAULT = "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)"
WEAK, STRONG = "grpo, bonus 0.01", "grpo, bonus 0.03"
SIGNS = {"pa_lp": 1, "na_hp": 1, "pa_hp": -1, "na_lp": -1}  # of the velocities, by the theory


@dataclass
class Config:
    results: Annotated[Path, tyro.conf.Positional]  # JSONL file that results.sweep made
    steps: int | None = None  # use only so many, as if the runs had ended there; None: all
    without_idle: bool = False  # without the runs that stopped to end their responses


class Sweep:
    """The runs by setting and seed. Each method that takes a setting returns {seed: number}."""

    def __init__(self, rows: list[dict]):
        self.rows = {(row["setting"], row["seed"]): row for row in rows}
        self.settings = [name for name in SETTINGS | MORE if any(name == other for other, _ in self.rows)]

    def of(self, setting: str, function) -> dict[int, float]:
        return {seed: function(row["series"]) for (name, seed), row in self.rows.items() if name == setting}

    def entropy_end(self, setting: str) -> dict[int, float]:
        return self.of(setting, lambda s: np.mean(s["entropy/mean"][-LAST:]))

    def entropy_kept(self, setting: str) -> dict[int, float]:
        return self.of(setting, lambda s: np.mean(s["entropy/mean"][-LAST:]) / s["entropy/mean"][0])

    def entropy_whole(self, setting: str) -> dict[int, float]:
        return self.of(setting, lambda s: np.mean(s["entropy/mean"]))

    def entropy_early(self, setting: str) -> dict[int, float]:
        return self.of(setting, lambda s: np.mean(s["entropy/mean"][:EARLY]))

    def entropy_spread(self, setting: str) -> dict[int, float]:
        """Standard deviation around a cubic fitted to the run: a steady fall is then not variation."""
        return self.of(setting, lambda s: np.std(residual(s["entropy/mean"])))

    def accuracy(self, setting: str) -> dict[int, float]:
        return self.of(setting, lambda s: s["eval/arithmetic/avg_at_k"][-1])

    def pass_kept(self, setting: str) -> dict[int, float]:
        return self.of(setting, lambda s: s["eval/arithmetic/pass_at_k"][-1] / s["eval/arithmetic/pass_at_k"][0])

    def average(self, setting: str, name: str) -> dict[int, float]:
        return self.of(setting, lambda s: mean_of(s[name]))


def residual(values: list[float]) -> np.ndarray:
    steps = np.arange(len(values))
    return np.array(values) - np.polyval(np.polyfit(steps, values, 3), steps)


def mean_of(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else float("nan")


def cut(series: dict[str, list]) -> float:
    """The share of responses that were cut at the limit, at the end."""
    return np.mean(series["response/truncated"][-LAST:])


# ----------------------------------------------------------------------------------------------------------------------
# Intervals and verdicts


def interval(values: dict[int, float]) -> tuple[float, float, float]:
    """(mean, lower, upper) of a 95 % t interval over seeds. One seed gives infinite bounds."""
    x = np.array([value for value in values.values() if np.isfinite(value)])
    if len(x) < 2:
        return (float(x.mean()) if len(x) else float("nan")), -np.inf, np.inf
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def difference(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def text(values: dict[int, float], digits: int = 3, sign: bool = False) -> str:
    mean, low, high = interval(values)
    plus = "+" if sign else ""
    bounds = f" [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]" if np.isfinite(low) else ""
    return f"{mean:{plus}.{digits}f}{bounds}"


def decide(*tests: tuple[dict[int, float], float]) -> str:
    """The verdict, from (values, bound) pairs: the claim says that all values are above their bounds."""
    intervals = [(*interval(values), bound) for values, bound in tests]
    if any(high < bound for _, _, high, bound in intervals):
        return "not held"
    return "held" if all(low > bound for _, low, _, bound in intervals) else "undecided"


def claims(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) in the order of docs/evidence.md, without claims whose runs are missing."""
    found = []

    def claim(name: str, needs: tuple[str, ...], function) -> None:
        if set(needs) <= set(sweep.settings):
            found.append((name, *function()))

    def collapse():
        kept = sweep.entropy_kept("grpo")
        return decide(({s: -v for s, v in kept.items()}, -0.5)), f"share of the first step's entropy left: {text(kept)}"

    def more_than_grpo():
        over = {name: difference(sweep.entropy_end(name), sweep.entropy_end("grpo")) for name in (LOW_BETA, DEFAULT)}
        numbers = "; ".join(f"{name}: {text(values, 4, True)}" for name, values in over.items())
        return decide(*((values, 0) for values in over.values())), f"nats more than grpo at the end: {numbers}"

    def fastest():
        over = [difference(sweep.entropy_whole(name), sweep.entropy_whole("ce_gppo (1, 0.5)")) for name in CE[:3]]
        numbers = "; ".join(f"{name}: {text(values, 4, True)}" for name, values in zip(list(CE)[:3], over, strict=True))
        return decide(*((values, 0) for values in over)), f"mean entropy of the run over that of (1, 0.5): {numbers}"

    def ordered():
        ends = [sweep.entropy_end(name) for name in CE]
        gaps = [difference(more, less) for more, less in zip(ends, ends[1:], strict=False)]
        seeds = set.intersection(*(set(gap) for gap in gaps))
        right = sum(all(gap[seed] > 0 for gap in gaps) for seed in seeds)
        numbers = "; ".join(f"{name} {text(end, 4)}" for name, end in zip(CE, ends, strict=True))
        return decide(*((gap, 0) for gap in gaps)), f"at the end {numbers}; {right} of {len(seeds)} seeds in this order"

    def dapo_early():
        over = difference(sweep.entropy_early("dapo"), sweep.entropy_early("grpo"))
        return decide((over, 0)), f"nats more in the first {EARLY} steps: {text(over, 4, True)}"

    def dapo_varies():
        over = difference(sweep.entropy_spread("dapo"), sweep.entropy_spread(DEFAULT))
        spreads = "; ".join(f"{name} {text(sweep.entropy_spread(name), 4)}" for name in ("dapo", DEFAULT))
        return decide((over, 0)), f"standard deviation around the trend, nats: {spreads}; {text(over, 4, True)} more"

    def accuracy():
        pairs = [(name, other) for name in (LOW_BETA, DEFAULT) for other in ("grpo", "dapo")]
        over = [difference(sweep.accuracy(a), sweep.accuracy(b)) for a, b in pairs]
        numbers = "; ".join(f"{a} over {b}: {text(v, 3, True)}" for (a, b), v in zip(pairs, over, strict=True))
        return decide(*((values, -MARGIN) for values in over)), numbers

    def keeps_pass():
        pairs = [(name, other) for name in (LOW_BETA, DEFAULT) for other in ("grpo", "dapo")]
        over = [difference(sweep.pass_kept(a), sweep.pass_kept(b)) for a, b in pairs]
        kept = "; ".join(f"{name} {text(sweep.pass_kept(name))}" for name in ("grpo", "dapo", LOW_BETA, DEFAULT))
        return decide(*((values, 0) for values in over)), f"pass@8 at the end over that at the start: {kept}"

    def sensitive():
        # Log entropy by log coefficient: makes a threefold bonus and a beta1 of 1.5 times comparable.
        def slope(a, b, factor):
            return {s: abs(np.log(a[s] / b[s])) / np.log(factor) for s in a if s in b}

        bonus = slope(sweep.entropy_end(STRONG), sweep.entropy_end(WEAK), 3)
        beta = slope(sweep.entropy_end(DEFAULT), sweep.entropy_end(LOW_BETA), 1.5)
        ends = "; ".join(f"{name} {text(sweep.entropy_end(name), 4)}" for name in (WEAK, STRONG, LOW_BETA, DEFAULT))
        return decide((difference(bonus, beta), 0)), (
            f"at the end {ends}; size of d ln entropy / d ln coefficient: bonus {text(bonus, 2)}, beta1 {text(beta, 2)}"
        )

    def improbable():
        names = [name for name in ("grpo", *CE) if name in sweep.settings]
        low = {name: sweep.average(name, "clip/prob_low") for name in names}
        high = {name: sweep.average(name, "clip/prob_high") for name in names}
        numbers = "; ".join(f"{name} {interval(low[name])[0]:.3f} and {interval(high[name])[0]:.3f}" for name in names)
        usual = np.exp(-interval(sweep.entropy_whole("grpo"))[0])
        tests = [({s: -v for s, v in part[name].items()}, -0.5) for part in (low, high) for name in names]
        return decide(*tests), (
            f"mean probability of the tokens clipped below and above: {numbers}; exp(-entropy) is {usual:.2f}"
        )

    def signs():
        right = {
            quadrant: np.mean(
                [np.sign(v) == sign for r in sweep.rows.values() for v in r["series"][f"velocity/{quadrant}"] if v]
            )
            for quadrant, sign in SIGNS.items()
        }
        numbers = ", ".join(f"{figures.QUADRANTS[quadrant]} {share:.2%}" for quadrant, share in right.items())
        return ("held" if min(right.values()) > 0.99 else "not held"), f"steps of all runs with the sign: {numbers}"

    claim("1a. grpo loses more than half of its entropy", ("grpo",), collapse)
    claim("1b. ce_gppo (0.5, 1) and (0.75, 1) end with more entropy", ("grpo", LOW_BETA, DEFAULT), more_than_grpo)
    claim("2a. (1, 0.5) loses entropy fastest", CE, fastest)
    claim("2b. entropy is ordered by beta2 - beta1, (0, 1) highest", CE, ordered)
    claim("3a. dapo has more entropy than grpo early on", ("grpo", "dapo"), dapo_early)
    claim("3b. dapo's entropy varies more than ce_gppo's", ("dapo", DEFAULT), dapo_varies)
    claim("4a. ce_gppo's accuracy is at least grpo's and dapo's", ("grpo", "dapo", LOW_BETA, DEFAULT), accuracy)
    claim("4b. its pass@8 keeps more of its start", ("grpo", "dapo", LOW_BETA, DEFAULT), keeps_pass)
    claim("5. a bonus is more sensitive than beta1 in [0.5, 0.75]", (WEAK, STRONG, LOW_BETA, DEFAULT), sensitive)
    claim("6a. clipped tokens are improbable (below 0.5)", ("grpo",), improbable)
    claim("6b. velocities have the signs of the theory", ("grpo",), signs)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Output


def table(sweep: Sweep) -> str:
    """Means and 95 % intervals over seeds, in Markdown.

    over grpo: differences between runs of the same seed. of clipped tokens, their %: their part of the velocity, and
    their share of all tokens, each below and above the clip interval. cut: if it is not 0, runs have forgotten how to
    end a response, and their entropy is mostly that of the repetition.
    """
    lines = [
        "| setting | runs | entropy at the end | over grpo | accuracy, avg@8 | over grpo | pass@8 "
        "| velocity, 1e-4 | of clipped tokens | their % | cut |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sweep.settings:
        low, high = (100 * interval(sweep.average(name, f"clip/{side}"))[0] for side in ("low", "high"))
        down, up = (1e4 * interval(sweep.average(name, f"velocity/clipped_{side}"))[0] for side in ("low", "high"))
        total = {seed: 1e4 * value for seed, value in sweep.average(name, "velocity/total").items()}
        pass_ = sweep.of(name, lambda s: s["eval/arithmetic/pass_at_k"][-1])
        idle = interval(sweep.of(name, cut))[0]
        columns = []
        for values in (sweep.entropy_end, sweep.accuracy):
            over = difference(values(name), values("grpo"))
            columns += [text(values(name)), text(over, 3, True) if over and name != "grpo" else ""]
        columns += [text(pass_), text(total, 1), f"{down:+.1f}, {up:+.1f}", f"{low:.2f}, {high:.2f}", f"{idle:.0%}"]
        lines.append(f"| {name} | {len(sweep.accuracy(name))} | {' | '.join(columns)} |")
    return "\n".join(lines)


def begin(run: dict, steps: int) -> dict:
    """The row of a run that ended after so many steps. (No setting of the sweep depends on the number of steps.)"""
    eval_steps = [step for step in run["eval_steps"] if step <= steps]
    series = {n: v[: len(eval_steps) if n.startswith("eval/") else steps] for n, v in run["series"].items()}
    return run | {"eval_steps": eval_steps, "series": series}


def rows_of(run: dict) -> list[dict]:
    """A run's series as rows of a metrics.jsonl, which tools/figures.py draws."""
    rows = {0: {"step": 0}}
    for name, values in run["series"].items():
        steps = run["eval_steps"] if name.startswith("eval/") else range(1, len(values) + 1)
        for step, value in zip(steps, values, strict=True):
            if value is not None:
                rows.setdefault(step, {"step": step})[name] = value
    return [rows[step] for step in sorted(rows)]


COLORS = {  # one for each setting of the sweep; those of ce_gppo go from blue to red as beta2 - beta1 falls
    "grpo": "black",
    "dapo": "#e69f00",
    "gppo": "#2ca02c",
    "cispo": "#7b3294",
    "gspo": "#17becf",
    "ce_gppo (0, 1)": "#1f4e9c",
    "ce_gppo (0.5, 1)": "#5fa8e6",
    "ce_gppo (0.75, 1)": "#e6398b",
    "ce_gppo (1, 0.5)": "#b2182b",
    "grpo, bonus 0.01": "#b8b800",
    "grpo, bonus 0.03": "#7a5c00",
    "ce_gppo, target 0.11": "#00897b",
}
ROWS = {  # of panels: title -> settings
    "objectives": ("grpo", "dapo", "gppo", "cispo", "gspo", DEFAULT),
    "betas of ce_gppo": ("grpo", *CE),
    "entropy bonus and target": ("grpo", WEAK, STRONG, "ce_gppo, target 0.11"),
}
OTHERS = {"others": ("grpo", *MORE)}


def curves(groups: dict[str, list[list[dict]]]) -> plt.Figure:
    """Entropy and accuracy: a row each for the objectives, for the betas, and for the other ways to more entropy."""
    rows = {title: [name for name in names if name in groups] for title, names in (ROWS | OTHERS).items()}
    rows = {title: names for title, names in rows.items() if set(names) - {"grpo"}} or {"objectives": list(groups)}
    fig, axes = plt.subplots(
        len(rows), 2, figsize=(9, 0.4 + 3 * len(rows)), sharey="col", squeeze=False, layout="constrained"
    )
    for (left, right), (title, names) in zip(axes, rows.items(), strict=True):
        for name in names:
            color = COLORS.get(name) or f"C{list(MORE).index(name) % 10}"
            figures.draw(left, groups[name], "entropy/mean", color=color)
            figures.draw(right, groups[name], "eval/arithmetic/avg_at_k", label=name, color=color)
        left.set(title=f"entropy: {title}", xlabel="step", ylabel="nats per token")
        right.set(title=f"held-out accuracy: {title}", xlabel="step", ylabel="avg@8")
        left.set_ylim(bottom=0)
        right.legend(loc="lower right", frameon=False)  # of both panels; the accuracies leave room there
    seeds = max(map(len, groups.values()))
    fig.suptitle(f"thick lines: mean of {seeds} seeds; thin lines: each seed" if seeds > 1 else "one seed")
    return finish(fig)


def velocities(groups: dict[str, list[list[dict]]]) -> plt.Figure:
    """The parts of the quadrants in the entropy velocity, a panel for each setting."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.4 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, runs) in zip(axes.flat, groups.items(), strict=False):
        figures.draw_velocity(axis, runs)
        axis.set_title(name)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=5)
    fig.supxlabel("step")
    fig.supylabel("entropy velocity, nats per token, mean of the seeds")
    return finish(fig)


def finish(fig: plt.Figure) -> plt.Figure:
    for axis in fig.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return fig


def main(config: Config) -> None:
    rows, name = read(config.results), config.results.stem
    if config.steps is not None:
        if unlike := [row for row in rows if config.steps not in row["eval_steps"][1:]]:
            raise UserError(f"steps {config.steps}: not evaluated there, only at {unlike[0]['eval_steps'][1:]}")
        rows, name = [begin(row, config.steps) for row in rows], f"{name}-{config.steps}"
    if config.without_idle:
        rows, name = [row for row in rows if cut(row["series"]) < IDLE], f"{name}-without-idle"
    if not rows:
        raise UserError(f"{config.results}: no such runs there; results/sweep.py makes them")
    sweep = Sweep(rows)
    verdicts = "\n".join(f"| {' | '.join(row)} |" for row in claims(sweep))
    verdicts = f"| claim | verdict | numbers, with 95 % intervals over seeds |\n|---|---|---|\n{verdicts}"
    took = f"{len(rows)} runs; whole, they took {sum(row['minutes'] for row in rows) / 60:.1f} hours of one lane."
    report = f"{table(sweep)}\n\n{verdicts}\n\n{took}\n"
    print(report)
    config.results.with_name(f"{name}.md").write_text(report)
    groups = {
        name: [rows_of(run) for (other, _), run in sweep.rows.items() if other == name] for name in sweep.settings
    }
    for suffix, figure in (("", curves(groups)), ("-velocity", velocities(groups))):
        for kind in ("png", "svg"):
            path = config.results.with_name(f"{name}{suffix}.{kind}")
            figure.savefig(path, dpi=150)
            print(path)


if __name__ == "__main__":
    command(main, Config, __doc__)
