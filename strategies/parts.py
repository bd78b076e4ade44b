"""Parts of a model: which of its arrays a client is sent and trains, and how much of each.

A part is a layout of its own: a subset of the model's names, each with the shape of a leading block of the model's
array. Adapters of rank r out of R are the first r rows of A, (r, n) of (R, n), and the first r columns of B, (m, r) of
(m, R); the lower half of a split model is some of its names, whole. This file knows names and shapes, not what is in
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.update import Layout, Section, Vector

_T = TypeVar("_T", bound=np.generic)


RESIDUAL = "residual."
"""What names of frozen arrays begin with that travel down, and that a rule of the server's alone changes."""


def returned(part: Layout) -> Layout:
    """What of a part comes back: all but what nobody trains."""
    if not any(name.startswith(RESIDUAL) for name in part.names):
        return part
    blocks = zip(part.names, part.shapes, strict=True)
    kept = {name: shape for name, shape in blocks if not name.startswith(RESIDUAL)}
    return Layout(tuple(kept), tuple(kept.values()))


def check_part(part: Layout, whole: Layout) -> None:
    """Refuses what is no part.

    Raises:
        ValueError: a name is not the model's, or a block does not fit into its array.
    """
    shapes = dict(zip(whole.names, whole.shapes, strict=True))
    for name, shape in zip(part.names, part.shapes, strict=True):
        outer = shapes.get(name)
        if outer is None:
            raise ValueError(f"the model has no array {name!r}")
        if len(shape) != len(outer) or any(a > b for a, b in zip(shape, outer, strict=True)):
            raise ValueError(f"a block of shape {shape} does not fit into {name!r}, {outer}")


def narrowed(arrays: Mapping[str, NDArray[_T]], part: Layout) -> dict[str, NDArray[_T]]:
    """The leading blocks of a part, by name in its order; views, not copies."""
    blocks = zip(part.names, part.shapes, strict=True)
    return {name: arrays[name][_leading(shape)] for name, shape in blocks}


def widened(vector: Vector, part: Layout, whole: Layout) -> Section:
    """A vector laid out as `part`, (part.size,) float32, in the whole's layout, zero where the part has nothing."""
    if part == whole:
        return Section(vector, whole)
    filled = np.zeros(whole.size, np.float32)
    views, blocks = whole.views(filled), part.views(vector)
    for name, shape in zip(part.names, part.shapes, strict=True):
        views[name][_leading(shape)] = blocks[name]
    return Section(filled, whole, part=part)


def covered(part: Layout, whole: Layout) -> NDArray[np.bool_]:
    """Which elements of the whole's vector a part has, (whole.size,)."""
    filled = np.zeros(whole.size, np.float32)
    views = whole.views(filled)
    for name, shape in zip(part.names, part.shapes, strict=True):
        views[name][_leading(shape)] = 1
    return filled.astype(np.bool_)


def _leading(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)
