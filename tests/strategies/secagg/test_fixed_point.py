"""Sums never wrap, errors stay within what is derived, and stochastic rounding is unbiased."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.secagg.fixed_point import FixedPoint
from strategies.secagg.masks import BLOCK

limits = st.floats(1e-30, 1e30)
roundings = st.sampled_from(["nearest", "stochastic"])
EDGE = 2**31 - 1


def encoded(point, vector, **options):
    out = np.empty(len(vector), np.uint32)
    point.encode(np.asarray(vector, np.float32), out, **options)
    return out


@given(limits, st.integers(1, 2**20), st.floats(0, 1_000), roundings, st.floats(0, 1))
def test_no_sum_of_extremes_and_noise_leaves_the_ring(limit, members, noise, rounding, factor):
    """All members at the limit, all noise in the same direction: in exact integers, within ±(2³¹ − 1)."""
    point = FixedPoint(limit, members, noise * limit)
    huge = np.array([np.inf, 3e38, limit, -limit], np.float64).clip(-3e38, 3e38)
    for scale in (factor, 1.0, np.nextafter(1.0, 0)):
        sent = encoded(point, huge, rounding=rounding, factor=float(scale)).view(np.int32)
        largest = max(abs(int(value)) for value in sent)
        worst_noise = math.floor(Fraction(point.headroom) * Fraction(point.scale))
        assert members * largest + worst_noise <= EDGE
    assert (
        members * (point.top + 1) + Fraction(point.headroom) * (point.top + 1) / Fraction(limit)
        > EDGE
    )


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40),
    st.floats(1e-3, 1e3),
    st.integers(1, 30),
    roundings,
)
def test_the_mean_of_weighted_members_is_within_the_derived_error(row, limit, members, rounding):
    rng = np.random.default_rng(len(row))
    factors = rng.uniform(0.01, 1, members)
    factors /= factors.max()
    rows = [(limit * 0.999 * np.roll(row, i)).astype(np.float32) for i in range(members)]
    vectors = FixedPoint(limit, members)
    numerator = sum(
        encoded(vectors, x, factor=f, rounding=rounding) for x, f in zip(rows, factors, strict=True)
    )
    mean = vectors.decode(numerator) / factors.sum()
    exact = (
        sum(f * x.astype(np.float64) for x, f in zip(rows, factors, strict=True)) / factors.sum()
    )
    bound = vectors.error(factors.max() / factors.mean(), rounding=rounding)
    assert np.abs(mean - exact).max() <= bound


def test_the_error_is_what_the_formula_says():
    point = FixedPoint(2.0, 100)
    assert point.error(3.0) == pytest.approx(100 / 2**32 * 2.0 * 3.0, rel=1e-4)
    assert point.error(rounding="stochastic") == pytest.approx(2 * point.error(), rel=1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_noise_of_an_element_is_what_rounding_does_on_average(rounding):
    """10⁵ uniform values: the rms is within 1% of the formula, 4 to 5 standard errors, a false alarm in 10⁴."""
    point = FixedPoint(1.0, 2**20)
    row = np.random.default_rng(5).uniform(-0.9, 0.9, 100_000).astype(np.float32)
    off = encoded(point, row, rounding=rounding).view(np.int32) * point.step - row
    assert np.sqrt(np.mean(off**2)) == pytest.approx(point.noise(rounding=rounding), rel=0.01)


@given(
    st.lists(st.floats(-10, 10, width=32), max_size=50),
    st.integers(0, 3),
    st.floats(0, 1),
    st.floats(0.5, 20),
)
def test_blocks_make_no_difference_and_saturation_is_counted(row, blocks, factor, limit):
    vector = np.resize(np.array(row, np.float32), blocks * BLOCK + len(row) if row else 0)
    point, out = FixedPoint(limit, 7), np.empty(len(vector), np.uint32)
    kept = vector.copy()
    saturated = point.encode(vector, out, factor=factor)
    assert saturated == np.count_nonzero(np.abs(vector.astype(np.float64)) > limit)
    expected = np.rint(vector.astype(np.float64).clip(-limit, limit) * (factor * point.scale))
    assert np.array_equal(out.view(np.int32), expected.clip(-point.top, point.top))
    assert np.array_equal(vector, kept)


def test_stochastic_rounding_is_unbiased():
    """A coin with p = 0.1, 10⁶ times over: 5.5 standard errors either way, a false alarm in 2 · 10⁷."""
    point = FixedPoint(1.0, 1_000)
    many = 1_000_000
    for part in (0.1, 0.5, 0.97):
        exact = np.float32((12_345 + part) * point.step)
        mean = encoded(point, np.full(many, exact), rounding="stochastic").astype(np.float64).mean()
        share = float(exact) * point.scale - math.floor(float(exact) * point.scale)
        tolerance = 5.5 * math.sqrt(share * (1 - share) / many)
        assert mean == pytest.approx(float(exact) * point.scale, abs=tolerance)


def test_stochastic_rounding_leaves_whole_steps_and_takes_its_neighbours_only():
    point = FixedPoint(float(EDGE), 1)  # a step is 1
    whole = np.array([0, 1, -1, 5, -(2**23), 2**24], np.float32)
    assert np.array_equal(encoded(point, whole, rounding="stochastic").view(np.int32), whole)
    some = np.resize(np.array([0.25, -0.25, 7.5, -7.5], np.float32), 4_000)
    found = encoded(point, some, rounding="stochastic").view(np.int32)
    assert set(found[::4]) == {0, 1}
    assert set(found[1::4]) == {-1, 0}
    assert set(found[3::4]) == {-8, -7}


def test_the_same_entropy_rounds_in_the_same_way():
    point, key = FixedPoint(1.0, 3), os.urandom(32)
    row = np.linspace(-1, 1, 2 * BLOCK + 1, dtype=np.float32)
    one, again = (
        encoded(point, row, rounding="stochastic", entropy=lambda count: key[:count])
        for _ in (1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, encoded(point, row, rounding="stochastic"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_its_place(bad):
    vector = np.zeros(BLOCK + 10, np.float32)
    vector[BLOCK + 3] = bad
    with pytest.raises(ValueError, match=f"element {BLOCK + 3} is {bad}"):
        encoded(FixedPoint(1.0, 2), vector)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FixedPoint(0.0, 3), "limit = 0.0: must be greater than 0"),
        (lambda: FixedPoint(math.inf, 3), "finite"),
        (lambda: FixedPoint(1.0, 0), "members = 0"),
        (lambda: FixedPoint(1.0, 2, -1.0), "headroom = -1.0"),
        (lambda: FixedPoint(1.0, 2**31), "leave no step"),
        (lambda: FixedPoint(1e-9, 2, 10.0), "less noise"),
        (lambda: FixedPoint(5e-324, 2), "a larger limit"),
        (lambda: encoded(FixedPoint(1.0, 2), [0.0], factor=1.1), "factor = 1.1"),
        (lambda: encoded(FixedPoint(1.0, 2), [0.0], factor=math.nan), "factor = nan"),
        (lambda: FixedPoint(1.0, 2).encode(np.zeros(3, np.float32), np.zeros(2, np.uint32)), "shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
