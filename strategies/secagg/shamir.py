"""Secret sharing (Shamir 1979, "How to share a secret"): any `threshold` shares give the secret, fewer say nothing.

A secret is a string of 16-bit symbols (little-endian). Each symbol is the constant term of a polynomial of its own over
GF(2¹⁶), of degree below `threshold`, with all other coefficients uniform; share i holds the polynomials' values at the
point i + 1.

Shares are not authenticated: a wrong one gives a wrong secret, which whoever combines them has to notice. Arithmetic by
tables is not of constant time, and numpy's buffers are not erased: neither is claimed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.secagg.field import EXP, LOG, ORDER

_SYMBOL = np.dtype("<u2")
_BLOCK = 1 << 18
"""Products at a time: bounds the memory of thousands of shares."""


def share(
    secret: bytes, threshold: int, count: int, *, entropy: Callable[[int], bytes] = os.urandom
) -> NDArray[np.uint8]:
    """Splits a secret.

    Args:
        secret: an even number of bytes.
        threshold: how many shares give it back.
        count: how many shares are made.
        entropy: gives that many uniform bytes; every coefficient but the secret comes from it.

    Returns:
        (count, len(secret)); row i is for the point i + 1.

    Raises:
        ValueError: not 1 ≤ threshold ≤ count ≤ 65,535, or an odd length.
    """
    if not 1 <= threshold <= count <= ORDER:
        raise ValueError(
            f"{threshold} of {count} shares: needs 1 ≤ threshold ≤ count ≤ {ORDER:,}, the points of the field"
        )
    _even(len(secret))
    symbols = len(secret) // 2
    coefficients = np.frombuffer(entropy((threshold - 1) * len(secret)), _SYMBOL)
    points = LOG[1 : count + 1, None]
    values = np.empty((count, symbols), _SYMBOL)
    values[:] = np.frombuffer(secret, _SYMBOL)
    for power, row in enumerate(coefficients.reshape(threshold - 1, symbols), 1):
        values ^= EXP[LOG[row] + power * points % ORDER]
    return values.view(np.uint8)


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the shares of at least `threshold` points; only those of the smallest points are used.

    Raises:
        ValueError: too few shares, a point outside 1 … 65,535, shares of different or odd lengths.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares: the threshold is {threshold}")
    lengths = {len(held) for held in shares.values()}
    if len(lengths) > 1:
        raise ValueError(f"shares of different lengths: {sorted(lengths)} bytes")
    points = sorted(shares)
    _check(points)
    held = b"".join(shares[point] for point in points[:threshold])
    rows = np.frombuffer(held, np.uint8).reshape(1, threshold, *lengths)
    return combine_many(points[:threshold], rows).tobytes()


def combine_many(points: Sequence[int], shares: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Many secrets whose shares are for the same points.

    Args:
        points: (threshold,), each once.
        shares: (m, threshold, L), L even; `shares[k, i]` is of secret k for `points[i]`.

    Returns:
        (m, L), one secret a row.

    Raises:
        ValueError: a point outside 1 … 65,535 or given twice, an odd L, or another number of shares than of points.
    """
    _check(points)
    many, threshold, length = shares.shape
    _even(length)
    if threshold != len(points):
        raise ValueError(f"{threshold} shares a secret for {len(points)} points")
    symbols = np.ascontiguousarray(shares).view(_SYMBOL)
    weights = _weights(np.array(points, np.int64))[:, None]
    secrets = np.empty((many, length // 2), _SYMBOL)
    rows = max(1, _BLOCK // max(1, threshold * length))
    for begin in range(0, many, rows):
        products = EXP[LOG[symbols[begin : begin + rows]] + weights]
        np.bitwise_xor.reduce(products, axis=1, out=secrets[begin : begin + rows])
    return secrets.view(np.uint8)


def _weights(points: NDArray[np.int64]) -> NDArray[np.int64]:
    """Logarithms of Lagrange's weights at 0: Πⱼ xⱼ / (xⱼ − xᵢ) over j ≠ i, where minus is exclusive or."""
    logs = LOG[points]
    below = np.empty_like(logs)
    rows = max(1, _BLOCK // len(points))
    for begin in range(0, len(points), rows):
        differences = points[begin : begin + rows, None] ^ points
        differences[differences == 0] = 1  # j = i, left out: log 1 = 0
        below[begin : begin + rows] = LOG[differences].sum(axis=1)
    result: NDArray[np.int64] = (logs.sum() - logs - below) % ORDER
    return result


def _check(points: Sequence[int]) -> None:
    outside = [point for point in points if not 1 <= point <= ORDER]
    if outside:
        raise ValueError(f"share for the point {outside[0]}: points are 1 … {ORDER:,}")
    if not points or len(set(points)) < len(points):
        raise ValueError(f"shares for the points {list(points)}: needs at least one, each once")


def _even(length: int) -> None:
    if length % 2:
        raise ValueError(f"{length} bytes: symbols are of 2 bytes; pad to an even length")
