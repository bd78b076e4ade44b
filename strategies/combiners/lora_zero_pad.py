"""Zero-padded mean of factors of unequal ranks, by examples or by how much the clients' products are worth.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA): factors of
smaller ranks are filled up with zeros to the model's, and averaged with weights ‖Bᵢ·Aᵢ‖_F / Σⱼ ‖Bⱼ·Aⱼ‖_F, which
the paper calls sparsity-weighted. The zeros count, so that ranks which few clients have shrink, A and B both: the
product of a rank that a tenth of the weight trains is a hundredth. `combiner=lora_mean` leaves the zeros out. Ranks
that no client of a round has stay as they were sent: with A and B both zero they could never be trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np

from strategies.combiners.lora_rule import LoraRule, Renewed, Views, unheld
from strategies.lora import (
    Factors,
    Layer,
    decomposed,
    distance,
    effective_rank,
    frobenius,
    stacked,
)


@dataclass(frozen=True)
class LoraZeroPad(LoraRule):
    """Σ pᵢ·pad(Bᵢ) and Σ pᵢ·pad(Aᵢ) over the ranks that some client has.

    Attributes:
        sparsity: whether the factors' weights pᵢ are the norms of the clients' products, layer by layer, in place of
            `weighting` and `by_head`, which heads keep. Where all products are zero they count as without it.
    """

    sparsity: bool = False

    def renew(
        self,
        layer: Layer,
        products: Sequence[Factors],
        weights: Sequence[float],
        sent: Views,
        rng: np.random.Generator,
    ) -> Renewed:
        """See `LoraRule.renew`; its error is the distance to the mean product by the same weights."""
        norms = [frobenius(one) for one in products] if self.sparsity else []
        if total := fsum(norms):
            weights = [norm / total for norm in norms]
        rest = unheld(layer, products, sent)
        top = layer.rank - rest.rank
        left, right = np.zeros((layer.m, layer.rank)), np.zeros((layer.rank, layer.n))
        left[:, top:], right[top:] = rest
        for one, weight in zip(products, weights, strict=True):
            left[:, : one.rank] += weight * one.left
            right[: one.rank] += weight * one.right
        adapter, exact = Factors(left, right), stacked([*products, rest], [*weights, 1.0])
        s = decomposed(adapter, layer.rank, method="exact").s
        return Renewed(adapter, None, frobenius(exact), distance(exact, adapter), effective_rank(s))
