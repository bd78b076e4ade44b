"""Float32 values in 16 bits each, or in all 32, byte by byte.

16 bits are IEEE 754's half precision under a power of two that all values share: 11 bits of significand down to 2⁻²⁹ of
the largest, so that a model's small steps do not vanish as they would below half precision's own 6·10⁻⁵. Rounding twice
is rounding once: what a client's memory took off is what arrives.

Signs and exponents make the first bytes of all values, which are much alike and go through the entropy coder; the last
bytes are as good as random and go as they are.
"""

from __future__ import annotations

import struct
from math import frexp
from typing import Literal

import numpy as np

from strategies.compression.entropy import Codec, Reader, deflate, most_bytes
from strategies.update import Vector
from strategies.wire import Refused

Precision = Literal["float16", "float32"]

_EXPONENT = struct.Struct("<h")
_LEAST, _MOST = -100, 129
"""Of the shared exponent: up to float32's own, and down to where 2^−24 of it is a float32 still."""
_TOP = 15
"""The largest value lies in [2^14, 2^15) as it is halved in precision: half precision ends at 2^16."""
_ALIKE = {"float16": 1, "float32": 2}
"""Leading bytes that are worth the coder's time."""


def as_sent(values: Vector, precision: Precision) -> Vector:
    """The values as they arrive; NaN and infinities as they are."""
    if precision == "float32":
        return values
    exponent = _shared_exponent(values)
    return _whole(_halved(values, exponent), exponent)


def pack_values(values: Vector, precision: Precision, codec: Codec) -> bytes:
    """(k,) float32."""
    if precision == "float32":
        return _pack_planes(np.ascontiguousarray(values, "<f4"), precision, codec)
    exponent = _shared_exponent(values)
    halves = _halved(values, exponent)
    return _EXPONENT.pack(exponent) + _pack_planes(halves.astype("<f2"), precision, codec)


def unpack_values(reader: Reader, count: int, precision: Precision, codec: Codec) -> Vector:
    """(count,) float32, as `as_sent`; raises `Refused` (`malformed`) where there are none such."""
    if precision == "float32":
        return _planes(reader, count, precision, codec).view("<f4").astype(np.float32, copy=False)
    (exponent,) = reader.numbers(_EXPONENT)
    if not _LEAST <= exponent <= _MOST:
        raise Refused("malformed", f"values share a power 2^{exponent}")
    return _whole(_planes(reader, count, precision, codec).view("<f2"), int(exponent))


def most_value_bytes(count: int, precision: Precision, codec: Codec) -> int:
    """The most bytes that so many values can take."""
    width, alike = np.dtype(precision).itemsize, _ALIKE[precision]
    head = 0 if precision == "float32" else _EXPONENT.size
    return head + alike * most_bytes(count, codec) + (width - alike) * count


def _shared_exponent(values: Vector) -> int:
    """E with 2^(e−1) <= max|x| < 2^e of the finite values once rounded to 11 bits; 0 where all are 0."""
    magnitudes = np.abs(values[np.isfinite(values)])
    fraction, exponent = frexp(float(magnitudes.max(initial=0.0)))
    # What rounds up to a power of two has the next exponent already: rounding again must not change it.
    return max(exponent + (round(fraction * 2**11) == 2**11), _LEAST)


def _halved(values: Vector, exponent: int) -> np.ndarray[tuple[int], np.dtype[np.float16]]:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return (values * np.float32(2.0 ** (_TOP - exponent))).astype(np.float16)


def _whole(halves: np.ndarray[tuple[int], np.dtype[np.float16]], exponent: int) -> Vector:
    with np.errstate(invalid="ignore", over="ignore"):
        return halves.astype(np.float32) * np.float32(2.0 ** (exponent - _TOP))


def _pack_planes(
    values: np.ndarray[tuple[int], np.dtype[np.floating]], precision: Precision, codec: Codec
) -> bytes:
    shape, alike = (len(values), values.itemsize), _ALIKE[precision]
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(shape).T[::-1])
    coded = [deflate(plane, codec) for plane in planes[:alike]]
    return b"".join((*coded, *(plane.tobytes() for plane in planes[alike:])))


def _planes(
    reader: Reader, count: int, precision: Precision, codec: Codec
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The values' bytes in their own order, (count · width,)."""
    width, alike = np.dtype(precision).itemsize, _ALIKE[precision]
    planes = np.empty((width, count), np.uint8)
    for index in range(width):
        planes[index] = reader.stream(count, count, codec) if index < alike else reader.take(count)
    return np.ascontiguousarray(planes[::-1].T).reshape(-1)
