import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.compression.selection import kept, largest, support

few_values = npst.arrays(
    np.float32,
    st.integers(0, 60),
    elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-45, 3e38]),
)


def by_sorting(vector: np.ndarray, k: int) -> list[int]:
    """What the definition says: magnitudes in order, of equal ones the first, without zeros."""
    order = sorted(range(len(vector)), key=lambda i: (-abs(float(vector[i])), i))
    return sorted(i for i in order[:k] if vector[i] != 0)


@given(few_values, st.data())
def test_the_largest_are_those_of_a_sort_and_of_equal_ones_the_first(vector, data):
    k = data.draw(st.integers(0, len(vector)))
    assert largest(vector, k).tolist() == by_sorting(vector, k)


def test_what_is_not_a_number_is_larger_than_all():
    vector = np.float32([1, np.nan, 3, np.inf, 2])
    assert largest(vector, 1).tolist() == [1]
    assert largest(vector, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("ratio", "size", "count"),
    [(0.01, 1000, 10), (0.01, 1001, 11), (0.01, 1, 1), (1, 7, 7), (0.5, 0, 0)],
)
def test_at_least_one_coordinate_of_any_is_kept(ratio, size, count):
    assert kept(ratio, size) == count


@given(st.integers(0, 300), st.data())
def test_a_support_is_ascending_of_the_size_asked_and_the_same_again(size, data):
    k = data.draw(st.integers(0, size))
    found = support(3, 5, size, k)
    assert len(found) == k
    assert (np.diff(found) > 0).all()
    assert k == 0 or 0 <= found[0] <= found[-1] < size
    support.cache_clear()
    np.testing.assert_array_equal(support(3, 5, size, k), found)


def test_a_support_is_nobodys_to_change():
    assert not support(0, 0, 10, 3).flags.writeable


def test_supports_hit_all_coordinates_alike():
    """20,000 supports of 5 of 20: each coordinate's count is binomial(20000, 1/4). Rate of false alarms: 20 two-sided
    tails at 6.5 standard deviations, 2·10⁻⁹."""
    versions, size, k = 20_000, 20, 5
    hits = np.zeros(size)
    for version in range(versions):
        hits[support.__wrapped__(1, version, size, k)] += 1
    deviation = math.sqrt(versions * k / size * (1 - k / size))
    assert np.abs(hits - versions * k / size).max() < 6.5 * deviation


def test_a_support_rests_on_the_generators_raw_bits_alone():
    """A known answer, so that no release of numpy moves one end's coordinates and not the other's."""
    assert support(7, 3, 1000, 8).tolist() == [241, 378, 408, 513, 559, 730, 944, 956]
