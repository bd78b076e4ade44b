"""Ascending coordinates as bytes: the gaps between them.

k of d coordinates are one of C(d, k) sets, so no code needs less than log₂ C(d, k) / k bits each on average, 8.1 at 1%.
Gaps between random coordinates are nearly geometric, and a geometric variable written as digits "255 and more to come"
and a rest below 255 loses nothing by it: what is left after 255 is distributed as before. An entropy coder then comes
within a few hundredths of a bit of the bound, and below it where coordinates keep company, as those of one layer do.

Where gaps are long, their lowest bits are as good as random and travel as they are.
"""

from __future__ import annotations

import numpy as np

from strategies.compression.codes import Bits, pack_codes, packed_size, unpack_codes
from strategies.compression.entropy import Codec, Reader, deflate, most_bytes
from strategies.compression.selection import Indices
from strategies.wire import Refused

_MORE = 255
"""The digit that says: as many, and more to come."""


def pack_indices(indices: Indices, size: int, codec: Codec) -> bytes:
    """K ascending coordinates below `size`."""
    bits = _low_bits(len(indices), size)
    gaps = np.diff(indices, prepend=-1) - 1
    high = gaps if bits is None else gaps >> bits
    ends = np.cumsum(high // _MORE + 1) - 1
    digits = np.full(ends[-1] + 1 if len(ends) else 0, _MORE, np.uint8)
    digits[ends] = high % _MORE
    stream = deflate(digits, codec)
    if bits is None:
        return stream
    low = (gaps & ((1 << bits) - 1)).astype(np.uint8)
    return stream + pack_codes(low, bits).tobytes()


def unpack_indices(reader: Reader, count: int, size: int, codec: Codec) -> Indices:
    """`count` ascending coordinates below `size`; raises `Refused` (`malformed`) where there are none such."""
    bits = _low_bits(count, size)
    digits = reader.stream(count, _most_digits(count, size), codec)
    ends = np.flatnonzero(digits != _MORE)
    if len(ends) != count or (count and ends[-1] + 1 != len(digits)):
        raise Refused("malformed", f"{len(ends)} coordinates came, {count} were announced")
    gaps = np.diff(np.cumsum(digits, dtype=np.int64)[ends], prepend=0)
    if bits is not None:
        low = unpack_codes(reader.take(packed_size(count, bits)), count, bits)
        gaps = (gaps << bits) | low
    indices = np.cumsum(gaps + 1) - 1
    if count and indices[-1] >= size:
        raise Refused("malformed", f"coordinate {indices[-1]} of {size}")
    return indices


def most_index_bytes(count: int, size: int, codec: Codec) -> int:
    """The most bytes that so many coordinates can take."""
    bits = _low_bits(count, size)
    low = 0 if bits is None else packed_size(count, bits)
    return most_bytes(_most_digits(count, size), codec) + low


def _most_digits(count: int, size: int) -> int:
    """One a coordinate, and one for each 255 steps of all gaps, which are no more than `size` together."""
    return count + (size >> (_low_bits(count, size) or 0)) // _MORE


def _low_bits(count: int, size: int) -> Bits | None:
    """How many low bits of each gap travel as they are, None for none; both ends know it from the numbers."""
    mean = size / max(count, 1)
    return None if mean < 2**8 else 4 if mean < 2**12 else 8
