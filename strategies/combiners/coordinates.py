"""Coordinate-wise rules: the median and the trimmed mean.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", Definitions 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.combiners import order
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.update import Vector


@dataclass
class Median(Robust):
    """The median of each coordinate, which needs no f: it bears any n > 2f."""

    label: ClassVar[str] = "the median"
    by_coordinate: ClassVar[bool] = True

    def least(self, f: int) -> int:
        """2f + 1: a majority is honest."""
        return 2 * f + 1

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        return order.median(rows, threads=side.threads)


@dataclass
class TrimmedMean(Robust):
    """The mean of each coordinate without its f smallest and f largest values. Needs n > 2f."""

    label: ClassVar[str] = "the trimmed mean"
    by_coordinate: ClassVar[bool] = True

    def least(self, f: int) -> int:
        """2f + 1: something must be left."""
        return 2 * f + 1

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        return order.trimmed_mean(rows, f, threads=side.threads)
