"""Means over seeds, and differences between two variants that are paired by seed, with a 95 % interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Rows = Iterable[Mapping[str, str]]  # of results/TABLE.csv


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with their standard deviation and the mean's 95 % interval; NaN for what n doesn't carry."""

    n: int
    mean: float
    spread: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies above or below 0, else 0: then no difference is shown."""
        return (self.low > 0) - (self.high < 0)


def estimate(values: Iterable[float]) -> Estimate:
    """Student's interval: mean ± t(0.975, n - 1) · s / sqrt(n); no spread and no interval without two values."""
    values = list(values)
    n = len(values)
    mean = statistics.fmean(values) if n else math.nan
    if n < 2 or not math.isfinite(mean):
        return Estimate(n, mean, math.nan, math.nan, math.nan)
    from scipy.stats import t  # here, since it takes long to import; it comes with scikit-learn

    spread = statistics.stdev(values)
    half = float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return Estimate(n, mean, spread, mean - half, mean + half)


def by_seed(rows: Rows, variant: str, column: str) -> dict[str, float]:
    """The values of a column for one variant, by seed; empty cells are left out."""
    return {row["seed"]: float(row[column]) for row in rows if row["variant"] == variant and row[column] != ""}


def level(rows: Rows, variant: str, column: str = "top1") -> Estimate:
    """The mean of a column over the seeds of a variant."""
    return estimate(by_seed(rows, variant, column).values())


def difference(rows: Rows, variant: str, baseline: str, column: str = "top1") -> Estimate:
    """The mean of variant - baseline over the seeds that both have."""
    rows = list(rows)
    one, other = by_seed(rows, variant, column), by_seed(rows, baseline, column)
    return estimate(one[seed] - other[seed] for seed in one if seed in other)
