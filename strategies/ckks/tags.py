"""Tags by which a client knows that a sum of ciphertexts is the sum of certain clients' uploads, and of nothing else.

CKKS is malleable: without the key anybody can multiply a ciphertext by k, add a constant or a multiple of the secret
key's own coefficients, and what is decrypted then tells of one client, or of the key. A count of members inside the
ciphertext is no help: k times one client's ciphertext counts k. So each upload c_i ∈ Z_q^m has a tag that adds up as
ciphertexts do,

    t_i = ⟨r, c_i⟩ + p_i mod q,

where r ∈ {0 … 2^32 − 1}^m and p_i ∈ Z_q follow from the shared key: r from the session, p_i from session, client and a
nonce (a Wegman-Carter authenticator that is linear in the message; Agrawal and Boneh 2009, "Homomorphic MACs"). Two
independent tags are taken. The server, which lacks the key, sees r only through pads that are used once, and passes
off another vector, or other members, with probability at most 2^-64 an attempt.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from strategies.ckks.key import SharedKey
from strategies.ckks.streams import Residues

NONCE_BYTES: Final = 16
TAG_BYTES: Final = 16
_TAGS: Final = 2
_LIMB_BITS: Final = 20
_BLOCK: Final = 4096
"""Products of a limb and 32 bits that fit in 64 bits together."""


@dataclass(frozen=True)
class Member:
    """One client's part of a sum, as its tag knows it.

    Attributes:
        client: its logical id.
        nonce: 16 bytes that it drew for this upload.
    """

    client: int
    nonce: bytes


def keystream(key: bytes, length: int) -> bytes:
    """That many bytes of ChaCha20 under a key of 32 bytes that is used for nothing else."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(length))


class Tagger:
    """Makes and checks tags within one session.

    Args:
        key: that the clients share.
        session: whatever an upload belongs to: session, model, sizes.
        modulus: q.
    """

    def __init__(self, key: SharedKey, session: bytes, modulus: int) -> None:
        self._modulus = modulus
        self._pads = key.derive("tag pads", session)
        self._weights = [key.derive(f"tag weights {index}", session) for index in range(_TAGS)]

    def tag(self, residues: Residues, member: Member) -> bytes:
        """The tag of one upload, residues (ciphertexts, 2, N)."""
        return _packed(
            (product + pad) % self._modulus
            for product, pad in zip(self._products(residues), self._pad(member), strict=True)
        )

    def verify(self, residues: Residues, members: Sequence[Member], tag: bytes) -> bool:
        """Whether residues (ciphertexts, 2, N) are the sum of exactly these members' uploads, one of each client."""
        if len({member.client for member in members}) < len(members) or len(tag) != TAG_BYTES:
            return False
        totals = self._products(residues)
        for member in members:
            totals = [total + pad for total, pad in zip(totals, self._pad(member), strict=True)]
        return hmac.compare_digest(tag, _packed(total % self._modulus for total in totals))

    def _pad(self, member: Member) -> list[int]:
        message = member.client.to_bytes(8, "little", signed=True) + member.nonce
        digest = hmac.digest(self._pads, message, "sha512")
        return [int.from_bytes(digest[start : start + 32], "little") for start in (0, 32)]

    def _products(self, residues: Residues) -> list[int]:
        flat = residues.reshape(-1)
        limbs = [_limb(flat, index) for index in range(3)]
        return [self._product(limbs, key) for key in self._weights]

    def _product(self, limbs: Sequence[NDArray[np.uint64]], key: bytes) -> int:
        """⟨r, c⟩ as a whole number, r from a key and c by its limbs."""
        length = len(limbs[0])
        weights = np.frombuffer(keystream(key, 4 * length), "<u4").astype(np.uint64)
        total = 0
        for index, limb in enumerate(limbs):
            sums = np.einsum(
                "ij,ij->i", weights.reshape(-1, _BLOCK), limb.reshape(-1, _BLOCK)
            )  # exact: each is below 2^52 · 4096
            total += sum(map(int, sums)) << (index * _LIMB_BITS)
        return total


def add_tags(first: bytes, second: bytes, modulus: int) -> bytes:
    """The tag of a sum: the server's part, which needs no key."""
    ours, theirs = struct.unpack("<2Q", first), struct.unpack("<2Q", second)
    return _packed((a + b) % modulus for a, b in zip(ours, theirs, strict=True))


def _limb(flat: NDArray[np.uint64], index: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(index * _LIMB_BITS), np.uint64((1 << _LIMB_BITS) - 1)
    return (flat >> shift) & mask


def _packed(tags: object) -> bytes:
    return struct.pack("<2Q", *tags)  # type: ignore[misc]
