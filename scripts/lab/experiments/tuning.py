"""The learning rate of each variant: every one runs at every rate of the same grid, on held-out training images.

The best rate is the one with the highest mean top-1 over the tuning seeds; a rate at which a run collapsed or failed is
not taken. Where a best rate lies at the edge of the grid, the grid grows there by one rate, for all variants alike, at
most twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from lab.experiments.table import Key, Table, rate

WIDENED_AT_MOST = 2
Runs = Mapping[Key, Mapping[str, str]]  # rows of results by their keys


@dataclass(frozen=True)
class Tuning:
    """How far the choice has come. While there are pending runs nothing is chosen."""

    grid: list[float]
    widened: int  # how often
    pending: list[Key]
    best: dict[str, str] = field(default_factory=dict)  # by variant; none where every rate failed
    edge: list[str] = field(default_factory=list)  # variants whose best rate is still the first or last of the grid

    @property
    def done(self) -> bool:
        """Whether each variant has its rate, as far as it can have one."""
        return not self.pending


def tuning_of(table: Table, runs: Runs) -> Tuning | None:
    """What the rows so far say about the learning rates; None for a table that isn't tuned."""
    if not table.tune:
        return None
    grid = table.tune.lr
    for widened in range(WIDENED_AT_MOST + 1):
        wanted = [
            Key("tune", name, rate(lr), seed) for seed in table.tune.seeds for lr in grid for name in table.variants
        ]
        if pending := [key for key in wanted if key not in runs]:
            return Tuning(grid, widened, pending)
        best = {name: best_rate(table, runs, name, grid) for name in table.variants}
        wider = widen(grid, list(best.values()))
        if wider == grid or widened == WIDENED_AT_MOST:
            break
        grid = wider
    ends = (None, grid[0], grid[-1])
    return Tuning(
        grid, widened, [], {name: rate(lr) for name, lr in best.items() if lr is not None},
        [name for name, lr in best.items() if lr in ends],
    )  # fmt: skip


def pending_runs(table: Table, runs: Runs) -> list[Key]:
    """What is still to run; final runs of a tuned table only once all rates are chosen."""
    tuning = tuning_of(table, runs)
    if tuning and not tuning.done:
        return tuning.pending
    return [key for key in table.final_keys(tuning.best if tuning else None) if key not in runs]


def best_rate(table: Table, runs: Runs, variant: str, grid: list[float]) -> float | None:
    """The rate with the highest mean top-1, the lower one of two equal ones; None if at every rate a run failed."""
    assert table.tune
    means = {}
    for lr in grid:
        rows = [runs[Key("tune", variant, rate(lr), seed)] for seed in table.tune.seeds]
        if all(row["status"] == "done" for row in rows):
            means[lr] = statistics.fmean(float(row["top1"]) for row in rows)
    return max(means, key=means.__getitem__) if means else None


def widen(grid: list[float], best: list[float | None]) -> list[float]:
    """The grid with one more rate below, above or both, in the ratio of its outermost ones, where a best one is there.

    A variant that failed at every rate asks for a lower one.
    """
    low = [grid[0] ** 2 / grid[1]] if {None, grid[0]} & set(best) else []
    high = [grid[-1] ** 2 / grid[-2]] if grid[-1] in best else []
    return [float(rate(lr)) for lr in (*low, *grid, *high)]
