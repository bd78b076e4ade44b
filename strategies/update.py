"""What a client contributes to a round: an `Update` of named sections.

A section is one contiguous float32 vector with the layout that gives its parts their names and shapes. This file
knows numpy and nothing else: not Flower, not torch, not how an update travels (`wire`) or what is done to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

DELTA: Final = "delta"
"""Trained parameters minus the parameters that the client was sent. Every update has it."""
BUFFERS: Final = "buffers"
"""Change of float buffers (running statistics): averaged, never passed through a server optimiser."""
COUNTERS: Final = "counters"
"""Increase of integer buffers: the server keeps the maximum. Exact in float32 up to 2^24 steps a round."""
CONTROL: Final = "control"
"""Change of a SCAFFOLD client's control variate, laid out like the parameters."""

CLIP_BIT: Final = "clip_bit"
"""One number: whether the client's update lay within the clip's bound, 1/2 or −1/2."""

EPSILON: Final = "epsilon"
"""The one metric that may travel under differential privacy: what a client has spent of its own accord."""

MODEL_SECTIONS: Final = frozenset({DELTA, BUFFERS, COUNTERS})
"""Sections that the model's own arrays make; others come of an algorithm."""

MAXIMUM_SECTIONS: Final = frozenset({COUNTERS})
"""Sections that are reduced by their maximum, whatever the combiner does with the others."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the arrays that one vector holds, in order.

    Attributes:
        names: one name an array, all different.
        shapes: the shape of each, in the same order; `()` is a scalar.

    Raises:
        ValueError: names repeat, or there are not as many shapes as names.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(f"a layout of {len(self.names)} names has {len(self.shapes)} shapes")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names repeat in a layout: {sorted(self.names)}")

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Layout:
        """The layout of named arrays, in the mapping's order."""
        return cls(tuple(arrays), tuple(tuple(array.shape) for array in arrays.values()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each array begins in the vector, and at last the vector's length."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + prod(shape))
        return tuple(ends)

    @property
    def size(self) -> int:
        """The number of elements d of the vector."""
        return self.offsets[-1]

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that two equal layouts share: a cheap check that both ends mean the same vector."""
        text = json.dumps([self.names, self.shapes], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flatten(self, arrays: Mapping[str, NDArray[np.generic]]) -> Vector:
        """Named arrays as one new float32 vector.

        Raises:
            ValueError: an array is missing or has another shape than the layout says.
        """
        vector = np.empty(self.size, np.float32)
        for name, view in self.views(vector).items():
            array = arrays.get(name)
            if array is None:
                raise ValueError(f"array {name!r} of the layout is missing")
            if array.shape != view.shape:
                raise ValueError(
                    f"array {name!r} has shape {array.shape}, its layout says {view.shape}"
                )
            view[...] = array
        return vector

    def views(self, vector: NDArray[np.floating]) -> dict[str, NDArray[np.floating]]:
        """The vector's arrays by name, without a copy: what is written to a view is written to the vector."""
        bounds = zip(self.names, self.shapes, self.offsets[:-1], self.offsets[1:], strict=True)
        return {name: vector[begin:end].reshape(shape) for name, shape, begin, end in bounds}


@dataclass(frozen=True)
class Section:
    """One vector of an update.

    Attributes:
        vector: (d,) float32, C-contiguous.
        layout: the names and shapes within it; `layout.size == d`.
        bound: an upper limit on the vector's L2 norm that holds by construction (a clip), or None.
        packed: what travels in the vector's place, where a client's last stage has packed it; None where the vector
            travels as it is. A section that is made anew has none.
        part: what of the layout is trained in it, where that is not all (`strategies.parts`); the rest is zero because
            nobody spoke of it, not because it should stay.
    """

    vector: Vector
    layout: Layout
    bound: float | None = None
    packed: bytes | None = None
    part: Layout | None = None

    def __post_init__(self) -> None:
        if self.vector.dtype != np.float32 or self.vector.shape != (self.layout.size,):
            raise ValueError(
                f"a section of {self.layout.size} elements needs a float32 vector of that length, "
                f"got {self.vector.dtype} {self.vector.shape}"
            )


@dataclass(frozen=True)
class Update:
    """What one client, or several together, would change in one version of the model.

    Attributes:
        sections: by name; always holds `DELTA`, the change of the parameters (never raw weights).
        weight: what the client declares, in examples. Rules that weight uniformly ignore it.
        members: logical ids of the clients whose contributions are in it. With several, the vectors are their mean
            and the weight is the sum of theirs.
        version: the model version that the clients started from.
        metrics: numbers that travelled in clear beside the vectors (training loss); empty under masks and DP.
        discount: in [0, 1], what its staleness leaves of its influence. The vectors are not scaled by it: rules compare
            updates as they are, and what comes of them is scaled.
    """

    sections: Mapping[str, Section]
    weight: float
    members: tuple[int, ...]
    version: int
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    discount: float = 1.0

    @property
    def delta(self) -> Section:
        """The change of the parameters."""
        return self.sections[DELTA]

    def with_section(self, name: str, section: Section) -> Update:
        """The same update with one section replaced or added."""
        sections = {**self.sections, name: section}
        # Not by `replace`, which costs a small update more than its arithmetic.
        return Update(
            sections, self.weight, self.members, self.version, self.metrics, self.discount
        )
