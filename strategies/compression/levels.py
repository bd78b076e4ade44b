"""Vectors rounded at random to a few levels a bucket, without bias.

Alistarh, Grubic, Li, Tomioka & Vojnovic 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", §3.1 and §5: consecutive elements make a bucket, scaled by the largest magnitude in it, as in the paper's
experiments (never more variance than scaling by the norm). With b bits there are 2s + 1 levels −s … s, s = 2^(b−1) − 1,
a step h = max|x| / s apart, and

    x ↦ h · ⌊x/h + u⌋,   u uniform on [0, 1),

whose mean is x and whose error is below h. u has 16 bits, and so the mean is right to 2⁻¹⁶ h.

Work goes by blocks that stay in a core's second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from strategies.compression.codes import Bits, pack_codes, packed_size, unpack_codes
from strategies.compression.entropy import Codec, Reader, deflate, most_bytes
from strategies.update import Vector
from strategies.wire import Refused

Levels = NDArray[np.int8]
"""Whole numbers from −s to s."""

Thresholds = Callable[[NDArray[np.uint16]], None]
"""Fills an array with uniform whole numbers below 2¹⁶."""

_BLOCK: Final = 1 << 16
"""Elements at a time."""
_HAIR: Final = np.float32(1 + 2.0**-20)
"""A step is longer by this than max|x| / s, so that rounding to float32 never lifts an element past level s."""
_LEAST: Final = np.float32(1e-30)
"""Buckets whose step is below count as zeros: its inverse must be a float32."""


def most_level(bits: Bits) -> int:
    """S."""
    return int((1 << (bits - 1)) - 1)


def buckets(size: int, bucket: int) -> int:
    """Of so many elements, the last one perhaps shorter."""
    return -(-size // bucket)


def quantize(
    vector: Vector, bits: Bits, bucket: int, thresholds: Thresholds
) -> tuple[Vector, Levels]:
    """Steps h by bucket, (⌈d / bucket⌉,) float32, and levels by element, (d,) int8.

    A bucket that holds a NaN or an infinity gets the step NaN.
    """
    size = len(vector)
    steps, levels = np.empty(buckets(size, bucket), np.float32), np.empty(size, np.int8)
    blocks = _blocks(size, bucket)
    longest = max((end - begin for begin, end, *_ in blocks), default=0)
    # Made once: an array of this size is fresh pages from the system, which cost more than what is done with them.
    scaled, drawn = np.empty(longest, np.float32), np.empty(longest, "<u2")
    fixed = np.empty((2, longest), np.int32)
    for begin, end, first, last, shape in blocks:
        block, count = vector[begin:end].reshape(shape), end - begin
        inverse = _measure(block, steps[first:last], bits)
        # Numpy's own product by a column goes through a buffer for rows below 8192 elements.
        np.einsum("ij,i->ij", block, inverse, out=scaled[:count].reshape(shape))
        level, random = fixed[:, :count]
        with np.errstate(invalid="ignore"):  # what is not finite gets some level, its bucket a NaN
            np.copyto(level, scaled[:count], casting="unsafe")
        thresholds(drawn[:count])
        np.copyto(random, drawn[:count])
        level += random
        level >>= 16
        np.copyto(levels[begin:end], level, casting="unsafe")
    return steps, levels


def dequantize(steps: Vector, levels: Levels, bucket: int) -> Vector:
    """Step times level by element, (d,) float32: infinite where that is past float32."""
    vector = np.empty(len(levels), np.float32)
    with np.errstate(over="ignore"):
        for begin, end, first, last, shape in _blocks(len(levels), bucket):
            block = vector[begin:end]
            np.copyto(block, levels[begin:end])
            block.reshape(shape)[...] *= steps[first:last, None]
    return vector


def _blocks(size: int, bucket: int) -> list[tuple[int, int, int, int, tuple[int, int]]]:
    """Begin and end of each block, its first and last bucket, and its shape; a shorter bucket is a block of its own."""
    whole, rows = size // bucket, max(1, _BLOCK // bucket)
    blocks = []
    for first in range(0, whole, rows):
        last = min(first + rows, whole)
        blocks.append((first * bucket, last * bucket, first, last, (last - first, bucket)))
    if size % bucket:
        blocks.append((whole * bucket, size, whole, whole + 1, (1, size % bucket)))
    return blocks


def _measure(block: Vector, steps: Vector, bits: Bits) -> Vector:
    """Fills the steps of a block (buckets, bucket) in; 2¹⁶ over each of them, and 0 where a step is 0 or NaN."""
    np.maximum(block.max(axis=1), -block.min(axis=1), out=steps)  # a NaN wins both
    with np.errstate(invalid="ignore", over="ignore"):
        steps *= _HAIR / np.float32(most_level(bits))
    steps[~np.isfinite(steps)] = np.nan
    steps[steps < _LEAST] = 0
    return np.divide(np.float32(2**16), steps, out=np.zeros_like(steps), where=steps > 0)


def pack_levels(
    vector: Vector, bits: Bits, bucket: int, thresholds: Thresholds, codec: Codec
) -> bytes:
    """A (d,) vector, quantised: 4 bytes a bucket and at most `bits` bits an element, but for a few bytes."""
    steps, levels = quantize(vector, bits, bucket, thresholds)
    if bits < 8:
        levels += np.int8(most_level(bits))
    return steps.astype("<f4").tobytes() + deflate(pack_codes(levels.view(np.uint8), bits), codec)


def unpack_levels(
    data: bytes | memoryview, size: int, bits: Bits, bucket: int, codec: Codec
) -> Vector:
    """The (size,) vector.

    Raises:
        Refused: `not_finite`, where the client's vector was so; `malformed`, for anything that is not so written.
    """
    reader, packed, most = Reader(data), packed_size(size, bits), most_level(bits)
    steps = reader.take(4 * buckets(size, bucket)).view("<f4").astype(np.float32, copy=False)
    levels = unpack_codes(reader.stream(packed, packed, codec), size, bits).view(np.int8)
    reader.close()
    if not np.isfinite(steps).all():
        raise Refused("not_finite", "a bucket held NaN or an infinity")
    if bits < 8:
        levels = levels - np.int8(most)
    # Codes of fewer than 8 bits begin with level −s.
    extreme = levels.min(initial=0) if bits == 8 else -levels.max(initial=0)
    if extreme < -most or (steps < 0).any():
        raise Refused("malformed", "a step is negative, or a level beyond the largest")
    return dequantize(steps, levels, bucket)


def most_level_bytes(size: int, bits: Bits, bucket: int, codec: Codec) -> int:
    """The most bytes that so many elements can take."""
    return 4 * buckets(size, bucket) + most_bytes(packed_size(size, bits), codec)
