"""Masks: keys of 32 bytes, stretched to vectors of integers modulo 2³² that look uniform without the key.

The keystream of AES-256 in counter mode (NIST SP 800-38A, AES instructions of the processor) or of ChaCha20 (RFC 8439),
read as little-endian 32-bit integers. The nonce is zero: a key is derived for one mask and used for nothing else, so no
two streams share both key and nonce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from strategies.secagg.keys import KEY_BYTES

BLOCK = 1 << 14
"""Integers at a time: the vector's block, the keystream and the zeros it is made of are 192 KiB, in a core's L2."""

_ZEROS = memoryview(bytes(4 * BLOCK))

CipherName = Literal["aes", "chacha"]


class Keystream:
    """One key's endless sequence of uniform integers modulo 2³².

    Raises:
        ValueError: a key that is not 32 bytes, or a cipher that is none of the two.
    """

    def __init__(self, key: bytes, cipher: CipherName = "aes") -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a mask's key is {KEY_BYTES} bytes long, this one {len(key)}")
        self._encryptor = _encryptor(key, cipher)

    def fill(self, words: NDArray[np.uint32]) -> None:
        """Overwrites the (≤ BLOCK,) contiguous little-endian words with the next of the sequence."""
        self._encryptor.update_into(_ZEROS[: words.nbytes], words.view(np.uint8).data)


def _encryptor(key: bytes, cipher: CipherName) -> CipherContext:
    match cipher:
        case "aes":
            return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        case "chacha":  # 4 bytes of counter, 12 of nonce
            return Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    raise ValueError(f"cipher {cipher!r}: choose 'aes' or 'chacha'")


def add_masks(
    vector: NDArray[np.uint32],
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    *,
    cipher: CipherName = "aes",
) -> None:
    """Adds the masks of the keys `plus` to a (d,) vector and takes those of `minus` off, in place, modulo 2³².

    All masks of one block before the next block: the vector passes through memory once, however many masks there are.

    Raises:
        ValueError: a key that is not 32 bytes, or a cipher that is none of the two.
        TypeError: the vector is not of uint32.
    """
    if vector.dtype != np.uint32:
        raise TypeError(f"masks are added modulo 2³²: the vector is {vector.dtype}, not uint32")
    added = [Keystream(key, cipher) for key in plus]
    taken = [Keystream(key, cipher) for key in minus]
    buffer = np.empty(min(BLOCK, len(vector)), "<u4")
    for begin in range(0, len(vector), BLOCK):
        block = vector[begin : begin + BLOCK]
        mask = buffer[: len(block)]
        for stream in added:
            stream.fill(mask)
            block += mask
        for stream in taken:
            stream.fill(mask)
            block -= mask
