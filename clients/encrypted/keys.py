"""The secret key of encrypted training: made and kept by the data's owner, and never anywhere else.

An owner, or several under one key, encrypt their examples by it once and decrypt mean gradients by it in every round,
so it outlives runs, in a file of its own. From it follow the evaluation keys that a compute party is sent: one for
products and one for each automorphism that the program needs, no more. They are encryptions of s² and of automorphisms
of s under s itself, and safe by the assumption of circular security that CKKS makes (Cheon, Kim, Kim and Song 2017,
"Homomorphic Encryption for Arithmetic of Approximate Numbers").

Nothing here knows a model, a ciphertext of data, or the wire.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from clients.encrypted.key_frames import (
    FINGERPRINT_BYTES,
    EvaluationKeys,
    KeyFrames,
    checked_elements,
)
from clients.encrypted.ring import MOST_BITS, Ring, in_range
from strategies import secret_file
from strategies.ckks import KeyFileError, SecretKeyError
from strategies.ckks import public_only as no_private_context
from strategies.ckks.streams import Frames, Residues, scratch

_MAGIC: Final = b"trellis-encrypted-1\n"
_SHAPE: Final = struct.Struct("<IB")  # degree, number of primes; then a byte a prime, its bits
_DIGEST_BYTES: Final = 32
_MOST_PRIMES: Final = max(MOST_BITS.values()) // 30
_LARGEST: Final = (
    len(_MAGIC) + _SHAPE.size + _MOST_PRIMES * (1 + 8 * max(MOST_BITS)) + _DIGEST_BYTES
)


class OwnerKeys:
    """SEAL's secret key for a ring, and what is derived from it. Whoever has it can read all that it encrypts.

    Args:
        ring: of the key.
        residues: the key's polynomial (primes, N) in NTT form.

    Raises:
        ValueError: that is no key of the ring.
    """

    def __init__(self, ring: Ring, residues: Residues) -> None:
        if residues.shape != (len(ring.bits), ring.degree):
            raise ValueError(f"a key of shape {residues.shape} is none of {ring}")
        in_range(residues, ring, "secret key")
        self.ring = ring
        self._residues = residues.copy()

    @classmethod
    def generate(cls, ring: Ring) -> OwnerKeys:
        """A new key from the operating system's entropy."""
        key = ring.seal.KeyGenerator(ring.context).secret_key()
        with scratch() as file:
            residues = Frames(ring.seal, file).plain_residues(key, len(ring.bits), ring.degree)
            file.write(b"")
        return cls(ring, residues)

    @classmethod
    def load(cls, path: Path) -> OwnerKeys:
        """Reads a key's file.

        Raises:
            KeyFileError: there is none, others can read it, or it holds no key.
        """
        mend = "`trellis keys encrypted FILE` makes one"
        try:
            return cls._parse(secret_file.load(path, _LARGEST))
        except OSError as error:
            raise KeyFileError(
                f"cannot read the owner's key {path}: {error.strerror}; {mend}"
            ) from error
        except secret_file.ReadableError as error:
            raise KeyFileError(f"an owner's key must be its owner's alone: {error}") from error
        except ValueError as error:
            raise KeyFileError(f"{path} holds no owner's key: {error}; {mend}") from error

    @classmethod
    def load_or_make(cls, path: Path, ring: Ring) -> OwnerKeys:
        """The key of a file, made where there is none: once, whoever else asks for it at the same time.

        Raises:
            KeyFileError: as `load`; or the file holds a key of another ring.
            OSError: as `save`.
        """
        secret_file.make_once(path, lambda: cls.generate(ring).save(path))
        return cls.load_for(path, ring)

    @classmethod
    def load_for(cls, path: Path, ring: Ring) -> OwnerKeys:
        """The key of a file, for a ring.

        Raises:
            KeyFileError: as `load`; or the file holds a key of another ring.
        """
        keys = cls.load(path)
        if keys.ring != ring:
            bits = ",".join(map(str, ring.bits))
            raise KeyFileError(
                f"{path} holds a key of degree {keys.ring.degree} and bits {list(keys.ring.bits)}, and the run's ring"
                f" is another: name one made by `trellis keys encrypted FILE --degree {ring.degree} --bits {bits}`"
            )
        return keys

    @classmethod
    def _parse(cls, data: bytes) -> OwnerKeys:
        head = len(_MAGIC) + _SHAPE.size
        if len(data) < head or not data.startswith(_MAGIC):
            raise ValueError("it does not begin as one")
        degree, primes = _SHAPE.unpack_from(data, len(_MAGIC))
        if degree not in MOST_BITS or primes > _MOST_PRIMES:
            raise ValueError(f"degree {degree} with {primes} primes is none of ours")
        wanted = head + primes + 8 * primes * degree + _DIGEST_BYTES
        if len(data) != wanted:
            raise ValueError(f"{len(data)} bytes are not the {wanted} of one")
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("it was altered: its checksum is another")
        ring = Ring(degree, tuple(body[head : head + primes]))
        residues = np.frombuffer(body, "<u8", offset=head + primes).reshape(primes, degree)
        return cls(ring, residues)

    def save(self, path: Path) -> None:
        """Writes the key's file: mode 0600, whole or not at all, never over another one.

        Raises:
            FileExistsError: there is such a file.
            OSError: the folder can't be written.
        """
        bits = bytes(self.ring.bits)
        body = _MAGIC + _SHAPE.pack(self.ring.degree, len(bits)) + bits
        body += self._residues.astype("<u8", copy=False).tobytes()
        secret_file.save(path, body + hashlib.sha256(body).digest())

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits by which keys, and what they encrypt, are told apart; they don't reveal the key."""
        return self.derive("fingerprint", length=FINGERPRINT_BYTES).hex()

    def derive(self, purpose: str, context: bytes = b"", length: int = 32) -> bytes:
        """Bytes for one purpose and context, independent of those for others (HKDF-SHA256, RFC 5869)."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = f"trellis encrypted {purpose}\0".encode() + context
        return HKDF(SHA256(), length, salt=None, info=info).derive(self._residues.tobytes())

    def evaluation(self, galois_elements: Sequence[int]) -> EvaluationKeys:
        """New evaluation keys, for products and for exactly these automorphisms X → X^g.

        Raises:
            ValueError: an element is no automorphism of the ring.
        """
        ring, elements = self.ring, checked_elements(self.ring, galois_elements)
        generator = ring.seal.KeyGenerator(ring.context, self.seal_key())
        with scratch() as file:
            first, seeds = KeyFrames(ring, file, None).read(generator.create_relin_keys())
            if elements:
                theirs = generator.create_galois_keys(list(elements))
                galois, galois_seeds = KeyFrames(ring, file, elements).read(theirs)
                first = np.concatenate([first, galois])
                seeds = np.concatenate([seeds, galois_seeds])
        return EvaluationKeys(self.fingerprint, elements, first, seeds)

    def seal_key(self) -> Any:
        """SEAL's own object.

        Raises:
            ValueError: SEAL refuses it.
        """
        ring, key = self.ring, self.ring.seal.SecretKey()
        with scratch() as file:
            identity = ring.identity(len(ring.bits))
            data = Frames(ring.seal, file).plaintext(identity, self._residues, 1.0)
            try:
                key.load(ring.context, file.write(data))
            except (RuntimeError, IndexError) as error:
                raise ValueError(f"SEAL refuses a secret key: {error}") from error
            finally:
                file.write(b"")
        return key

    def has_secret_key(self) -> bool:
        """True: by this name whoever must have no secret key asks of what it is handed."""
        return True

    def __repr__(self) -> str:
        return f"OwnerKeys(ring={self.ring}, fingerprint={self.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("an owner's key is kept in its own file and never pickled")


def public_only(handed: Any) -> None:
    """Refuses what holds a secret key: an owner's, a key of encrypted sums, a `tenseal.Context`, or SEAL's own objects.

    For a compute party that is built by hand.

    Raises:
        SecretKeyError: it does.
    """
    if _is_secret(handed):
        raise SecretKeyError(
            "a compute party must not hold the owner's secret key: with it, it could read the data that it trains on;"
            " hand it what OwnerKeys.evaluation gives"
        )
    no_private_context(handed)


def _is_secret(handed: Any) -> bool:
    if isinstance(handed, bytes | bytearray | memoryview):
        return bytes(handed[: len(_MAGIC)]) == _MAGIC
    from tenseal import sealapi as seal

    return isinstance(handed, OwnerKeys | seal.SecretKey | seal.KeyGenerator | seal.Decryptor)
