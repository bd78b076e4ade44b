import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.contract import Claim
from strategies.samplers import Uniform


def draw(
    sampler: Uniform, clients: list[int], seed: int = 0, round_number: int = 1, attempt: int = 0
):
    return sampler.draw(clients, seed=seed, round_number=round_number, attempt=attempt)


@given(
    st.sets(st.integers(0, 10**6), max_size=60).map(sorted),
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 80),
    st.integers(0, 2**63 - 1),
    st.integers(1, 10**6),
)
def test_a_cohort_is_sorted_without_repeats_and_of_the_planned_size(
    clients, fraction, minimum, seed, number
):
    sampler = Uniform(fraction=fraction, minimum=minimum)
    cohort = draw(sampler, clients, seed, number)
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= set(clients)
    assert len(cohort) == sampler.cohort(len(clients))
    assert all(type(client) is int for client in cohort)


@pytest.mark.parametrize(
    ("fraction", "minimum", "available", "cohort"),
    [
        (1.0, 1, 7, 7),
        (0.1, 1, 100, 10),
        (0.1, 5, 20, 5),
        (0.1, 5, 3, 3),
        (0.01, 1, 10, 1),
        (0.5, 1, 0, 0),
    ],
)
def test_a_cohort_is_a_fraction_of_those_who_are_there(fraction, minimum, available, cohort):
    assert Uniform(fraction=fraction, minimum=minimum).cohort(available) == cohort


def test_everyone_is_asked_by_default():
    assert draw(Uniform(), [3, 5, 8]) == [3, 5, 8]


def test_a_draw_depends_on_seed_round_and_attempt_and_on_nothing_else():
    sampler, clients = Uniform(fraction=0.1), list(range(100))
    first = draw(sampler, clients)
    assert draw(Uniform(fraction=0.1), clients) == first
    assert draw(sampler, clients, seed=1) != first
    assert draw(sampler, clients, round_number=2) != first
    assert draw(sampler, clients, attempt=1) != first


def test_every_client_is_asked_equally_often():
    sampler, clients = Uniform(fraction=0.2), list(range(10))
    counts = np.zeros(10)
    for number in range(1, 3001):
        counts[draw(sampler, clients, round_number=number)] += 1
    expected, deviation = 600, np.sqrt(3000 * 0.2 * 0.8)
    assert np.abs(counts - expected).max() < 5 * deviation


def test_the_cohort_is_fixed_in_the_contract_where_the_population_is_known():
    claim = Uniform(fraction=0.1, population=200).check(Claim())
    assert (claim.cohort, claim.sampling) == (20, "fixed")
    assert claim.source("cohort") == "Uniform"
    assert Uniform(fraction=0.1).check(Claim()).cohort is None
