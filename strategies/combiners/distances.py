"""Distances between updates by one Gram matrix, in bounded memory and without the cancellation that voids them.

‖xᵢ − xⱼ‖² = Gᵢᵢ + Gⱼⱼ − 2·Gᵢⱼ loses all its digits in float32 when the rows lie far from the origin of G and close to
one another: raw weights do, and so do honest updates beside a single huge lie when the origin is the mean. So G is
taken about a centre among the rows, and about another one where the first turns out to be far from somebody's half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from strategies.update import Vector

if TYPE_CHECKING:
    from strategies.combiners.rows import Rows

Matrix = NDArray[np.float64]

_FAR = 16.0
"""How many times its squared distance to the nearer half of the others a row's squared norm may be: float32's rounding
is then at most a few millionths of a distance."""


def gram_matrix(rows: Rows) -> Matrix:
    """Inner products about a centre, (n, n) float64, from float32 blocks whose products are summed in float64.

    The first centre is the mean of all rows. If some row lies farther from it than its own neighbourhood is wide, the
    mean was dragged away, and the centre becomes the mean of the half with the smallest norms: where most are honest,
    no liar in that half is longer than an honest update.
    """
    gram = _about(rows, np.ones(rows.n, bool))
    if not np.isfinite(gram).all() or _dragged(gram):
        norms = distances_to(rows, None)
        small = np.zeros(rows.n, bool)
        small[np.argsort(norms, kind="stable")[: rows.n // 2 + 1]] = True
        gram = _about(rows, small, np.float64 if norms.max() > 1e15 else np.float32)
    return gram


def squared_distances(gram: Matrix) -> Matrix:
    """‖xᵢ − xⱼ‖² from a Gram matrix, (n, n) float64, never negative, 0 on the diagonal."""
    norms = gram.diagonal()
    distances = norms[:, None] + norms[None, :] - 2 * gram
    np.maximum(distances, 0, out=distances)
    np.fill_diagonal(distances, 0)
    return distances


def distances_to(rows: Rows, point: Vector | None) -> Matrix:
    """‖xᵢ − p‖ of each row to a (d,) point, or to the origin for None: (n,) float64."""
    squares = np.zeros(rows.n)
    for begin, block in rows.blocks():
        if point is not None:
            with np.errstate(over="ignore"):
                block -= point[begin : begin + block.shape[1]]
        squares += _squares(block)
    return np.sqrt(squares)


def products_with(rows: Rows, point: Vector) -> tuple[Matrix, Matrix]:
    """⟨xᵢ, p⟩ with a (d,) point, and ‖xᵢ‖: two (n,) float64 vectors from one reading."""
    products, squares = np.zeros(rows.n), np.zeros(rows.n)
    for begin, block in rows.blocks():
        part = point[begin : begin + block.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):
            found = block @ part
        products += found if np.isfinite(found).all() else block.astype(np.float64) @ part
        squares += _squares(block)
    return products, np.sqrt(squares)


def _squares(block: Vector) -> Matrix:
    """Σⱼ xᵢⱼ² of each row of a block: in float32, again in float64 where a square overflows (past 1e19)."""
    with np.errstate(over="ignore"):
        squares = np.einsum("ij,ij->i", block, block)
    if np.isfinite(squares).all():
        return np.asarray(squares, np.float64)
    return np.asarray(np.einsum("ij,ij->i", block, block, dtype=np.float64))


def _about(rows: Rows, centre: NDArray[np.bool_], dtype: type = np.float32) -> Matrix:
    """The Gram matrix about the mean of the chosen rows."""
    gram = np.zeros((rows.n, rows.n))
    everybody = bool(centre.all())
    with np.errstate(over="ignore", invalid="ignore"):  # taken again in float64 where it overflows
        for _, block in rows.blocks(width=_width(rows.n)):
            chosen = block if everybody else block[centre]
            work = block if dtype is np.float32 else block.astype(dtype)
            work -= chosen.mean(axis=0, dtype=dtype)
            gram += work @ work.T
    return gram


def _width(n: int) -> int:
    """Wider blocks than elsewhere: a product of few rows is soon done, and starting it costs."""
    return max(1 << 12, (1 << 19) // n)


def _dragged(gram: Matrix) -> bool:
    distances = squared_distances(gram)
    half = np.partition(distances, len(gram) // 2, axis=1)[:, len(gram) // 2]
    return bool((gram.diagonal() > _FAR * half).any())
