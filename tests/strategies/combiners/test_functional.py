import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.combiners import Mean
from strategies.combiners.functional import mean
from tests.support.updates import plan_of, update

matrices = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(0, 6)),
    elements=st.floats(-1e10, 1e10, width=32),
)


@given(matrices)
def test_the_mean_is_a_float32_vector_and_its_input_stays_as_it_was(updates):
    before = updates.tobytes()
    updates.flags.writeable = False
    result = mean(updates)
    assert (result.shape, result.dtype) == ((updates.shape[1],), np.float32)
    assert updates.tobytes() == before


@given(matrices, st.data())
def test_the_mean_is_numpys_in_float64(updates, data):
    counts = st.lists(st.integers(1, 10**6), min_size=len(updates), max_size=len(updates))
    weights = data.draw(counts)
    expected = np.average(updates.astype(np.float64), axis=0, weights=weights)
    scale = np.average(np.abs(updates.astype(np.float64)), axis=0, weights=weights)
    found = mean(updates, weights=weights)
    np.testing.assert_array_less(np.abs(found - expected), 1e-6 * scale + 1e-30)


@given(matrices)
def test_the_pure_function_and_the_streaming_rule_agree_bit_for_bit(updates):
    accumulator = Mean().begin(plan_of(update(updates[0]), cohort=len(updates)))
    for client, row in enumerate(updates):
        accumulator.add(update(row, weight=client + 1.0, client=client))
    weights = np.arange(1, len(updates) + 1)
    assert accumulator.result().delta.vector.tobytes() == mean(updates, weights=weights).tobytes()


def test_a_client_of_weight_zero_is_not_in_the_mean():
    np.testing.assert_array_equal(mean(np.float32([[1, 2], [9, 9]]), weights=[2, 0]), [1, 2])


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 2, 3], [[1, 2]], [1, -1], [0, 0], [1, np.nan], [1, np.inf]],
    ids=["too few", "too many", "a matrix", "negative", "all zero", "NaN", "infinite"],
)
def test_weights_that_are_not_n_numbers_from_zero_are_refused(weights):
    with pytest.raises(ValueError, match="weights should be 2 finite numbers >= 0, not all 0"):
        mean(np.zeros((2, 3), np.float32), weights=weights)


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 2, 2)])
def test_anything_but_a_matrix_with_a_row_is_refused(shape):
    with pytest.raises(ValueError, match=r"updates should be a matrix \(n, d\) with n >= 1"):
        mean(np.zeros(shape, np.float32))
