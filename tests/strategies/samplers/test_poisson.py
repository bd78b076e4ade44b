"""Poisson sampling: independent coins, nobody's to foresee, and cohorts that may be empty."""

import numpy as np
import pytest
from scipy import stats

from strategies.contract import Claim
from strategies.samplers import Poisson


def draw(sampler, clients, round_number=1, seed=0, attempt=0):
    return sampler.draw(clients, seed=seed, round_number=round_number, attempt=attempt)


def test_the_size_of_a_cohort_is_binomial_and_each_client_has_a_coin_of_its_own():
    sampler, clients, rounds = Poisson(fraction=0.3), list(range(20)), 3000
    asked = np.zeros((rounds, 20), bool)
    for row in range(rounds):
        asked[row, draw(sampler, clients)] = True
    sizes = np.bincount(asked.sum(1), minlength=21)
    expected = rounds * stats.binom.pmf(np.arange(21), 20, 0.3)
    few = expected < 5  # put together, as the chi-square test wants
    found = [*sizes[~few], sizes[few].sum()]
    assert stats.chisquare(found, [*expected[~few], expected[few].sum()]).pvalue > 1e-6
    for client in clients:
        assert stats.binomtest(int(asked[:, client].sum()), rounds, 0.3).pvalue > 1e-7


def test_empty_cohorts_come():
    sampler = Poisson(fraction=0.05)
    assert any(draw(sampler, [3, 4]) == [] for _ in range(50))  # fails once in 10^50 runs


def test_a_fraction_of_one_asks_all():
    assert draw(Poisson(fraction=1.0), [5, 2, 9]) == [2, 5, 9]


def test_coins_do_not_come_of_the_seed_unless_nothing_rests_on_them():
    clients = list(range(200))
    assert draw(Poisson(), clients) != draw(Poisson(), clients)  # equal once in 2^200 runs
    repeatable = Poisson(reproducible=True)
    assert draw(repeatable, clients) == draw(Poisson(reproducible=True), clients)
    assert draw(repeatable, clients) != draw(repeatable, clients, round_number=2)
    assert draw(repeatable, clients) != draw(repeatable, clients, seed=1)
    assert draw(repeatable, clients) != draw(repeatable, clients, attempt=1)


@pytest.mark.parametrize(
    ("fraction", "population", "cohort"),
    [(0.1, 1000, 100), (0.001, 10, 1), (1.0, 7, 7), (0.5, 0, None)],
)
def test_it_claims_the_expected_cohort_and_the_rate(fraction, population, cohort):
    claim = Poisson(fraction=fraction, population=population).check(Claim())
    assert (claim.sampling, claim.rate, claim.cohort) == ("poisson", fraction, cohort)
    assert claim.source("rate") == "Poisson"


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_a_fraction_is_a_probability(fraction):
    with pytest.raises(ValueError, match=r"Poisson\.fraction"):
        Poisson(fraction=fraction)
