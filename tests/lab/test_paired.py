"""Intervals and tests against scipy, statsmodels where it is, and published examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lab.experiments import tuned
from lab.experiments.paired import equivalence, estimate, gaps, holm, p_value, welch
from lab.experiments.table import Table
from scipy import stats
from tables import rows_of

A, B = [93.1, 92.4, 93.8, 92.9, 93.3], [92.7, 92.6, 92.9, 92.2, 92.8, 92.5, 93.0]


def rows() -> list[dict[str, str]]:
    return rows_of({"a": dict(enumerate(A)), "b": dict(enumerate(B))})


def test_welch_is_that_of_scipy() -> None:
    found = welch(rows(), "a", "b")
    expected = stats.ttest_ind(A, B, equal_var=False).confidence_interval(0.95)
    assert (found.n, found.mean) == (5, pytest.approx(np.mean(A) - np.mean(B)))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_p_is_that_of_scipy_on_both_sides_and_one() -> None:
    d = gaps(rows(), "a", "b")
    assert p_value(d) == pytest.approx(stats.ttest_rel(A, B[:5]).pvalue)
    for side, name in ((1, "greater"), (-1, "less")):
        assert p_value(d, 0.1, side) == pytest.approx(stats.ttest_1samp(d, 0.1, alternative=name).pvalue)


def test_equivalence_is_two_one_sided_tests() -> None:
    d = gaps(rows(), "a", "b")
    sides = stats.ttest_1samp(d, -0.5, alternative="greater"), stats.ttest_1samp(d, 0.5, alternative="less")
    assert equivalence(d, 0.5) == pytest.approx(max(side.pvalue for side in sides))
    assert equivalence([0.01, -0.01, 0.0], 0.5) < 0.001
    assert equivalence([0.6, 0.7], 0.5) > 0.5


def test_holm_by_hand_and_by_statsmodels() -> None:
    """Holm (1979): p times the number of hypotheses not yet rejected, never less than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([math.nan, 0.02])[1] == 0.02
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).uniform(0, 0.2, 12)
    assert holm(list(p)) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_runs_that_collapsed_are_left_out() -> None:
    numbers = rows()
    numbers[0]["status"] = "collapsed"
    assert gaps(numbers, "a", "b") == pytest.approx([a - b for a, b in zip(A[1:], B[1:], strict=False)])
    assert welch(numbers, "a", "b").mean == pytest.approx(np.mean(A[1:]) - np.mean(B))


def test_nothing_is_said_of_one_value_and_equal_ones_have_no_spread() -> None:
    assert math.isnan(p_value([1.0]))
    assert math.isnan(equivalence([1.0], 2.0))
    assert (p_value([1.0, 1.0]), p_value([0.0, 0.0]), equivalence([0.1, 0.1], 0.5)) == (0.0, 1.0, 0.0)
    assert welch(rows_of({"a": {0: 1, 1: 1}, "b": {0: 1, 1: 1}}), "a", "b").low == 0


TABLE = Table("t", "T", "b", {"a": {}, "b": {}, "c": {}}, primary="a - b", margin=0.5, options={"num_classes": 10})


@pytest.mark.parametrize(
    ("differences", "text"),
    [
        ([0.8, 0.9, 1.0, 0.9], "a gain of more than 0.5 points"),
        ([-0.8, -0.9, -1.0, -0.9], "a loss of more than 0.5 points"),
        ([0.0, 0.1, -0.1, 0.05], "within ±0.5 points (no difference from 0 is shown"),
        ([0.2, 0.25, 0.2, 0.25], "within ±0.5 points (above 0"),
        ([-0.2, -0.25, -0.2, -0.25], "within ±0.5 points (below 0"),
        ([0.0, 1.0, 0.2, 0.9], "not settled"),
    ],
)
def test_the_sentence_follows_from_interval_and_margin(differences: list[float], text: str) -> None:
    numbers = {"a": {i: 50 + d for i, d in enumerate(differences)}, "b": dict.fromkeys(range(4), 50.0)}
    assert text in tuned.primary_sentence(TABLE, rows_of(numbers))


def test_the_number_of_seeds_that_would_settle_it_is_the_first_that_does() -> None:
    gap = estimate([0.0, 1.0, 0.2, 0.9])
    n = int(tuned.needed(gap, 0.8).split("about ")[1].split()[0])
    half = [stats.t.ppf(0.975, k - 1) * gap.spread / k**0.5 for k in (n - 1, n)]
    assert half[0] >= abs(gap.mean - 0.8) > half[1]


def test_the_primary_contrast_has_no_part_in_holms_correction() -> None:
    numbers = {"a": dict(enumerate(A)), "b": dict(enumerate(B[:5])), "c": {i: x + 1 for i, x in enumerate(B[:5])}}
    ((name, _, p),) = tuned.other_contrasts(
        TABLE, rows_of({**numbers, "c": {0: 93.9, 1: 93.4, 2: 94.1, 3: 93.0, 4: 94.0}})
    )
    assert name == "c - b"
    assert p == pytest.approx(stats.ttest_rel([93.9, 93.4, 94.1, 93.0, 94.0], B[:5]).pvalue)
    text = tuned.table_of_contrasts(TABLE, rows_of(numbers))
    assert "| `a` - `b` | 5 |" in text
    assert text.splitlines()[2].endswith("| primary |")
