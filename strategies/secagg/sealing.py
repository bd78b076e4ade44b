"""Messages that the server carries and must not read or change: ChaCha20-Poly1305 (RFC 8439).

The nonce is zero, so a key seals ONE message: derive it with a `context` that names sender, receiver, round and
purpose.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

OVERHEAD = 16
"""Bytes that sealing adds: the tag."""

_NONCE = bytes(12)


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Encrypts the plaintext, and authenticates it together with `associated`, which is not sent.

    Args:
        key: 32 bytes, for this message only.
        plaintext: what only the owner of the key may read.
        associated: what both sides know, such as the `context` of the message.

    Raises:
        ValueError: a key of another length.
    """
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """The plaintext of what `seal` gave.

    Raises:
        ValueError: the key, the message or `associated` is another one; or a key of another length.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, associated)
    except InvalidTag as error:
        raise ValueError(
            f"a sealed message of {len(sealed)} bytes does not open: changed on its way, or meant for another"
        ) from error
