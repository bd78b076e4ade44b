import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from strategies.compression.entropy import Reader
from strategies.compression.gaps import most_index_bytes, pack_indices, unpack_indices
from strategies.compression.sparse import most_sparse_bytes, pack_sparse, unpack_sparse
from strategies.compression.values import (
    as_sent,
    most_value_bytes,
    pack_values,
    unpack_values,
)
from strategies.wire import Refused

CODECS = ("zstd", "none")
PRECISIONS = ("float16", "float32")


@st.composite
def index_sets(draw) -> tuple[np.ndarray, int]:
    size = draw(st.sampled_from([1, 2, 255, 256, 257, 70_000, 2_000_000]))
    found = draw(st.sets(st.integers(0, size - 1), max_size=40))
    return np.array(sorted(found), np.int64), size


@pytest.mark.parametrize("codec", CODECS)
@given(one=index_sets())
@example(one=(np.arange(300), 300))
@example(one=(np.array([254, 255, 510]), 511))
@example(one=(np.array([], np.int64), 0))
def test_coordinates_come_back_in_no_more_bytes_than_said(one, codec):
    indices, size = one
    data = pack_indices(indices, size, codec)
    assert len(data) <= most_index_bytes(len(indices), size, codec)
    reader = Reader(data)
    np.testing.assert_array_equal(unpack_indices(reader, len(indices), size, codec), indices)
    reader.close()


@pytest.mark.parametrize("share", [0.1, 0.01, 0.001, 1e-4])
def test_random_coordinates_take_little_more_than_their_number_of_sets_needs(share):
    """log₂ C(d, k) / k bits is the least that any code can do on average."""
    size, k = 1_000_000, int(share * 1_000_000)
    indices = np.sort(np.random.default_rng(5).permutation(size)[:k])
    ways = math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
    bits = 8 * len(pack_indices(indices, size, "zstd")) / k
    # Half a bit where low bits go as they are; a frame and its table take some 100 bytes.
    assert bits < ways / math.log(2) / k + (0.1 if share >= 0.01 else 0.5) + 8 * 100 / k


@pytest.mark.parametrize("digits", [[5], [5, 255], [255, 255], [5, 6, 7], [250, 250]])
def test_coordinates_that_are_not_as_many_as_said_or_lie_outside_are_refused(digits):
    data = len(digits).to_bytes(4, "little") + bytes(digits)
    with pytest.raises(Refused, match="malformed"):
        unpack_indices(Reader(data), 2, 300, "none")


numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30).map(
    np.float32
)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("precision", PRECISIONS)
@given(values=numbers)
@example(values=np.float32([3.4028235e38, -1e-45]))
@example(values=np.float32([1.9999999, 1e-3]))
def test_values_arrive_as_they_are_said_to(values, precision, codec):
    data = pack_values(values, precision, codec)
    assert len(data) <= most_value_bytes(len(values), precision, codec)
    reader = Reader(data)
    found = unpack_values(reader, len(values), precision, codec)
    reader.close()
    np.testing.assert_array_equal(found, as_sent(values, precision))


@given(values=numbers)
@example(values=np.float32([1.9999999, 1e-3]))
@example(values=np.float32([0.99999994] * 3))
def test_rounding_twice_is_rounding_once(values):
    once = as_sent(values, "float16")
    if np.isfinite(once).all():
        np.testing.assert_array_equal(as_sent(once, "float16"), once)


@given(st.floats(2.0**-66, 2.0**66, width=32), st.integers(0, 2**32))
def test_half_precision_keeps_eleven_bits_of_all_that_is_not_far_below_the_largest(scale, seed):
    spread = np.random.default_rng(seed).uniform(-28, 0, 50)
    values = (scale * 2.0**spread).astype(np.float32)
    values[0] = scale
    np.testing.assert_allclose(as_sent(values, "float16"), values, rtol=2**-11)


def test_what_is_not_finite_stays_so():
    values = np.float32([1, np.nan, np.inf, -np.inf])
    for precision in PRECISIONS:
        reader = Reader(pack_values(values, precision, "zstd"))
        np.testing.assert_array_equal(unpack_values(reader, 4, precision, "zstd"), values)


def sparse(size: int, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vector = np.zeros(size, np.float32)
    vector[rng.permutation(size)[:count]] = rng.normal(0, 0.01, count)
    return vector


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 0), (1, 1), (500, 5), (10_000, 1000)])
def test_a_sparse_vector_comes_back_in_no_more_bytes_than_said(size, count, precision, codec):
    vector = sparse(size, count)
    data = pack_sparse(vector, precision, codec)
    assert len(data) <= most_sparse_bytes(size, count, precision, codec)
    expected = vector.copy()
    expected[vector != 0] = as_sent(vector[vector != 0], precision)
    np.testing.assert_array_equal(unpack_sparse(data, size, count, precision, codec), expected)


@pytest.mark.parametrize("codec", CODECS)
@given(st.integers(1, 3000), st.data())
def test_fewer_elements_never_need_more_room_than_the_most(codec, size, data):
    """What an honest client sends is within the limit of its k however few of its elements are not 0."""
    most = data.draw(st.integers(1, size))
    fewer = data.draw(st.integers(0, most))
    room = most_index_bytes(most, size, codec)
    assert most_index_bytes(fewer, size, codec) <= room


def test_more_elements_than_were_asked_for_are_refused():
    data = pack_sparse(sparse(100, 6), "float16", "zstd")
    with pytest.raises(Refused, match="6 elements came, 5 at most"):
        unpack_sparse(data, 100, 5, "float16", "zstd")


@pytest.mark.parametrize(("precision", "times"), [("float16", 150), ("float32", 85)])
def test_one_in_a_hundred_of_a_bell_curve_takes_so_many_times_fewer_bytes(precision, times):
    size = 100_000
    vector = np.random.default_rng(1).normal(0, 1, size).astype(np.float32)
    vector[np.abs(vector) < np.sort(np.abs(vector))[-1000]] = 0
    assert 4 * size / len(pack_sparse(vector, precision, "zstd")) > times
