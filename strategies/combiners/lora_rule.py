"""What rules over products of low-rank factors have in common: they see all of a round's factors, layer by layer.

The clients' changes of A and B are no changes of the product B·A that could be added, so these rules start from the
factors that were sent (`Plan.sent`), make each client's own of them and its change, and take each layer to a new point:
the change that they give is the way there, which only a server step of exactly 1 goes. All that is no factor is the
mean over those who train it. Who has the first ranks only says nothing of those beyond: what no client of a round has
(`unheld`) stays in the model.

Memory: a round's updates stay in their replies' bytes until its end, sorted by client then; beside them one layer at a
time, at most 3·(m + n)·R + min(m, R)·min(n, R) float64 for R ranks in all, the clients' and those that none has. This
file knows the contract, the weights and the bookkeeping; what becomes of a layer is each rule's `renew`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, hypot
from statistics import fmean
from typing import Annotated, ClassVar, Final, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from strategies.combiners.lora_coverage import CoverageMean, Group
from strategies.combiners.mean import MeanAccumulator, check_weighting
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.lora import Factors, Layer, Method, is_factor, is_residual, layers_of, own_factors
from strategies.lora.factors import relative
from strategies.protocols import Plan
from strategies.ranges import Ranged
from strategies.seeds import generator
from strategies.update import CONTROL, DELTA, Section, Update, Vector

Weighting = Literal["examples", "uniform"]

MEND: Final = {
    "uniform": "set combiner.weighting=uniform",
    "examples": "set combiner.weighting=examples",
}
"""Where what the server sees is weighted otherwise, by how it is."""

Views = Mapping[str, NDArray[np.floating]]


class Renewed(NamedTuple):
    """What a rule makes of one layer.

    Attributes:
        adapter: the new B (m, rank) and A (rank, n).
        residual: the new left (m, q) and right (q, n); None where it stays as it is.
        exact: ‖·‖_F of what the rule approximates.
        error: ‖·‖_F of what its approximation lacks.
        effective_rank: of what the layer has now (`strategies.lora.effective_rank`).
    """

    adapter: Factors
    residual: Factors | None
    exact: float
    error: float
    effective_rank: float


@dataclass(frozen=True)
class LoraRule(Ranged, ABC):
    """A rule over the products of a round's factors.

    Attributes:
        weighting: `examples` weights by the number of examples that a client declares, `uniform` equally.
        by_head: whether the clients of one task (those whose parts have the same heads) together weigh as much as those
            of any other.
        svd: how stacked factors are decomposed (`strategies.lora.decomposed`); `auto` is exact but for very many.
        seed: of what is drawn: the bases of a decomposition at random, and rows of A where a rule begins anew.
    """

    weighting: Weighting = "examples"
    by_head: bool = False
    svd: Method = "auto"
    seed: Annotated[int, Ge(0)] = 0

    wants_sent: ClassVar[bool] = True
    needs_residual: ClassVar[bool] = False
    """Whether a layer without a residual has no place for what the rule leaves over."""

    @abstractmethod
    def renew(
        self,
        layer: Layer,
        products: Sequence[Factors],
        weights: Sequence[float],
        sent: Views,
        rng: np.random.Generator,
    ) -> Renewed:
        """The layer anew; what `unheld` gives is in what it approximates, with weight 1.

        Args:
            layer: of the model.
            products: the factors of each client that has some, at least one, in the order of their ids.
            weights: of these, in all 1.
            sent: arrays of the whole model by name, as they were sent.
            rng: for this layer in this round.
        """

    def check(self, claim: Claim) -> Claim:
        """Needs both factors of each client, all from the present model; leaves no sensitivity.

        Raises:
            ContractError: parameters are no factors, A is shared, or the server sees less than each client's own.
        """
        check_adapters(self, claim)
        if claim.factors == "shared_a":
            raise ContractError(
                claim.source("factors"),
                name_of(self),
                "A is shared and frozen, so that the mean of B is exact already, and this rule would make A another",
                "use combiner=lora_mean",
            )
        claim.need_visibility(
            self,
            Visibility.EACH,
            why="it multiplies each client's own factors, and the product of two sums is not the sum of products",
            instead="use collector=plain; or combiner=lora_mean with model.share_a=true, whose sums are exact",
        )
        claim.need_rounds(
            self,
            why="it takes the model to a point made of factors that started from the present one",
            instead="use scheduler=synchronous, or combiner=lora_mean",
        )
        check_weighting(self, self.weighting, claim, MEND)
        if CONTROL in claim.sections:
            raise ContractError(
                claim.source("sections"),
                name_of(self),
                "a control variate corrects the way of single factors, and this rule takes their product to a point",
                "use client=sgd or client=proximal",
            )
        return claim.given(
            self, weighting=self.weighting, denominator="replies", sensitivity=None, replaced=True
        )

    def begin(self, plan: Plan) -> HeldFactors:
        """An accumulator for one round.

        Raises:
            ValueError: the plan lacks what was sent, or the model lacks adapters, or the residual that the rule needs.
        """
        layers = layers_of(plan.layouts[DELTA])
        if plan.sent is None or not layers:
            lacks = "parameters that were sent" if layers else "factors A and B of one layer"
            raise ValueError(
                f"{name_of(self)} works on products of factors, and there are no {lacks}"
            )
        bare = [layer.name for layer in layers if not layer.residual_rank]
        if self.needs_residual and bare:
            raise ValueError(
                f"{name_of(self)} puts what factors of the model's rank can't hold into a residual, which "
                f"{', '.join(bare)} has not: set model.residual_rank, or use combiner=lora_svd"
            )
        return HeldFactors(self, plan, layers, plan.sent)


class HeldFactors:
    """A round's updates, held until the rule can see all of them. The vectors stay in their replies' own bytes."""

    def __init__(self, rule: LoraRule, plan: Plan, layers: Sequence[Layer], sent: Vector) -> None:
        self._rule, self._plan, self._layers, self._sent = rule, plan, layers, sent
        beside = {name: layout for name, layout in plan.layouts.items() if name != DELTA}
        self._beside = MeanAccumulator(beside, rule.weighting)
        whole = plan.layouts[DELTA]
        frozen = filter(is_residual, whole.names)
        self._mean = CoverageMean(whole, frozen=[*frozen], by_group=rule.by_head)
        self._updates: list[Update] = []
        self._figures: dict[str, float] = {}

    def add(self, update: Update) -> None:
        """Takes one client's update; sections as in the plan's layouts, weight ≥ 1."""
        weight = update.weight if self._rule.weighting == "examples" else 1.0
        self._mean.add(update.delta, weight, group=head_group(update.delta))
        self._beside.add(update)
        self._updates.append(update)

    def result(self, refused: int = 0) -> Update | None:
        """The way to the new model as one update over all members; None when nothing was added."""
        combined = self._beside.result(refused)
        if combined is None:
            return None
        layout = self._plan.layouts[DELTA]
        mean = self._mean.mean()
        self._renew(layout.views(mean), layout.views(self._sent))
        sections = {**combined.sections, DELTA: Section(mean.astype(np.float32), layout)}
        return replace(combined, sections={name: sections[name] for name in self._plan.layouts})

    def figures(self) -> Mapping[str, float]:
        """Of the last result, over all layers that somebody trained.

        `lora_error` is what the new factors lack of what they approximate, relative to that, in the Frobenius norm;
        `lora_rank` the mean effective rank of a layer.
        """
        return self._figures

    def _renew(self, change: Views, sent: Views) -> None:
        """Writes the way of all factors over what the mean made of them."""
        rule = self._rule
        updates = sorted(self._updates, key=lambda update: update.members)
        weights = shares(updates, rule.weighting, rule.by_head)
        error = exact = 0.0
        ranks = []
        for index, layer in enumerate(self._layers):
            products, own = clients_of(layer, updates, weights, sent)
            if not products:  # the mean of nothing: it stays
                continue
            rng = generator(rule.seed, "lora", self._plan.round, index)
            new = rule.renew(layer, products, own, sent, rng)
            change[layer.b][...] = new.adapter.left - sent[layer.b]
            change[layer.a][...] = new.adapter.right - sent[layer.a]
            if new.residual is not None and layer.left is not None and layer.right is not None:
                change[layer.left][...] = new.residual.left - sent[layer.left]
                change[layer.right][...] = new.residual.right - sent[layer.right]
            error, exact = hypot(error, new.error), hypot(exact, new.exact)
            ranks.append(new.effective_rank)
        if ranks:
            self._figures = {"lora_error": relative(error, exact), "lora_rank": fmean(ranks)}


def check_adapters(part: object, claim: Claim) -> None:
    """Refuses models whose parameters are no factors."""
    if claim.factors is None:
        raise ContractError(
            claim.source("factors"),
            name_of(part),
            "it averages low-rank adapters, and the model has none",
            "use combiner=mean, or model=lora",
        )


def head_group(section: Section) -> Group:
    """The task group of whoever trains this part: the names of its arrays that are no factors."""
    part = section.layout if section.part is None else section.part
    return tuple(sorted(name for name in part.names if not is_factor(name)))


def shares(updates: Sequence[Update], weighting: Weighting, by_head: bool) -> list[float]:
    """The weight of each update, in all 1; where it is by task, in each task alike."""
    own = [one.weight if weighting == "examples" else float(len(one.members)) for one in updates]
    groups = [head_group(one.delta) if by_head else () for one in updates]
    totals = {
        group: fsum(w for w, g in zip(own, groups, strict=True) if g == group) for group in groups
    }
    return [w / totals[g] / len(totals) for w, g in zip(own, groups, strict=True)]


def clients_of(
    layer: Layer, updates: Sequence[Update], weights: Sequence[float], sent: Views
) -> tuple[list[Factors], list[float]]:
    """The factors of all clients that have some of a layer, and their weights, in all 1."""
    products, own = [], []
    for update, weight in zip(updates, weights, strict=True):
        section = update.delta
        part = section.part
        shapes = None if part is None else dict(zip(part.names, part.shapes, strict=True))
        factors = own_factors(layer, sent, section.layout.views(section.vector), shapes)
        if factors is not None:
            products.append(factors)
            own.append(weight)
    total = fsum(own)
    return products, [weight / total for weight in own]


def unheld(layer: Layer, products: Sequence[Factors], sent: Views) -> Factors:
    """The ranks of a layer beyond the largest that any client has, as they were sent; k = 0 where one has all.

    Args:
        layer: of the model.
        products: the factors of each client that has some, at least one.
        sent: arrays of the whole model by name, as they were sent.
    """
    top = max(one.rank for one in products)
    return Factors(
        sent[layer.b][:, top:].astype(np.float64), sent[layer.a][top:].astype(np.float64)
    )
