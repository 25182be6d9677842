"""The runs of a sweep as numbers: one for each seed of a setting, and their 95 % intervals over seeds."""

import numpy as np
from scipy.stats import t as student

from results.settings import SETTINGS

LAST = 10  # steps; "the end" of a run is their mean
EARLY = 15  # first steps, for claim 3


class Runs:
    """The runs of a sweep by setting and seed. Each method that takes a setting returns {seed: number}."""

    def __init__(self, rows: list[dict]):
        self.rows = {(row["setting"], row["seed"]): row for row in rows}
        self.settings = [name for name in SETTINGS if any(name == other for other, _ in self.rows)]
        self.source = rows[0].get("source", "arithmetic")  # the first sweep did not write it

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
        """Standard deviation around a cubic fitted to the run: a steady fall does not count as variation."""
        return self.of(setting, lambda s: np.std(residual(s["entropy/mean"])))

    def entropy_extremes(self, setting: str) -> tuple[float, float]:
        """(lowest, highest) entropy of a step over that of the first step, of all runs."""
        shares = [np.array(s) / s[0] for s in self.of(setting, lambda s: s["entropy/mean"]).values()]
        return min(map(np.min, shares)), max(map(np.max, shares))

    def evaluations(self, setting: str, metric: str = "avg_at_k") -> dict[int, list[float]]:
        """{seed: the metric at each evaluation}, without runs that were made before it was kept."""
        found = self.of(setting, lambda s: s.get(f"eval/{self.source}/{metric}"))
        return {seed: values for seed, values in found.items() if values}

    def at_end(self, setting: str, metric: str = "avg_at_k") -> dict[int, float]:
        return {seed: values[-1] for seed, values in self.evaluations(setting, metric).items()}

    def pass_kept(self, setting: str) -> dict[int, float]:
        return {seed: values[-1] / values[0] for seed, values in self.evaluations(setting, "pass_at_k").items()}

    def unlearned(self, setting: str) -> dict[int, float]:
        """How far the last accuracy is below the best."""
        return {seed: max(values) - values[-1] for seed, values in self.evaluations(setting).items()}

    def average(self, setting: str, name: str) -> dict[int, float]:
        return self.of(setting, lambda s: mean_of(s[name]))

    def base_entropy(self) -> float:
        """In nats: that of the first step, over all runs."""
        return np.mean([row["series"]["entropy/mean"][0] for row in self.rows.values()])


def residual(values: list[float]) -> np.ndarray:
    steps = np.arange(len(values))
    return np.array(values) - np.polyval(np.polyfit(steps, values, 3), steps)


def mean_of(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else float("nan")


def cut(series: dict[str, list]) -> float:
    """The share of responses that were cut at the limit, at the end."""
    return np.mean(series["response/truncated"][-LAST:])


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
    if not values:
        return ""
    mean, low, high = interval(values)
    plus = "+" if sign else ""
    bounds = f" [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]" if np.isfinite(low) else ""
    return f"{mean:{plus}.{digits}f}{bounds}"
