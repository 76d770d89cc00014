"""Estimates as text in Markdown."""

from __future__ import annotations

import math

from lab.experiments.paired import Estimate


def mean_and_spread(value: Estimate, digits: int = 2, factor: float = 1) -> str:
    """Mean ± standard deviation; the mean alone for one seed, nothing without a number."""
    if not math.isfinite(value.mean):
        return "diverged" if value.n else ""
    text = f"{factor * value.mean:.{digits}f}"
    return text if math.isnan(value.spread) else f"{text} ± {factor * value.spread:.{digits}f}"


def interval(value: Estimate, factor: float = 1) -> str:
    """Mean and 95 % interval of a difference, times a factor."""
    if not value.n:
        return ""
    numbers = (factor * number for number in (value.mean, value.low, value.high))
    mean, low, high = (f"{round(number, 2) + 0.0:+.2f}" for number in numbers)  # + 0.0: no -0.00
    return mean if math.isnan(value.low) else f"{mean} [{low}, {high}]"


def p_text(p: float) -> str:
    """A p-value with three decimals; nothing for NaN."""
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
