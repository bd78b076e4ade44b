"""The mean product, as the best factors of the model's rank.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
(FlexLoRA): the clients' products are averaged, the mean decomposed, and each client is sent the singular vectors of its
rank. The paper decomposes the dense matrix; here factors are stacked and never multiplied out, to the same result
(`strategies.lora.decomposition`). The new factors are balanced, so that leading blocks are the best approximations of
their ranks. In the paper the model is the mean product and nothing else; here the product of ranks that no client of
the round has is added to it, or a round of small clients would take away what larger ones trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from strategies.combiners.lora_rule import LoraRule, Renewed, Views, unheld
from strategies.lora import Factors, Layer, balanced, decomposed, effective_rank, stacked
from strategies.lora.factors import Matrix


@dataclass(frozen=True)
class LoraSvd(LoraRule):
    """The truncated singular value decomposition of Σ wᵢ·Bᵢ·Aᵢ and the product of ranks that no client has.

    Where that has fewer ranks than the model (B begins at zero), the rows of A that are left get new random values and
    the columns of B zeros: the product is the same, and those ranks can be trained again. With both zero neither would
    ever have a gradient.
    """

    def renew(
        self,
        layer: Layer,
        products: Sequence[Factors],
        weights: Sequence[float],
        sent: Views,
        rng: np.random.Generator,
    ) -> Renewed:
        """See `LoraRule.renew`."""
        target = stacked([self.target(products, weights), unheld(layer, products, sent)])
        found = decomposed(target, layer.rank, method=self.svd, rng=rng)
        adapter = balanced(found, layer.rank)
        largest = found.s[0] if len(found.s) else 0.0
        alive = int(np.sum(found.s > max(layer.m, layer.n) * np.finfo(np.float64).eps * largest))
        adapter.left[:, alive:] = 0
        adapter.right[alive:] = fresh_rows(layer, rng)[alive:]
        return Renewed(adapter, None, found.norm, found.error, effective_rank(found.s))

    def target(self, products: Sequence[Factors], weights: Sequence[float]) -> Factors:
        """What the clients make of what is decomposed: the mean product."""
        return stacked(products, weights)


def fresh_rows(layer: Layer, rng: np.random.Generator) -> Matrix:
    """A as peft's adapters begin, (rank, n) float64 uniform in ±1/√n."""
    bound = 1 / np.sqrt(layer.n)
    return rng.uniform(-bound, bound, (layer.rank, layer.n))
