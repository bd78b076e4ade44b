"""A round's updates as the rows of an (n, d) matrix that is never made: read a block of columns at a time.

The updates stay where they are, in their messages' own bytes; what a rule needs beside them is a few blocks that fit a
core's cache. Knows vectors and nothing of clients or rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from strategies.combiners.distances import gram_matrix
from strategies.update import Vector

Matrix = NDArray[np.float64]

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block over all rows: half a megabyte of float32, which with a copy fits a second-level cache."""
_SHORTEST, _LONGEST = 1 << 10, 1 << 14


def block_width(rows: int) -> int:
    """Columns of a block of so many rows."""
    return min(_LONGEST, max(_SHORTEST, BLOCK_ELEMENTS // max(1, rows)))


class Rows(ABC):
    """n vectors of d elements.

    Attributes:
        n: rows.
        size: elements d of each.
    """

    n: int
    size: int

    @abstractmethod
    def read(self, begin: int, block: Vector) -> None:
        """Fills an (n, w) float32 block with columns begin … begin + w."""

    @cached_property
    def gram(self) -> Matrix:
        """Inner products ⟨xᵢ − c, xⱼ − c⟩ about a centre c of the rows' own, (n, n) float64.

        Only what does not depend on the centre may be read from it: distances, and those of affine combinations.
        """
        return gram_matrix(self)

    def blocks(
        self, begin: int = 0, end: int | None = None, width: int | None = None
    ) -> Iterator[tuple[int, Vector]]:
        """Columns begin … end in blocks (n, w), each with its first column; a block is overwritten by the next."""
        end = self.size if end is None else end
        width = width or block_width(self.n)
        buffer = np.empty((self.n, min(width, end - begin)), np.float32)
        for start in range(begin, end, width):
            block = buffer[:, : min(width, end - start)]
            self.read(start, block)
            yield start, block

    @abstractmethod
    def chosen(self, indices: NDArray[np.intp]) -> Rows:
        """Some of the rows."""

    def views(self, begin: int, end: int) -> list[Vector]:
        """Columns begin … end as n vectors, to be read only: views where the rows lie in memory as they are."""
        block = np.empty((self.n, end - begin), np.float32)
        self.read(begin, block)
        return list(block)

    def combined(self, weights: Matrix) -> Vector:
        """Σ wᵢ·xᵢ, (d,) float32; rows of weight 0 are not read."""
        result = np.zeros(self.size, np.float32)
        chosen = np.flatnonzero(weights)
        scales = weights.astype(np.float32)
        alike = len(set(scales[chosen])) == 1
        for begin in range(0, self.size, _LONGEST):
            out = result[begin : begin + _LONGEST]
            views = self.views(begin, begin + len(out))
            for index in chosen:
                out += views[index] if alike else views[index] * scales[index]
            if alike:
                out *= scales[chosen[0]]
        return result


class Stack(Rows):
    """Vectors as they are.

    Args:
        rows: n ≥ 1 updates, each in one or more pieces (its sections), every one a float32 vector; all rows are cut
            alike.

    Raises:
        ValueError: there is no row, or the rows' pieces have not the same lengths.
    """

    def __init__(self, rows: Sequence[Sequence[Vector]]) -> None:
        if not rows:
            raise ValueError("there is no update to combine")
        lengths = [len(piece) for piece in rows[0]]
        for row in rows:
            if [len(piece) for piece in row] != lengths:
                raise ValueError(f"the rows' pieces have not all the lengths {lengths}")
        self._rows = [tuple(row) for row in rows]
        self._offsets = [0, *accumulate(lengths)]
        self.n, self.size = len(rows), self._offsets[-1]

    @classmethod
    def of(cls, matrix: Vector) -> Stack:
        """The rows of an (n, d) array."""
        return cls([(row,) for row in matrix])

    def read(self, begin: int, block: Vector) -> None:
        """See `Rows.read`."""
        at, end = begin, begin + block.shape[1]
        while at < end:
            piece = bisect_right(self._offsets, at) - 1
            first = self._offsets[piece]
            stop = min(end, self._offsets[piece + 1])
            columns, source = slice(at - begin, stop - begin), slice(at - first, stop - first)
            for target, row in zip(block, self._rows, strict=True):
                target[columns] = row[piece][source]
            at = stop

    def chosen(self, indices: NDArray[np.intp]) -> Stack:
        """See `Rows.chosen`."""
        return Stack([self._rows[index] for index in indices])

    def views(self, begin: int, end: int) -> list[Vector]:
        """See `Rows.views`."""
        piece = bisect_right(self._offsets, begin) - 1
        first, stop = self._offsets[piece], self._offsets[piece + 1]
        if end > stop:
            return super().views(begin, end)
        return [row[piece][begin - first : end - first] for row in self._rows]


class Mixed(Rows):
    """Rows Σⱼ Wᵢⱼ·xⱼ of other rows, made block by block.

    Args:
        rows: n vectors.
        mixing: W, (m, n) float64; each row sums to 1, so that distances follow from the others' Gram matrix.
    """

    def __init__(self, rows: Rows, mixing: Matrix) -> None:
        self._inner, self._mixing = rows, mixing
        self._mixing32 = mixing.astype(np.float32)
        self.n, self.size = len(mixing), rows.size

    @cached_property
    def gram(self) -> Matrix:
        """See `Rows.gram`: W·G·Wᵀ, without another look at the vectors."""
        return self._mixing @ self._inner.gram @ self._mixing.T

    def read(self, begin: int, block: Vector) -> None:
        """See `Rows.read`."""
        source = np.empty((self._inner.n, block.shape[1]), np.float32)
        self._inner.read(begin, source)
        np.matmul(self._mixing32, source, out=block)

    def chosen(self, indices: NDArray[np.intp]) -> Mixed:
        """See `Rows.chosen`."""
        return Mixed(self._inner, self._mixing[indices])

    def combined(self, weights: Matrix) -> Vector:
        """See `Rows.combined`: Wᵀ·w of the inner rows."""
        return self._inner.combined(self._mixing.T @ weights)
