import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.compression.low_rank import (
    Matrix,
    as_decoded,
    factorise,
    first_right,
    matrices_of,
    most_low_rank_bytes,
    pack_low_rank,
    unpack_low_rank,
)
from strategies.update import Layout

LAYOUT = Layout(
    ("conv", "bias", "head", "scalar", "small"), ((16, 4, 3, 3), (16,), (30, 40), (), (2, 2))
)


def vector(seed: int = 0, layout: Layout = LAYOUT) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, layout.size).astype(np.float32)


def test_matrices_are_the_arrays_that_are_smaller_as_factors():
    assert matrices_of(LAYOUT, 2) == [Matrix(0, 16, 36, 2), Matrix(592, 30, 40, 2)]
    assert matrices_of(LAYOUT, 12) == [Matrix(592, 30, 40, 12)]
    assert matrices_of(LAYOUT, 40) == []


@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_that_rank_comes_back_to_half_precision(rank):
    rng = np.random.default_rng(1)
    layout = Layout(("w",), ((50, 60),))
    exact = (rng.normal(0, 1, (50, rank)) @ rng.normal(0, 1, (rank, 60))).astype(np.float32).ravel()
    matrices = matrices_of(layout, rank)
    left, right = factorise(exact, matrices, first_right(matrices, 0))
    decoded = as_decoded(exact, matrices, left, right)
    assert np.linalg.norm(decoded - exact) < 2**-10 * np.linalg.norm(exact)


def test_warm_starts_come_to_the_best_approximation_of_that_rank():
    """Subspace iteration: the error tends to that of the truncated singular value decomposition."""
    layout, rank = Layout(("w",), ((40, 30),)), 2
    one, matrices = vector(2, layout), matrices_of(layout, rank)
    one += np.outer(np.arange(40), np.arange(30)).ravel().astype(np.float32) / 100
    singular = np.linalg.svd(one.reshape(40, 30))[1]
    best = float(np.sqrt((singular[rank:] ** 2).sum()))
    right, errors = first_right(matrices, 0), []
    for _ in range(60):
        left, right = factorise(one, matrices, right)
        errors.append(float(np.linalg.norm(as_decoded(one, matrices, left, right) - one)))
    assert errors[-1] < best * 1.01
    assert errors[-1] <= errors[0]


@pytest.mark.parametrize("codec", ["zstd", "none"])
@given(seed=st.integers(0, 50), rank=st.integers(1, 4))
def test_the_server_makes_bit_for_bit_what_the_client_takes_off(codec, seed, rank):
    one, matrices = vector(seed), matrices_of(LAYOUT, rank)
    left, right = factorise(one, matrices, first_right(matrices, seed))
    data = pack_low_rank(one, matrices, left, right, codec)
    assert len(data) <= most_low_rank_bytes(LAYOUT.size, matrices, codec)
    found = unpack_low_rank(data, LAYOUT.size, matrices, codec)
    assert found.tobytes() == as_decoded(one, matrices, left, right).tobytes()


def test_what_no_matrix_holds_travels_as_it_is():
    one, matrices = vector(), matrices_of(LAYOUT, 2)
    left, right = factorise(one, matrices, first_right(matrices, 0))
    decoded = as_decoded(one, matrices, left, right)
    np.testing.assert_array_equal(decoded[576:592], one[576:592])
    np.testing.assert_array_equal(decoded[1792:], one[1792:])
    assert (decoded[:576] != one[:576]).any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_server_as_such(wrong):
    one, matrices = vector(), matrices_of(LAYOUT, 2)
    one[700] = wrong
    left, right = factorise(one, matrices, first_right(matrices, 0))
    found = unpack_low_rank(
        pack_low_rank(one, matrices, left, right, "zstd"), LAYOUT.size, matrices, "zstd"
    )
    assert not np.isfinite(found).all()


def test_zeros_and_a_layout_without_matrices_are_no_trouble():
    matrices = matrices_of(LAYOUT, 2)
    zeros = np.zeros(LAYOUT.size, np.float32)
    left, right = factorise(zeros, matrices, first_right(matrices, 0))
    assert not as_decoded(zeros, matrices, left, right).any()
    one = vector(3)
    left, right = factorise(one, [], first_right([], 0))
    data = pack_low_rank(one, [], left, right, "zstd")
    np.testing.assert_array_equal(unpack_low_rank(data, LAYOUT.size, [], "zstd"), one)
