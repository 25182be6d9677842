"""Table, verdicts and figures of a sweep.

    .venv/bin/python -m results.claims results/reproduction-walk.jsonl    writes reproduction-walk.md and figures
    .venv/bin/python -m results.claims results/reproduction-walk.jsonl --steps 50    only of the first 50 steps

Run it from the repository root. Most claims are decided by 95 % intervals over seeds (Student's t) of differences
between runs of the same seed, which have the problems in the same order. Each part of a claim says that a difference is
above 0. Its verdict is the first of these that applies:

    no difference   the interval lies inside the margin: 5 % of the base policy's entropy, 2 points of accuracy
    held            the whole interval is above 0
    not held        the whole interval is below 0
    undecided       none of these: more seeds are needed

A claim of several parts is "not held" if one part is, else "undecided" if one part is, "held" if all are, and "no
difference" otherwise. Rules and margins were written before the runs on `walk` were made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ce_gppo import types as t
from ce_gppo.config import command
from ce_gppo.messages import UserError
from results import draw
from results.series import EARLY, Runs, cut, difference, interval, text
from results.settings import CE
from results.sweep import read
from tools import branches
from tools.figures import QUADRANTS

IDLE = 0.05  # a run is idle if, at its end, this share of responses or more is cut at the limit
ENTROPY_MARGIN = 0.05  # of the base policy's entropy: smaller differences count as none
MARGIN = 0.02  # of accuracy and of pass@k; "at least" allows this much less
UNLEARNED = 0.05  # a run has unlearned if its last accuracy is this far below its best
LOW_BETA, DEFAULT = "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)"
LP_ONLY, LP_HALF = "lp_only (1, 1)", "lp_only_half (0.75, 1)"
PAIRS = [(name, other) for name in (LOW_BETA, DEFAULT) for other in ("grpo", "dapo")]
BONUSES = (("grpo, bonus 0.001", "grpo, bonus 0.003"), ("grpo, bonus 0.01", "grpo, bonus 0.03"))  # of walk, arithmetic
SIGNS = {"pa_lp": 1, "na_hp": 1, "pa_hp": -1, "na_lp": -1}  # of the velocities, by the theory


@dataclass
class Config:
    results: Annotated[Path, tyro.conf.Positional]  # JSONL file that results.sweep made
    steps: t.Count | None = None  # use only this many, as if the runs had ended there; None: all
    without_idle: bool = False  # leave out runs that no longer end their responses
    branches: Path | None = None  # JSONL file that tools/branch.py made: drawn beside the curves in a third figure


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def compare(values: dict[int, float], bound: float = 0.0, margin: float = 0.0) -> str:
    """The verdict on "the values are above the bound", by their interval over seeds."""
    _, low, high = interval(values)
    if bound - margin < low and high < bound + margin:
        return "no difference"
    return "held" if low > bound else "not held" if high < bound else "undecided"


def decide(*verdicts: str) -> str:
    """The verdict on a claim of several parts."""
    for verdict in ("not held", "undecided"):
        if verdict in verdicts:
            return verdict
    return "held" if set(verdicts) == {"held"} else "no difference"


def over(values, pairs, bound: float = 0.0, margin: float = 0.0, digits: int = 4) -> tuple[str, str]:
    """(verdict, numbers) on "the first setting of each pair is above the second". values: setting -> {seed: number}."""
    gaps = [difference(values(a), values(b)) for a, b in pairs]
    numbers = [f"{a} over {b}: {text(gap, digits, True)}" for (a, b), gap in zip(pairs, gaps, strict=True)]
    return decide(*(compare(gap, bound, margin) for gap in gaps)), "; ".join(numbers)


def entropy_margin(runs: Runs) -> float:
    """In nats."""
    return ENTROPY_MARGIN * runs.base_entropy()


def bonuses_of(runs: Runs) -> tuple[str, str]:
    """The settings with a weak and a strong entropy bonus."""
    return next((pair for pair in BONUSES if set(pair) <= set(runs.settings)), BONUSES[0])


def claims(runs: Runs) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) in the order of docs/evidence.md, without the claims whose runs are missing."""
    four = ("grpo", "dapo", LOW_BETA, DEFAULT)
    table = [  # (claim, settings that it needs, function of the runs that gives verdict and numbers)
        ("1a. grpo loses more than half of its entropy", ("grpo",), collapse),
        ("1b. ce_gppo (0.5, 1) and (0.75, 1) end with more entropy", ("grpo", LOW_BETA, DEFAULT), more_than_grpo),
        ("2a. (1, 0.5) loses entropy fastest", CE, fastest),
        ("2b. entropy is ordered by beta2 - beta1, (0, 1) highest", CE, ordered),
        ("3a. dapo has more entropy than grpo early on", ("grpo", "dapo"), dapo_early),
        ("3b. dapo's entropy varies more than ce_gppo's", ("dapo", DEFAULT), dapo_varies),
        ("4a. ce_gppo's accuracy is at least grpo's and dapo's", four, accuracy),
        ("4b. its pass@8 keeps more of its start", four, keeps_pass),
        ("4c. it finds more different right answers", four, keeps_ways),
        ("5. a bonus is more sensitive than beta1 in [0.5, 0.75]", (*bonuses_of(runs), LOW_BETA, DEFAULT), sensitive),
        ("6a. clipped tokens are improbable (below 0.5)", ("grpo",), improbable),
        ("6b. velocities have the signs of the theory", ("grpo",), signs),
        ("6c. ce_gppo neither collapses nor explodes, nor unlearns", ("grpo", LOW_BETA, DEFAULT), steady),
        ("7a. lp_only is more accurate than gppo (ours)", (LP_ONLY, "gppo"), lp_accurate),
        ("7b. lp_only has more entropy than gppo (ours)", (LP_ONLY, "gppo"), lp_entropy),
        ("7c. lp_only_half is more accurate than ce_gppo (0.75, 1) (ours)", (LP_HALF, DEFAULT), half_accurate),
        ("7d. both are at least as accurate as grpo (ours)", (LP_ONLY, LP_HALF, "grpo"), as_accurate),
        ("8. the stronger bonus ends with more entropy than grpo", ("grpo", bonuses_of(runs)[1]), bonus_raises),
    ]
    if not runs.at_end("grpo", "distinct_at_k"):  # older runs did not count different answers
        table = [row for row in table if row[2] is not keeps_ways]
    return [(name, *decision(runs)) for name, needs, decision in table if set(needs) <= set(runs.settings)]


def collapse(runs: Runs) -> tuple[str, str]:
    kept = runs.entropy_kept("grpo")
    lost = {seed: 0.5 - value for seed, value in kept.items()}
    return compare(lost), f"share of the first step's entropy left: {text(kept)}"


def more_than_grpo(runs: Runs) -> tuple[str, str]:
    return over(runs.entropy_end, [(LOW_BETA, "grpo"), (DEFAULT, "grpo")], margin=entropy_margin(runs))


def fastest(runs: Runs) -> tuple[str, str]:
    verdict, numbers = over(runs.entropy_whole, [(name, CE[3]) for name in CE[:3]], margin=entropy_margin(runs))
    return verdict, f"mean entropy of the run, {numbers}"


def ordered(runs: Runs) -> tuple[str, str]:
    verdict, numbers = over(runs.entropy_end, list(zip(CE, CE[1:], strict=False)), margin=entropy_margin(runs))
    ends = [runs.entropy_end(name) for name in CE]
    seeds = set.intersection(*map(set, ends))
    right = sum(all(a[seed] > b[seed] for a, b in zip(ends, ends[1:], strict=False)) for seed in seeds)
    return verdict, f"{numbers}; {right} of {len(seeds)} seeds in this order"


def dapo_early(runs: Runs) -> tuple[str, str]:
    verdict, numbers = over(runs.entropy_early, [("dapo", "grpo")], margin=entropy_margin(runs))
    return verdict, f"mean of the first {EARLY} steps, {numbers}"


def dapo_varies(runs: Runs) -> tuple[str, str]:
    verdict, numbers = over(runs.entropy_spread, [("dapo", DEFAULT)], margin=entropy_margin(runs))
    return verdict, f"standard deviation around the trend, nats, {numbers}"


def accuracy(runs: Runs) -> tuple[str, str]:
    return over(runs.at_end, PAIRS, bound=-MARGIN, digits=3)


def keeps_pass(runs: Runs) -> tuple[str, str]:
    verdict, numbers = over(runs.pass_kept, PAIRS, margin=MARGIN, digits=3)
    return verdict, f"pass@8 at the end over that at the start, {numbers}"


def keeps_ways(runs: Runs) -> tuple[str, str]:
    verdict, numbers = over(lambda name: runs.at_end(name, "distinct_at_k"), PAIRS, margin=8 * MARGIN, digits=2)
    return verdict, f"different right answers among 8, {numbers}"


def sensitive(runs: Runs) -> tuple[str, str]:
    """Compares d ln entropy / d ln coefficient: the bonus is tripled, beta1 is multiplied by 1.5."""

    def slope(a, b, factor):
        return {s: abs(np.log(a[s] / b[s])) / np.log(factor) for s in a if s in b}

    weak, strong = bonuses_of(runs)
    bonus = slope(runs.entropy_end(strong), runs.entropy_end(weak), 3)
    beta = slope(runs.entropy_end(DEFAULT), runs.entropy_end(LOW_BETA), 1.5)
    ends = "; ".join(f"{name} {text(runs.entropy_end(name), 4)}" for name in (weak, strong, LOW_BETA, DEFAULT))
    # The margin: with this difference of the slopes, a factor of 1.5 changes entropy by 5 %.
    return compare(difference(bonus, beta), 0, np.log(1 + ENTROPY_MARGIN) / np.log(1.5)), (
        f"at the end {ends}; size of d ln entropy / d ln coefficient: bonus {text(bonus, 2)}, beta1 {text(beta, 2)}"
    )


def improbable(runs: Runs) -> tuple[str, str]:
    names = [name for name in ("grpo", *CE) if name in runs.settings]
    low = {name: runs.average(name, "clip/prob_low") for name in names}
    high = {name: runs.average(name, "clip/prob_high") for name in names}
    numbers = "; ".join(f"{name} {interval(low[name])[0]:.3f} and {interval(high[name])[0]:.3f}" for name in names)
    usual = np.exp(-interval(runs.entropy_whole("grpo"))[0])
    parts = [compare({s: 0.5 - v for s, v in part[name].items()}) for part in (low, high) for name in names]
    return decide(*parts), (
        f"mean probability of the tokens clipped below and above: {numbers}; exp(-entropy) is {usual:.2f}"
    )


def signs(runs: Runs) -> tuple[str, str]:
    right = {
        quadrant: np.mean(
            [np.sign(v) == sign for r in runs.rows.values() for v in r["series"][f"velocity/{quadrant}"] if v]
        )
        for quadrant, sign in SIGNS.items()
    }
    numbers = ", ".join(f"{QUADRANTS[quadrant]} {share:.2%}" for quadrant, share in right.items())
    return ("held" if min(right.values()) > 0.99 else "not held"), f"steps of all runs with the sign: {numbers}"


def steady(runs: Runs) -> tuple[str, str]:
    names = [name for name in ("grpo", *CE, "gppo", LP_ONLY) if name in runs.settings]
    course = {name: (*runs.entropy_extremes(name), max(runs.unlearned(name).values())) for name in names}
    numbers = "; ".join(f"{name} {low:.2f} to {high:.2f}, {lost:.3f}" for name, (low, high, lost) in course.items())
    ours = [course[name] for name in (LOW_BETA, DEFAULT)]
    held = all(low > 0.1 and high < 1.2 and lost < UNLEARNED for low, high, lost in ours)
    return ("held" if held else "not held"), f"entropy over the first step's, accuracy lost after its best: {numbers}"


def lp_accurate(runs: Runs) -> tuple[str, str]:
    return over(runs.at_end, [(LP_ONLY, "gppo")], margin=MARGIN, digits=3)


def lp_entropy(runs: Runs) -> tuple[str, str]:
    return over(runs.entropy_end, [(LP_ONLY, "gppo")], margin=entropy_margin(runs))


def half_accurate(runs: Runs) -> tuple[str, str]:
    return over(runs.at_end, [(LP_HALF, DEFAULT)], margin=MARGIN, digits=3)


def as_accurate(runs: Runs) -> tuple[str, str]:
    return over(runs.at_end, [(LP_ONLY, "grpo"), (LP_HALF, "grpo")], bound=-MARGIN, digits=3)


def bonus_raises(runs: Runs) -> tuple[str, str]:
    return over(runs.entropy_end, [(bonuses_of(runs)[1], "grpo")], margin=entropy_margin(runs))


# ----------------------------------------------------------------------------------------------------------------------
# Output


def table(runs: Runs) -> str:
    """Means and 95 % intervals over seeds, in Markdown.

    over grpo: differences between runs of the same seed. of clipped tokens, their %: their part of the velocity, and
    their share of all tokens, each below and above the clip interval. cut: responses cut at the limit. Such responses
    do not end, and their entropy is mostly that of repeated text.
    """
    lines = [
        "| setting | runs | entropy at the end | over grpo | accuracy, avg@8 | over grpo | pass@8 | distinct@8 "
        "| velocity, 1e-4 | of clipped tokens | their % | cut |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in runs.settings:
        low, high = (100 * interval(runs.average(name, f"clip/{side}"))[0] for side in ("low", "high"))
        down, up = (1e4 * interval(runs.average(name, f"velocity/clipped_{side}"))[0] for side in ("low", "high"))
        total = {seed: 1e4 * value for seed, value in runs.average(name, "velocity/total").items()}
        idle = interval(runs.of(name, cut))[0]
        columns = []
        for values in (runs.entropy_end, runs.at_end):
            gap = difference(values(name), values("grpo"))
            columns += [text(values(name)), text(gap, 3, True) if gap and name != "grpo" else ""]
        columns += [text(runs.at_end(name, "pass_at_k")), text(runs.at_end(name, "distinct_at_k"), 2)]
        columns += [text(total, 1), f"{down:+.1f}, {up:+.1f}", f"{low:.2f}, {high:.2f}", f"{idle:.0%}"]
        lines.append(f"| {name} | {len(runs.at_end(name))} | {' | '.join(columns)} |")
    return "\n".join(lines)


def begin(run: dict, steps: int) -> dict:
    """The row of a run as if it had ended after `steps` steps, on which no setting of a sweep depends."""
    eval_steps = [step for step in run["eval_steps"] if step <= steps]
    series = {n: v[: len(eval_steps) if n.startswith("eval/") else steps] for n, v in run["series"].items()}
    return run | {"eval_steps": eval_steps, "series": series}


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
    runs = Runs(rows)
    verdicts = "\n".join(f"| {' | '.join(row)} |" for row in claims(runs))
    verdicts = f"| claim | verdict | numbers, with 95 % intervals over seeds |\n|---|---|---|\n{verdicts}"
    margins = f"Margins: {entropy_margin(runs):.3f} nats of entropy, {MARGIN} of accuracy."
    took = f"{len(rows)} runs; whole, they took {sum(row['minutes'] for row in rows) / 60:.1f} hours of one lane."
    report = f"{table(runs)}\n\n{verdicts}\n\n{margins} {took}\n"
    print(report)
    config.results.with_name(f"{name}.md").write_text(report)
    groups = {setting: [run for (other, _), run in runs.rows.items() if other == setting] for setting in runs.settings}
    drawn = {"": draw.curves(groups, runs.source), "-velocity": draw.velocities(groups)}
    if config.branches:
        drawn["-summary"] = draw.summary(groups, runs.source, branches.read(config.branches))
    for suffix, figure in drawn.items():
        for kind in ("png", "svg"):
            path = config.results.with_name(f"{name}{suffix}.{kind}")
            figure.savefig(path, dpi=150)
            print(path)


if __name__ == "__main__":
    command(main, Config, __doc__)
