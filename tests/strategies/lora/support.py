"""Products of thin matrices for tests, and what they are when they are multiplied out."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from strategies.lora import Factors


def drawn(m: int, n: int, rank: int, rng: np.random.Generator) -> Factors:
    return Factors(rng.standard_normal((m, rank)), rng.standard_normal((rank, n)))


def rotated(product: Factors, rng: np.random.Generator) -> Factors:
    """B·O and Oᵀ·A: the same product in another basis."""
    turn = np.linalg.qr(rng.standard_normal((product.rank, product.rank)))[0]
    return Factors(product.left @ turn, turn.T @ product.right)


def dense(products, weights) -> np.ndarray:
    return sum(w * (one.left @ one.right) for one, w in zip(products, weights, strict=True))


@st.composite
def sums(draw, least_rank: int = 0):
    """Products of one shape, ranks up to beyond their sides, and weights that sum to 1."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    ranks = draw(st.lists(st.integers(least_rank, 14), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = rng.uniform(0.1, 10, len(ranks))
    return [drawn(m, n, rank, rng) for rank in ranks], list(weights / weights.sum()), rng
