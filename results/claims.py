"""Table, verdicts and figures of a sweep.

    .venv/bin/python -m results.claims results/reproduction-walk.jsonl    writes reproduction-walk.md and figures

Run it from the repository root. A claim says that differences between runs of the same seed, which have the problems in
the same order, are above 0; each has a 95 % interval over seeds (Student's t). A claim holds if every interval is above
0 ("held"), fails if one is below 0 ("not held"), and is undecided otherwise. Differences inside the margin, 5 % of the
base policy's entropy or 2 points of accuracy, count as none: a claim that they keep from holding has "no difference".
Rules and margins were written before the runs were made, those with a coin's rewards after two runs of others.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ce_gppo.config import command
from ce_gppo.messages import UserError
from results import draw
from results.series import EARLY, RUN, by_setting, difference, interval, markdown, mean, measured, read, text
from results.settings import CE, STRONG, WEAK

ENTROPY_MARGIN = 0.05  # of the base policy's entropy
MARGIN = 0.02  # of accuracy and of pass@k; "at least" allows this much less
UNLEARNED = 0.05  # a run has unlearned if its last accuracy is this far below its best
LOW_BETA, DEFAULT, LP_ONLY = "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)", "lp_only (1, 1)"
PAIRS = [(name, other) for name in (LOW_BETA, DEFAULT) for other in ("grpo", "dapo")]
DECAYING = "decaying (1, 1)"
BAND = (0.75, 1.25)  # times the first step's entropy; beyond it a run with a coin's rewards has collapsed or exploded
COIN = (  # with rewards that teach nothing
    ("10a. gppo explodes or collapses, grpo does not", [("gppo", "grpo")]),
    ("10b. beta1 does it, beta2 does not", [("ce_gppo (1, 0)", "ce_gppo (0, 1)")]),
    ("10c. the paper's betas do it", [("ce_gppo (0.5, 1)", "grpo"), ("ce_gppo (0.75, 1)", "grpo")]),
    ("10d. decaying with both betas 1 does not (ours)", [("gppo", DECAYING)]),
    ("10e. dgpo, erc and dppo do not", [("gppo", "dgpo"), ("gppo", "erc"), ("gppo", "dppo")]),
)
SIGNS = {"pa_lp": 1, "na_hp": 1, "pa_hp": -1, "na_lp": -1}  # of the velocities, by the theory
COLUMNS = (  # of the table: a measure, its digits, and whether also the difference to grpo is shown
    *(("entropy", 3, True), ("accuracy", 3, True), ("pass@8", 3, False), ("distinct@8", 2, False)),
    *((f"velocity/{part}", 5, False) for part in ("total", "clipped_low", "clipped_high")),
    *(("clip/low", 4, False), ("clip/high", 4, False), ("cut", 2, False)),
)


@dataclass
class Config:
    results: Annotated[Path, tyro.conf.Positional]  # JSONL file that results.sweep made
    branches: Path | None = None  # JSONL file that results.branch made: drawn beside the curves in another figure
    coin: Path | None = None  # JSONL file of the sweep coin: its entropy is drawn beside these runs' accuracy


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


def above(groups: dict, pairs, measure: str, margin: float = 0.0, bound: float = 0.0) -> tuple[str, str]:
    """(verdict, numbers) on "the first setting of each pair is above the second", or above 0 where that is None."""
    values = {name: measured(groups[name], measure) for pair in pairs for name in pair if name}
    gaps = [difference(values[a], values[b]) if b else values[a] for a, b in pairs]
    names = [f"{a} over {b}" if b else a for a, b in pairs]
    numbers = "; ".join(f"{name}: {text(gap, 4, '+')}" for name, gap in zip(names, gaps, strict=True))
    return verdict(gaps, margin, bound), f"{measure}, {numbers}"


def claims(groups: dict[str, list[dict]]) -> list[tuple[str, str, str]]:
    """(claim, verdict, numbers) in the order of docs/evidence.md, without the claims whose runs are missing."""
    if "coin.py" in next(iter(groups.values()))[0]["arguments"]:  # accuracy says nothing there
        return [(claim, *leaves(groups, pairs)) for claim, pairs in COIN if {*groups} >= {*itertools.chain(*pairs)}]
    nats, (weak, strong) = entropy_margin(groups), STRONG if set(STRONG) <= set(groups) else WEAK
    betas, fastest = [(LOW_BETA, "grpo"), (DEFAULT, "grpo")], [(name, CE[3]) for name in CE[:3]]
    grpo, ours, dapo = [("grpo", None)], [(LP_ONLY, "gppo")], [("dapo", "grpo")]
    each, ours_and_grpo = [(name, None) for name in ("grpo", *CE) if name in groups], [(LOW_BETA, DEFAULT), *grpo]
    table = (  # claim, pairs of settings, and a measure, margin and bound; or a function of groups and pairs
        ("1a. grpo loses more than half of its entropy", grpo, "half of the entropy lost"),
        ("1b. ce_gppo (0.5, 1) and (0.75, 1) end with more entropy", betas, "entropy", nats),
        ("2a. (1, 0.5) loses entropy fastest: the mean over the run", fastest, "entropy/mean", nats),
        ("2b. entropy is ordered by beta2 - beta1, (0, 1) highest", [*itertools.pairwise(CE)], "entropy", nats),
        (f"3a. dapo has more entropy in the first {EARLY} steps", dapo, "early entropy", nats),
        ("3b. dapo's entropy varies more around its trend", [("dapo", DEFAULT)], "spread of entropy", nats),
        ("4a. ce_gppo's accuracy is at least grpo's and dapo's", PAIRS, "accuracy", 0.0, -MARGIN),
        ("4b. its pass@8 keeps more of its start", PAIRS, "pass@8 kept", MARGIN),
        ("4c. it finds more different right answers among 8", PAIRS, "distinct@8", 8 * MARGIN),
        ("5. a bonus is more sensitive than beta1 in [0.5, 0.75]", [(weak, strong), (LOW_BETA, DEFAULT)], sensitive),
        ("6a. tokens clipped below are improbable", each, "0.5 less the probability below"),
        ("6a. tokens clipped above are improbable", each, "0.5 less the probability above"),
        ("6b. velocities have the signs of the theory", grpo, signs),
        ("6c. ce_gppo neither collapses nor explodes, nor unlearns", ours_and_grpo, steady),
        ("7a. lp_only is more accurate than gppo (ours)", ours, "accuracy", MARGIN),
        ("7b. lp_only has more entropy than gppo (ours)", ours, "entropy", nats),
        ("9a. decaying is more accurate than gppo (ours)", [(DECAYING, "gppo")], "accuracy", MARGIN),
        ("9b. decaying is at least as accurate as grpo (ours)", [(DECAYING, "grpo")], "accuracy", 0.0, -MARGIN),
        ("8. the stronger bonus ends with more entropy than grpo", [(strong, "grpo")], "entropy", nats),
    )
    rows = []
    for claim, pairs, rule, *bounds in table:
        if {*groups, None}.issuperset(itertools.chain(*pairs)):
            found = rule(groups, pairs) if callable(rule) else above(groups, pairs, rule, *bounds)
            rows.append((claim, *found))
    return rows


def leaves(groups: dict, pairs: list) -> tuple[str, str]:
    """Held if entropy leaves the band in every run of the first of each pair, and in none of the second."""
    steps = {}
    for name in dict.fromkeys(itertools.chain(*pairs)):
        series = [row["series"]["entropy/mean"] for row in groups[name]]
        outside = [[not BAND[0] < entropy / run[0] < BAND[1] for entropy in run] for run in series]
        steps[name] = [run.index(True) + 1 if True in run else None for run in outside]
    held = all(None not in steps[first] and not any(steps[second]) for first, second in pairs)
    told = "; ".join(f"{name}: {', '.join(str(step or 'never') for step in each)}" for name, each in steps.items())
    return ("held" if held else "not held"), f"first step with entropy outside {BAND} of the first step's, {told}"


def entropy_margin(groups: dict[str, list[dict]]) -> float:
    """In nats, by the entropy of the first step over all runs."""
    return ENTROPY_MARGIN * mean(n for group in groups.values() for n in measured(group, "first entropy").values())


def sensitive(groups: dict, pairs: list) -> tuple[str, str]:
    """Compares d ln entropy / d ln coefficient: the bonus is tripled, beta1 is multiplied by 1.5."""
    slopes = []
    for pair, factor in zip(pairs, (3, 1.5), strict=True):
        low, high = (measured(groups[name], "entropy") for name in pair)
        slopes.append({seed: abs(np.log(high[seed] / low[seed])) / np.log(factor) for seed in low if seed in high})
    bonus, beta = (text(slope, 2) for slope in slopes)
    # The margin: with this difference of the slopes, a factor of 1.5 changes entropy by 5 %.
    found = verdict([difference(*slopes)], np.log(1 + ENTROPY_MARGIN) / np.log(1.5))
    return found, f"size of d ln entropy / d ln coefficient: bonus {bonus}, beta1 {beta}"


def signs(groups: dict, _) -> tuple[str, str]:
    series = [row["series"] for group in groups.values() for row in group]
    right = {q: np.mean([v * sign > 0 for s in series for v in s[f"velocity/{q}"] if v]) for q, sign in SIGNS.items()}
    numbers = ", ".join(f"{quadrant} {share:.2%}" for quadrant, share in right.items())
    return ("held" if min(right.values()) > 0.99 else "not held"), f"steps of all runs with the sign: {numbers}"


def steady(groups: dict, pairs: list) -> tuple[str, str]:
    numbers, held = [], True
    for name in filter(None, itertools.chain(*pairs)):
        lows, highs, losses = (measured(groups[name], key).values() for key in ("lowest", "highest", "unlearned"))
        numbers.append(f"{name} {min(lows):.2f} to {max(highs):.2f}, {max(losses):.3f}")
        held &= name == "grpo" or (min(lows) > 0.1 and max(highs) < 1.2 and max(losses) < UNLEARNED)
    numbers = "; ".join(numbers)
    return ("held" if held else "not held"), f"entropy over the first step's, accuracy lost after its best: {numbers}"


def table(groups: dict[str, list[dict]]) -> str:
    """Means and 95 % intervals over seeds, in Markdown.

    over grpo: differences between runs of the same seed. cut: the share of responses cut at the limit, at the end.
    """
    head = ["setting", "runs"]
    rows = [[name, len(group)] for name, group in groups.items()]
    for measure, digits, compared in COLUMNS:
        head += [measure, "over grpo"] if compared else [measure]
        for row in rows:
            values, grpo = (measured(groups.get(name, []), measure) for name in (row[0], "grpo"))
            over = "" if row[0] == "grpo" else text(difference(values, grpo), digits, "+")
            row += [text(values, digits), over] if compared else [text(values, digits)]
    return markdown(head, rows)


def main(config: Config) -> None:
    rows, branches = read(config.results, RUN), draw.read_branches(config.branches) if config.branches else []
    if not rows:
        raise UserError(f"{config.results}: no runs there; results/sweep.py makes them")
    groups = by_setting(rows)
    verdicts = markdown(["claim", "verdict", "numbers, with 95 % intervals over seeds"], claims(groups))
    margins = f"Margins: {entropy_margin(groups):.3f} nats of entropy, {MARGIN} of accuracy."
    took = f"{len(rows)} runs; whole, they took {sum(row['minutes'] for row in rows) / 60:.1f} hours of one lane."
    report = f"{table(groups)}\n\n{verdicts}\n\n{margins} {took}\n"
    print(report)
    config.results.with_suffix(".md").write_text(report)
    figures = [("", draw.curves(groups)), ("-summary", branches and draw.summary(groups, branches))]
    figures += [("-coin", draw.coin_and_hot(by_setting(read(config.coin, RUN)), groups))] if config.coin else []
    for suffix, figure in figures:
        if figure:
            path = config.results.with_name(f"{config.results.stem}{suffix}.png")
            figure.savefig(path, dpi=150)
            print(path)


if __name__ == "__main__":
    command(main, Config, __doc__)
