"""The secret key that clients share and the server lacks: made, kept in a file, and read back."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np

from strategies import secret_file
from strategies.ckks.parameters import CkksParameters, ring
from strategies.ckks.streams import Residues, Streams, scratch

_MAGIC: Final = b"trellis-ckks-1\n"
_SHAPE: Final = struct.Struct("<IBBB")  # degree, number of primes, their bits (0 for none)
_LARGEST: Final = len(_MAGIC) + _SHAPE.size + 8 * 8192 * 2


class KeyFileError(ValueError):
    """A key's file can't be used."""


class SharedKey:
    """SEAL's secret key for a ring, and what is derived from it.

    Whoever has it can decrypt every upload of every client that has it.

    Args:
        degree: N.
        bits: of the primes.
        residues: the key's polynomial (primes, N) in SEAL's form.

    Raises:
        ValueError: that is no key of the ring.
    """

    def __init__(self, degree: int, bits: tuple[int, ...], residues: Residues) -> None:
        if residues.shape != (len(bits), degree):
            raise ValueError(f"a key of shape {residues.shape} is none of degree {degree}")
        self.ring = (degree, bits)
        self._residues = residues.copy()
        self.seal_key()

    @classmethod
    def generate(cls, parameters: CkksParameters | None = None) -> SharedKey:
        """A new key from the operating system's entropy."""
        degree, bits = (parameters or CkksParameters()).ring
        theirs = ring(degree, bits)
        key = theirs.seal.KeyGenerator(theirs.context).secret_key()
        with scratch() as file:
            residues = Streams(theirs, degree, file).key_residues(key, len(bits))
            file.write(b"")
        return cls(degree, bits, residues)

    @classmethod
    def load(cls, path: Path) -> SharedKey:
        """Reads a key's file.

        Raises:
            KeyFileError: there is none, others can read it, or it holds no key.
        """
        mend = "make one by `trellis keys ckks FILE` and give every client a copy"
        try:
            return cls._parse(secret_file.load(path, _LARGEST))
        except OSError as error:
            raise KeyFileError(
                f"cannot read the CKKS key {path}: {error.strerror}; {mend}"
            ) from error
        except secret_file.ReadableError as error:
            raise KeyFileError(f"the CKKS key must be the clients' alone: {error}") from error
        except ValueError as error:
            raise KeyFileError(f"{path} holds no CKKS key: {error}; {mend}") from error

    @classmethod
    def load_or_make(cls, path: Path, parameters: CkksParameters) -> SharedKey:
        """The key of a file that is made where there is none, for a machine that plays all clients of a run.

        Raises:
            KeyFileError, OSError: as `load` and `save`.
        """
        secret_file.make_once(path, lambda: cls.generate(parameters).save(path))
        return cls.load(path)

    @classmethod
    def _parse(cls, data: bytes) -> SharedKey:
        head = len(_MAGIC) + _SHAPE.size
        if len(data) < head or not data.startswith(_MAGIC):
            raise ValueError("it does not begin as one")
        degree, primes, *bits = _SHAPE.unpack_from(data, len(_MAGIC))
        if primes not in (1, 2) or degree not in (4096, 8192):
            raise ValueError(f"degree {degree} with {primes} primes is none of ours")
        parameters = CkksParameters(
            degree=cast(Literal[4096, 8192], degree), bits=tuple(bits[:primes])
        )
        if len(data) != head + 8 * primes * degree:
            raise ValueError(f"{len(data)} bytes are not the {head + 8 * primes * degree} of one")
        residues = np.frombuffer(data, "<u8", offset=head).reshape(primes, degree)
        return cls(*parameters.ring, residues)

    def save(self, path: Path) -> None:
        """Writes the key's file: mode 0600, whole or not at all, never over another one.

        Raises:
            FileExistsError: there is such a file.
            OSError: the folder can't be written.
        """
        degree, bits = self.ring
        shape = _SHAPE.pack(degree, len(bits), *(*bits, 0)[:2])
        secret_file.save(path, _MAGIC + shape + self._residues.astype("<u8").tobytes())

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits by which clients with another key are told apart; they don't reveal the key."""
        return self.derive("fingerprint", length=16).hex()

    def derive(self, purpose: str, context: bytes = b"", length: int = 32) -> bytes:
        """Bytes for one purpose and context, independent of those for others (HKDF-SHA256, RFC 5869)."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = f"trellis ckks {purpose}\0".encode() + context
        return HKDF(SHA256(), length, salt=None, info=info).derive(self._residues.tobytes())

    def seal_key(self) -> Any:
        """SEAL's own object.

        Raises:
            ValueError: SEAL refuses it.
        """
        degree, bits = self.ring
        with scratch() as file:
            return Streams(ring(degree, bits), degree, file).load_key(self._residues)

    def __repr__(self) -> str:
        return f"SharedKey(ring={self.ring}, fingerprint={self.fingerprint!r})"

    def __reduce__(self) -> str:
        raise TypeError("a shared key is kept in its own file and never pickled")
