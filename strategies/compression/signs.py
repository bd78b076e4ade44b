"""A vector as one bit an element and one scale.

Bernstein, Wang, Azizzadenesheli & Anandkumar 2018, "signSGD: Compressed Optimisation for Non-Convex Problems"; the
scale is that of Karimireddy, Rebjock, Stich & Jaggi 2019, "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes", Definition 2: x ↦ (‖x‖₁ / d) · sign(x), with sign(0) = 1.
"""

from __future__ import annotations

import struct

import numpy as np

from strategies.compression.entropy import Bytes, Reader
from strategies.update import Vector
from strategies.wire import Refused

_SCALE = struct.Struct("<f")
_BLOCK = 1 << 16
"""Elements at a time, which stay in a core's second-level cache."""


def signs_of(vector: Vector) -> tuple[np.float32, Bytes]:
    """‖x‖₁ / d and one bit an element of a (d,) vector: 1 where it is not negative.

    The scale is NaN where the vector holds something that is not finite, and 0 of nothing.
    """
    total, size = 0.0, len(vector)
    buffer = np.empty(min(size, _BLOCK), np.float32)
    with np.errstate(over="ignore"):
        for begin in range(0, size, _BLOCK):
            block = vector[begin : begin + _BLOCK]
            total += float(np.abs(block, out=buffer[: len(block)]).sum())
        scale = np.float32(total / max(size, 1))
    bits = np.packbits(~np.signbit(vector), bitorder="little")
    return scale if np.isfinite(scale) else np.float32(np.nan), bits


def pack_signs(scale: np.float32, bits: Bytes) -> bytes:
    """4 bytes, and the bits."""
    return _SCALE.pack(scale) + bits.tobytes()


def unpack_signs(data: bytes | memoryview, size: int) -> Vector:
    """±scale, (size,) float32.

    Raises:
        Refused: `not_finite`, where the client's vector was so; `malformed`, for anything that is not so written.
    """
    reader = Reader(data)
    (scale,) = reader.numbers(_SCALE)
    packed = reader.take(-(-size // 8))
    reader.close()
    if not np.isfinite(scale):
        raise Refused("not_finite", f"the scale of a vector of signs is {scale:g}")
    if scale < 0 or (size % 8 and packed[-1] >> size % 8):
        raise Refused("malformed", "a scale below 0, or bits past the last sign")
    return signed(np.float32(scale), packed, size)


def signed(scale: np.float32, packed: Bytes, size: int) -> Vector:
    """`scale` where a bit is 1, −`scale` where it is 0: what the server makes of them, (size,) float32."""
    vector = np.empty(size, np.float32)
    bits = np.unpackbits(packed, count=size, bitorder="little")
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, size, _BLOCK):
            block = vector[begin : begin + _BLOCK]
            np.copyto(block, bits[begin : begin + _BLOCK])
            block *= 2 * scale
            block -= scale  # exact, as twice a float32 is one
    return vector


def most_sign_bytes(size: int) -> int:
    """The bytes that so many elements take."""
    return _SCALE.size + -(-size // 8)
