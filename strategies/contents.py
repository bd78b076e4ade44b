"""What a sum holds of each client: the update's sections, and a short tail that replaces all that may not go in clear.

    section vectors · f | metrics · f | saturated · f | f | 1        f = w / w_max, or 1 where all weigh alike

Sums of these give the weighted mean of vectors and metrics, the sum of weights, and how many contributions there are.
A client's number of examples and its metrics are never sent by themselves. The tail is in [−1, 1], whatever its ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from strategies.update import Layout, Section, Update, Vector
from strategies.wire import Refused

SATURATED = "saturated"
"""The metric that tells which share of all elements was cut at the limit."""
FIXED_POINT_ERROR = "fixed_point_error"
"""The metric that tells how far rounding has put the mean off: the expected relative L2 error."""


@dataclass(frozen=True)
class Contents:
    """The order of a summed vector, and its ranges.

    Attributes:
        layouts: the sections by name; they stand in the order of their names.
        metrics: names of the training metrics that go along.
        metric_limit: the largest magnitude of a metric; larger ones are cut.
        max_weight: w_max, the largest weight that counts, in examples; None where all clients weigh alike.
    """

    layouts: Mapping[str, Layout]
    metrics: tuple[str, ...]
    metric_limit: float
    max_weight: float | None

    @property
    def size(self) -> int:
        """Elements d of all sections."""
        return sum(layout.size for layout in self.layouts.values())

    @property
    def tail_size(self) -> int:
        """Elements after them."""
        return len(self.metrics) + 3

    def factor(self, update: Update) -> float:
        """What a client's vectors are multiplied by: w / w_max, at most 1.

        Raises:
            Refused: `num_examples`, for a weight below 1.
        """
        if self.max_weight is None:
            return 1.0
        if not update.weight >= 1:
            raise Refused("num_examples", f"{update.weight:g} examples make no contribution")
        return min(1.0, update.weight / self.max_weight)

    def vectors(self, update: Update) -> Iterator[tuple[slice, Vector]]:
        """Each section's vector and its place.

        Raises:
            Refused: `missing` or `shape`, when the update has other sections than these.
        """
        if set(update.sections) != set(self.layouts):
            raise Refused(
                "missing",
                f"sections {sorted(update.sections)} were made, {sorted(self.layouts)} are summed",
            )
        begin = 0
        for name in sorted(self.layouts):
            section = update.sections[name]
            if section.layout.digest != self.layouts[name].digest:
                raise Refused("shape", f"section {name!r} is laid out otherwise than the server's")
            yield slice(begin, begin + section.layout.size), section.vector
            begin += section.layout.size

    def tail(self, update: Update, saturated: int) -> NDArray[np.float64]:
        """The tail of one client, (tail_size,).

        Args:
            update: its metrics that are not here, or not finite, count as 0.
            saturated: how many elements of its vectors were cut at the limit.
        """
        factor = self.factor(update)
        given = (update.metrics.get(name, 0.0) for name in self.metrics)
        scaled = [value / self.metric_limit if isfinite(value) else 0.0 for value in given]
        cut = np.clip([*scaled, saturated / max(1, self.size)], -1, 1) * factor
        return np.concatenate([cut, [factor, 1.0]])

    def update(
        self,
        sums: NDArray[np.float64],
        tail: NDArray[np.float64],
        members: tuple[int, ...],
        version: int,
        noise: float = 0.0,
    ) -> Update:
        """The mean of the members' updates out of the sums of their vectors and tails.

        Args:
            sums: (size,) float64, Σ f·x in the units of x; used up.
            tail: (tail_size,), the sum of their tails.
            members: logical ids of those who are in it.
            version: of the model that they started from.
            noise: rms error of one element of one member's vector, in the units of x.

        Raises:
            Refused: `corrupt`, when the tail can't be that of so many clients: the sum is not what it should be.
        """
        count, total = float(tail[-1]), float(tail[-2])
        if abs(count - len(members)) > 0.5 or not 0 < total <= len(members) + 0.5:
            raise Refused(
                "corrupt",
                f"the sum of {len(members)} clients counts {count:g} and weighs {total:g} of them",
            )
        if self.max_weight is None:
            total = float(len(members))
        sums /= total
        named = zip(sorted(self.layouts), self._ends(), strict=True)
        sections = {
            name: Section(sums[place].astype(np.float32), self.layouts[name])
            for name, place in named
        }
        means = tail[: len(self.metrics)] / total * self.metric_limit
        metrics = dict(zip(self.metrics, map(float, means), strict=True))
        metrics[SATURATED] = max(0.0, float(tail[-3]) / total)
        length = float(np.linalg.norm(sums))
        error = noise * sqrt(len(members) * self.size) / total
        metrics[FIXED_POINT_ERROR] = error / length if length else 0.0
        # Whole numbers of examples are exact in the sum, and not to be 0.9999999999999999 after two products.
        weight = round(total * (self.max_weight or 1.0), 6)
        return Update(sections, weight, members, version, metrics)

    def _ends(self) -> Iterator[slice]:
        begin = 0
        for name in sorted(self.layouts):
            yield slice(begin, begin + self.layouts[name].size)
            begin += self.layouts[name].size
