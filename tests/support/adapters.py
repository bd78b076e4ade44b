"""Models of low-rank adapters and clients' updates of them, for tests: real arrays, and what they mean densely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from strategies.combiners import LoraFedEx, LoraMean
from strategies.lora import Layer, layers_of
from strategies.parts import widened
from strategies.protocols import Plan
from strategies.update import DELTA, Layout, Update

M, N, RANK = 7, 9, 4
"""Outputs, inputs and the model's rank of each layer."""

ALPHA = 6.0


def layout_of(
    layers: Sequence[str] = ("h_0_q", "h_1_v"),
    *,
    rank: int = RANK,
    residual: int = 0,
    heads: Sequence[str] = ("head",),
) -> Layout:
    """A model: its adapters, its heads, and a residual of this rank for each layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        shapes |= {f"adapters.{layer}.A.weight": (rank, N), f"adapters.{layer}.B.weight": (M, rank)}
    for head in heads:
        shapes |= {f"{head}.weight": (2, M), f"{head}.bias": (2,)}
    for layer in layers if residual else ():
        shapes |= {
            f"residual.{layer}.left": (M, residual),
            f"residual.{layer}.right": (residual, N),
        }
    return Layout(tuple(shapes), tuple(shapes.values()))


def part_of(
    layout: Layout, ranks: Mapping[str, int] | int, heads: Sequence[str] | None = None
) -> Layout:
    """What a client of these ranks (by layer, or one for all) and with these heads trains; residuals never are."""
    shapes = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        pieces = name.split(".")
        if pieces[0] == "adapters":
            rank = ranks if isinstance(ranks, int) else ranks.get(pieces[1])
            if rank is not None:
                shapes[name] = (rank, N) if pieces[2] == "A" else (M, rank)
        elif pieces[0] != "residual" and (heads is None or ".".join(pieces[:-1]) in heads):
            shapes[name] = shape
    return Layout(tuple(shapes), tuple(shapes.values()))


@dataclass
class Federation:
    """A model that was sent, and updates of parts of it."""

    layout: Layout
    sent: np.ndarray
    updates: list[Update]

    def plan(self, **others: object) -> Plan:
        inputs = len(self.updates)
        keywords = {"cohort": inputs, "inputs": inputs, "sent": self.sent} | others
        return Plan({DELTA: self.layout}, **keywords)

    def weights(self, weighting: str = "examples") -> np.ndarray:
        own = [one.weight if weighting == "examples" else 1.0 for one in self.updates]
        return np.array(own)

    def factors(self, index: int, layer: Layer) -> tuple[np.ndarray, np.ndarray] | None:
        """B and A of one client after training, by the definition: leading blocks of what was sent, and its change."""
        section = self.updates[index].delta
        part = section.part or self.layout
        shapes = dict(zip(part.names, part.shapes, strict=True))
        if not shapes.get(layer.a, (0,))[0]:
            return None
        rank = shapes[layer.a][0]
        after = self.layout.views(self.sent.astype(np.float64) + section.vector)
        return after[layer.b][:, :rank], after[layer.a][:rank]

    def mean_product(self, layer: Layer, weights: np.ndarray | None = None) -> np.ndarray:
        """Σ wᵢ·Bᵢ·Aᵢ / Σ wᵢ, dense."""
        weights = self.weights() if weights is None else weights
        total, whole = np.zeros((layer.m, layer.n)), 0.0
        for index, weight in enumerate(weights):
            own = self.factors(index, layer)
            if own is not None:
                total, whole = total + weight * own[0] @ own[1], whole + weight
        return total / whole

    def mean_of(self, rule: object, layer: Layer) -> np.ndarray:
        """The mean that a rule is about, dense: of products, or of each rank over those who have it."""
        if not isinstance(rule, LoraFedEx | LoraMean):
            return self.mean_product(layer)
        terms: dict[int, list[tuple[float, np.ndarray]]] = {}
        for index, weight in enumerate(self.weights()):
            left, right = self.factors(index, layer) or (
                np.zeros((layer.m, 0)),
                np.zeros((0, layer.n)),
            )
            for rank in range(right.shape[0]):
                terms.setdefault(rank, []).append((weight, np.outer(left[:, rank], right[rank])))
        return sum(
            sum(weight * one for weight, one in those) / sum(weight for weight, _ in those)
            for those in terms.values()
        )

    def combined(self, rule, order: Sequence[int] | None = None, **plan: object):
        """The rule's update, and its accumulator."""
        held = rule.begin(self.plan(**plan))
        for index in range(len(self.updates)) if order is None else order:
            held.add(self.updates[index])
        return held.result(), held

    def after(self, update: Update) -> Mapping[str, np.ndarray]:
        """The model that has taken a step of 1, by name, float64."""
        return self.layout.views(self.sent.astype(np.float64) + update.delta.vector)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return layers_of(self.layout)


def federation(
    parts: Sequence[Layout | None],
    layout: Layout,
    *,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> Federation:
    """Clients with these parts; what was sent and each change are drawn, B and residuals among them."""
    rng = np.random.default_rng(seed)
    sent = rng.standard_normal(layout.size).astype(np.float32)
    updates = []
    for index, part in enumerate(parts):
        own = part_of(layout, RANK) if part is None else part
        change = rng.standard_normal(own.size).astype(np.float32)
        section = widened(change, own, layout)
        weight = float(rng.integers(1, 50)) if weights is None else float(weights[index])
        updates.append(Update({DELTA: section}, weight, (index,), 3))
    return Federation(layout, sent, updates)


def unequal(ranks: Sequence[int], *, residual: int = 3, seed: int = 0) -> Federation:
    """Clients of these ranks in both layers."""
    layout = layout_of(residual=residual)
    return federation([part_of(layout, rank) for rank in ranks], layout, seed=seed)


def model_product(views: Mapping[str, np.ndarray], layer: Layer) -> np.ndarray:
    """s·B·A + left·right, dense."""
    product = ALPHA / RANK * views[layer.b] @ views[layer.a]
    return product + views[layer.left] @ views[layer.right]
