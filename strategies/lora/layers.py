"""Which arrays of a layout are the factors of which layer, and a client's own factors among them.

`<stem>.A.weight` (r, n) and `<stem>.B.weight` (m, r) under the same stem are the adapter of one layer, whatever the
stem is; `residual.<layer>.left` (m, q) and `residual.<layer>.right` (q, n) are a further product that is added to the
same weights and that nobody trains, with the same prefix as `adapters.<layer>`. An A or a B alone is an array like any
other: where all clients share a frozen A, it need not travel.

A client of rank rᵢ has the first rᵢ rows of A and columns of B (`strategies.parts`): its factors are those that it was
sent, plus its change. This file knows names and shapes, and nothing of what is done with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from strategies.lora.factors import Factors
from strategies.update import Layout

Shapes = Mapping[str, tuple[int, ...]]

_FACTOR: Final = re.compile(r"(?P<stem>(?:.*\.)?)(?P<kind>[AB])\.weight")
_RESIDUAL: Final = re.compile(
    r"(?P<prefix>(?:.*\.)?)residual\.(?P<layer>[^.]+)\.(?P<kind>left|right)"
)
_ADAPTERS: Final = re.compile(r"(?:(?<=\.)|^)adapters\.(?=[^.]+$)")


@dataclass(frozen=True)
class Layer:
    """One adapted layer of a model.

    Attributes:
        name: its stem without `adapters.`; empty where the layout has one pair of bare names.
        a: the name of A, (rank, n).
        b: the name of B, (m, rank).
        rank: of the model, the most that a client's can be.
        m: the layer's outputs.
        n: the layer's inputs.
        left: the name of the residual's (m, residual_rank), None where the layer has none.
        right: the name of the residual's (residual_rank, n), likewise.
        residual_rank: q, 0 where the layer has no residual.
    """

    name: str
    a: str
    b: str
    rank: int
    m: int
    n: int
    left: str | None = None
    right: str | None = None
    residual_rank: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Its arrays: both factors, and those of the residual where there is one."""
        return tuple(name for name in (self.a, self.b, self.left, self.right) if name is not None)


def layers_of(layout: Layout) -> tuple[Layer, ...]:
    """The adapted layers of a layout, in the order of their A; a residual without an adapter is of none.

    Raises:
        ValueError: the two factors of a layer do not fit together, or its residual does not fit it, or has only one of
            its own.
    """
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    residuals = _residuals(shapes)
    found = []
    for name in layout.names:
        match = _FACTOR.fullmatch(name)
        if match is None or match["kind"] != "A":
            continue
        other = f"{match['stem']}B.weight"
        if other in shapes:
            key = _ADAPTERS.sub("", match["stem"].removesuffix("."))
            found.append(_layer(key, name, other, shapes, residuals.get(key)))
    return tuple(found)


def is_factor(name: str) -> bool:
    """Whether an array is a factor of an adapter or of a residual; all others are heads, biases and the like."""
    return bool(_FACTOR.fullmatch(name) or _RESIDUAL.fullmatch(name))


def is_residual(name: str) -> bool:
    """Whether an array is a factor of a residual, which nobody trains."""
    return bool(_RESIDUAL.fullmatch(name))


def own_factors(
    layer: Layer,
    sent: Mapping[str, NDArray[np.floating]],
    delta: Mapping[str, NDArray[np.floating]],
    part: Shapes | None,
) -> Factors | None:
    """A client's factors after training, (m, rᵢ) and (rᵢ, n) float64; None where it has nothing of the layer.

    A rank of 0 is nothing of the layer, too: whoever can't train an adapter says nothing of it.

    Args:
        layer: of the model.
        sent: arrays of the whole model by name, as they were sent.
        delta: the client's change by name, in the whole model's shapes.
        part: the shapes of the arrays that the client trains; None for all. A factor that is not in it is frozen, and
            as it was sent.

    Raises:
        ValueError: the part has blocks that are no leading ranks.
    """
    rank = _own_rank(layer, part)
    if not rank:
        return None
    left = sent[layer.b][:, :rank].astype(np.float64) + delta[layer.b][:, :rank]
    right = sent[layer.a][:rank].astype(np.float64) + delta[layer.a][:rank]
    return Factors(left, right)


def _own_rank(layer: Layer, part: Shapes | None) -> int:
    if part is None:
        return layer.rank
    a, b = part.get(layer.a), part.get(layer.b)
    ranks = {shape[axis] for shape, axis in ((a, 0), (b, 1)) if shape is not None}
    fits = (a is None or a[1] == layer.n) and (b is None or b[0] == layer.m)
    if len(ranks) > 1 or not fits:
        raise ValueError(
            f"a part has blocks {a} of {layer.a} and {b} of {layer.b}: no leading rank"
        )
    return ranks.pop() if ranks else 0


def _residuals(shapes: Shapes) -> dict[str, dict[str, str]]:
    """By the layer's name, the names of its residual's factors by kind."""
    found: dict[str, dict[str, str]] = {}
    for name in shapes:
        match = _RESIDUAL.fullmatch(name)
        if match is not None:
            found.setdefault(match["prefix"] + match["layer"], {})[match["kind"]] = name
    return found


def _layer(key: str, a: str, b: str, shapes: Shapes, residual: Mapping[str, str] | None) -> Layer:
    if len(shapes[a]) != 2 or len(shapes[b]) != 2 or shapes[a][0] != shapes[b][1]:
        raise ValueError(f"{a}, {shapes[a]}, and {b}, {shapes[b]}, are no factors of one product")
    (rank, n), m = shapes[a], shapes[b][0]
    if residual is None:
        return Layer(key, a, b, rank, m, n)
    left, right = residual.get("left"), residual.get("right")
    if left is None or right is None:
        raise ValueError(f"the residual of {key!r} has only {', '.join(residual.values())}")
    q = shapes[left][-1] if shapes[left] else 0
    if shapes[left] != (m, q) or shapes[right] != (q, n):
        raise ValueError(
            f"{left}, {shapes[left]}, and {right}, {shapes[right]}, do not fit a layer of {m} x {n}"
        )
    return Layer(key, a, b, rank, m, n, left, right, q)
