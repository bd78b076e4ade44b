"""Small whole numbers, several to a byte."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strategies.compression.entropy import Bytes
from strategies.wire import Refused

Bits = Literal[2, 4, 8]
"""Of one number."""

_WORD = {2: "<u4", 4: "<u2"}
"""One code a byte, as many as go into one packed byte."""
_SHIFTS = {2: (6, 12, 18), 4: (4,)}
"""From the place of the second code in a word to that in a byte, of the third, and so on."""
_MASK = {2: 0x03030303, 4: 0x0F0F}


def packed_size(count: int, bits: Bits) -> int:
    """Bytes of so many codes."""
    return -(-count * bits // 8)


def pack_codes(codes: NDArray[np.uint8], bits: Bits) -> Bytes:
    """Codes below 2^bits, the first in the lowest bits of the first byte; bits 2, 4 or 8."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    padded = codes
    if len(codes) % per_byte:
        padded = np.zeros(packed_size(len(codes), bits) * per_byte, np.uint8)
        padded[: len(codes)] = codes
    words = padded.view(_WORD[bits])
    joined = words.copy()
    for shift in _SHIFTS[bits]:
        joined |= words >> shift
    return joined.astype(np.uint8)


def unpack_codes(data: Bytes, count: int, bits: Bits) -> NDArray[np.uint8]:
    """The inverse of `pack_codes`.

    Args:
        data: `packed_size(count, bits)` bytes.
        count: of the codes.
        bits: 2, 4 or 8.

    Raises:
        Refused: `malformed`, where what fills the last byte up is not 0.
    """
    if bits == 8:
        return data
    words = data.astype(_WORD[bits])
    spread = words.copy()
    for shift in _SHIFTS[bits]:
        spread |= words << shift
    spread &= _MASK[bits]
    codes: NDArray[np.uint8] = spread.view(np.uint8)
    if codes[count:].any():
        raise Refused("malformed", "the last byte is filled up with something")
    return codes[:count]
