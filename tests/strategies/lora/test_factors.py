import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.lora import Factors, cross_term, distance, frobenius, stacked
from strategies.lora.factors import reduced
from tests.strategies.lora.support import dense, drawn, rotated, sums

CLOSE = 1e-12


@given(sums())
def test_stacked_factors_are_the_sum_of_the_products(case):
    products, weights, _ = case
    np.testing.assert_allclose(
        stacked(products, weights).dense(), dense(products, weights), atol=1e-12
    )


@given(sums())
def test_norm_and_core_are_those_of_the_dense_matrix(case):
    products, weights, _ = case
    whole = stacked(products, weights)
    found = dense(products, weights)
    assert frobenius(whole) == pytest.approx(np.linalg.norm(found), rel=CLOSE, abs=CLOSE)
    q, core, p = reduced(whole)
    again = (core if q is None else q @ core) @ (np.eye(core.shape[1]) if p is None else p.T)
    np.testing.assert_allclose(again, found, atol=1e-11)
    m, n = found.shape
    assert core.shape == (min(m, whole.rank), min(n, whole.rank))


@given(sums(least_rank=1))
def test_distances_are_those_of_the_dense_matrices(case):
    products, _, _ = case
    first, second = products[0], products[-1]
    wanted = np.linalg.norm(first.dense() - second.dense())
    assert distance(first, second) == pytest.approx(wanted, rel=CLOSE, abs=1e-11)


@given(st.integers(0, 1000), st.floats(1e-12, 1e-6))
def test_a_small_distance_is_not_lost_in_the_products_size(seed, step):
    """By squares it would be: float64 knows a relative 1e-16 of them, a distance of 1e-8."""
    rng = np.random.default_rng(seed)
    one = drawn(30, 20, 4, rng)
    moved = Factors(one.left + step * rng.standard_normal(one.left.shape), one.right)
    wanted = np.linalg.norm((moved.left - one.left) @ one.right)
    assert distance(moved, one) == pytest.approx(wanted, rel=1e-2)


@given(sums(least_rank=1))
def test_the_cross_term_is_that_of_the_dense_matrices(case):
    products, weights, _ = case
    rank = min(one.rank for one in products)
    alike = [Factors(one.left[:, :rank], one.right[:rank]) for one in products]
    pairs = list(zip(alike, weights, strict=True))
    mean = Factors(sum(w * one.left for one, w in pairs), sum(w * one.right for one, w in pairs))
    exact = dense(alike, weights)
    wanted = np.linalg.norm(exact - mean.dense()) / np.linalg.norm(exact)
    assert cross_term(alike, weights, mean) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@given(st.integers(0, 1000), st.integers(1, 6))
def test_with_a_shared_a_there_is_no_cross_term(seed, clients):
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((4, 9))
    products = [Factors(rng.standard_normal((7, 4)), shared) for _ in range(clients)]
    weights = [1 / clients] * clients
    mean = Factors(sum(one.left for one in products) / clients, shared)
    assert cross_term(products, weights, mean) < 1e-14


def test_bases_that_differ_make_a_cross_term_of_equal_products():
    """The very same product three times: its mean is itself, and the mean of its turned factors is not."""
    rng = np.random.default_rng(0)
    one = drawn(20, 30, 4, rng)
    turned = [rotated(one, rng) for _ in range(3)]
    weights = [1 / 3] * 3
    mean = Factors(sum(t.left for t in turned) / 3, sum(t.right for t in turned) / 3)
    assert cross_term(turned, weights, mean) > 0.3
    assert distance(stacked(turned, weights), one) < 1e-12 * frobenius(one)


def test_nothing_of_nothing_is_no_error():
    zero = Factors(np.zeros((3, 2)), np.zeros((2, 4)))
    some = Factors(np.ones((3, 2)), np.ones((2, 4)))
    assert cross_term([zero], [1.0], zero) == 0
    assert cross_term([zero], [1.0], some) == float("inf")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_as_many_weights_as_products(weights):
    one = drawn(2, 3, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2 products have"):
        stacked([one, one], weights)


def test_no_product_is_no_sum():
    with pytest.raises(ValueError, match="0 products"):
        stacked([])


def test_products_of_two_shapes_have_no_sum():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="must match"):
        stacked([drawn(2, 3, 1, rng), drawn(2, 4, 1, rng)])
