"""The mean of low-rank factors, each element over the clients that have it: FedAvg of A and of B.

Zhang et al. 2024, "Towards Building the FederatedGPT: Federated Instruction Tuning" (FedIT). It streams, goes under
masks and noise, and is exact where clients share a frozen A: mean(Bᵢ)·A = mean(Bᵢ·A) (FFA-LoRA; Sun et al. 2024,
"Improving LoRA in Privacy-preserving Federated Learning"). Where both factors are trained, the product of the means is
not the mean of the products; by how much, each round says: `lora_cross_term` (`strategies.lora.cross_term`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import hypot
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.combiners.lora_coverage import CoverageMean
from strategies.combiners.lora_partitioned import by_rank
from strategies.combiners.lora_rule import (
    MEND,
    check_adapters,
    clients_of,
    head_group,
    shares,
    unheld,
)
from strategies.combiners.mean import Mean, MeanAccumulator
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.lora import Factors, distance, frobenius, is_residual, layers_of, stacked
from strategies.lora.factors import relative
from strategies.protocols import Plan
from strategies.update import CONTROL, DELTA, Section, Update


@dataclass(frozen=True)
class LoraMean(Mean):
    """The mean over the clients that train an element.

    Attributes:
        weighting: `examples` weights by the number of examples that a client declares, `uniform` equally.
        denominator: `replies` divides an element by the weight of those who have it; `cohort` by the number of clients
            planned, whoever replies and has it, which a sensitivity needs.
        by_head: whether the clients of one task (those whose parts have the same heads) together weigh as much as those
            of any other.
        report: whether each round says its cross term, for which a round's updates are held until its end; without it
            memory does not grow with the number of clients.

    Raises:
        ValueError: the cohort is no denominator of weights by examples or by task.
    """

    by_head: bool = False
    report: bool = True

    by_coverage: ClassVar[bool] = True
    mend: ClassVar[Mapping[str, str]] = MEND
    wants_sent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_head and self.denominator == "cohort":
            raise ValueError("denominator = 'cohort' counts clients: it needs by_head = False")

    def check(self, claim: Claim) -> Claim:
        """As `Mean` where all clients train the same; where they do not, the server must see who has what.

        Raises:
            ContractError: parameters are no factors; or clients train different parts, or weigh by task, and the server
                can't tell who trained what.
        """
        check_adapters(self, claim)
        if claim.parts:
            self._check_parts(claim)
        if self.by_head:
            claim.need_visibility(
                self,
                Visibility.EACH,
                why="a sum does not tell which tasks its members have",
                instead="set combiner.by_head=false, or use collector=plain",
            )
        stated = super().check(claim)
        return stated.given(self, sensitivity=None) if self.by_head else stated

    def _check_parts(self, claim: Claim) -> None:
        if CONTROL in claim.sections:
            raise ContractError(
                claim.source("sections"),
                name_of(self),
                "a control variate covers the whole model, and clients train different parts of it",
                "use client=sgd or client=proximal",
            )
        if self.denominator == "cohort" and claim.factors == "shared_a":
            return
        if self.denominator == "cohort":
            raise ContractError(
                claim.source("parts"),
                name_of(self),
                "divided by the whole cohort, both factors of ranks that few have shrink, and their product twice",
                "set model.share_a=true, or give all clients one rank",
            )
        claim.need_visibility(
            self,
            Visibility.EACH,
            why="clients train different parts of the model, and a sum does not tell who trained what",
            instead="use collector=plain, or give all clients one rank and one head",
        )

    def begin(self, plan: Plan) -> LoraMeanAccumulator:
        """A fresh accumulator; it reports where the plan has what was sent."""
        return LoraMeanAccumulator(self, plan)


class LoraMeanAccumulator:
    """Adds updates as they come; the mean does not depend on their order, nor on whether it is reported of."""

    def __init__(self, rule: LoraMean, plan: Plan) -> None:
        self._rule, self._layouts = rule, dict(plan.layouts)
        cohort = plan.cohort if rule.denominator == "cohort" else None
        self._cohort = cohort
        beside = {name: layout for name, layout in plan.layouts.items() if name != DELTA}
        self._beside = MeanAccumulator(beside, rule.weighting, cohort)
        whole = plan.layouts[DELTA]
        frozen = filter(is_residual, whole.names)
        self._mean = CoverageMean(whole, frozen=[*frozen], by_group=rule.by_head)
        self._sent = plan.sent if rule.report and cohort is None else None
        self._held: list[Update] = []
        self._figures: dict[str, float] = {}

    def add(self, update: Update) -> None:
        """Takes one update; sections as in the layouts, weight ≥ 1, its discount as in `MeanAccumulator.add`."""
        rule = self._rule
        weight = update.weight if rule.weighting == "examples" else float(len(update.members))
        self._mean.add(
            update.delta, weight, discount=update.discount, group=head_group(update.delta)
        )
        self._beside.add(update)
        if self._sent is not None:
            self._held.append(update)

    def result(self, refused: int = 0) -> Update | None:
        """The mean as one update over all members, in ascending order; None when nothing was added."""
        combined = self._beside.result(refused)
        if combined is None:
            return None
        layout = self._layouts[DELTA]
        mean = self._mean.mean(self._cohort)
        # Neither a sum nor a stale update has factors that follow from what was sent; and with the cohort for divisor
        # noise comes after, which a figure of the bare updates would pass by.
        single = all(len(one.members) == 1 and one.discount == 1 for one in self._held)
        if self._sent is not None and single and self._cohort is None:
            self._figures = self._cross_terms(mean, self._sent)
        sections = {**combined.sections, DELTA: Section(mean.astype(np.float32), layout)}
        return replace(combined, sections={name: sections[name] for name in self._layouts})

    def figures(self) -> Mapping[str, float]:
        """`lora_cross_term` once there is a result: over all layers that have both factors; else nothing."""
        return self._figures

    def _cross_terms(
        self, mean: NDArray[np.float64], sent: NDArray[np.float32]
    ) -> dict[str, float]:
        layout = self._layouts[DELTA]
        layers = layers_of(layout)
        updates = sorted(self._held, key=lambda update: update.members)
        weights = shares(updates, self._rule.weighting, self._rule.by_head)
        start, change = layout.views(sent), layout.views(mean)
        error = size = 0.0
        for layer in layers:
            products, own = clients_of(layer, updates, weights, start)
            if products:
                average = Factors(
                    start[layer.b] + change[layer.b], start[layer.a] + change[layer.a]
                )
                rest = unheld(layer, products, start)
                exact = stacked([by_rank(products, own), rest])
                error = hypot(error, distance(exact, average))
                size = hypot(size, frobenius(exact))
        return {"lora_cross_term": relative(error, size)} if layers else {}
