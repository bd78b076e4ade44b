"""Rings of CKKS, and what moves between SEAL's objects and residues.

Cheon et al. 2017, "Homomorphic Encryption for Arithmetic of Approximate Numbers".

A ring is a degree N and a chain of primes. The last prime is the special one, which only keys have; a ciphertext at
level L has residues modulo the first L. Ciphertexts live as numpy arrays (components, L, N) of uint64 in SEAL's NTT
order: on disk, on the wire and in linear algebra (`linear`); as SEAL's objects only where SEAL works on them. Their
frames are written here round residues that were looked at before, so that no stranger's byte reaches SEAL's parsers.

Nothing here knows a key, a model or a message.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from strategies.ckks.parameters import seal_context
from strategies.ckks.streams import CiphertextError, Frames, Residues, scratch

MOST_BITS: Final = {4096: 109, 8192: 218, 16384: 438}
"""Bits of all primes together that leave 128-bit security against classical attacks, for a ternary secret: Albrecht et
al. 2018, "Homomorphic Encryption Security Standard", Table 1."""


@dataclass(frozen=True)
class Ring:
    """A degree and a chain of primes, 128-bit secure by the standard's table and by SEAL's own.

    Attributes:
        degree: N; a ciphertext has N / 2 complex slots.
        bits: of each prime: the first stays to the end, the last is the special one.

    Raises:
        ValueError: the ring is none of the table's, or not secure.
    """

    degree: int
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))
        most = MOST_BITS.get(self.degree)
        if most is None:
            raise ValueError(f"CKKS degree {self.degree} should be one of {sorted(MOST_BITS)}")
        if len(self.bits) < 2 or not all(30 <= bits <= 60 for bits in self.bits):
            raise ValueError(
                f"CKKS bits {list(self.bits)} should be two primes or more of 30 to 60 bits each"
            )
        if sum(self.bits) > most:
            raise ValueError(
                f"CKKS bits {list(self.bits)} are {sum(self.bits)} in all: degree {self.degree} is 128-bit secure with"
                f" at most {most} (Homomorphic Encryption Security Standard, Table 1); take a larger degree"
            )
        _ = self._seal  # SEAL's opinion

    @property
    def slots(self) -> int:
        """N / 2."""
        return self.degree // 2

    @property
    def levels(self) -> int:
        """Primes of a fresh ciphertext."""
        return len(self.bits) - 1

    @property
    def primes(self) -> tuple[int, ...]:
        """The ciphertexts' primes, and the special one last."""
        return self._seal.primes

    @property
    def seal(self) -> Any:
        """TenSEAL's module of SEAL's own classes."""
        return self._seal.module

    @property
    def context(self) -> Any:
        """SEAL's context."""
        return self._seal.context

    def parms_id(self, level: int) -> list[int]:
        """By which SEAL knows a level's parameters; `len(bits)` for keys'."""
        return self._seal.identities[level]

    def identity(self, level: int) -> bytes:
        """The same, as its streams hold it."""
        return b"".join(word.to_bytes(8, "little") for word in self.parms_id(level))

    @cached_property
    def _seal(self) -> _Seal:
        return _seal(self.degree, self.bits)

    def __reduce__(self) -> tuple[type[Ring], tuple[int, tuple[int, ...]]]:
        return Ring, (self.degree, self.bits)  # SEAL's objects don't travel


@dataclass(frozen=True)
class _Seal:
    module: Any
    context: Any
    primes: tuple[int, ...]
    identities: dict[int, list[int]]


@lru_cache(maxsize=16)
def _seal(degree: int, bits: tuple[int, ...]) -> _Seal:
    seal, context, primes = seal_context(degree, bits)
    identities = {len(bits): context.key_parms_id()}
    at = context.first_context_data()
    for level in range(len(bits) - 1, 0, -1):
        identities[level] = at.parms_id()
        at = at.next_context_data()
    return _Seal(seal, context, primes, identities)


class Desk:
    """Residues to SEAL's ciphertexts and back, through a scratch file of this process's own; for one thread.

    Args:
        ring: of the ciphertexts.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        held = scratch()
        self._frames = Frames(ring.seal, held.__enter__())
        weakref.finalize(self, held.__exit__, None, None, None)

    def ciphertext(
        self, residues: Residues, scale: float, *, seed: bytes = b"", ntt: bool = True
    ) -> Any:
        """A ciphertext of residues (components, level, N), or of (1, level, N) and the seed of the second.

        Raises:
            CiphertextError: SEAL refuses it.
        """
        _, level, degree = residues.shape
        if degree != self._ring.degree or not 1 <= level <= self._ring.levels:
            raise CiphertextError(f"residues of shape {residues.shape} are none of {self._ring}")
        found = self._ring.seal.Ciphertext()
        data = self._frames.ciphertext(
            self._ring.identity(level), residues, scale, seed=seed, ntt=ntt
        )
        try:
            found.load(self._ring.context, self._frames.scratch.write(data))
        except (RuntimeError, ValueError, IndexError) as error:
            raise CiphertextError(f"SEAL refuses a ciphertext: {error}") from error
        return found

    def residues(self, ciphertext: Any) -> Residues:
        """Residues (components, level, N) of a ciphertext."""
        return self._frames.residues(
            ciphertext, ciphertext.size(), ciphertext.coeff_modulus_size(), self._ring.degree
        )

    def fresh(self, ciphertext: Any, level: int) -> tuple[Residues, bytes]:
        """The first component (1, level, N) of a seeded ciphertext, and the seed of its second."""
        return self._frames.seeded(ciphertext, level, self._ring.degree)

    def plaintext(self, residues: Residues, scale: float = 1.0) -> Any:
        """A plaintext of residues (level, N) in NTT form."""
        found = self._ring.seal.Plaintext()
        data = self._frames.plaintext(self._ring.identity(len(residues)), residues, scale)
        found.load(self._ring.context, self._frames.scratch.write(data))
        return found

    def plain_residues(self, plaintext: Any, level: int) -> Residues:
        """Residues (level, N) of a plaintext in NTT form."""
        return self._frames.plain_residues(plaintext, level, self._ring.degree)

    def transformed(self, residues: Residues, *, back: bool = False) -> Residues:
        """Coefficients (level, N) in NTT form, or the other way."""
        if not residues.any():
            return residues.copy()
        # SEAL transforms ciphertexts, and refuses results whose second component is 0.
        both = np.broadcast_to(residues, (2, *residues.shape))
        carrier = self.ciphertext(both, 1.0, ntt=back)
        evaluator = self._ring.seal.Evaluator(self._ring.context)
        move = evaluator.transform_from_ntt_inplace if back else evaluator.transform_to_ntt_inplace
        move(carrier)
        found: Residues = self.residues(carrier)[0]
        return found

    def constant(self, values: list[int], scale: float = 1.0) -> Any:
        """A plaintext that multiplies residues modulo the i-th prime by the i-th value."""
        column = np.array(values, np.uint64)[:, None]
        return self.plaintext(np.broadcast_to(column, (len(values), self._ring.degree)), scale)


def in_range(residues: Residues, ring: Ring, what: str = "residues") -> None:
    """Refuses residues (..., level, N) that are not below their primes; raises `CiphertextError`."""
    level = residues.shape[-2]
    primes = np.array(ring.primes[:level], np.uint64)[:, None]
    if bool((residues >= primes).any()):
        raise CiphertextError(
            f"{what}: a residue is not below its prime: other parameters, or no ciphertext"
        )


def centred(residues: NDArray[np.uint64], prime: int) -> NDArray[np.int64]:
    """Residues modulo one prime as the integers nearest to zero."""
    signed = residues.astype(np.int64)
    signed[residues > np.uint64(prime // 2)] -= prime
    return signed
