"""The runs of a sweep as numbers: one for each seed of a setting, and their 95 % intervals over seeds."""

from collections.abc import Callable, Iterable

import numpy as np
from scipy import stats

from results.settings import SETTINGS

LAST = 10  # steps; "the end" of a run is their mean
EARLY = 15  # first steps, for claim 3


class Runs:
    """The runs of a sweep by setting and seed. Each method that takes a setting returns {seed: number}."""

    def __init__(self, rows: list[dict]):
        self.groups = {name: [row for row in rows if row["setting"] == name] for name in SETTINGS}
        self.groups = {name: group for name, group in self.groups.items() if group}
        self.source = rows[0]["source"]

    def entropy(self, setting: str, function: Callable) -> dict[int, float]:
        """function: of the entropy at each step, [steps]."""
        return {row["seed"]: function(np.array(row["series"]["entropy/mean"])) for row in self.groups.get(setting, ())}

    def entropy_end(self, setting: str) -> dict[int, float]:
        return self.entropy(setting, lambda e: e[-LAST:].mean())

    def entropy_kept(self, setting: str) -> dict[int, float]:
        return self.entropy(setting, lambda e: e[-LAST:].mean() / e[0])

    def entropy_whole(self, setting: str) -> dict[int, float]:
        return self.entropy(setting, np.mean)

    def entropy_early(self, setting: str) -> dict[int, float]:
        return self.entropy(setting, lambda e: e[:EARLY].mean())

    def entropy_spread(self, setting: str) -> dict[int, float]:
        """Standard deviation around a cubic fitted to the run: a steady fall does not count as variation."""
        return self.entropy(setting, lambda e: np.std(e - np.polyval(np.polyfit(range(len(e)), e, 3), range(len(e)))))

    def evaluations(self, setting: str, metric: str = "avg_at_k") -> dict[int, list[float]]:
        """{seed: the metric at each evaluation}, without runs that were made before it was kept."""
        found = {row["seed"]: row["series"].get(f"eval/{self.source}/{metric}") for row in self.groups.get(setting, ())}
        return {seed: values for seed, values in found.items() if values}

    def at_end(self, setting: str, metric: str = "avg_at_k") -> dict[int, float]:
        return {seed: values[-1] for seed, values in self.evaluations(setting, metric).items()}

    def distinct(self, setting: str) -> dict[int, float]:
        return self.at_end(setting, "distinct_at_k")

    def pass_kept(self, setting: str) -> dict[int, float]:
        return {seed: values[-1] / values[0] for seed, values in self.evaluations(setting, "pass_at_k").items()}

    def unlearned(self, setting: str) -> dict[int, float]:
        """How far the last accuracy is below the best."""
        return {seed: max(values) - values[-1] for seed, values in self.evaluations(setting).items()}

    def average(self, setting: str, name: str, last: int = 0) -> dict[int, float]:
        """Mean of a metric over the steps that have it, or over those of the last ones."""
        series = {row["seed"]: row["series"].get(name, [])[-last:] for row in self.groups.get(setting, ())}
        there = {seed: [value for value in values if value is not None] for seed, values in series.items()}
        return {seed: float(np.mean(values)) if values else np.nan for seed, values in there.items()}

    def base_entropy(self) -> float:
        """In nats: that of the first step, over all runs."""
        return np.mean([row["series"]["entropy/mean"][0] for group in self.groups.values() for row in group])


def interval(values: Iterable[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval), Student's. NaN of no values; the width of one is infinite."""
    x = np.array([value for value in values if np.isfinite(value)])
    if len(x) < 2:
        return (x[0] if len(x) else np.nan), np.inf
    return x.mean(), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)


def difference(a: dict, b: dict) -> dict:
    """By seed, of the seeds that both have."""
    return {key: a[key] - b[key] for key in a if key in b}


def text(values: dict[int, float], digits: int = 3, sign: str = "") -> str:
    """Mean and bounds, "" without values. sign: "+" for differences."""
    mean, half = interval(values.values())
    bounds = f" [{mean - half:{sign}.{digits}f}, {mean + half:{sign}.{digits}f}]" if np.isfinite(half) else ""
    return f"{mean:{sign}.{digits}f}{bounds}" if values else ""


def markdown(head: list[str], rows: Iterable[Iterable]) -> str:
    """A table."""
    first, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *lines])
