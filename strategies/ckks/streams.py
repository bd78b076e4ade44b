"""SEAL's objects to residues and back, so that no stranger's byte ever reaches SEAL's parsers unchecked.

A ciphertext travels as what is in it and nothing else: residues modulo q, and a seed. How many there are is known
beforehand; degree, level, size, form and scale are our own, and are written into SEAL's stream here. A forged ciphertext of
another level, with three components, or one that inflates to gigabytes therefore can't even be expressed.

sealapi saves to paths only, compressed by Zstandard, and loads from paths: memory behind a file descriptor serves.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from strategies.ckks.parameters import SEED_BYTES, Ring

Residues = NDArray[np.uint64]

_HEADER: Final = struct.Struct("<HBBBBHQ")  # magic, own size, version (2), compression, zero, size
_MAGIC: Final = 0xA15E
_UNCOMPRESSED, _ZSTANDARD = 0, 2
_CIPHERTEXT: Final = struct.Struct("<32sBQQQdQ")  # identity, NTT form, size, N, primes, scale, 1
_PLAINTEXT: Final = struct.Struct("<32sQd")  # identity, coefficients, scale
_COUNT: Final = struct.Struct("<Q")
_BLAKE2XB: Final = 1


class CiphertextError(ValueError):
    """Bytes that are no ciphertext of these parameters."""


class _Saved(Protocol):
    def save(self, path: str) -> None: ...


class Scratch:
    """A file for SEAL to save to and load from, seen by this process only."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._file = path

    def save(self, item: _Saved) -> bytes:
        """What an object's `save` writes."""
        self._file.write_bytes(b"")
        item.save(self.path)
        return self._file.read_bytes()

    def write(self, data: bytes) -> str:
        """The path to load these bytes from."""
        self._file.write_bytes(data)
        return self.path


@contextmanager
def scratch() -> Iterator[Scratch]:
    """A scratch file: in memory where the system has such files, else in a folder that only this user can enter."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory(prefix="trellis-ckks-") as folder:
            yield Scratch(Path(folder) / "scratch")
        return
    descriptor = os.memfd_create("trellis-ckks", os.MFD_CLOEXEC)
    try:
        yield Scratch(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


class Streams:
    """SEAL's streams for one ring and scale.

    Args:
        ring: of keys and ciphertexts.
        degree: N.
        scratch: a file to save to and load from.
        scale: of the ciphertexts; 1 where only keys are read.
    """

    def __init__(self, ring: Ring, degree: int, scratch: Scratch, scale: float = 1.0) -> None:
        self._ring, self._degree, self._scratch, self._scale = ring, degree, scratch, scale
        probe = scratch.save(ring.seal.Plaintext())
        magic, size, self._major, self._minor, *_ = _HEADER.unpack_from(probe)
        if (magic, size) != (_MAGIC, _HEADER.size):
            raise RuntimeError("this TenSEAL writes another format than SEAL 4's")

    def fresh(self, ciphertext: Any) -> tuple[Residues, bytes]:
        """The first component (N,) of a seeded ciphertext, and the seed of its second."""
        template = self._ciphertext(np.zeros(self._degree, np.uint64), bytes(SEED_BYTES))
        data = self._saved(ciphertext, template)
        start = _HEADER.size + _CIPHERTEXT.size + _HEADER.size + _COUNT.size
        end = start + 8 * self._degree
        return np.frombuffer(data, "<u8", self._degree, start), data[end + _HEADER.size + 1 :]

    def whole(self, ciphertext: Any) -> Residues:
        """Both components (2, N) of a ciphertext."""
        template = self._ciphertext(np.zeros(2 * self._degree, np.uint64), b"")
        data = self._saved(ciphertext, template)
        start = _HEADER.size + _CIPHERTEXT.size + _HEADER.size + _COUNT.size
        return np.frombuffer(data, "<u8", 2 * self._degree, start).reshape(2, -1)

    def load(self, residues: Residues, seed: bytes = b"") -> Any:
        """A ciphertext of (N,) residues and a seed, or of (2, N) residues.

        Raises:
            CiphertextError: SEAL refuses it.
        """
        ciphertext = self._ring.seal.Ciphertext()
        path = self._scratch.write(self._ciphertext(residues, seed))
        try:
            ciphertext.load(self._ring.context, path)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CiphertextError(f"SEAL refuses a ciphertext: {error}") from error
        if (ciphertext.size(), ciphertext.is_ntt_form()) != (2, True):
            raise CiphertextError("a ciphertext has not two components in NTT form")
        return ciphertext

    def key_residues(self, key: Any, primes: int) -> Residues:
        """The residues (primes, N) of a secret key."""
        template = self._key(np.zeros((primes, self._degree), np.uint64))
        data = self._saved(key, template)
        start = _HEADER.size + _PLAINTEXT.size + _HEADER.size + _COUNT.size
        return np.frombuffer(data, "<u8", offset=start).reshape(primes, self._degree)

    def load_key(self, residues: Residues) -> Any:
        """SEAL's secret key of residues (primes, N).

        Raises:
            ValueError: SEAL refuses it.
        """
        key = self._ring.seal.SecretKey()
        try:
            key.load(self._ring.context, self._scratch.write(self._key(residues)))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"SEAL refuses a secret key: {error}") from error
        finally:
            self._scratch.write(b"")
        return key

    def _saved(self, item: _Saved, template: bytes) -> bytes:
        """An object's stream without compression; as long as the template says, or TenSEAL has changed."""
        import pyarrow as pa

        data = self._scratch.save(item)
        if _HEADER.unpack_from(data)[4] == _UNCOMPRESSED:
            plain = data[_HEADER.size :]
        else:
            plain = pa.Codec("zstd").decompress(
                data[_HEADER.size :], len(template) - _HEADER.size, asbytes=True
            )
        if len(plain) + _HEADER.size != len(template):
            raise RuntimeError("this TenSEAL writes another format than SEAL 4's")
        return template[: _HEADER.size] + plain

    def _framed(self, body: bytes) -> bytes:
        size = _HEADER.size + len(body)
        return (
            _HEADER.pack(_MAGIC, _HEADER.size, self._major, self._minor, _UNCOMPRESSED, 0, size)
            + body
        )

    def _array(self, residues: Residues) -> bytes:
        return self._framed(_COUNT.pack(residues.size) + residues.astype("<u8").tobytes())

    def _ciphertext(self, residues: Residues, seed: bytes) -> bytes:
        members = _CIPHERTEXT.pack(
            self._ring.identity, 1, 2, self._degree, 1, float(self._scale), 1
        )
        generator = self._framed(bytes([_BLAKE2XB]) + seed) if seed else b""
        return self._framed(members + self._array(residues) + generator)

    def _key(self, residues: Residues) -> bytes:
        members = _PLAINTEXT.pack(self._ring.key_identity, residues.size, 1.0)
        return self._framed(members + self._array(residues))
