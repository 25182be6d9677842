"""Table, verdicts and figures of a sweep.

    .venv/bin/python -m results.claims results/reproduction-walk.jsonl    writes reproduction-walk.md and figures

Run it from the repository root. A claim says that differences between runs of the same seed, which have the problems in
the same order, are above 0; each has a 95 % interval over seeds (Student's t). A claim holds if every interval is above
0 ("held"), fails if one is below 0 ("not held"), and is undecided otherwise. Differences inside the margin, 5 % of the
base policy's entropy or 2 points of accuracy, count as none: a claim that they keep from holding has "no difference".
Rules and margins were written before the runs on `walk` were made.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ce_gppo.config import command
from ce_gppo.messages import UserError
from results import draw, effects
from results.series import EARLY, LAST, Runs, difference, interval, markdown, text
from results.settings import CE, STRONG, WEAK
from results.sweep import read
from tools.figures import QUADRANTS

ENTROPY_MARGIN = 0.05  # of the base policy's entropy
MARGIN = 0.02  # of accuracy and of pass@k; "at least" allows this much less
UNLEARNED = 0.05  # a run has unlearned if its last accuracy is this far below its best
LOW_BETA, DEFAULT, LP_ONLY = "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)", "lp_only (1, 1)"
PAIRS = [(name, other) for name in (LOW_BETA, DEFAULT) for other in ("grpo", "dapo")]
SIGNS = {"pa_lp": 1, "na_hp": 1, "pa_hp": -1, "na_lp": -1}  # of the velocities, by the theory
SHOWN = ("velocity/clipped_low", "velocity/clipped_high", "clip/low", "clip/high")  # in the table
Decision = tuple[str, str] | None  # (verdict, numbers), None if runs are missing


@dataclass
class Config:
    results: Annotated[Path, tyro.conf.Positional]  # JSONL file that results.sweep made
    branches: Path | None = None  # JSONL file that results.branch made: drawn beside the curves in a third figure


def verdict(differences: list[dict[int, float]], margin: float = 0.0, bound: float = 0.0) -> str:
    """The verdict on "all of these differences are above the bound"."""
    means = [interval(values.values()) for values in differences]
    intervals = [(mean - half - bound, mean + half - bound) for mean, half in means]
    counted = [(low, high) for low, high in intervals if not -margin < low <= high < margin]
    if any(high < 0 for _, high in counted):
        return "not held"
    if not all(low > 0 for low, _ in counted):
        return "undecided"
    return "held" if len(counted) == len(intervals) else "no difference"


def above(values, pairs, margin: float = 0.0, bound: float = 0.0) -> Decision:
    """Decides "the first setting of each pair is above the second". values: setting -> {seed: number}."""
    if not all(values(name) for pair in pairs for name in pair):
        return None
    gaps = [difference(values(a), values(b)) for a, b in pairs]
    numbers = [f"{a} over {b}: {text(gap, 4, '+')}" for (a, b), gap in zip(pairs, gaps, strict=True)]
    return verdict(gaps, margin, bound), "; ".join(numbers)


def claims(runs: Runs) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) in the order of docs/evidence.md, without the claims whose runs are missing."""
    nats, end, accuracy = entropy_margin(runs), runs.entropy_end, runs.at_end
    betas, last = [(LOW_BETA, "grpo"), (DEFAULT, "grpo")], [(name, CE[3]) for name in CE[:3]]
    dapo, ours, bonus = [("dapo", "grpo")], [(LP_ONLY, "gppo")], [(bonuses(runs)[1], "grpo")]
    table = (
        ("1a. grpo loses more than half of its entropy", collapse(runs)),
        ("1b. ce_gppo (0.5, 1) and (0.75, 1) end with more entropy", above(end, betas, nats)),
        ("2a. (1, 0.5) loses entropy fastest: the mean over the run", above(runs.entropy_whole, last, nats)),
        ("2b. entropy is ordered by beta2 - beta1, (0, 1) highest", ordered(runs)),
        (f"3a. dapo has more entropy in the first {EARLY} steps", above(runs.entropy_early, dapo, nats)),
        ("3b. dapo's entropy varies more around its trend", above(runs.entropy_spread, [("dapo", DEFAULT)], nats)),
        ("4a. ce_gppo's accuracy is at least grpo's and dapo's", above(accuracy, PAIRS, bound=-MARGIN)),
        ("4b. its pass@8 keeps more of its start", above(runs.pass_kept, PAIRS, MARGIN)),
        ("4c. it finds more different right answers among 8", above(runs.distinct, PAIRS, 8 * MARGIN)),
        ("5. a bonus is more sensitive than beta1 in [0.5, 0.75]", sensitive(runs)),
        ("6a. clipped tokens are improbable (below 0.5)", improbable(runs)),
        ("6b. velocities have the signs of the theory", signs(runs)),
        ("6c. ce_gppo neither collapses nor explodes, nor unlearns", steady(runs)),
        ("7a. lp_only is more accurate than gppo (ours)", above(accuracy, ours, MARGIN)),
        ("7b. lp_only has more entropy than gppo (ours)", above(end, ours, nats)),
        ("8. the stronger bonus ends with more entropy than grpo", above(end, bonus, nats)),
    )
    return [(claim, *decision) for claim, decision in table if decision]


def entropy_margin(runs: Runs) -> float:
    """In nats."""
    return ENTROPY_MARGIN * runs.base_entropy()


def bonuses(runs: Runs) -> tuple[str, str]:
    """The settings with a weaker and a stronger entropy bonus."""
    return STRONG if set(STRONG) <= set(runs.groups) else WEAK


def collapse(runs: Runs) -> Decision:
    if kept := runs.entropy_kept("grpo"):
        lost = {seed: 0.5 - value for seed, value in kept.items()}
        return verdict([lost]), f"share of the first step's entropy left: {text(kept)}"


def ordered(runs: Runs) -> Decision:
    if decision := above(runs.entropy_end, list(itertools.pairwise(CE)), entropy_margin(runs)):
        ends = [runs.entropy_end(name) for name in CE]
        seeds = set.intersection(*map(set, ends))
        right = sum(all(a[seed] > b[seed] for a, b in itertools.pairwise(ends)) for seed in seeds)
        return decision[0], f"{decision[1]}; {right} of {len(seeds)} seeds in this order"


def sensitive(runs: Runs) -> Decision:
    """Compares d ln entropy / d ln coefficient: the bonus is tripled, beta1 is multiplied by 1.5."""

    def slope(low: str, high: str, factor: float) -> dict[int, float]:
        a, b = runs.entropy_end(low), runs.entropy_end(high)
        return {seed: abs(np.log(b[seed] / a[seed])) / np.log(factor) for seed in b if seed in a}

    names = (*bonuses(runs), LOW_BETA, DEFAULT)
    if set(names) <= set(runs.groups):
        bonus, beta = slope(*names[:2], 3), slope(*names[2:], 1.5)
        ends = "; ".join(f"{name} {text(runs.entropy_end(name), 4)}" for name in names)
        # The margin: with this difference of the slopes, a factor of 1.5 changes entropy by 5 %.
        return verdict([difference(bonus, beta)], np.log(1 + ENTROPY_MARGIN) / np.log(1.5)), (
            f"at the end {ends}; size of d ln entropy / d ln coefficient: bonus {text(bonus, 2)}, beta1 {text(beta, 2)}"
        )


def improbable(runs: Runs) -> Decision:
    if "grpo" not in runs.groups:
        return None
    parts, numbers = [], []
    for name in [name for name in ("grpo", *CE) if name in runs.groups]:
        sides = [runs.average(name, f"clip/prob_{side}") for side in ("low", "high")]
        parts += [{seed: 0.5 - value for seed, value in side.items()} for side in sides]
        numbers.append(f"{name} " + " and ".join(f"{interval(side.values())[0]:.3f}" for side in sides))
    usual = np.exp(-interval(runs.entropy_whole("grpo").values())[0])
    return verdict(parts), (
        f"mean probability of the tokens clipped below and above: {'; '.join(numbers)}; exp(-entropy) is {usual:.2f}"
    )


def signs(runs: Runs) -> Decision:
    series = [row["series"] for group in runs.groups.values() for row in group]
    right = {q: np.mean([v * sign > 0 for s in series for v in s[f"velocity/{q}"] if v]) for q, sign in SIGNS.items()}
    numbers = ", ".join(f"{QUADRANTS[quadrant]} {share:.2%}" for quadrant, share in right.items())
    return ("held" if min(right.values()) > 0.99 else "not held"), f"steps of all runs with the sign: {numbers}"


def steady(runs: Runs) -> Decision:
    if not {"grpo", LOW_BETA, DEFAULT} <= set(runs.groups):
        return None
    numbers, held = [], True
    for name in [name for name in ("grpo", *CE, "gppo", LP_ONLY) if name in runs.groups]:
        low = min(runs.entropy(name, lambda e: e.min() / e[0]).values())
        high = max(runs.entropy(name, lambda e: e.max() / e[0]).values())
        lost = max(runs.unlearned(name).values())
        numbers.append(f"{name} {low:.2f} to {high:.2f}, {lost:.3f}")
        held &= name not in (LOW_BETA, DEFAULT) or (low > 0.1 and high < 1.2 and lost < UNLEARNED)
    return ("held" if held else "not held"), (
        f"entropy over the first step's, accuracy lost after its best: {'; '.join(numbers)}"
    )


def table(runs: Runs) -> str:
    """Means and 95 % intervals over seeds, in Markdown.

    over grpo: differences between runs of the same seed. of clipped tokens, their %: their part of the velocity, and
    their share of all tokens, each below and above the clip interval. cut: responses cut at the limit, at the end. Such
    responses do not end, and their entropy is mostly that of repeated text.
    """
    head = "setting|runs|entropy at the end|over grpo|accuracy, avg@8|over grpo|pass@8|distinct@8|velocity, 1e-4"
    rows = []
    for name, group in runs.groups.items():
        mean = {key: interval(runs.average(name, key).values())[0] for key in SHOWN}
        cut = interval(runs.average(name, "response/truncated", LAST).values())[0]
        gaps = [difference(values(name), values("grpo")) for values in (runs.entropy_end, runs.at_end)]
        entropy, accuracy = ("" if name == "grpo" else text(gap, 3, "+") for gap in gaps)
        velocity = {seed: 1e4 * value for seed, value in runs.average(name, "velocity/total").items()}
        rows.append([name, len(group), text(runs.entropy_end(name)), entropy, text(runs.at_end(name)), accuracy])
        rows[-1] += [text(runs.at_end(name, "pass_at_k")), text(runs.distinct(name), 2), text(velocity, 1)]
        rows[-1] += [", ".join(f"{1e4 * mean[key]:+.1f}" for key in SHOWN[:2])]
        rows[-1] += [", ".join(f"{100 * mean[key]:.2f}" for key in SHOWN[2:]), f"{cut:.0%}"]
    return markdown(f"{head}|of clipped tokens|their %|cut".split("|"), rows)


def main(config: Config) -> None:
    rows = read(config.results)
    if not rows:
        raise UserError(f"{config.results}: no runs there; results/sweep.py makes them")
    runs = Runs(rows)
    verdicts = markdown(["claim", "verdict", "numbers, with 95 % intervals over seeds"], claims(runs))
    margins = f"Margins: {entropy_margin(runs):.3f} nats of entropy, {MARGIN} of accuracy."
    took = f"{len(rows)} runs; whole, they took {sum(row['minutes'] for row in rows) / 60:.1f} hours of one lane."
    report = f"{table(runs)}\n\n{verdicts}\n\n{margins} {took}\n"
    print(report)
    config.results.with_suffix(".md").write_text(report)
    drawn = {"": draw.curves(runs.groups, runs.source), "-velocity": draw.velocities(runs.groups)}
    if config.branches:
        drawn["-summary"] = draw.summary(runs.groups, runs.source, effects.read(config.branches))
    for suffix, figure in drawn.items():
        for kind in ("png", "svg"):
            path = config.results.with_name(f"{config.results.stem}{suffix}.{kind}")
            figure.savefig(path, dpi=150)
            print(path)


if __name__ == "__main__":
    command(main, Config, __doc__)
