"""Means over seeds, and differences between two variants with their 95 % intervals and tests.

Every function leaves out runs that collapsed or failed: these are counted, not averaged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Rows = Iterable[Mapping[str, str]]  # of results/TABLE.csv, of one phase


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
    from scipy.stats import t  # here, since it takes long to import

    spread = statistics.stdev(values)
    half = float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return Estimate(n, mean, spread, mean - half, mean + half)


def by_seed(rows: Rows, variant: str, column: str) -> dict[str, float]:
    """The values of a column for one variant, by seed; empty cells and runs that collapsed are left out."""
    chosen = [row for row in rows if row["variant"] == variant and row.get("status") not in ("collapsed", "failed")]
    return {row["seed"]: float(row[column]) for row in chosen if row[column] != ""}


def level(rows: Rows, variant: str, column: str = "top1") -> Estimate:
    """The mean of a column over the seeds of a variant."""
    return estimate(by_seed(rows, variant, column).values())


def gaps(rows: Rows, variant: str, baseline: str, column: str = "top1") -> list[float]:
    """variant - baseline for each seed that both have."""
    rows = list(rows)
    one, other = by_seed(rows, variant, column), by_seed(rows, baseline, column)
    return [one[seed] - other[seed] for seed in one if seed in other]


def difference(rows: Rows, variant: str, baseline: str, column: str = "top1") -> Estimate:
    """The mean of variant - baseline over the seeds that both have."""
    return estimate(gaps(rows, variant, baseline, column))


def welch(rows: Rows, variant: str, baseline: str, column: str = "top1") -> Estimate:
    """The difference of two means as if no seed were shared (Welch 1947); n is that of the smaller group."""
    rows = list(rows)
    groups = [list(by_seed(rows, name, column).values()) for name in (variant, baseline)]
    n = min(map(len, groups))
    if not n:
        return Estimate(0, math.nan, math.nan, math.nan, math.nan)
    mean = statistics.fmean(groups[0]) - statistics.fmean(groups[1])
    if n < 2 or not math.isfinite(mean):
        return Estimate(n, mean, math.nan, math.nan, math.nan)
    from scipy.stats import t

    parts = [statistics.variance(group) / len(group) for group in groups]
    error = math.sqrt(sum(parts))
    weights = sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    half = float(t.ppf(0.975, sum(parts) ** 2 / weights)) * error if weights else 0.0
    return Estimate(n, mean, math.nan, mean - half, mean + half)


def survives_holm(rows: Rows, pairs: Iterable[tuple[str, str]], column: str = "top1") -> list[bool]:
    """For each (variant, baseline) whether its paired difference survives Holm's correction over all pairs, at 5 %."""
    rows = list(rows)
    return [p < 0.05 for p in holm([p_value(gaps(rows, *pair, column)) for pair in pairs])]


def p_value(values: Sequence[float], center: float = 0.0, side: int = 0) -> float:
    """Student's test of a mean against `center`: two-sided, or that it is above (side 1) or below it (side -1).

    Returns NaN without two finite values.
    """
    found = estimate(values)
    if math.isnan(found.spread):
        return math.nan
    from scipy.stats import t

    distance = found.mean - center
    if not found.spread:
        away = distance != 0 if not side else side * distance > 0
        return 0.0 if away else 1.0
    score = distance / (found.spread / math.sqrt(found.n))
    return float(t.sf(side * score, found.n - 1) if side else 2 * t.sf(abs(score), found.n - 1))


def equivalence(values: Sequence[float], margin: float) -> float:
    """The p-value of two one-sided tests (TOST, Schuirmann 1987): small if the mean lies within ±margin."""
    return max(p_value(values, -margin, 1), p_value(values, margin, -1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979), in the order given; NaN stays NaN and doesn't count."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__)
    adjusted, least = list(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted
