"""Masks: keys of 32 bytes, stretched to vectors of integers modulo 2³² that look uniform without the key.

The keystream of AES-256-GCM (NIST SP 800-38D) or of ChaCha20 (RFC 8439), read as little-endian 32-bit integers. The
nonce is zero: a key is derived for one mask and used for nothing else, so no two streams share both key and nonce.

GCM's keystream is AES in counter mode from block 2. It is taken from GCM, whose tag nobody asks for, because masks
took a fifth less time than by OpenSSL 4.0's plain counter mode where the processor has wide AES instructions;
without these it may be the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from strategies.secagg.keys import KEY_BYTES

BLOCK = 1 << 15
"""Integers at a time: the vector's block, the keystream and the zeros it is made of are 384 KiB, in a core's L2."""

ZEROS = memoryview(bytes(4 * BLOCK))
"""What a keystream encrypts: a slice of them into a block's bytes, by `update_into`, gives the next integers."""

CipherName = Literal["aes", "chacha"]


def keystream(key: bytes, cipher: CipherName = "aes") -> CipherContext:
    """One key's sequence of uniform bytes, from its beginning.

    Raises:
        ValueError: a key that is not 32 bytes, or a cipher that is none of the two.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mask's key is {KEY_BYTES} bytes long, this one {len(key)}")
    match cipher:
        case "aes":
            return Cipher(algorithms.AES256(key), modes.GCM(bytes(12))).encryptor()
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
    added = [keystream(key, cipher) for key in plus]
    taken = [keystream(key, cipher) for key in minus]
    buffer = np.empty(min(BLOCK, len(vector)), "<u4")
    for begin in range(0, len(vector), BLOCK):
        block = vector[begin : begin + BLOCK]
        mask = buffer[: len(block)]
        zeros, into = ZEROS[: mask.nbytes], mask.view(np.uint8).data
        for stream in added:
            stream.update_into(zeros, into)
            np.add(block, mask, out=block)
        for stream in taken:
            stream.update_into(zeros, into)
            np.subtract(block, mask, out=block)
