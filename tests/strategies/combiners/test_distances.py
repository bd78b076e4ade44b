"""Distances that keep their digits: far from the origin, beside huge lies, past float32's range, in blocks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.combiners import distances
from strategies.combiners.distances import distances_to, products_with, squared_distances
from strategies.combiners.rows import Mixed, Stack
from tests.support.robust_rules import pairwise


def drawn(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)


def worst(found: np.ndarray, wanted: np.ndarray) -> float:
    apart = ~np.eye(len(wanted), dtype=bool)
    return float((np.abs(found - wanted)[apart] / wanted[apart]).max())


def fast(updates: np.ndarray) -> np.ndarray:
    return squared_distances(Stack.of(updates).gram)


def naive(updates: np.ndarray) -> np.ndarray:
    """float32 and about the origin, as a Gram matrix is usually taken."""
    gram = updates @ updates.T
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).astype(np.float64)


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_distances_are_those_of_float64(n, d, seed):
    updates = drawn(n, d, seed)
    wanted = pairwise(updates)
    assert np.allclose(fast(updates), wanted, rtol=0, atol=2e-6 * wanted.max())


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_updates_on_top_of_weights_keep_their_distances(ratio):
    """What is lost here is the weights' own rounding to float32, before any rule saw them."""
    updates = drawn(10, 20_000) * np.float32(ratio) + drawn(1, 20_000, 1)
    wanted = pairwise(updates)
    assert worst(fast(updates), wanted) < 2e-6
    if ratio <= 1e-3:
        assert worst(naive(updates), wanted) > 0.01  # the test would see it


@pytest.mark.parametrize("huge", [1e3, 1e6, 1e10, 1e18, 1e25, 3e38])
@pytest.mark.parametrize("liars", [1, 4])
def test_a_huge_lie_does_not_drown_the_distances_of_the_others(huge, liars):
    updates = drawn(10, 5_000)
    for liar in range(liars):
        updates[liar] = drawn(1, 5_000, liar + 1) * np.float32(huge / 5)
    honest = slice(liars, None)
    found = fast(updates)
    assert np.isfinite(found).all()
    assert worst(found[honest, honest], pairwise(updates[honest])) < 1e-5


def test_a_huge_lie_beside_zeros_does_not_spoil_distances_between_raw_weights():
    updates = drawn(11, 20_000) * np.float32(1e-3) + drawn(1, 20_000, 1)
    updates[0] = drawn(1, 20_000, 2) * np.float32(1e6)
    updates[1:4] = 0
    assert worst(fast(updates)[4:, 4:], pairwise(updates[4:])) < 1e-5


def test_rows_in_several_pieces_are_one_vector():
    updates = drawn(7, 1000)
    cuts = [0, 1, 400, 400, 1000]
    pieces = [tuple(row[a:b].copy() for a, b in itertools.pairwise(cuts)) for row in updates]
    whole, cut = Stack.of(updates), Stack(pieces)
    assert np.array_equal(whole.gram, cut.gram)
    weights = np.linspace(-1, 1, 7)
    assert np.array_equal(whole.combined(weights), cut.combined(weights))
    block = np.empty((7, 500), np.float32)
    cut.read(300, block)
    assert np.array_equal(block, updates[:, 300:800])


@pytest.mark.parametrize("width", [1 << 10, 1 << 12])
def test_the_width_of_a_block_changes_a_gram_matrix_by_rounding_only(monkeypatch, width):
    updates = drawn(9, 10_000)
    wanted = fast(updates)
    monkeypatch.setattr(distances, "_width", lambda n: width)
    assert worst(fast(updates), wanted) < 1e-6


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_mixed_rows_have_the_gram_matrix_of_what_they_are(n, d, seed):
    updates = drawn(n, d, seed)
    mixing = np.random.default_rng(seed).dirichlet(np.ones(n), size=n // 2 + 1)
    mixed = Mixed(Stack.of(updates), mixing)
    written = mixing @ updates.astype(np.float64)
    found = squared_distances(mixed.gram)
    assert np.allclose(found, pairwise(written), rtol=1e-3, atol=1e-5)
    weights = np.random.default_rng(seed + 1).standard_normal(len(mixing))
    assert np.allclose(mixed.combined(weights), weights @ written, atol=1e-4)
    some = mixed.chosen(np.array([0]))
    assert np.allclose(some.combined(np.ones(1)), written[0], atol=1e-5)
    assert np.allclose(np.stack(mixed.views(0, d)), written, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e30])
def test_distances_to_a_point_and_products_with_it(scale):
    updates = drawn(6, 3_000) * np.float32(scale)
    point = drawn(1, 3_000, 5)[0] * np.float32(scale)
    wide, at = updates.astype(np.float64), point.astype(np.float64)
    rows = Stack.of(updates)
    assert np.allclose(distances_to(rows, None), np.linalg.norm(wide, axis=1), rtol=1e-6)
    assert np.allclose(distances_to(rows, point), np.linalg.norm(wide - at, axis=1), rtol=1e-6)
    products, norms = products_with(rows, point)
    assert np.allclose(products, wide @ at, rtol=1e-4, atol=1e-4 * scale**2)
    assert np.allclose(norms, np.linalg.norm(wide, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "no update"), ([(np.zeros(2, np.float32),), (np.zeros(3, np.float32),)], "lengths")],
)
def test_rows_must_be_there_and_alike(rows, words):
    with pytest.raises(ValueError, match=words):
        Stack(rows)
