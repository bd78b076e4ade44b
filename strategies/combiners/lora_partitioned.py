"""The mean product, each rank averaged over the clients that have it, against the collapse of ranks.

Wu, Hu, Min & Wang 2026, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity"
(raFLoRA): where the mean product is decomposed and handed out by ranks (FlexLoRA), a direction beyond the smallest
rank comes back from the larger clients only, but is divided by the weight of all, so that round by round it shrinks by
their share. Their remedy: clients' updates are cut into intervals of ranks, and each interval is averaged over the
clients that reach it. That is the paper's; that an interval's weights are the clients' own over their sum, that one
which no client reaches stays as it was sent, and that the sum of the intervals is decomposed as `LoraSvd` does it, is
how it stands here.

The k-th rank is the k-th column of B times the k-th row of A as the client trained them: a rotation within an interval
changes nothing, one across intervals does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from strategies.combiners.lora_svd import LoraSvd
from strategies.lora import Factors, stacked
from strategies.lora.factors import Matrix


@dataclass(frozen=True)
class LoraPartitioned(LoraSvd):
    """The truncated singular value decomposition of Σₖ (Σ_{rᵢ>k} wᵢ·bᵢₖ·aᵢₖᵀ) / Σ_{rᵢ>k} wᵢ."""

    def target(self, products: Sequence[Factors], weights: Sequence[float]) -> Factors:
        """What the clients make of what is decomposed: with equal ranks, the mean product."""
        return by_rank(products, weights)


def by_rank(products: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σₖ of each rank's mean over the clients that have it, as one product of all their ranks."""
    ranks = rank_weights(products, weights)
    return stacked(
        [
            Factors(one.left * (weight / ranks[: one.rank]), one.right)
            for one, weight in zip(products, weights, strict=True)
        ]
    )


def rank_weights(products: Sequence[Factors], weights: Sequence[float]) -> Matrix:
    """Σ wᵢ over the clients that have the k-th rank, (the largest rank,) float64."""
    total = np.zeros(max(one.rank for one in products))
    for one, weight in zip(products, weights, strict=True):
        total[: one.rank] += weight
    return total
