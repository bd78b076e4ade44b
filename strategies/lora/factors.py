"""Products of two thin matrices that are never multiplied out: their sums, their norms, their distances.

A low-rank adapter is W·x + s·B·A·x (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3). The
sum of several products is the product of their factors side by side, Σ wᵢ·Bᵢ·Aᵢ = [w₁B₁ … wₙBₙ]·[A₁; …; Aₙ] (Wang et
al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", stacking), and
orthogonal columns change no norm: with B = Q·R and Aᵀ = P·T, ‖B·A‖ = ‖R·Tᵀ‖, a matrix of the products' rank. So
nothing here takes more than the factors' own memory twice over, and a core of at most min(m, k)·min(n, k) numbers.

This file knows float64 matrices and nothing of layers, clients or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Factors(NamedTuple):
    """The product left·right.

    Attributes:
        left: (m, k) float64; B of an adapter.
        right: (k, n) float64; A of an adapter. k may be 0: the product is zero.
    """

    left: Matrix
    right: Matrix

    @property
    def rank(self) -> int:
        """k, the most that the product's rank can be."""
        return int(self.left.shape[1])

    def scaled(self, scale: float) -> Factors:
        """`scale` times the product."""
        return Factors(self.left * scale, self.right)

    def dense(self) -> Matrix:
        """The product, (m, n): for whoever needs it as it is; nothing in this package does."""
        return self.left @ self.right


def stacked(products: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Σ wᵢ·Lᵢ·Rᵢ exactly, of rank Σ kᵢ.

    Args:
        products: at least one, all of the same m and n.
        weights: one each, of any sign; None for 1.

    Raises:
        ValueError: there is no product, there are not as many weights, or their shapes differ.
    """
    weights = [1.0] * len(products) if weights is None else list(weights)
    if not products or len(weights) != len(products):
        raise ValueError(f"{len(products)} products have {len(weights)} weights")
    lefts = [one.left * weight for one, weight in zip(products, weights, strict=True)]
    return Factors(np.concatenate(lefts, axis=1), np.concatenate([one.right for one in products]))


def reduced(product: Factors) -> tuple[Matrix | None, Matrix, Matrix | None]:
    """Q, C and P of L·R = Q·C·Pᵀ with orthonormal columns in Q (m, k) and P (n, k).

    Q or P is None where it would be square, k ≥ m or k ≥ n: then C takes that side whole. C is of shape (min(m, k),
    min(n, k)): the dense matrix only where it is smaller than the factors.
    """
    left, right = product
    (m, k), n = left.shape, right.shape[1]
    q = p = None
    if k < m:
        q, left = np.linalg.qr(left)
    if k < n:
        p, transposed = np.linalg.qr(right.T)
        right = transposed.T
    return q, left @ right, p


def frobenius(product: Factors) -> float:
    """‖L·R‖_F, as accurate as float64 is for the factors, not for their squares."""
    left, right = product
    if left.shape[1] < left.shape[0]:
        left = _triangle(left)
    if right.shape[0] < right.shape[1]:
        right = _triangle(right.T).T
    return float(np.linalg.norm(left @ right))


def distance(first: Factors, second: Factors) -> float:
    """‖L₁·R₁ − L₂·R₂‖_F of two products of the same shape."""
    return frobenius(stacked([first, second], [1.0, -1.0]))


def cross_term(products: Sequence[Factors], weights: Sequence[float], mean: Factors) -> float:
    """How far the product of mean factors is from the mean product: ‖Σ wᵢBᵢAᵢ − B̄·Ā‖_F / ‖Σ wᵢBᵢAᵢ‖_F.

    Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", has why it is not 0 (the first of their
    discordances): in B̄·Ā stand terms Bᵢ·Aⱼ of two clients, which never were one model's.

    Args:
        products: one a client.
        weights: that sum to 1.
        mean: B̄ and Ā.

    Returns:
        0 where both are zero, infinity where the mean product alone is.
    """
    exact = stacked(products, weights)
    return relative(distance(exact, mean), frobenius(exact))


def relative(error: float, size: float) -> float:
    """Their ratio; 0 for nothing of nothing."""
    if size > 0:
        return error / size
    return 0.0 if error == 0 else float("inf")


def _triangle(matrix: Matrix) -> Matrix:
    """R of a tall matrix Q·R: the same norms and inner products of columns."""
    return np.asarray(np.linalg.qr(matrix, mode="r"), np.float64)
