"""Keys: agreement over X25519 (RFC 7748), derivation by HKDF-SHA256 (RFC 5869), signatures by Ed25519 (RFC 8032).

Private parts are raw bytes, so that they can be shared out (`shamir`), and are never shown by `repr`. They are Python
objects: that they are erased from memory is not claimed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
"""Length of every key here, private, public, agreed or derived."""

_VERSION = b"trellis-secagg-1"


def context(purpose: str, /, **fields: bytes | int | str) -> bytes:
    """What a key, a sealed message or a signature is for, as bytes: no two purposes or sets of fields give the same.

    The order in which fields are named does not matter; 1, "1" and b"1" differ.

    Raises:
        TypeError: a field of another type.
    """
    parts = [_VERSION, purpose.encode()]
    for name in sorted(fields):
        parts += [name.encode(), _tagged(name, fields[name])]
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def _tagged(name: str, value: bytes | int | str) -> bytes:
    match value:
        case bytes():
            return b"b" + value
        case str():
            return b"s" + value.encode()
        case int():
            return b"i" + str(int(value)).encode()
    raise TypeError(f"field {name} is a {type(value).__name__}: bytes, int or str are encoded")


def derive(key: bytes, info: bytes) -> bytes:
    """A 32-byte key for one purpose from a secret, by HKDF-SHA256 without salt; `info` is a `context`."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(key)


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair, 32 raw bytes each."""

    private: bytes = field(repr=False)
    public: bytes
    _key: X25519PrivateKey = field(repr=False, compare=False)
    """Kept, since reading it from its bytes costs as much as an agreement."""

    @classmethod
    def generate(cls) -> KeyPair:
        """A new pair from the operating system's entropy."""
        return cls._of(X25519PrivateKey.generate())

    @classmethod
    def from_private(cls, private: bytes) -> KeyPair:
        """The pair of a private key.

        Raises:
            ValueError: not 32 bytes.
        """
        return cls._of(X25519PrivateKey.from_private_bytes(private))

    @classmethod
    def _of(cls, key: X25519PrivateKey) -> KeyPair:
        return cls(key.private_bytes_raw(), key.public_key().public_bytes_raw(), key)

    def agree(self, public: bytes, info: bytes) -> bytes:
        """The 32-byte key that this pair and the owner of `public` have in common for one purpose.

        X25519 has several encodings of one public key, so `info` should name both parties.

        Raises:
            ValueError: `public` is not 32 bytes, or of low order: any pair would agree with it on zero.
        """
        (key,) = self.agree_for(public, info)
        return key

    def agree_for(self, public: bytes, *infos: bytes) -> list[bytes]:
        """A key for each of several purposes out of one agreement, which takes nine times as long as a derivation.

        Raises:
            ValueError: as `agree`.
        """
        theirs = X25519PublicKey.from_public_bytes(public)
        try:
            secret = self._key.exchange(theirs)
        except ValueError as error:
            raise ValueError(
                f"public key {public.hex()} is of low order: no pair has it"
            ) from error
        return [derive(secret, info) for info in infos]


def agree(private: bytes, public: bytes, info: bytes) -> bytes:
    """`KeyPair.agree` for a private key that is used once; for several public keys make the pair first.

    Raises:
        ValueError: as `KeyPair.from_private` and `KeyPair.agree`.
    """
    return KeyPair.from_private(private).agree(public, info)


@dataclass(frozen=True)
class Identity:
    """An Ed25519 key pair that says who somebody is, round after round; 32 raw bytes each."""

    private: bytes = field(repr=False)
    public: bytes

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from the operating system's entropy."""
        return cls._of(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes) -> Identity:
        """Reads what `to_pem` wrote.

        Raises:
            ValueError: no unencrypted PKCS #8 PEM of an Ed25519 key.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except TypeError as error:  # it wants a password
            raise ValueError(f"identity: {error}; write it without a password") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"identity: the PEM holds a {type(key).__name__}; it must be Ed25519")
        return cls._of(key)

    @classmethod
    def _of(cls, key: Ed25519PrivateKey) -> Identity:
        return cls(key.private_bytes_raw(), key.public_key().public_bytes_raw())

    def to_pem(self) -> bytes:
        """PKCS #8 PEM without a password: the file's permissions are what protects it."""
        return Ed25519PrivateKey.from_private_bytes(self.private).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def sign(self, message: bytes) -> bytes:
        """A 64-byte signature; `message` is a `context`, so that it can stand for nothing else."""
        return self._key.sign(message)

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        """Kept, since reading it costs as much as a signature, and a client signs one for each neighbour."""
        return Ed25519PrivateKey.from_private_bytes(self.private)


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the owner of `public` signed `message`; no for a key or a signature that is none."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
