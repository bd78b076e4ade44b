import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from strategies.lora import (
    Factors,
    balanced,
    decomposed,
    effective_rank,
    frobenius,
    stacked,
    truncated,
)
from tests.strategies.lora.support import dense, drawn, rotated, sums


def best(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The dense truncated decomposition, and all singular values."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


@given(sums(), st.integers(0, 14))
def test_it_is_the_dense_matrix_decomposed(case, rank):
    products, weights, _ = case
    matrix = dense(products, weights)
    found = decomposed(stacked(products, weights), rank, method="exact")
    _, s = best(matrix, rank)
    kept = len(found.s)
    assert kept == min(rank, *matrix.shape, sum(one.rank for one in products))
    np.testing.assert_allclose(found.s, s[:kept], atol=1e-11)
    assert found.norm == pytest.approx(np.linalg.norm(matrix), abs=1e-11)
    assert found.error == pytest.approx(np.linalg.norm(s[rank:]), abs=1e-10)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(kept), atol=1e-11)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(kept), atol=1e-11)
    left_out = matrix - (found.u * found.s) @ found.vt
    assert np.linalg.norm(left_out) == pytest.approx(found.error, abs=1e-10)


@given(sums(least_rank=1))
def test_every_leading_block_is_the_best_of_its_rank(case):
    """Eckart and Young: what a client of a smaller rank is sent is the best that it can hold."""
    products, weights, _ = case
    matrix = dense(products, weights)
    whole = balanced(decomposed(stacked(products, weights), 12), 12)
    for rank in range(13):
        wanted = np.linalg.norm(best(matrix, rank)[1][rank:])
        block = whole.left[:, :rank] @ whole.right[:rank]
        assert np.linalg.norm(matrix - block) == pytest.approx(wanted, abs=1e-10)


@given(sums(least_rank=1))
def test_balanced_factors_share_the_product_evenly(case):
    products, weights, _ = case
    found = balanced(decomposed(stacked(products, weights), 5), 5)
    assert found.left.shape[1] == found.right.shape[0] == 5
    np.testing.assert_allclose(found.left.T @ found.left, found.right @ found.right.T, atol=1e-11)


@given(sums(least_rank=1))
def test_a_clients_basis_does_not_show(case):
    products, weights, rng = case
    assume(not near_tie(products, weights))
    turned = [rotated(one, rng) for one in products]
    first, second = (
        balanced(decomposed(stacked(each, weights), 3), 3) for each in (products, turned)
    )
    scale = frobenius(stacked(products, weights))
    assert np.linalg.norm(first.dense() - second.dense()) <= 1e-9 * scale


def near_tie(products, weights) -> bool:
    """Whether the third and fourth singular values are too close for a best approximation to be one alone."""
    s = np.append(np.linalg.svd(dense(products, weights))[1], [0.0] * 4)
    return bool(s[2] - s[3] < 1e-5 * s[0])


@given(sums(least_rank=1), st.floats(1e-3, 1e3))
def test_the_scale_of_an_adapter_may_be_in_the_weights_or_in_the_product(case, scale):
    products, weights, _ = case
    inside = decomposed(stacked([one.scaled(scale) for one in products], weights), 4)
    outside = decomposed(stacked(products, [w * scale for w in weights]), 4)
    np.testing.assert_allclose(inside.s, outside.s, rtol=1e-9, atol=1e-11 * scale)


@given(sums(least_rank=1), st.randoms(use_true_random=False))
def test_the_order_of_products_does_not_show(case, random):
    products, weights, _ = case
    pairs = list(zip(products, weights, strict=True))
    forwards = decomposed(stacked(*map(list, zip(*pairs, strict=True))), 12)
    random.shuffle(pairs)
    again = decomposed(stacked(*map(list, zip(*pairs, strict=True))), 12)
    np.testing.assert_allclose(again.s, forwards.s, atol=1e-11)


def noisy_sum(m: int, n: int, ranks: list[int], seed: int) -> Factors:
    """Clients that share a decaying signal of rank 8, each with noise of its own."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((side, 8)))[0] for side in (m, n))
    decay = np.logspace(0, -1, 8)
    products = [
        stacked(
            [Factors(u * decay, v.T), drawn(m, n, rank, rng)], [1.0, 0.05 / np.sqrt(m * n * rank)]
        )
        for rank in ranks
    ]
    return stacked(products, [1 / len(ranks)] * len(ranks))


@pytest.mark.parametrize("seed", range(5))
def test_at_random_is_within_one_percent_of_the_best(seed):
    """Halko et al., Theorem 10.6: with power iterations the expected error tends to the best one."""
    product = noisy_sum(120, 90, [4, 8, 16] * 6, seed)
    exact = decomposed(product, 12, method="exact")
    random = decomposed(product, 12, method="randomized", rng=np.random.default_rng(seed))
    assert exact.error <= random.error * (1 + 1e-9)
    assert random.error <= 1.01 * exact.error
    assert random.norm == pytest.approx(exact.norm, rel=1e-7)
    np.testing.assert_allclose(random.s[:8], exact.s[:8], rtol=1e-4)
    left_out = product.dense() - (random.u * random.s) @ random.vt
    assert np.linalg.norm(left_out) == pytest.approx(random.error, rel=1e-4)


@given(st.integers(0, 1000))
def test_at_random_is_exact_where_the_product_has_no_more_ranks(seed):
    product = drawn(40, 50, 6, np.random.default_rng(seed))
    exact = decomposed(product, 6, method="exact")
    random = decomposed(product, 6, method="randomized", rng=np.random.default_rng(seed))
    np.testing.assert_allclose(random.s, exact.s, rtol=1e-9)
    np.testing.assert_allclose((random.u * random.s) @ random.vt, product.dense(), atol=1e-9)
    assert random.error <= 1e-6 * exact.norm


def test_auto_is_exact_until_the_ranks_are_half_of_the_smaller_side():
    rng = np.random.default_rng(0)
    few, many = drawn(100, 80, 39, rng), drawn(100, 80, 40, rng)
    for product, method in ((few, "exact"), (many, "randomized")):
        found = decomposed(product, 8)
        wanted = decomposed(product, 8, method=method)
        other = decomposed(product, 8, method="exact" if method == "randomized" else "randomized")
        assert found.s.tobytes() == wanted.s.tobytes() != other.s.tobytes()
    wide = decomposed(many, 70)  # 70 and what is drawn beside them are all that there is
    assert wide.s.tobytes() == decomposed(many, 70, method="exact").s.tobytes()


def test_signs_are_those_of_the_largest_element_whichever_way_it_is_found():
    product = noisy_sum(60, 50, [4, 8], 0)
    exact = decomposed(product, 8, method="exact")
    random = decomposed(product, 8, method="randomized")
    np.testing.assert_allclose(random.u, exact.u, atol=1e-3)
    assert (exact.u[np.abs(exact.u).argmax(axis=0), np.arange(8)] > 0).all()


@given(sums(least_rank=1), st.integers(0, 8))
def test_what_is_truncated_is_what_would_have_been_decomposed_shorter(case, rank):
    products, weights, _ = case
    product = stacked(products, weights)
    short = truncated(decomposed(product, 12), rank)
    wanted = decomposed(product, rank)
    np.testing.assert_allclose(short.s, wanted.s, atol=1e-12)
    assert short.error == pytest.approx(wanted.error, abs=1e-10)


def test_the_effective_rank_counts_equal_values():
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.zeros(4)) == 0
    assert 1 < effective_rank(np.array([1.0, 0.1])) < 2


def test_a_product_of_no_rank_is_zero():
    found = decomposed(Factors(np.zeros((4, 0)), np.zeros((0, 5))), 3)
    assert (len(found.s), found.norm, found.error) == (0, 0.0, 0.0)
    np.testing.assert_array_equal(balanced(found, 3).dense(), np.zeros((4, 5)))
