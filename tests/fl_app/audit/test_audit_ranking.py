"""Areas, hits and the bound of a threshold attack, against plain counting and scores of known laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fl_app.audit.ranking import auc, hits_at, rank, threshold_epsilon

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=4, max_size=30).map(np.array)


@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_in_order_and_its_variance_delong_s(members, others):
    wins = (members[:, None] > others).astype(float) + 0.5 * (members[:, None] == others)
    rows, columns = wins.mean(axis=1), wins.mean(axis=0)
    variance = rows.var(ddof=1) / len(members) + columns.var(ddof=1) / len(others)
    area, deviation = auc(members, others)
    assert area == pytest.approx(wins.mean())
    assert deviation == pytest.approx(np.sqrt(variance), abs=1e-12)


def test_the_interval_holds_the_true_area_as_often_as_it_says():
    """N(1, 1) against N(0, 1) has the area Φ(1/√2). 400 intervals at 95%: fewer than 347 hold it with odds of 1e-6
    even where each holds it only 92% of the time, which is as near as the normal law comes at this size."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        found = rank(
            rng.normal(1, 1, 80), rng.normal(0, 1, 80), delta=0, confidence=0.95, rng=rng
        ).auc_interval
        held += found[0] <= norm.cdf(1 / np.sqrt(2)) <= found[1]
    assert held >= binom.ppf(1e-6, 400, 0.92)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_hits_are_counted_at_no_more_false_alarms_than_allowed(members, others, rate):
    allowed = [
        (members > t).mean() for t in [*others, *members] if (others > t).mean() <= rate + 1e-12
    ]
    assert hits_at(members, others, rate) == pytest.approx(max(allowed))


def test_scores_of_one_law_bound_nothing():
    """500 audits of scores that tell nothing: a bound above 0 in at most 5% of them, at odds of 1e-6 of this test."""
    rng = np.random.default_rng(3)
    bounds = [
        threshold_epsilon(
            rng.normal(size=200), rng.normal(size=300), delta=0, confidence=0.95, rng=rng
        )
        for _ in range(500)
    ]
    assert sum(bound > 0 for bound in bounds) <= binom.isf(1e-6, 500, 0.05)


def test_scores_apart_bound_much():
    """All 500 of one half on the right side of the threshold: log(p / (1 − p)) with p = 0.025^(1/500) is 4.9."""
    members, others = np.linspace(2, 3, 1000), np.linspace(0, 1, 1000)
    found = rank(members, others, delta=1e-5, confidence=0.95, rng=np.random.default_rng(0))
    assert (found.auc, found.tpr_at_1, found.tpr_at_01) == (1, 1, 1)
    assert 4.5 < found.epsilon_bound < 4.92


def test_few_scores_and_nan_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="3 members"):
        rank(np.zeros(3), np.zeros(9), delta=0, confidence=0.95, rng=rng)
    with pytest.raises(ValueError, match="the others is not a number"):
        rank(np.zeros(9), np.full(9, np.nan), delta=0, confidence=0.95, rng=rng)
