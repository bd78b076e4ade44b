"""The map is orthogonal for every size, its inverse undoes it, and it flattens what is pointed."""

import math
import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from strategies.privacy.rotation import Rotation, hadamard

sizes = st.integers(1, 3_000)
seeds = st.binary(min_size=32, max_size=32)


def vector(size: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng([size, number]).normal(0, 1, size).astype(np.float32)


@given(sizes, seeds)
@example(1, bytes(32))
@example(2, bytes(32))
@example(1_023, bytes(32))
@example(1_024, bytes(32))
@example(1_025, bytes(32))
def test_lengths_and_angles_are_kept(size, seed):
    rotation, x, y = Rotation(seed, size), vector(size), vector(size, 1)
    before, after = (x, y), (rotation.forward(x), rotation.forward(y))
    assert after[0].shape == (size,)
    assert after[0].dtype == np.float32
    for i in range(2):
        for j in range(2):
            inner = float(before[i].astype(np.float64) @ before[j])
            assert float(after[i].astype(np.float64) @ after[j]) == pytest.approx(
                inner, abs=1e-5 * size**0.5 + 1e-5 * abs(inner)
            )


@given(sizes, seeds)
def test_the_inverse_undoes_it_both_ways_and_nothing_is_written_to(size, seed):
    rotation, x = Rotation(seed, size), vector(size)
    kept = x.copy()
    np.testing.assert_allclose(rotation.inverse(rotation.forward(x)), x, atol=1e-5)
    np.testing.assert_allclose(rotation.forward(rotation.inverse(x)), x, atol=1e-5)
    np.testing.assert_array_equal(x, kept)


@given(sizes, seeds, st.floats(-4, 4))
def test_it_is_linear_so_that_a_sum_can_be_turned_back(size, seed, factor):
    rotation, x, y = Rotation(seed, size), vector(size), vector(size, 1)
    total = rotation.forward((x + np.float32(factor) * y).astype(np.float32))
    apart = rotation.forward(x) + np.float32(factor) * rotation.forward(y)
    np.testing.assert_allclose(total, apart, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 33, 64])
def test_its_matrix_is_orthogonal(size):
    rotation = Rotation(os.urandom(32), size)
    matrix = np.array([rotation.forward(row) for row in np.eye(size, dtype=np.float32)])
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("bits", range(12))
def test_the_transform_is_sylvesters(bits):
    """H[i, j] = (−1)^popcount(i & j) / √m."""
    size = 1 << bits
    row = size // 3
    one = np.zeros(size, np.float32)
    one[row] = 1
    expected = [(-1) ** (row & j).bit_count() / math.sqrt(size) for j in range(size)]
    np.testing.assert_allclose(hadamard(one), expected, atol=1e-7)


@pytest.mark.parametrize("size", [1 << 14, (1 << 14) + 1, 20_000, (1 << 15) - 1])
def test_a_single_element_is_spread_over_all(size):
    """The largest is below 1.6·√(2·log d / d), by a union bound: 2d·exp(−(1.6² / 2)·log d) < 10⁻⁵ for each place."""
    places = {0, 1, size // 2, size - (1 << 14), (1 << 14) - 1, size - 1}
    for place in places:
        one = np.zeros(size, np.float32)
        one[place] = 1
        largest = np.abs(Rotation(bytes([place % 251]) * 32, size).forward(one)).max()
        assert 1 / math.sqrt(size) <= largest * (1 + 1e-6)
        assert largest < 1.6 * math.sqrt(2 * math.log(size) / (1 << 14))


def test_a_vector_of_equal_elements_is_spread_too():
    """Without signs a Hadamard matrix would gather it all in one element."""
    size = 30_000
    flat = np.full(size, 1 / math.sqrt(size), np.float32)
    assert np.abs(Rotation(bytes(32), size).forward(flat)).max() < 1.6 * math.sqrt(
        2 * math.log(size) / (1 << 14)
    )


def test_the_seed_alone_decides():
    x = vector(500)
    one, other = (Rotation(seed * 32, 500).forward(x) for seed in (b"a", b"b"))
    np.testing.assert_array_equal(one, Rotation(b"a" * 32, 500).forward(x))
    assert not np.allclose(one, other)


@pytest.mark.parametrize("size", [2**18, 2**18 + 2**17])
def test_signs_are_even_and_of_all_the_stream(size):
    """A million signs and more than one block of the keystream: 5 standard deviations, 6 · 10⁻⁷."""
    rotation = Rotation(os.urandom(32), size)
    for signs in (rotation._first, rotation._last):
        if signs is not None:
            assert set(np.unique(signs)) == {-1.0, 1.0}
            assert abs(float(signs.sum())) < 5 * math.sqrt(len(signs))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Rotation(bytes(31), 4), "32 bytes"),
        (lambda: Rotation(bytes(32), 0), "no direction"),
        (lambda: Rotation(bytes(32), 4).forward(np.zeros(5, np.float32)), "4 are rotated"),
        (lambda: Rotation(bytes(32), 4).inverse(np.zeros(3, np.float32)), "4 are rotated"),
    ],
)
def test_what_cannot_be_right_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
