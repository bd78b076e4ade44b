"""One-run audits of mechanisms whose ε is known: valid at the stated rate, and strong where there is much to find."""

import numpy as np
import pytest
from scipy.stats import binom
from test_audit_bounds import FALSE_ALARM, gaussian_epsilon

from fl_app.audit.bounds import one_run_epsilon
from fl_app.audit.coins import guess, toss

DELTA = 1e-5


def gaussian_sum(coins, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """The noisy sum of canaries that each move a coordinate of their own by 1: exactly one Gaussian release."""
    return np.asarray(coins, float) + sigma * rng.standard_normal(len(coins))


@pytest.mark.parametrize("sigma", [0.4, 0.8, 2.0])
def test_the_bound_exceeds_the_true_epsilon_in_at_most_5_percent_of_repetitions(sigma):
    """300 audits at 95%: more exceedances than a rate of 5% gives with odds of 1e-6 fail this test."""
    rng, truth = np.random.default_rng(7), gaussian_epsilon(sigma, DELTA)
    exceeded = 0
    for _ in range(300):
        coins = rng.integers(0, 2, 200).astype(bool)
        scores = gaussian_sum(coins, sigma, rng) - 0.5
        exceeded += guess(scores, coins, delta=DELTA, confidence=0.95).epsilon_bound > truth
    assert exceeded <= binom.isf(FALSE_ALARM, 300, 0.05)


def test_a_mechanism_with_less_noise_than_it_says_is_found_out():
    """Noise for ε = 1 is promised and a tenth of it added. The bound is above 1 with odds far beyond 1 − 1e-6: at
    σ = 0.37 nine guesses in ten are right, 0.95 of the surest half; of 1,000 canaries 800 right ones would do."""
    rng = np.random.default_rng(1)
    promised = 3.8
    assert 0.9 < gaussian_epsilon(promised, DELTA) < 1
    coins = toss(1000)
    scores = gaussian_sum(coins, promised / 10, rng) - 0.5
    assert guess(scores, coins, delta=DELTA, confidence=0.95).epsilon_bound > 1


def test_scores_that_know_nothing_bound_nothing_more_often_than_stated():
    rng, above = np.random.default_rng(2), 0
    for _ in range(300):
        coins = rng.integers(0, 2, 64).astype(bool)
        above += guess(rng.normal(size=64), coins, delta=0, confidence=0.95).epsilon_bound > 0
    assert above <= binom.isf(FALSE_ALARM, 300, 0.05)


def test_without_noise_every_coin_is_told_and_the_bound_is_the_largest():
    coins = toss(64)
    found = guess(np.asarray(coins) - 0.5, coins, delta=0, confidence=0.95)
    assert (found.guesses, found.correct) == (64, 64)
    assert found.epsilon_bound == found.most
    assert found.most == one_run_epsilon(64, 64, 64, delta=0, confidence=1 - 0.05 / 4)


def test_the_surest_are_guessed_where_the_rest_is_noise():
    """32 of 256 scores are sure and right, the others tell nothing."""
    rng = np.random.default_rng(4)
    coins = rng.integers(0, 2, 256).astype(bool)
    scores = rng.normal(size=256) * 1e-3
    scores[:32] = np.where(coins[:32], 5.0, -5.0)
    found = guess(scores, coins, delta=0, confidence=0.95)
    assert (found.guesses, found.correct) == (32, 32)


def test_coins_are_fair_and_the_system_s():
    """100,000 coins: their share is off by 1% with odds under 1e-9."""
    assert np.mean(toss(100_000)) == pytest.approx(0.5, abs=0.01)
    assert toss(4, lambda count: bytes([0, 1, 254, 255])) == (False, True, False, True)


def test_scores_that_do_not_fit_are_refused():
    for scores in (np.zeros(7), np.full(8, np.nan)):
        with pytest.raises(ValueError, match="8 coins need as many scores"):
            guess(scores, toss(8), delta=0, confidence=0.95)
