"""The mean of updates of which each speaks of a part of the model: an element over those who trained it, streaming.

A client that was sent no head of another task, or fewer ranks of an adapter, has zeros there because nobody spoke, and
zeros that count would draw what few clients train towards where it was. So the divisor of an element is the weight of
those whose part has it (Diao et al. 2021, "HeteroFL: Computation and Communication Efficient Federated Learning for
Heterogeneous Clients": each parameter over the clients that have it); an element that nobody has stays.

What nobody trains has no business in an update: it stays whatever a client says. This file knows vectors and parts,
and nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Collection
from math import fsum

import numpy as np
from numpy.typing import NDArray

from strategies.combiners.summation import CompensatedSum
from strategies.parts import covered
from strategies.update import Layout, Section

Group = tuple[str, ...]
"""What the clients of a group have in common, as names."""


class CoverageMean:
    """Σ wᵢ·xᵢ / Σ wᵢ by element over those who have it. Does not depend on the order in which they come.

    Takes 16 bytes an element for each group and nothing for a client.

    Args:
        layout: of the vectors.
        frozen: names of arrays that nobody trains; their mean is 0.
        by_group: each group weighs as much as any other, and clients share their group's weight by their own.
    """

    def __init__(
        self, layout: Layout, *, frozen: Collection[str] = (), by_group: bool = False
    ) -> None:
        self._layout, self._frozen, self._by_group = layout, frozenset(frozen), by_group
        self._sums: dict[Group, CompensatedSum] = {}
        self._weights: dict[Group, dict[Layout, list[float]]] = {}

    def add(
        self, section: Section, weight: float, *, discount: float = 1.0, group: Group = ()
    ) -> None:
        """Takes one (d,) vector, zero outside its part; `discount` scales it and not what is divided by."""
        group = group if self._by_group else ()
        if group not in self._sums:
            self._sums[group] = CompensatedSum(self._layout.size)
        self._sums[group].add(section.vector, weight * discount)
        part = self._layout if section.part is None else section.part
        self._weights.setdefault(group, {}).setdefault(part, []).append(weight)

    def mean(self, divisor: float | None = None) -> NDArray[np.float64]:
        """The mean as a new (d,) vector, 0 where nobody has an element.

        Args:
            divisor: of all elements, whoever has them; None for the weight of those who have each.
        """
        total, weight = np.zeros(self._layout.size), np.zeros(self._layout.size)
        for group in sorted(self._sums):
            parts = self._weights[group]
            # A group's own weight divides it twice: as a mean, and as one of the weights that this mean is divided by.
            whole = fsum(w for each in parts.values() for w in each) if self._by_group else 1.0
            total += self._sums[group].mean(whole)
            for part in sorted(parts, key=lambda part: part.digest):
                weight += (
                    fsum(parts[part])
                    / whole
                    * (1.0 if part == self._layout else covered(part, self._layout))
                )
        if divisor is not None:
            weight[...] = divisor
        mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
        for name, view in self._layout.views(mean).items():
            if name in self._frozen:
                view[...] = 0
        return mean
