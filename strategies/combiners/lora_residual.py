"""Exact aggregation of unequal adapters: what factors of the model's rank can't hold goes into a residual.

The model is W·x + s·B·A·x + L·R·x with s = α / rank and a residual L·R that nobody trains (`strategies.lora.layers`).
Both rules here make its product s·B·A + L·R that of the mean of the clients' models (FedEx-LoRA, of unequal ranks: each
rank's mean over those who have it), and of ranks that none of them has as they were sent; they cut the residual to the
rank q that the model has room for: exact where q suffices, and the best of its rank where it does not.

* FLoRA (Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
  Algorithm 1): stacked products are added to the weights, and adapters begin anew.
* FedEx-LoRA (Singhal, Ponkshe & Vepakomma 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning
  of Large Language Models"): factors are averaged, and mean(Bᵢ·Aᵢ) − B̄·Ā is added to the weights.

In both papers W itself takes up what is left over, which clients who never send W back would have to be sent densely.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt

from strategies.combiners.lora_partitioned import by_rank, rank_weights
from strategies.combiners.lora_rule import HeldFactors, LoraRule, Renewed, Views, unheld
from strategies.combiners.lora_svd import fresh_rows
from strategies.contract import name_of
from strategies.lora import (
    Factors,
    Layer,
    balanced,
    decomposed,
    effective_rank,
    frobenius,
    layers_of,
    stacked,
)
from strategies.protocols import Plan
from strategies.update import DELTA


@dataclass(frozen=True)
class LoraResidual(LoraRule, ABC):
    """A rule that leaves a residual.

    Attributes:
        alpha: α of the model's adapters.
        rank: of the model, the largest that a layer has: B·A counts α / rank times in all layers.
    """

    alpha: Annotated[float, Gt(0)] = 16.0
    rank: Annotated[int, Ge(1)] = 8

    needs_residual: ClassVar[bool] = True

    def begin(self, plan: Plan) -> HeldFactors:
        """See `LoraRule.begin`; refuses a rank that can't be the model's, too."""
        _check_rank(self, self.rank, plan)
        return super().begin(plan)


@dataclass(frozen=True)
class LoraStack(LoraResidual):
    """FLoRA: the whole product goes into the residual, B begins at zero and A anew at random."""

    def renew(
        self,
        layer: Layer,
        products: Sequence[Factors],
        weights: Sequence[float],
        sent: Views,
        rng: np.random.Generator,
    ) -> Renewed:
        """See `LoraRule.renew`."""
        adapter = Factors(np.zeros((layer.m, layer.rank)), fresh_rows(layer, rng))
        mean = stacked(products, weights)
        return _settled(self, layer, products, mean, sent, adapter, self.alpha / self.rank, rng)


@dataclass(frozen=True)
class LoraFedEx(LoraResidual):
    """FedEx-LoRA: the mean of factors, each rank over the clients that have it, and the residual what that lacks."""

    def renew(
        self,
        layer: Layer,
        products: Sequence[Factors],
        weights: Sequence[float],
        sent: Views,
        rng: np.random.Generator,
    ) -> Renewed:
        """See `LoraRule.renew`; ranks that nobody has stay as they were sent.

        A rank that some lack is the mean of those who have it, in the product as in the factors: over all clients, the
        residual would take it from the averaged adapter again in each round.
        """
        adapter = _averaged(layer, products, weights, sent)
        mean = by_rank(products, weights)
        return _settled(self, layer, products, mean, sent, adapter, self.alpha / self.rank, rng)


def _check_rank(rule: LoraRule, rank: int, plan: Plan) -> None:
    largest = max((layer.rank for layer in layers_of(plan.layouts[DELTA])), default=0)
    if rank < largest:
        raise ValueError(
            f"{name_of(rule)}.rank = {rank}, and the model has a layer of rank {largest}: "
            "set combiner.rank to the rank of the model"
        )


def _averaged(
    layer: Layer, products: Sequence[Factors], weights: Sequence[float], sent: Views
) -> Factors:
    total = rank_weights(products, weights)
    left = np.array(sent[layer.b], np.float64)
    right = np.array(sent[layer.a], np.float64)
    left[:, : len(total)] = right[: len(total)] = 0
    for one, weight in zip(products, weights, strict=True):
        share = weight / total[: one.rank]
        left[:, : one.rank] += one.left * share
        right[: one.rank] += one.right * share[:, None]
    return Factors(left, right)


def _settled(
    rule: LoraRule,
    layer: Layer,
    products: Sequence[Factors],
    mean: Factors,
    sent: Views,
    adapter: Factors,
    scale: float,
    rng: np.random.Generator,
) -> Renewed:
    """The residual that makes up for what the new adapter lacks of the mean model."""
    assert layer.left is not None  # `LoraRule.begin` has seen to it
    assert layer.right is not None
    before = Factors(sent[layer.left].astype(np.float64), sent[layer.right].astype(np.float64))
    whole = stacked([before, mean, unheld(layer, products, sent)], [1.0, scale, scale])
    rest = stacked([whole, adapter], [1.0, -scale])
    found = decomposed(rest, layer.residual_rank, method=rule.svd, rng=rng)
    residual = balanced(found, layer.residual_rank)
    now = stacked([residual, adapter], [1.0, scale])
    s = decomposed(now, now.rank, method="exact").s
    return Renewed(adapter, residual, frobenius(whole), found.error, effective_rank(s))
