"""The difference of two models on their grids, in few bytes and back: exact, and hostile bytes are refused.

Each array's difference is whole numbers, small ones when the models are close. They are folded to 0, 1, 2, … for 0, −1,
1, … (zigzag), and written as planes: the lowest bytes of all numbers, then the second lowest of the arrays that need
two, and so on, each plane compressed by itself. Higher planes are nearly all zeros and cost little, so that a few large
numbers need no escape. On runs of a small CNN it all comes to 5 to 8% more than the numbers' entropy.

    widths[i]      bytes that array i's numbers need, 0 to 4
    exponents[i]   of the grid that they count in
    planes[p]      byte p of each number of each array with widths[i] > p, in the arrays' order, compressed

So the size of each plane is known before a byte of it is inflated.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import zstandard
from numpy.typing import NDArray

from strategies.downlink.grid import LEAST, OF_ZEROS, Array, from_multiples, multiples
from strategies.wire import Refused

Codec = Literal["zstd", "zlib"]
REASON: Final = "held"
"""The word by which a client refuses what it can't restore: the server then sends the whole model."""

MOST_PLANES: Final = 4
"""Bytes of the largest number: what needs more is sent whole."""
_ZSTD_LEVEL: Final = 3
"""The highest saves 1 to 3% more."""


@dataclass(frozen=True)
class Packed:
    """A difference as it travels.

    Attributes:
        codec: what compressed the planes.
        exponents: one an array.
        widths: one an array.
        planes: compressed; as many as the largest width.
    """

    codec: str
    exponents: tuple[int, ...]
    widths: tuple[int, ...]
    planes: tuple[bytes, ...]


def pack(
    base: Mapping[str, Array],
    target: Mapping[str, Array],
    exponents: Sequence[int],
    codec: Codec = "zstd",
) -> Packed | None:
    """The difference target − base; None where an array's has no such form.

    Args:
        base: arrays by name.
        target: the same names, shapes and dtypes, in the same order.
        exponents: for each array, of a grid that both versions lie on.
        codec: what compresses the planes.
    """
    widths: list[int] = []
    parts: list[list[NDArray[np.uint8]]] = [[] for _ in range(MOST_PLANES)]
    for name, exponent in zip(target, exponents, strict=True):
        before, after = multiples(base[name], exponent), multiples(target[name], exponent)
        if before is None or after is None:
            return None
        folded = _folded(after - before)
        width = (int(folded.max(initial=0)).bit_length() + 7) // 8
        if width > MOST_PLANES:
            return None
        widths.append(width)
        octets = folded.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
        for plane in range(width):
            parts[plane].append(octets[:, plane])
    planes = tuple(_compressed(codec, np.concatenate(part).tobytes()) for part in parts if part)
    return Packed(codec, tuple(exponents), tuple(widths), planes)


def unpack(base: Mapping[str, Array], packed: Packed, *, back: bool = False) -> dict[str, Array]:
    """The model that the change makes of `base`; with `back` the one that it makes `base` of.

    Allocates no more than 8 bytes an element of one array, and 4 an element of the model, beside the result.

    Raises:
        Refused: `held`, for what no `pack` with this base has made.
    """
    arrays = list(base.values())
    _check(packed, len(arrays))
    sizes = [array.size for array in arrays]
    planes = [
        _inflated(
            packed.codec,
            data,
            sum(size for size, width in zip(sizes, packed.widths, strict=True) if width > plane),
        )
        for plane, data in enumerate(packed.planes)
    ]
    taken = [0] * len(planes)
    restored: dict[str, Array] = {}
    for (name, array), exponent, width in zip(
        base.items(), packed.exponents, packed.widths, strict=True
    ):
        before = multiples(array, exponent)
        if before is None:
            raise Refused(REASON, f"array {name!r:.80} does not lie on the grid 2^{exponent}")
        octets = np.zeros((array.size, 8), np.uint8)
        for plane in range(width):
            begin = taken[plane]
            octets[:, plane] = planes[plane][begin : begin + array.size]
            taken[plane] += array.size
        change = _unfolded(octets.view("<u8").ravel())
        restored[name] = from_multiples(
            before - change if back else before + change, exponent, array
        )
    return restored


def _check(packed: Packed, arrays: int) -> None:
    if packed.codec not in get_args(Codec):
        raise Refused(REASON, f"the codec {packed.codec!r:.40} is unknown")
    if len(packed.widths) != arrays or len(packed.exponents) != arrays:
        raise Refused(REASON, f"{len(packed.widths)} arrays came, the held model has {arrays}")
    if max(packed.widths, default=0) != len(packed.planes) or len(packed.planes) > MOST_PLANES:
        raise Refused(REASON, f"{len(packed.planes)} planes are not what the widths ask for")
    if any(not LEAST <= exponent <= OF_ZEROS for exponent in packed.exponents):
        raise Refused(REASON, "an exponent is out of float64's range")


def _folded(whole: NDArray[np.int64]) -> NDArray[np.uint64]:
    """0, −1, 1, −2, … as 0, 1, 2, 3, …: small numbers are small whatever their sign."""
    return ((whole << 1) ^ (whole >> 63)).view(np.uint64)


def _unfolded(folded: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (folded >> np.uint64(1)).view(np.int64) ^ -(folded & np.uint64(1)).view(np.int64)


def _compressed(codec: Codec, data: bytes) -> bytes:
    if codec == "zlib":
        return zlib.compress(data)
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)


def _inflated(codec: str, data: bytes, size: int) -> NDArray[np.uint8]:
    """Exactly `size` bytes; what says that it holds more, or does, is refused before it is made."""
    if len(data) > size + size // 64 + 64:
        raise Refused(REASON, f"{len(data)} bytes are too many for a plane of {size}")
    try:
        plain = _unzipped(data, size) if codec == "zlib" else _unframed(data, size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise Refused(REASON, f"a plane can't be inflated: {error!s:.100}") from error
    if len(plain) != size:
        raise Refused(REASON, f"a plane holds {len(plain)} bytes, {size} are its arrays'")
    return np.frombuffer(plain, np.uint8)


def _unzipped(data: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    plain = stream.decompress(data, size + 1)
    if not stream.eof or stream.unused_data:
        raise Refused(REASON, f"a plane does not end after {size} bytes")
    return plain


def _unframed(data: bytes, size: int) -> bytes:
    # The frame says how much it holds, and zstandard believes it: asked before it is opened.
    declared = zstandard.get_frame_parameters(data).content_size
    if declared != size:
        raise Refused(
            REASON, f"a plane says that it holds {declared} bytes, {size} are its arrays'"
        )
    opened = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    return opened.decompress(data, max_output_size=size, allow_extra_data=False)
