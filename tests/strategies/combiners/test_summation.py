"""The running sum against `math.fsum`, which rounds only once."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.combiners.summation import CompensatedSum

CLIENTS, SIZE = 1000, 200


def wide_values(clients: int = CLIENTS, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """(clients, size) float32 of both signs, magnitudes from 1e-8 to 1e8 in every column."""
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** rng.uniform(-8, 8, (clients, size))
    return (magnitudes * rng.choice([-1.0, 1.0], (clients, size))).astype(np.float32)


def total(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    running = CompensatedSum(values.shape[1])
    for index, row in enumerate(values):
        running.add(row, 1.0 if weights is None else float(weights[index]))
    return running.mean(1.0)


def relative_error(found: np.ndarray, values: np.ndarray, weights: np.ndarray) -> float:
    """The largest |found − Σ w·x| / Σ |w·x| over the columns; products of integer weights are exact."""
    worst = 0.0
    for column in range(values.shape[1]):
        terms = [float(w) * float(x) for w, x in zip(weights, values[:, column], strict=True)]
        exact = math.fsum(terms)
        worst = max(worst, abs(found[column] - exact) / math.fsum(map(abs, terms)))
    return worst


def test_a_thousand_clients_from_1e_8_to_1e8_sum_to_the_last_bit():
    values, ones = wide_values(), np.ones(CLIENTS)
    error = relative_error(total(values), values, ones)
    assert error < 1e-15
    naive = relative_error(np.add.reduce(values, axis=0, dtype=np.float32), values, ones)
    assert naive > 1e-9, "a float32 sum should show what the compensated one avoids"


def test_weights_up_to_a_million_cost_no_precision():
    values = wide_values(seed=1)
    weights = np.random.default_rng(2).integers(1, 1_000_000, CLIENTS)
    assert relative_error(total(values, weights), values, weights) < 1e-15


def test_what_cancels_is_not_lost():
    values = np.array([[1e8], [1e-8], [-1e8], [1e-8]], np.float32)
    assert total(values)[0] == 2 * float(np.float32(1e-8))
    assert float(np.sum(values, dtype=np.float64)) != 2 * float(np.float32(1e-8))


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_clients_in_any_order_give_the_same_bits(seed):
    values = wide_values(seed=3)
    order = np.random.default_rng(seed).permutation(CLIENTS)
    assert total(values[order]).tobytes() == total(values).tobytes()


def test_a_plain_float64_sum_would_depend_on_the_order():
    values = wide_values(seed=3).astype(np.float64)
    forwards, backwards = np.zeros(SIZE), np.zeros(SIZE)
    for row in values:
        forwards += row
    for row in values[::-1]:
        backwards += row
    assert forwards.tobytes() != backwards.tobytes()


@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(0, 5)),
        elements=st.floats(-1e10, 1e10, width=32, allow_subnormal=True),
    ),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_the_order_of_a_few_clients_never_shows(values, random, data):
    weights = np.array(data.draw(st.lists(st.integers(1, 10**6), min_size=12, max_size=12)))
    order = list(range(len(values)))
    random.shuffle(order)
    forwards = total(values, weights).astype(np.float32)
    assert total(values[order], weights[order]).astype(np.float32).tobytes() == forwards.tobytes()


@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 30), st.just(3)),
        elements=st.floats(-1e10, 1e10, width=32),
    )
)
def test_a_sum_is_as_good_as_one_rounding(values):
    found = total(values)
    for column in range(3):
        exact = math.fsum(map(float, values[:, column]))
        scale = math.fsum(abs(float(value)) for value in values[:, column])
        assert abs(found[column] - exact) <= 2.0**-52 * abs(exact) + 1e-24 * scale


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 20000])
def test_vectors_of_any_length_are_summed_whole(size):
    values = wide_values(3, size, seed=4)
    expected = [math.fsum(map(float, column)) for column in values.T]
    np.testing.assert_array_equal(total(values), expected)


def test_adding_changes_no_vector():
    values = wide_values(5, 100)
    before = values.copy()
    total(values, np.arange(1, 6))
    np.testing.assert_array_equal(values, before)


def test_the_mean_may_be_asked_for_again_and_is_a_new_array():
    running = CompensatedSum(2)
    running.add(np.array([2, 4], np.float32))
    first = running.mean(2.0)
    first[:] = 99
    np.testing.assert_array_equal(running.mean(2.0), [1, 2])


def test_memory_does_not_grow_with_the_number_of_vectors():
    def peak(count: int) -> int:
        vector = np.ones(50_000, np.float32)
        tracemalloc.start()
        running = CompensatedSum(len(vector))
        for _ in range(count):
            running.add(vector)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(500) < 1.02 * peak(5)
