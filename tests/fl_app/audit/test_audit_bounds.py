"""Bounds on ε against closed forms, the papers' own figures, and mechanisms whose ε is known exactly."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fl_app.audit.bounds import (
    clopper_pearson,
    lower_rate,
    one_run_epsilon,
    one_run_p_value,
    rates_epsilon,
    upper_rate,
)

FALSE_ALARM = 1e-6


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """ε of one Gaussian release of sensitivity 1 (Balle and Wang 2018, Theorem 8), by bisection."""

    def spent(eps: float) -> float:
        left, right = 1 / (2 * sigma) - eps * sigma, -1 / (2 * sigma) - eps * sigma
        return float(norm.cdf(left) - math.exp(eps) * norm.cdf(right))

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def most_exceedances(repetitions: int, rate: float) -> int:
    """The count that a binomial number exceeds with probability `FALSE_ALARM` at most."""
    return int(binom.isf(FALSE_ALARM, repetitions, rate))


@pytest.mark.parametrize(
    ("numbers", "delta", "printed"),
    [((1000, 100, 75), 1e-4, 0.673), ((100_000, 1510, 1439), 1e-5, 2.675)],
)
def test_the_paper_s_own_figures(numbers, delta, printed):
    """Steinke et al. 2023, Appendix D and §7; the second figure is cut off there, not rounded."""
    assert one_run_epsilon(*numbers, delta=delta) == pytest.approx(printed, abs=1e-3)


@given(st.integers(1, 2000), st.floats(0.5, 0.999))
def test_all_right_with_delta_0_has_a_closed_form(guesses, confidence):
    """p^r = 1 − confidence, so that ε = log(p / (1 − p))."""
    rate = (1 - confidence) ** (1 / guesses)
    expected = max(0.0, math.log(rate / (1 - rate))) if rate < 1 else math.inf
    found = one_run_epsilon(guesses, guesses, guesses, delta=0, confidence=confidence)
    assert found == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 60), st.data())
def test_a_p_value_is_that_of_the_theorem_written_out(guesses, data):
    correct = data.draw(st.integers(0, guesses))
    canaries = data.draw(st.integers(guesses, 200))
    epsilon, delta = data.draw(st.floats(0, 5)), data.draw(st.floats(0, 1e-2))
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [
        math.comb(guesses, k) * rate**k * (1 - rate) ** (guesses - k) for k in range(guesses + 1)
    ]
    alpha = max(
        (sum(mass[correct - i : correct]) * 2 / i for i in range(1, correct + 1)), default=0
    )
    expected = min(1.0, sum(mass[correct:]) + alpha * canaries * delta)
    found = one_run_p_value(canaries, guesses, correct, epsilon, delta)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(1, 100), st.data())
def test_more_right_guesses_bound_more_and_a_larger_delta_less(guesses, data):
    correct = data.draw(st.integers(0, guesses - 1))
    delta = data.draw(st.floats(0, 0.01))
    bound = one_run_epsilon(guesses, guesses, correct, delta=delta)
    assert bound <= one_run_epsilon(guesses, guesses, correct + 1, delta=delta) + 1e-9
    assert bound <= one_run_epsilon(guesses, guesses, correct, delta=delta / 2) + 1e-9


@pytest.mark.parametrize("rate", [0.001, 0.03, 0.5, 0.9])
@pytest.mark.parametrize("trials", [5, 60])
def test_a_rate_s_bounds_hold_as_often_as_they_say(rate, trials):
    """Exactly: the probability of all counts whose bound is on the wrong side."""
    counts = np.arange(trials + 1)
    mass = binom.pmf(counts, trials, rate)
    for error in (0.05, 0.001):
        assert mass[np.asarray(lower_rate(counts, trials, error)) > rate].sum() <= error
        assert mass[np.asarray(upper_rate(counts, trials, error)) < rate].sum() <= error


def test_the_interval_is_the_textbook_one():
    """No success in n: from 0 to 1 − (α/2)^(1/n); R's binom.test(7, 20) for the other."""
    assert clopper_pearson(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert clopper_pearson(7, 20) == pytest.approx((0.1539092, 0.5921885), abs=1e-7)


def test_perfect_separation_bounds_epsilon_by_the_number_of_trials():
    """Rates of at least p and at most 1 − p with p = 0.025^(1/n), either way round."""
    rate = 0.025 ** (1 / 100)
    found = rates_epsilon(100, 100, 0, 100, delta=0, confidence=0.95)
    assert found == pytest.approx(math.log(rate / (1 - rate)))
    denials = rates_epsilon(90, 100, 0, 1000, delta=1e-5, confidence=0.95)
    assert denials > 0
    assert rates_epsilon(50, 100, 50, 100, delta=0, confidence=0.95) == 0


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_two_rates_exceed_the_true_epsilon_in_at_most_5_percent_of_repetitions(sigma):
    """4,000 audits of a Gaussian mechanism at its most telling thresholds. False alarm of this test: 1e-6."""
    rng, repetitions, trials, delta = np.random.default_rng(1), 4000, 400, 1e-5
    truth = gaussian_epsilon(sigma, delta)
    for threshold in (0.5, 1.0, 2 * sigma):
        hits = rng.binomial(trials, norm.sf((threshold - 1) / sigma), repetitions)
        alarms = rng.binomial(trials, norm.sf(threshold / sigma), repetitions)
        bounds = rates_epsilon(hits, trials, alarms, trials, delta=delta, confidence=0.95)
        assert (bounds > truth).sum() <= most_exceedances(repetitions, 0.05)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lower_rate(3, 2, 0.05), "must be 0 to trials"),
        (lambda: lower_rate(0, 0, 0.05), "of 1 or more"),
        (lambda: upper_rate(1, 2, 0.0), "between 0 and 1"),
        (lambda: one_run_p_value(5, 6, 1, 1.0, 0.0), "must not grow"),
        (lambda: one_run_p_value(5, 5, 1, -1.0, 0.0), "epsilon=-1.0"),
        (lambda: one_run_p_value(5, 5, 1, math.nan, 0.0), "epsilon=nan"),
        (lambda: one_run_p_value(5, 5, 1, 1.0, 1.0), "delta=1.0"),
        (lambda: one_run_epsilon(5, 5, 1, delta=0, confidence=1.0), "confidence=1.0"),
        (lambda: rates_epsilon(1, 2, 1, 2, delta=-1.0, confidence=0.9), "delta=-1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
