"""Tails agree with exact fractions, the tiny ones too."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.secagg.tails import log2_binomial, log2_tails


def exact_tail(population, marked, draws, least):
    ways = sum(
        math.comb(marked, x) * math.comb(population - marked, draws - x)
        for x in range(max(least, 0), min(marked, draws) + 1)
        if draws - x <= population - marked
    )
    return Fraction(ways, math.comb(population, draws))


def log2(fraction):
    """log₂ of a fraction of any size."""
    if not fraction:
        return -math.inf
    shift = fraction.denominator.bit_length() - fraction.numerator.bit_length()
    return math.log2(fraction * Fraction(2) ** shift) - shift


@given(st.data())
def test_every_tail_of_a_small_population(data):
    population = data.draw(st.integers(1, 40))
    marked, draws = (data.draw(st.integers(0, population)) for _ in range(2))
    found = log2_tails(population, marked, draws)
    exact = [log2(exact_tail(population, marked, draws, x)) for x in range(draws + 2)]
    assert found == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize(("population", "marked", "draws"), [(499, 50, 138), (4_999, 1_500, 214)])
def test_tails_below_two_to_minus_sixty(population, marked, draws):
    found = log2_tails(population, marked, draws)
    tiny = np.flatnonzero(found < -60)[:5]
    for x in tiny:
        assert found[x] == pytest.approx(
            log2(exact_tail(population, marked, draws, int(x))), abs=1e-8
        )
    assert len(tiny) == 5


def test_binomial_coefficients_outside_their_range_are_zero():
    found = log2_binomial(5, np.array([-1, 0, 2, 5, 6]))
    assert found == pytest.approx([-math.inf, 0, math.log2(10), 0, -math.inf])
