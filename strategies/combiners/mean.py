"""The mean of a round's updates, streaming: memory does not grow with the number of clients.

`weighting="examples"` is FedAvg's (McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", Algorithm 1: Σ n_k/n · w_k). `weighting="uniform"` gives every client the same say, which is what
bounds the influence of one and so what central differential privacy needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from typing import ClassVar, Literal

import numpy as np

from strategies.combiners.summation import CompensatedSum
from strategies.contract import Claim, ContractError, name_of
from strategies.protocols import Accumulator, Plan
from strategies.ranges import Ranged
from strategies.update import MAXIMUM_SECTIONS, Layout, Section, Update

_WEIGHTED = {"uniform": "alike", "examples": "by examples"}
_MEND = {
    "uniform": "use combiner=uniform_mean (combiner=cohort_mean under privacy), or one sum with "
    "collector.max_weight=1000, the largest weight that counts",
    "examples": "use combiner=mean, or collector.max_weight=null (under privacy with collector.metrics=[])",
}


def check_weighting(
    part: object,
    weighting: Literal["examples", "uniform"],
    claim: Claim,
    instead: Mapping[str, str] = _MEND,
) -> None:
    """Refuses where what the server sees weights its members otherwise than `part` is to weight them.

    Args:
        part: in whose name it refuses.
        weighting: of the part.
        claim: what holds of the updates.
        instead: the mend, by what the server sees.

    Raises:
        ContractError: it sees members weighted otherwise.
    """
    if claim.summed not in (None, weighting):
        raise ContractError(
            claim.source("summed"),
            name_of(part),
            f"what the server sees weights its members {_WEIGHTED[claim.summed]}, the mean is to weight them "
            f"{_WEIGHTED[weighting]}",
            instead[claim.summed],
        )


@dataclass(frozen=True)
class Mean(Ranged):
    """The mean over clients.

    Attributes:
        weighting: `examples` weights by the number of examples that a client declares, `uniform` equally.
        denominator: `replies` divides by the weight of those who replied; `cohort` by the number of clients planned,
            however many reply, which a sensitivity needs and uniform weights allow.

    Raises:
        ValueError: the cohort is no denominator of weights by examples.
    """

    weighting: Literal["examples", "uniform"] = "examples"
    denominator: Literal["replies", "cohort"] = "replies"

    by_coverage: ClassVar[bool] = False
    """Whether an element is divided by the weight of those who trained it, where clients train different parts."""
    mend: ClassVar[Mapping[str, str]] = _MEND
    """What to use where what the server sees is weighted otherwise, by how it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denominator == "cohort" and self.weighting != "uniform":
            raise ValueError(
                "denominator = 'cohort' counts clients: it needs weighting = 'uniform'"
            )

    def check(self, claim: Claim) -> Claim:
        """Takes any visibility. A sensitivity needs the cohort for denominator and a bound on every section.

        It is C / cohort for one client more or less, and 2C / cohort where a cohort of fixed size can only replace
        one. Sections reduced by their maximum have none.

        Raises:
            ContractError: what the server sees is weighted otherwise, or clients train different parts.
        """
        check_weighting(self, self.weighting, claim, self.mend)
        if claim.parts and not self.by_coverage:
            raise ContractError(
                claim.source("parts"),
                name_of(self),
                "clients train different parts of the model, and a mean over all dilutes what few of them trained",
                "use combiner=lora_mean, which averages each element over those who have it",
            )
        bound = claim.l2_bound()
        bounded = self.denominator == "cohort" and bound is not None and claim.cohort is not None
        changed = 2 if claim.sampling == "fixed" else 1
        sensitivity = changed * bound / claim.cohort if bounded and bound and claim.cohort else None
        if claim.sections & MAXIMUM_SECTIONS:
            sensitivity = None
        return claim.given(
            self,
            weighting=self.weighting,
            denominator=self.denominator,
            sensitivity=sensitivity,
        )

    def begin(self, plan: Plan) -> Accumulator:
        """A fresh accumulator; the planned cohort matters only where it is the denominator."""
        return MeanAccumulator(
            plan.layouts, self.weighting, plan.cohort if self.denominator == "cohort" else None
        )


class MeanAccumulator:
    """Adds updates as they come; the result does not depend on their order."""

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        weighting: Literal["examples", "uniform"],
        cohort: int | None = None,
    ) -> None:
        self._layouts = dict(layouts)
        self._weighting = weighting
        self._cohort = cohort
        self._sums = {
            name: CompensatedSum(lay.size)
            for name, lay in layouts.items()
            if name not in MAXIMUM_SECTIONS
        }
        self._maxima = {
            name: np.zeros(lay.size, np.float32)
            for name, lay in layouts.items()
            if name in MAXIMUM_SECTIONS
        }
        self._weights: list[float] = []
        self._examples: list[float] = []
        self._members: list[int] = []
        self._version = 0

    def add(self, update: Update) -> None:
        """Takes one update; sections as in the layouts, weight ≥ 1.

        Its discount scales what it adds and not what is divided by (Nguyen et al. 2022, "Federated Learning with
        Buffered Asynchronous Aggregation", Algorithm 1): a buffer in which all are stale makes a small step.
        """
        weight = update.weight if self._weighting == "examples" else float(len(update.members))
        for name, total in self._sums.items():
            total.add(update.sections[name].vector, weight * update.discount)
        for name, largest in self._maxima.items():
            np.maximum(largest, update.sections[name].vector, out=largest)
        self._weights.append(weight)
        self._examples.append(update.weight)
        self._members.extend(update.members)
        self._version = update.version

    def result(self, refused: int = 0) -> Update | None:
        """The mean as one update over all members, in ascending order; None when nothing was added.

        A mean has no use for the number of those that were refused.
        """
        if not self._members:
            return None
        # fsum rounds once, whatever the order; weights need not be whole numbers.
        weight = fsum(self._weights) if self._cohort is None else float(self._cohort)
        vectors = {
            name: total.mean(weight).astype(np.float32) for name, total in self._sums.items()
        }
        # The maximum of 0.0 and -0.0 is whichever comes first: adding 0 makes both 0.0.
        vectors |= {name: largest + np.float32(0) for name, largest in self._maxima.items()}
        sections = {name: Section(vectors[name], layout) for name, layout in self._layouts.items()}
        return Update(sections, fsum(self._examples), tuple(sorted(self._members)), self._version)
