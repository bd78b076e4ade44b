"""The best approximation of a sum of thin products by a shorter one, without the dense matrix.

The truncated singular value decomposition is the best of its rank in the Frobenius norm (Eckart & Young 1936, "The
approximation of one matrix by another of lower rank"), so with factors U·√Σ and √Σ·Vᵀ every leading block is the best
of its own rank: what a client of a smaller rank is sent. Exactly: from orthonormal bases of both factors and the
decomposition of the small core between them. At random, where the core is no longer small: Halko, Martinsson & Tropp
2011, "Finding Structure with Randomness", Algorithm 4.4 (subspace iteration) and 5.1 (the decomposition from it).

This file knows float64 matrices and nothing of layers, clients or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Final, Literal

import numpy as np

from strategies.lora.factors import Factors, Matrix, frobenius, reduced

Method = Literal["auto", "exact", "randomized"]

LARGE: Final = 0.5
"""Of the smaller side: stacked factors of so large a rank or more are decomposed at random under `auto`."""
_OVERSAMPLING: Final = 16
"""Columns beyond the rank that is wanted; Halko et al. advise 5 to 10, and they cost little."""
_ITERATIONS: Final = 2
"""q of Algorithm 4.4: singular values that decay slowly, as those of many clients' noise, need a few."""


@dataclass(frozen=True)
class Decomposition:
    """U·diag(s)·Vᵀ, the leading singular values and vectors of a product.

    Attributes:
        u: (m, p) float64, orthonormal columns; the largest element of each is positive, so that all ways to the same
            decomposition give the same signs.
        s: (p,) float64, from the largest.
        vt: (p, n) float64, orthonormal rows.
        norm: ‖·‖_F of the whole product.
        error: ‖·‖_F of what is left out.
    """

    u: Matrix
    s: Matrix
    vt: Matrix
    norm: float
    error: float


def decomposed(
    product: Factors,
    rank: int,
    *,
    method: Method = "auto",
    rng: np.random.Generator | None = None,
) -> Decomposition:
    """The leading `rank` singular values and vectors of L·R, fewer where the product has fewer.

    Exact costs O((m + n)·k² + k³) for k columns; at random O((m + n)·k·rank), plus O((m + n)·k²) for the norm.

    Args:
        product: (m, k) and (k, n).
        rank: at most so many.
        method: `auto` is `randomized` from k = LARGE·min(m, n) on, where that has fewer columns than the product.
        rng: of the random method; None for one of a fixed seed.
    """
    least = min(*product.left.shape, product.right.shape[1])
    rank = min(rank, least)
    if method == "auto":
        side = min(product.left.shape[0], product.right.shape[1])
        large = product.rank >= LARGE * side and rank + _OVERSAMPLING < least
        method = "randomized" if large else "exact"
    if method == "randomized":
        return _at_random(product, rank, rng or np.random.default_rng(0))
    return _exact(product, rank)


def truncated(whole: Decomposition, rank: int) -> Decomposition:
    """The leading `rank` of what is there."""
    error = sqrt(whole.error**2 + float(np.sum(whole.s[rank:] ** 2)))
    return Decomposition(whole.u[:, :rank], whole.s[:rank], whole.vt[:rank], whole.norm, error)


def balanced(decomposition: Decomposition, rank: int) -> Factors:
    """U·√Σ and √Σ·Vᵀ, (m, rank) and (rank, n): zero where there are fewer singular values.

    Of all factors with this product these have the least ‖L‖² + ‖R‖², equal norms in column k of L and row k of R, and
    leading blocks that are the best approximations of their ranks.
    """
    roots, kept = np.sqrt(decomposition.s[:rank]), min(rank, len(decomposition.s))
    left = np.zeros((len(decomposition.u), rank))
    right = np.zeros((rank, decomposition.vt.shape[1]))
    left[:, :kept] = decomposition.u[:, :kept] * roots
    right[:kept] = decomposition.vt[:kept] * roots[:, None]
    return Factors(left, right)


def effective_rank(s: Matrix) -> float:
    """exp(H(s / Σs)) of singular values: k where k of them are equal and the others 0; 0 where all are 0.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", their definition.
    """
    total = float(s.sum())
    if total <= 0:
        return 0.0
    shares = s[s > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _exact(product: Factors, rank: int) -> Decomposition:
    q, core, p = reduced(product)
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    norm, error = float(np.linalg.norm(s)), float(np.linalg.norm(s[rank:]))
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    u = u if q is None else q @ u
    vt = vt if p is None else vt @ p.T
    return _signed(u, s, vt, norm, error)


def _at_random(product: Factors, rank: int, rng: np.random.Generator) -> Decomposition:
    left, right = product
    width = min(rank + _OVERSAMPLING, *left.shape, right.shape[1])
    basis = np.linalg.qr(left @ (right @ rng.standard_normal((right.shape[1], width))))[0]
    for _ in range(_ITERATIONS):
        rows = np.linalg.qr(right.T @ (left.T @ basis))[0]
        basis = np.linalg.qr(left @ (right @ rows))[0]
    u, s, vt = np.linalg.svd((basis.T @ left) @ right, full_matrices=False)
    u, s, vt = basis @ u[:, :rank], s[:rank], vt[:rank]
    norm = _norm(product)
    # By Pythagoras, as the basis is orthonormal; what float64 can't tell from 0 is 0.
    left_out = norm**2 - float(np.sum(s**2))
    error = sqrt(left_out) if left_out > 1e-14 * norm**2 else 0.0
    return _signed(u, s, vt, norm, error)


def _norm(product: Factors) -> float:
    """‖L·R‖_F by ⟨LᵀL, R·Rᵀ⟩, half the work of orthonormal bases; a square root of float64's accuracy will do."""
    left, right = product
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return frobenius(product)
    return sqrt(max(0.0, float(np.sum((left.T @ left) * (right @ right.T)))))


def _signed(u: Matrix, s: Matrix, vt: Matrix, norm: float, error: float) -> Decomposition:
    columns = np.arange(len(s))
    signs = np.sign(u[np.abs(u).argmax(axis=0), columns]) if len(u) else np.ones(len(s))
    signs[signs == 0] = 1
    return Decomposition(u * signs, s, vt * signs[:, None], norm, error)
