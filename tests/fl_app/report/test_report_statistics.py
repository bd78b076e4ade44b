"""Means, spreads and intervals against known values, scipy's and arithmetic's."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_app.report.statistics import Difference, Estimate, estimate, paired

figures = st.floats(-1e6, 1e6)


def test_a_spread_is_that_of_a_sample() -> None:
    assert estimate([2, 4, 4, 4, 5, 5, 7, 9]) == Estimate(8, 5.0, pytest.approx(math.sqrt(32 / 7)))
    assert estimate([0.5]) == Estimate(1, 0.5, None)
    assert estimate([]) == Estimate(0, None, None)


def test_a_known_interval() -> None:
    # Student's sleep data (1908): extra hours of sleep with two drugs, ten patients.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(list(zip(second, first, strict=True)))
    assert (found.pairs, found.mean) == (10, pytest.approx(1.58))
    assert found.low == pytest.approx(0.7001142, abs=1e-6)
    assert found.high == pytest.approx(2.459886, abs=1e-6)


def test_below_two_pairs_there_is_no_interval() -> None:
    assert paired([]) == Difference(0, None, None, None)
    assert paired([(3.0, 1.0)]) == Difference(1, 2.0, None, None)


@given(st.lists(st.tuples(figures, figures), min_size=2, max_size=20), st.floats(0.5, 0.999))
def test_intervals_are_scipys(pairs: list[tuple[float, float]], level: float) -> None:
    found = paired(pairs, level)
    values, baseline = np.array(pairs).T
    differences = values - baseline
    assert found.mean == pytest.approx(differences.mean(), rel=1e-9, abs=1e-6)
    if np.ptp(differences) < 1e-3:  # scipy divides by the deviation
        return
    theirs = stats.ttest_rel(values, baseline).confidence_interval(level)
    assert (found.low, found.high) == (
        pytest.approx(theirs.low, rel=1e-6, abs=1e-4),
        pytest.approx(theirs.high, rel=1e-6, abs=1e-4),
    )


@given(st.lists(st.tuples(figures, figures), min_size=2, max_size=10), figures)
def test_what_pairs_share_does_not_matter(pairs: list[tuple[float, float]], shift: float) -> None:
    found = paired(pairs)
    moved = paired([(value + shift, baseline + shift) for value, baseline in pairs])
    turned = paired([(baseline, value) for value, baseline in pairs])
    assert moved.mean == pytest.approx(found.mean, abs=1e-6)
    assert moved.low == pytest.approx(found.low, abs=1e-5)
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))  # type: ignore[operator]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        difference = random.normal(0.3, 1.0, 4)
        found = paired([(value, 0.0) for value in difference])
        held += found.low <= 0.3 <= found.high  # type: ignore[operator]
    # Four standard errors of a share of 2,000.
    assert held / 2000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_close_figures_keep_their_spread() -> None:
    values = [1e6 + 1e-6 * number for number in (1, 2, 3)]
    assert estimate(values).deviation == pytest.approx(statistics.stdev(values), rel=1e-12)
