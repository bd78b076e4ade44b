"""SEAL's objects to residues and back, so that no stranger's byte ever reaches SEAL's parsers unchecked.

A ciphertext travels as what is in it and nothing else: residues modulo q, and a seed. How many there are is known
beforehand; degree, level, size, form and scale are our own, and are written into SEAL's stream here. A forged
ciphertext of another level, with three components, or one that inflates to gigabytes can't even be expressed.

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
_ARRAY_AT: Final = _CIPHERTEXT.size + _HEADER.size + _COUNT.size
"""Where a ciphertext's residues begin behind its first header."""
_BLAKE2XB: Final = 1
_OTHER_FORMAT: Final = "this TenSEAL writes another format than SEAL 4's"


class CiphertextError(ValueError):
    """Bytes that are no ciphertext of these parameters."""


class _Saved(Protocol):
    def save(self, path: str) -> None: ...


class Scratch:
    """A file for SEAL to save to and load from, seen by this process only.

    Args:
        descriptor: of the open file.
        path: by which it can be opened again.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor, self._path = descriptor, path

    def save(self, item: _Saved) -> bytes:
        """What an object's `save` writes."""
        item.save(self._path)  # which cuts off what was there
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def write(self, data: bytes) -> str:
        """The path to load these bytes from."""
        os.ftruncate(self._descriptor, len(data))
        os.pwrite(self._descriptor, data, 0)
        return self._path


@contextmanager
def scratch() -> Iterator[Scratch]:
    """A scratch file: in memory where the system has such files, else in a folder that only this user can enter."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("trellis-ckks", os.MFD_CLOEXEC)
        try:
            yield Scratch(descriptor, f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with (
            tempfile.TemporaryDirectory(prefix="trellis-ckks-") as folder,
            (Path(folder) / "scratch").open("w+b", buffering=0) as file,
        ):
            yield Scratch(file.fileno(), file.name)


class Frames:
    """SEAL's streams round residues: written here, and read where SEAL has written them.

    Args:
        seal: TenSEAL's module of SEAL's own classes.
        scratch: a file to save to and load from.
    """

    def __init__(self, seal: Any, scratch: Scratch) -> None:
        import pyarrow as pa

        self.scratch = scratch
        self._codec = pa.Codec("zstd")
        probe = scratch.save(seal.Plaintext())
        magic, size, self._major, self._minor, *_ = _HEADER.unpack_from(probe)
        if (magic, size) != (_MAGIC, _HEADER.size):
            raise RuntimeError(_OTHER_FORMAT)

    def residues(self, ciphertext: Any, size: int, primes: int, degree: int) -> Residues:
        """All components (size, primes, N) of a ciphertext."""
        words = size * primes * degree
        data = self.saved(ciphertext, _CIPHERTEXT.size, 8 * words)
        return np.frombuffer(data, "<u8", words, _ARRAY_AT).reshape(size, primes, degree)

    def seeded(self, ciphertext: Any, primes: int, degree: int) -> tuple[Residues, bytes]:
        """The first component (1, primes, N) of a seeded ciphertext, and the seed of its second."""
        words = primes * degree
        generator = _HEADER.size + 1 + SEED_BYTES
        data = self.saved(ciphertext, _CIPHERTEXT.size, 8 * words, generator)
        return (
            np.frombuffer(data, "<u8", words, _ARRAY_AT).reshape(1, primes, degree),
            data[-SEED_BYTES:],
        )

    def ciphertext(
        self,
        identity: bytes,
        residues: Residues,
        scale: float,
        *,
        seed: bytes = b"",
        ntt: bool = True,
    ) -> bytes:
        """The stream of a ciphertext of residues (size, primes, N); of (1, primes, N) where a seed makes the second."""
        size, primes, degree = residues.shape
        members = _CIPHERTEXT.pack(
            identity, ntt, 2 if seed else size, degree, primes, float(scale), 1
        )
        generator = self.framed(bytes([_BLAKE2XB]) + seed) if seed else b""
        return self.framed(members + self.array(residues) + generator)

    def plaintext(self, identity: bytes, residues: Residues, scale: float) -> bytes:
        """The stream of a plaintext, or a secret key, of residues (primes, N)."""
        members = _PLAINTEXT.pack(identity, residues.size, float(scale))
        return self.framed(members + self.array(residues))

    def plain_residues(self, plaintext: Any, primes: int, degree: int) -> Residues:
        """The residues (primes, N) of a plaintext in NTT form, or of a secret key."""
        data = self.saved(plaintext, _PLAINTEXT.size, 8 * primes * degree)
        start = _ARRAY_AT - _CIPHERTEXT.size + _PLAINTEXT.size
        return np.frombuffer(data, "<u8", offset=start).reshape(primes, degree)

    def saved(self, item: _Saved, members: int, array: int, rest: int = 0) -> bytes:
        """What follows the header of an object's stream, without compression.

        Raises:
            RuntimeError: it is not as long as its parts: this TenSEAL writes another format.
        """
        data = self.scratch.save(item)
        wanted = members + _HEADER.size + _COUNT.size + array + rest
        if _HEADER.unpack_from(data)[4] == _ZSTANDARD:
            plain: bytes = self._codec.decompress(data[_HEADER.size :], wanted, asbytes=True)
        else:
            plain = data[_HEADER.size :]
        if len(plain) != wanted:
            raise RuntimeError(_OTHER_FORMAT)
        return plain

    def framed(self, body: bytes) -> bytes:
        """A body behind its header."""
        size = _HEADER.size + len(body)
        return (
            _HEADER.pack(_MAGIC, _HEADER.size, self._major, self._minor, _UNCOMPRESSED, 0, size)
            + body
        )

    def array(self, residues: Residues) -> bytes:
        """An array of words, framed."""
        return self.framed(
            _COUNT.pack(residues.size) + residues.astype("<u8", copy=False).tobytes()
        )


class Streams:
    """SEAL's streams for one ring of a single ciphertext prime, and a scale.

    Args:
        ring: of keys and ciphertexts.
        degree: N.
        scratch: a file to save to and load from.
        scale: of the ciphertexts; 1 where only keys are read.
    """

    def __init__(self, ring: Ring, degree: int, scratch: Scratch, scale: float = 1.0) -> None:
        self._ring, self._degree, self._scale = ring, degree, scale
        self._frames = Frames(ring.seal, scratch)

    def fresh(self, ciphertext: Any) -> tuple[Residues, bytes]:
        """The first component (N,) of a seeded ciphertext, and the seed of its second."""
        first, seed = self._frames.seeded(ciphertext, 1, self._degree)
        return first.reshape(-1), seed

    def whole(self, ciphertext: Any) -> Residues:
        """Both components (2, N) of a ciphertext."""
        return self._frames.residues(ciphertext, 2, 1, self._degree).reshape(2, -1)

    def load(self, residues: Residues, seed: bytes = b"") -> Any:
        """A ciphertext of (N,) residues and a seed, or of (2, N) residues.

        Raises:
            CiphertextError: SEAL refuses it.
        """
        ciphertext = self._ring.seal.Ciphertext()
        rows = residues.reshape(-1, 1, self._degree)
        data = self._frames.ciphertext(self._ring.identity, rows, self._scale, seed=seed)
        try:
            ciphertext.load(self._ring.context, self._frames.scratch.write(data))
        except (RuntimeError, ValueError, IndexError) as error:
            raise CiphertextError(f"SEAL refuses a ciphertext: {error}") from error
        if (ciphertext.size(), ciphertext.is_ntt_form()) != (2, True):
            raise CiphertextError("a ciphertext has not two components in NTT form")
        return ciphertext

    def key_residues(self, key: Any, primes: int) -> Residues:
        """The residues (primes, N) of a secret key."""
        return self._frames.plain_residues(key, primes, self._degree)

    def load_key(self, residues: Residues) -> Any:
        """SEAL's secret key of residues (primes, N).

        Raises:
            ValueError: SEAL refuses it.
        """
        key = self._ring.seal.SecretKey()
        data = self._frames.plaintext(self._ring.key_identity, residues, 1.0)
        try:
            key.load(self._ring.context, self._frames.scratch.write(data))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"SEAL refuses a secret key: {error}") from error
        finally:
            self._frames.scratch.write(b"")
        return key
