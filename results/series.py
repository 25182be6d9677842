"""The rows of results as numbers: measures of a run by setting and seed, 95 % intervals, tables."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import stats

from ce_gppo.messages import UserError
from results.settings import SETTINGS

LAST = 10  # steps; "the end" of a run is their mean
RUN = ("setting", "seed", "arguments")  # names in the row of a run
EARLY = 15  # first steps, for claim 3


def mean(values: Iterable[float | None]) -> float:
    """Of the steps that have a value."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else np.nan


def spread(entropy: list[float]) -> float:
    """Standard deviation around a cubic fitted to the run: a steady fall does not count as variation."""
    steps = np.arange(len(entropy))
    return np.std(entropy - np.polyval(np.polyfit(steps, entropy, 3), steps))


MEASURES = {  # name -> number of a run, by its series. Other names: mean of the metric over all steps
    "entropy": lambda s: mean(s["entropy/mean"][-LAST:]),
    "half of the entropy lost": lambda s: 0.5 - mean(s["entropy/mean"][-LAST:]) / s["entropy/mean"][0],
    "first entropy": lambda s: s["entropy/mean"][0],
    "early entropy": lambda s: mean(s["entropy/mean"][:EARLY]),
    "spread of entropy": lambda s: spread(s["entropy/mean"]),
    "lowest": lambda s: min(s["entropy/mean"]) / s["entropy/mean"][0],
    "highest": lambda s: max(s["entropy/mean"]) / s["entropy/mean"][0],
    "accuracy": lambda s: s["eval/avg_at_k"][-1],
    "unlearned": lambda s: max(s["eval/avg_at_k"]) - s["eval/avg_at_k"][-1],
    "pass@8": lambda s: s["eval/pass_at_k"][-1],
    "pass@8 kept": lambda s: s["eval/pass_at_k"][-1] / s["eval/pass_at_k"][0],
    "distinct@8": lambda s: mean(s.get("eval/distinct_at_k", [])[-1:]),  # only walk and countdown have it
    "0.5 less the probability below": lambda s: 0.5 - mean(s.get("clip/prob_low", [])),
    "0.5 less the probability above": lambda s: 0.5 - mean(s.get("clip/prob_high", [])),
    "cut": lambda s: mean(s["response/truncated"][-LAST:]),
}


def by_setting(rows: list[dict]) -> dict[str, list[dict]]:
    groups = {name: [row for row in rows if row["setting"] == name] for name in SETTINGS}
    return {name: group for name, group in groups.items() if group}


def measured(group: list[dict], measure: str) -> dict[int, float]:
    """{seed: number} of the runs of a setting."""
    function = MEASURES.get(measure, lambda s: mean(s.get(measure, [])))
    return {
        row["seed"]: function({name.replace(f"/{row['source']}/", "/"): v for name, v in row["series"].items()})
        for row in group
    }


def interval(values: Iterable[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval), Student's. NaN of no values; the width of one is infinite."""
    x = np.array([value for value in values if np.isfinite(value)])
    if len(x) < 2:
        return (x[0] if len(x) else np.nan), np.inf
    return x.mean(), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)


def difference(a: dict, b: dict) -> dict:
    """By seed or branch, of those that both have."""
    return {key: a[key] - b[key] for key in a if key in b}


def text(values: dict[int, float], digits: int = 3, sign: str = "") -> str:
    """Mean and bounds, "" without values. sign: "+" for differences."""
    middle, half = interval(values.values())
    bounds = f" [{middle - half:{sign}.{digits}f}, {middle + half:{sign}.{digits}f}]" if np.isfinite(half) else ""
    return f"{middle:{sign}.{digits}f}{bounds}" if np.isfinite(middle) else ""


def markdown(head: list[str], rows: Iterable[Iterable]) -> str:
    """A table."""
    first, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *lines])


def read(path: Path, names: Iterable[str]) -> list[dict]:
    """The rows of a file of results, none if there is no file. UserError for a line that is no row with these names."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
            _ = [rows[-1][name] for name in names]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a row with {', '.join(names)}; remove this line") from None
    return rows
