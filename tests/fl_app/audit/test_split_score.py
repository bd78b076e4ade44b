"""Intervals of what attacks get right: they hold as often as they say, also of tokens that come in texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fl_app.audit.bounds import clopper_pearson
from fl_app.audit.ranking import auc
from fl_app.audit.split.score import area, most_frequent, share

REPEATS = 300
LEAST = int(binom.ppf(1e-6, REPEATS, 0.95)) - 8
"""Intervals of 95% hold less often once in a million; 2 points for what is approximate in them."""


@given(
    st.lists(
        st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=2
    ),
    st.floats(0.5, 0.99),
)
def test_a_share_lies_in_its_interval_and_more_confidence_widens_it(units, confidence):
    hits, trials = zip(*units, strict=True)
    value, (low, high) = share(hits, trials, confidence)
    assert value == pytest.approx(sum(hits) / sum(trials))
    assert 0 <= low <= value <= high <= 1
    wide = share(hits, trials, (1 + confidence) / 2)[1]
    assert wide[0] <= low + 1e-9
    assert wide[1] >= high - 1e-9


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("rate", [0.1, 0.6, 0.97])
def test_the_interval_holds_of_tokens_that_come_in_texts(rate, spread):
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(REPEATS):
        trials = rng.integers(5, 40, 30)
        of_text = rate if not spread else rng.beta(rate / spread, (1 - rate) / spread, 30)
        _, (low, high) = share(rng.binomial(trials, of_text), trials, 0.95)
        held += low <= rate <= high
    assert held >= LEAST


def test_a_binomial_interval_would_not_hold():
    """What the interval of units is for: Clopper and Pearson's of all tokens is far too narrow."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(REPEATS):
        hits = rng.binomial(30, rng.beta(3, 2, 30)).sum()
        low, high = clopper_pearson(int(hits), 900)
        held += low <= 0.6 <= high
    assert held < 0.7 * REPEATS


def test_no_fault_in_few_texts_is_no_certainty():
    assert share([50] * 5, [50] * 5, 0.95)[1] == clopper_pearson(5, 5)
    assert share([0] * 5, [50] * 5, 0.95)[1] == clopper_pearson(0, 5)
    assert share([3], [9], 0.95) == (pytest.approx(1 / 3), (0.0, 1.0))


@pytest.mark.parametrize(
    ("hits", "trials"), [([], []), ([0], [0]), ([3], [2]), ([-1], [2]), ([1, 1], [2])]
)
def test_shares_of_nothing_are_refused(hits, trials):
    with pytest.raises(ValueError, match="as many as were tried"):
        share(hits, trials, 0.95)


@pytest.mark.parametrize("apart", [0.0, 1.0, 2.5])
def test_the_area_s_interval_holds(apart):
    rng = np.random.default_rng(3)
    truth = norm.cdf(apart / np.sqrt(2))
    held = 0
    for _ in range(REPEATS):
        low, high = area(rng.normal(apart, 1, 20), rng.normal(0, 1, 60), 0.95)[1]
        held += low <= truth <= high
    assert held >= LEAST


def test_an_area_of_one_has_a_lower_end_below_it():
    value, (low, high) = area(np.arange(10, 20.0), np.arange(10.0), 0.95)
    assert (value, high) == (1.0, 1.0)
    assert 0.6 < low < 0.95
    assert area(np.arange(10.0), np.arange(10, 20.0), 0.95) == (0.0, (0.0, pytest.approx(1 - low)))


def test_the_area_is_the_ranking_s():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.5, 1, 30), rng.normal(0, 1, 40)
    assert area(first, second, 0.95)[0] == auc(first, second)[0]


@pytest.mark.parametrize("scores", [np.ones(1), np.array([1.0, np.nan])])
def test_scores_that_can_t_be_ranked_are_refused(scores):
    with pytest.raises(ValueError, match="at least 2 of each, all finite"):
        area(scores, np.arange(5.0), 0.95)


def test_the_most_frequent_answer():
    assert most_frequent([5, 3, 3, 5, 9]) == (3, 0.4)
    with pytest.raises(ValueError, match="no answers"):
        most_frequent([])
