"""The bound holds for every vector and every draw; the mean is the vector."""

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.privacy.rounding import BETA, LARGEST_NORM, rounded, rounded_l1, rounded_l2

vectors = npst.arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e4, 1e4))


@given(vectors, st.sampled_from([BETA, 0.01, 0.99]))
def test_it_is_never_longer_than_the_bound_and_moves_no_element_by_a_step(vector, beta):
    norm = float(np.linalg.norm(vector))
    found = rounded(vector, norm, beta)
    assert found.dtype == np.int64
    assert math.sqrt(sum(int(x) ** 2 for x in found)) <= rounded_l2(norm, len(vector), beta)
    assert np.all(np.abs(found - vector) < 1)
    whole = vector == np.floor(vector)
    np.testing.assert_array_equal(found[whole], vector[whole])


@settings(max_examples=20)
@given(st.integers(1, 50_000), st.floats(0, 0.99), st.floats(0.01, 1e3))
def test_it_ends_soon_where_all_parts_are_alike(size, part, whole):
    """Parts of 1/2 are the longest way up; none of 20 vectors takes more than a moment."""
    vector = np.full(size, math.floor(whole) + part)
    norm = float(np.linalg.norm(vector))
    found = rounded(vector, norm)
    assert float(np.linalg.norm(found)) <= rounded_l2(norm, size) * (1 + 1e-12)


def test_a_rounding_that_came_out_too_long_is_drawn_again():
    """Sixteen halves, of which twelve may go up: never more in 2,000 draws, and so many at times."""
    vector, norm = np.full(16, 0.5), 2.05
    assert 12 < rounded_l2(norm, 16) ** 2 < 13
    lengths = [int((rounded(vector, norm) ** 2).sum()) for _ in range(2_000)]
    assert max(lengths) == 12
    # Twelve come in 2.8% of draws, thirteen and more in 1.06% without the condition: none in 2,000 once in 10⁹ runs.
    assert min(lengths) < 8


def test_the_mean_is_the_vector():
    """4,000 roundings of 50 elements: 5.5 standard errors each, a false alarm in 5 · 10⁵ for all of them."""
    vector = np.random.default_rng(3).uniform(-5, 5, 50)
    many, norm = 4_000, float(np.linalg.norm(vector))
    mean = np.mean([rounded(vector, norm) for _ in range(many)], axis=0)
    part = vector - np.floor(vector)
    error = np.sqrt(part * (1 - part) / many)
    assert np.abs((mean - vector) / error).max() < 6


def test_parts_that_are_small_are_right_to_many_digits():
    """A part of 1/1,000, a million times: 5 standard errors, 6 · 10⁻⁷."""
    vector = np.full(1_000_000, 3.001)
    ups = int((rounded(vector, float(np.linalg.norm(vector))) == 4).sum())
    assert abs(ups - 1_000) < 5 * math.sqrt(1_000)


def test_a_hair_too_long_is_scaled_down_and_ends():
    """Of a norm of 10⁷ a part in 100,000 is more than any rounding allows for."""
    vector = np.full(100, 1e6) + 0.5
    norm = float(np.linalg.norm(vector)) / (1 + 1e-5)
    found = rounded(vector, norm)
    assert float(np.linalg.norm(found)) <= rounded_l2(norm, 100)


def test_the_same_entropy_rounds_alike():
    key, vector = os.urandom(32), np.linspace(-9, 9, 40_000)
    norm = float(np.linalg.norm(vector))
    one, again = (rounded(vector, norm, entropy=lambda count: key[:count]) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, rounded(vector, norm))


def test_the_bound_is_the_papers():
    """Both arms: d small beside c² and large."""
    assert rounded_l2(100.0, 16) == pytest.approx(math.sqrt(10_000 + 4 + 102))
    assert rounded_l2(0.1, 4) == pytest.approx(math.sqrt(0.01 + 1 + 0.1 + 1))
    assert rounded_l2(0.0, 1, 1e-9) == pytest.approx(1.0)
    assert rounded_l2(10.0, 4, 1e-9) == pytest.approx(12.0)


@given(npst.arrays(np.int64, st.integers(1, 40), elements=st.integers(-9, 9)))
def test_no_integer_vector_has_a_larger_l1_norm(vector):
    l2 = math.sqrt(float((vector**2).sum()))
    assert np.abs(vector).sum() <= rounded_l1(l2, len(vector)) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rounded(np.array([3.0, 4.0]), 4.9), "norm 5, where 4.9 was promised"),
        (lambda: rounded(np.array([np.nan]), 1.0), "norm nan"),
        (lambda: rounded(np.array([np.inf]), 1.0), "norm inf"),
        (lambda: rounded_l2(-1.0, 3), "no bound"),
        (lambda: rounded_l2(math.nan, 3), "no bound"),
        (lambda: rounded_l2(LARGEST_NORM * 2, 3), "no bound"),
        (lambda: rounded_l2(1.0, 0), "no bound"),
        (lambda: rounded_l2(1.0, 3, 0.0), "no bound"),
        (lambda: rounded_l2(1.0, 3, 1.0), "no bound"),
    ],
)
def test_what_has_no_bound_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
