"""Order statistics: right for every number of rows, on both of their ways, the same bits for any number of threads."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from strategies.combiners import order
from strategies.combiners.rows import Stack
from tests.support import robust_rules as plain
from tests.support.examples import many

values = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
matrices = st.integers(1, 60).flatmap(
    lambda n: st.integers(1, 5).flatmap(
        lambda d: arrays.arrays(np.float32, (n, d), elements=values)
    )
)


def drawn(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)


@pytest.mark.parametrize("n", range(1, 13))
def test_a_network_that_sorts_all_zeros_and_ones_sorts_everything(n):
    """The zero-one principle (Knuth, The Art of Computer Programming 3, 5.3.4, Theorem Z)."""
    columns = np.array(list(product([0.0, 1.0], repeat=n)), np.float32).T
    network = order._network(n, tuple(range(n)))
    spare = list(np.empty((n + 1, columns.shape[1]), np.float32))
    wires = order._sorted_wires(list(columns), network, spare)
    assert np.array_equal(np.stack(wires), np.sort(columns, axis=0))


@pytest.mark.parametrize("n", [3, 5, 10, 24, 48])
def test_pruning_leaves_out_comparators_and_never_more_than_may_be(n):
    full = len(order._network(n, tuple(range(n))))
    dropped = order._network(n, (order._DROPPED,) * n)
    alike = order._network(n, (0,) * n)
    assert (dropped, alike) == ((), ())
    trimmed = order._network(n, (order._DROPPED, *(0,) * (n - 2), order._DROPPED))
    assert n - 1 <= len(trimmed) <= full  # the extremes alone need n − 1 comparisons


@settings(max_examples=many(150))
@given(matrices)
def test_the_median_is_numpys(updates):
    # Two denormal numbers have a midpoint that rounds either way.
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    expected = plain.median(updates)
    assert np.allclose(order.median(Stack.of(updates)), expected, rtol=1e-6, atol=2 * smallest)


@settings(max_examples=many(150))
@given(matrices, st.data())
def test_the_trimmed_mean_is_that_of_the_sorted_columns(updates, data):
    trim = data.draw(st.integers(0, (len(updates) - 1) // 2))
    found = order.trimmed_mean(Stack.of(updates), trim)
    scale = np.abs(updates).max()
    assert np.allclose(found, plain.trimmed_mean(updates, trim), rtol=0, atol=1e-6 * scale)


@settings(max_examples=many(150))
@given(matrices, st.data())
def test_the_mean_around_the_median_takes_the_nearest_values(updates, data):
    keep = data.draw(st.integers(1, len(updates)))
    found = order.mean_around_median(Stack.of(updates), keep)
    scale = np.abs(updates).max()
    assert np.allclose(found, plain.around_median(updates, keep), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("n", [4, 11, 48, 49, 70])
def test_blocks_and_threads_change_no_bit(n):
    updates = drawn(n, 3 * order._NETWORK_WIDTH + 17 if n <= order.NETWORK_ROWS else 5_000)
    rows = Stack.of(updates)
    keep = n - n // 3
    for reduce in (
        order.median,
        lambda r, **k: order.trimmed_mean(r, n // 4, **k),
        lambda r, **k: order.mean_around_median(r, keep, **k),
    ):
        one = reduce(rows)
        assert one.tobytes() == reduce(rows, threads=2).tobytes()
        assert one.tobytes() == reduce(rows, threads=7).tobytes()
        few = reduce(Stack.of(updates[:, -40:].copy()))
        assert one[-40:].tobytes() == few.tobytes()


@pytest.mark.parametrize("n", [11, 60])
def test_the_updates_are_left_as_they_were(n):
    updates = drawn(n, 200)
    before = updates.copy()
    for reduce in (
        order.median,
        lambda r: order.trimmed_mean(r, 2),
        lambda r: order.mean_around_median(r, 5),
    ):
        reduce(Stack.of(updates))
    assert updates.tobytes() == before.tobytes()


@pytest.mark.parametrize("n", [11, 60])
@pytest.mark.parametrize("huge", [1e30, 3e38])
def test_a_huge_value_on_either_side_leaves_no_rounding_behind(n, huge):
    updates = drawn(n, 300) * np.float32(1e-3)
    updates[0], updates[1] = huge, -huge
    honest = updates[2:]
    trimmed = order.trimmed_mean(Stack.of(updates), 1)
    assert np.allclose(trimmed, plain.trimmed_mean(honest, 0), rtol=0, atol=1e-9)
    near = order.mean_around_median(Stack.of(updates), n - 4)
    assert np.abs(near).max() < np.abs(honest).max()


def test_nothing_is_ordered_where_there_is_no_column():
    assert order.median(Stack.of(np.empty((3, 0), np.float32)), threads=2).shape == (0,)
