"""Seeds, state and metrics: a few lines each, on which repeatability and restarts rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.metrics import Sums, add_metrics, mean_metrics
from strategies.seeds import generator, integer
from strategies.state import array_in, array_like, integer_in, mapping_in

seeds = st.integers(0, 2**63 - 1)


@given(seeds, st.text(max_size=10), st.lists(st.integers(0, 10**6), max_size=3))
def test_a_seed_is_63_bits_and_the_same_every_time(seed, purpose, indices):
    first = integer(seed, purpose, *indices)
    assert first == integer(seed, purpose, *indices)
    assert 0 <= first < 2**63
    assert (
        generator(seed, purpose, *indices).random() == generator(seed, purpose, *indices).random()
    )


def test_purposes_indices_and_seeds_have_streams_of_their_own():
    asked = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1), (0, "a", 2), (0, "a", 1, 2), (0, "a", 2, 1)]
    assert len({integer(seed, purpose, *indices) for seed, purpose, *indices in asked}) == len(
        asked
    )


def test_seeds_are_the_same_on_every_machine():
    assert integer(0, "train", 1, 2) == 8990814842138451353
    assert generator(0, "sampler", 1, 0).bit_generator.random_raw() == 18246092200162588613


def test_arrays_of_a_state_are_copied_as_float64():
    stored = np.array([1, 2], np.float32)
    found = array_in({"m": stored}, "m", (2,))
    assert found.dtype == np.float64
    found[0] = 9
    assert stored[0] == 1


@pytest.mark.parametrize("value", [None, 3.0, [1, 2], np.zeros(3), np.zeros((2, 1))])
def test_an_array_of_another_shape_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"the state's 'm' should be an array of shape \(2,\)"):
        array_in({"m": value}, "m", (2,))


@pytest.mark.parametrize("value", [None, np.zeros(2), np.zeros(3, np.int64)])
def test_an_array_of_another_dtype_is_refused_where_it_must_be_the_same(value):
    with pytest.raises(ValueError, match=r"'m' should be an array of int64 with shape \(2,\)"):
        array_like({"m": value}, "m", np.zeros(2, np.int64))


def test_numbers_and_mappings_are_told_from_anything_else():
    assert integer_in({"n": 3}, "n") == 3
    assert mapping_in({"m": {"a": 1}}, "m") == {"a": 1}
    for wrong in (None, True, 1.0, "1"):
        with pytest.raises(ValueError, match="the state's 'n' should be a whole number"):
            integer_in({"n": wrong}, "n")
    for wrong in (None, 3, [("a", 1)]):
        with pytest.raises(ValueError, match="the state's 'm' should be a mapping"):
            mapping_in({"m": wrong}, "m")


def means(*reports: tuple[float, dict[str, float]]) -> dict[str, float]:
    sums: Sums = {}
    for weight, metrics in reports:
        add_metrics(sums, metrics, weight)
    return mean_metrics(sums)


def test_metrics_are_averaged_by_weight_over_those_who_report_them():
    found = means((1, {"loss": 1.0, "acc": 0.5}), (3, {"loss": 3.0}))
    assert found == {"loss": 2.5, "acc": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e308, -1.7e308])
def test_a_number_that_is_no_use_is_left_out_with_its_weight(value):
    assert means((100, {"loss": value}), (1, {"loss": 2.0}), (1, {"loss": 4.0})) == {"loss": 3.0}


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats())))
def test_a_mean_is_always_finite(reports):
    found = means(*((weight, {"loss": value}) for weight, value in reports))
    assert all(np.isfinite(value) for value in found.values())
