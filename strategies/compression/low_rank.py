"""Matrices as products of two thin ones, by one step of subspace iteration.

Vogels, Karimireddy & Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
Algorithm 1, on one client's matrix alone: P = orthonormal(M·Q), Q = Mᵀ·P, and M ≈ P·Qᵀ, starting from the Q that the
client had before. The paper's workers average P between the two steps, for which a server would have to be asked twice.

Factors travel in half precision, and the product that a client takes off its memory is made of the factors as they
arrive, by sums of outer products in a fixed order, each operation rounded as IEEE 754 says: the same bits on any
machine, as a library's matrix product would not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from strategies.compression.entropy import Codec, Reader
from strategies.compression.values import as_sent, most_value_bytes, pack_values, unpack_values
from strategies.seeds import generator
from strategies.update import Layout, Vector

_BLOCK = 1 << 16
"""Elements of a product at a time, which stay in a core's second-level cache."""


@dataclass(frozen=True)
class Matrix:
    """One array of a layout that is worth factoring.

    Attributes:
        begin: where it begins in the vector.
        rows: its first axis, n.
        columns: all others together, m.
        rank: r of its factors P (n, r) and Q (m, r).
    """

    begin: int
    rows: int
    columns: int
    rank: int

    @property
    def end(self) -> int:
        """Where it ends in the vector."""
        return self.begin + self.rows * self.columns


def matrices_of(layout: Layout, rank: int) -> list[Matrix]:
    """The arrays of two axes or more that are smaller as factors; in order."""
    found = []
    for shape, begin in zip(layout.shapes, layout.offsets[:-1], strict=True):
        if len(shape) < 2:
            continue
        rows, columns = shape[0], prod(shape[1:])
        if rank * (rows + columns) < rows * columns:
            found.append(Matrix(begin, rows, columns, rank))
    return found


def first_right(matrices: Sequence[Matrix], seed: int) -> Vector:
    """The Q of all matrices that a client starts from, one after the other: standard normal."""
    size = sum(one.columns * one.rank for one in matrices)
    return generator(seed, "power-sgd").standard_normal(size, np.float32)


def factorise(vector: Vector, matrices: Sequence[Matrix], right: Vector) -> tuple[Vector, Vector]:
    """The factors P and Q of all matrices in a (d,) vector, each flat and one after the other.

    Args:
        vector: anything; what is not finite makes factors that are not.
        matrices: as `matrices_of`.
        right: Q of the last time, flat.
    """
    lefts, rights, begin = [], [], 0
    with np.errstate(invalid="ignore", over="ignore"):
        for one in matrices:
            end = begin + one.columns * one.rank
            matrix = vector[one.begin : one.end].reshape(one.rows, one.columns)
            left = _orthonormal(matrix @ right[begin:end].reshape(one.columns, one.rank))
            lefts.append(left.ravel())
            rights.append((matrix.T @ left).ravel())
            begin = end
    return _joined(lefts), _joined(rights)


def _orthonormal(matrix: Vector) -> Vector:
    if not np.isfinite(matrix).all():  # LAPACK need not return
        return np.full_like(matrix, np.nan)
    left: Vector = np.linalg.qr(matrix)[0]
    return left


def _joined(pieces: Sequence[Vector]) -> Vector:
    return np.concatenate(pieces) if pieces else np.empty(0, np.float32)


def as_decoded(vector: Vector, matrices: Sequence[Matrix], left: Vector, right: Vector) -> Vector:
    """What the server makes of a vector whose factors these are, bit for bit."""
    decoded = vector.copy()
    _put_products(decoded, matrices, as_sent(left, "float16"), as_sent(right, "float16"))
    return decoded


def _put_products(vector: Vector, matrices: Sequence[Matrix], left: Vector, right: Vector) -> None:
    """P·Qᵀ in the place of each matrix."""
    at_left = at_right = 0
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for one in matrices:
            end_left, end_right = at_left + one.rows * one.rank, at_right + one.columns * one.rank
            tall = left[at_left:end_left].reshape(one.rows, one.rank)
            wide = right[at_right:end_right].reshape(one.columns, one.rank)
            out = vector[one.begin : one.end].reshape(one.rows, one.columns)
            _put_product(out, tall, np.ascontiguousarray(wide.T))
            at_left, at_right = end_left, end_right


def _put_product(out: Vector, tall: Vector, wide: Vector) -> None:
    """Σ tall[:, j] ⊗ wide[j], the first j first, a few rows at a time."""
    height = max(1, _BLOCK // out.shape[1])
    buffer = np.empty((min(height, len(out)), out.shape[1]), np.float32)
    for begin in range(0, len(out), height):
        block, left = out[begin : begin + height], tall[begin : begin + height]
        np.multiply(left[:, :1], wide[0], out=block)
        for column in range(1, len(wide)):
            term = buffer[: len(block)]
            np.multiply(left[:, column, None], wide[column], out=term)
            block += term


def pack_low_rank(
    vector: Vector, matrices: Sequence[Matrix], left: Vector, right: Vector, codec: Codec
) -> bytes:
    """Both factors in half precision, and in float32 the elements of the vector that no matrix holds."""
    rest = vector[_outside(len(vector), matrices)]
    return b"".join(
        (
            pack_values(left, "float16", codec),
            pack_values(right, "float16", codec),
            pack_values(rest, "float32", codec),
        )
    )


def unpack_low_rank(
    data: bytes | memoryview, size: int, matrices: Sequence[Matrix], codec: Codec
) -> Vector:
    """The (size,) vector; raises `Refused` (`malformed`) for anything that is not so written."""
    reader, outside = Reader(data), _outside(size, matrices)
    tall, wide, rest = _sizes(size, matrices)
    left = unpack_values(reader, tall, "float16", codec)
    right = unpack_values(reader, wide, "float16", codec)
    others = unpack_values(reader, rest, "float32", codec)
    reader.close()
    vector = np.empty(size, np.float32)
    vector[outside] = others
    _put_products(vector, matrices, left, right)
    return vector


def most_low_rank_bytes(size: int, matrices: Sequence[Matrix], codec: Codec) -> int:
    """The most bytes that so many elements with these matrices can take."""
    tall, wide, rest = _sizes(size, matrices)
    halves = sum(most_value_bytes(count, "float16", codec) for count in (tall, wide))
    return halves + most_value_bytes(rest, "float32", codec)


def _sizes(size: int, matrices: Sequence[Matrix]) -> tuple[int, int, int]:
    """Elements of all P, of all Q, and of what no matrix holds."""
    tall = sum(one.rows * one.rank for one in matrices)
    wide = sum(one.columns * one.rank for one in matrices)
    return tall, wide, size - sum(one.rows * one.columns for one in matrices)


def _outside(size: int, matrices: Sequence[Matrix]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which elements no matrix holds."""
    outside = np.ones(size, np.bool_)
    for one in matrices:
        outside[one.begin : one.end] = False
    return outside
