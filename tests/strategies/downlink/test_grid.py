"""The grid: near enough, exact in each dtype, and the same for everybody."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.downlink.grid import (
    OF_ZEROS,
    exponent_of,
    from_multiples,
    multiples,
    rounded,
)


def floats(dtype: str) -> st.SearchStrategy[np.ndarray]:
    width = 8 * np.dtype(dtype).itemsize
    limit = float(np.finfo(dtype).max) / 8
    elements = st.floats(-limit, limit, width=width, allow_nan=False)
    return npst.arrays(
        dtype, npst.array_shapes(min_dims=0, max_dims=2, max_side=6), elements=elements
    )


any_array = st.sampled_from(["f2", "f4", "f8"]).flatmap(floats)


def rms_squared(array: np.ndarray) -> Fraction:
    return sum((Fraction(float(x)) ** 2 for x in array.ravel()), Fraction()) / max(array.size, 1)


@given(any_array, st.integers(2, 20))
@example(np.array([1.0, -0.0, 1e-45], np.float32), 10)
@example(np.array([65_504.0 / 8, 6e-8], np.float16), 2)
@example(np.full(5, 5e-324), 20)
def test_elements_are_whole_multiples_at_most_half_a_step_away(array, bits):
    exponent = exponent_of(array, bits)
    assert exponent is not None
    step, lattice = Fraction(2) ** exponent, rounded(array, exponent)
    assert (lattice.dtype, lattice.shape) == (array.dtype, array.shape)
    for x, y in zip(array.ravel(), lattice.ravel(), strict=True):
        assert (Fraction(float(y)) / step).denominator == 1
        assert abs(Fraction(float(y)) - Fraction(float(x))) <= step / 2
    assert not np.signbit(lattice[lattice == 0]).any()


@given(any_array, st.integers(2, 20))
def test_the_step_is_the_largest_power_of_two_that_is_bits_below_the_rms(array, bits):
    exponent = exponent_of(array, bits)
    if not array.any():
        assert exponent == OF_ZEROS
        return
    step, square = Fraction(2) ** exponent, rms_squared(array)
    least = Fraction(float(np.finfo(array.dtype).smallest_subnormal))
    # The rms is computed in float64, and may lie on the other side of a power of two by its last bits.
    slack = 1 + Fraction(1, 10**12)
    assert step <= least or step**2 * 4**bits <= square * slack
    assert (2 * step) ** 2 * 4**bits * slack >= square


@given(any_array, st.integers(2, 20))
def test_a_model_on_its_grid_is_its_own(array, bits):
    exponent = exponent_of(array, bits)
    once = rounded(array, exponent)
    assert rounded(once, exponent).tobytes() == once.tobytes()
    whole = multiples(once, exponent)
    assert from_multiples(whole, exponent, once).tobytes() == once.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_what_has_no_grid_stays_as_it_is(value):
    array = np.array([0.1, value], np.float32)
    assert exponent_of(array, 10) is None
    assert rounded(array, None) is array


@pytest.mark.parametrize("dtype", ["i8", "u8", "i4", "u1", "?"])
def test_integers_are_their_own_multiples_to_the_last_bit(dtype):
    limits = (
        np.array([0, 1])
        if dtype == "?"
        else np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    )
    array = limits.astype(dtype)
    assert exponent_of(array, 10) == 0
    assert rounded(array, 0) is array
    assert from_multiples(multiples(array, 0), 0, array).tobytes() == array.tobytes()


def test_values_off_a_grid_or_past_float64s_whole_numbers_have_no_multiples():
    assert multiples(np.array([0.75], np.float32), -1) is None
    assert multiples(np.array([1e30], np.float32), -1) is None
    assert multiples(np.array([np.nan], np.float32), -1) is None
    assert multiples(np.array([1.0], np.float32), -1074) is None
    assert multiples(np.array([1.5], np.float32), -1).tolist() == [3]


def test_the_relative_error_is_that_of_uniform_rounding():
    """rms error h/√12 within 2%: the standard error of 10⁶ uniform errors' rms is 0.045%, so 40 of them."""
    array = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    for bits in (8, 12):
        exponent = exponent_of(array, bits)
        error = rounded(array, exponent).astype(np.float64) - array
        assert np.sqrt(np.mean(error**2)) == pytest.approx(2.0**exponent / 12**0.5, rel=0.02)
