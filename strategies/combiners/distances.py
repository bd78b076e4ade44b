"""Distances between updates by one Gram matrix, in bounded memory and without the cancellation that voids them.

‖xᵢ − xⱼ‖² = Gᵢᵢ + Gⱼⱼ − 2·Gᵢⱼ loses all its digits in float32 when the rows lie far from the origin of G and close to
one another: raw weights do, and so do honest updates beside a huge lie when the origin is the mean. So G is taken about
one of the rows, and about another one where the first turns out to be far from somebody's half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from strategies.update import Vector

Matrix = NDArray[np.float64]


class Columns(Protocol):
    """What distances are taken between: n vectors of `size` elements, read some columns at a time."""

    n: int
    size: int

    def views(self, begin: int, end: int) -> list[Vector]:
        """Columns begin … end as n vectors, to be read only."""
        ...

    def blocks(self) -> Iterator[tuple[int, Vector]]:
        """All columns in blocks (n, w), each with its first column, that may be written to."""
        ...


_TRIANGLE_ROWS = 28
"""Up to so many rows, products with single rows make half a Gram matrix sooner than one product makes all of it."""

_LONG = 1e15
"""Norms past which a product of two rows may leave float32's range, …"""
_SHORT = 1e-12
"""… and below which the squares of their elements may vanish in it."""
_FAR = 16.0
"""How many times its squared distance to the nearer half of the others a row's squared norm may be: float32's rounding
is then at most a few millionths of a distance."""


def gram_matrix(rows: Columns) -> Matrix:
    """Inner products about one of the rows, (n, n) float64, from float32 blocks whose products are summed in float64.

    If some row lies farther from the first than its own neighbourhood is wide, the first may be a huge lie, and the one
    of median length takes its place: while most are honest, that is a length that honest updates have. It may still
    lie elsewhere than they do; then the distances found, wrong by no more than that length allows, tell who does not.
    """
    gram = _about(rows, 0)
    if not np.isfinite(gram).all() or gram.max() < _SHORT**2 or _far(gram):
        norms = distances_to(rows, None)
        exact = np.float32 if _SHORT < norms.max() < _LONG else np.float64
        gram = _about(rows, int(np.argsort(norms, kind="stable")[(rows.n - 1) // 2]), exact)
        if _far(gram):
            gram = _about(rows, most_central(squared_distances(gram)), exact)
    return gram


def most_central(distances: Matrix) -> int:
    """The row whose nearer half of the others is nearest: while most rows are honest, one among the honest."""
    return int(np.argmin(majority_radii(distances)))


def majority_radii(distances: Matrix) -> Matrix:
    """How far, squared, each row must reach for a majority of the rows, itself included; (n,)."""
    half = len(distances) // 2
    return np.asarray(np.partition(distances, half, axis=1)[:, half])


def squared_distances(gram: Matrix) -> Matrix:
    """‖xᵢ − xⱼ‖² from a Gram matrix, (n, n) float64, never negative, 0 on the diagonal."""
    norms = gram.diagonal()
    distances = norms[:, None] + norms[None, :] - 2 * gram
    np.maximum(distances, 0, out=distances)
    np.fill_diagonal(distances, 0)
    return distances


def distances_to(rows: Columns, point: Vector | None) -> Matrix:
    """‖xᵢ − p‖ of each row to a (d,) point, or to the origin for None: (n,) float64."""
    squares = np.zeros(rows.n)
    for begin, block in rows.blocks():
        if point is not None:
            with np.errstate(over="ignore"):
                block -= point[begin : begin + block.shape[1]]
        squares += _squares(block)
    return np.sqrt(squares)


def products_with(rows: Columns, point: Vector) -> tuple[Matrix, Matrix]:
    """⟨xᵢ, p⟩ with a (d,) point, and ‖xᵢ‖: two (n,) float64 vectors from one reading."""
    products, squares = np.zeros(rows.n), np.zeros(rows.n)
    for begin, block in rows.blocks():
        part = point[begin : begin + block.shape[1]]
        found = _squares(block)
        with np.errstate(over="ignore", invalid="ignore"):
            product = block @ part
        exact = np.isfinite(product).all() and found.min() > _SHORT**2
        products += product if exact else block.astype(np.float64) @ part
        squares += found
    return products, np.sqrt(squares)


def _squares(block: Vector) -> Matrix:
    """Σⱼ xᵢⱼ² of each row of a block: in float32, again in float64 where squares overflow (past 1e19) or vanish."""
    with np.errstate(over="ignore"):
        squares = np.einsum("ij,ij->i", block, block).astype(np.float64)
    for row in np.flatnonzero(~np.isfinite(squares) | (squares < _SHORT**2)):
        wide = block[row].astype(np.float64)
        squares[row] = wide @ wide
    return np.asarray(squares, np.float64)


def _about(rows: Columns, centre: int, dtype: type = np.float32) -> Matrix:
    """The Gram matrix about one of the rows."""
    gram, width = np.zeros((rows.n, rows.n)), _width(rows.n)
    buffer: NDArray[np.floating] = np.empty((rows.n, min(width, rows.size)), dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # taken again in float64 where it overflows
        for begin in range(0, rows.size, width):
            views = rows.views(begin, min(begin + width, rows.size))
            block = buffer[:, : len(views[0])]
            for row, view in zip(block, views, strict=True):
                np.subtract(view, views[centre], out=row, dtype=dtype)
            _add_products(block, gram)
    return np.triu(gram) + np.triu(gram, 1).T


def _add_products(block: NDArray[np.floating], gram: Matrix) -> None:
    """Adds the block's inner products to the upper triangle."""
    if len(block) > _TRIANGLE_ROWS:
        gram += block @ block.T
        return
    for index, row in enumerate(block):
        gram[index, index:] += block[index:] @ row


def _width(n: int) -> int:
    """Columns of a block: wide enough that starting a product costs little, and two blocks fit a second-level cache."""
    return min(1 << 14, max(1 << 12, (1 << 18) // n))


def _far(gram: Matrix) -> bool:
    distances = squared_distances(gram)
    return bool((gram.diagonal() > _FAR * majority_radii(distances)).any())
