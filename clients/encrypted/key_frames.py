"""Evaluation keys as residues, on the wire and in memory, and SEAL's objects made of them behind frames of our own.

A key-switching key (Kim, Polyakov, Zucca 2021, "Revisiting Homomorphic Encryption Schemes for Finite Fields", hybrid
switching with one special prime P) is one encryption of P · s' a prime of the ciphertexts, under the owner's s: s' is
s² for the relinearisation key, and an automorphism of s for a Galois key. Of each encryption (c0, c1) the uniform c1
follows from a seed, so that c0 and 64 bytes travel: half of the bytes, and no form in which c1 is zero and c0 a secret.

How many there are, of which shape and for which automorphisms is the compute party's own knowledge, and SEAL's stream
is written here round residues that were checked: a stranger's byte reaches SEAL's parsers in no other way. This file
knows no secret key and can't make an evaluation key.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.ring import Ring, in_range
from strategies.ckks.parameters import SEED_BYTES
from strategies.ckks.streams import CiphertextError, Frames, Residues, Scratch, scratch

FINGERPRINT_BYTES: Final = 16
_SEED_WORDS: Final = SEED_BYTES // 8
_ARRAYS: Final = ("elements", "fingerprint", "first", "seeds")
_COUNT: Final = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class EvaluationKeys:
    """What a compute party needs to multiply and to permute an owner's ciphertexts; nothing in it decrypts.

    Attributes:
        fingerprint: of the secret key that they belong to, 32 hexadecimal digits.
        elements: the Galois elements, ascending.
        first: residues (1 + elements, primes - 1, primes, N) of the encryptions' first components in NTT form: the
            relinearisation key, then one key an element.
        seeds: (1 + elements, primes - 1, 8) words, from which the second components follow.
    """

    fingerprint: str
    elements: tuple[int, ...]
    first: Residues = field(repr=False)
    seeds: NDArray[np.uint64] = field(repr=False)

    def to_arrays(self) -> dict[str, NDArray[np.uint64]]:
        """For the wire: `elements` (elements,), `fingerprint` (2,), `first` and `seeds` as above, all uint64."""
        return {
            "elements": np.array(self.elements, np.uint64),
            "fingerprint": np.frombuffer(bytes.fromhex(self.fingerprint), "<u8"),
            "first": self.first,
            "seeds": self.seeds,
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Any], ring: Ring, galois_elements: Sequence[int]
    ) -> EvaluationKeys:
        """What a stranger sent as keys of a ring, for exactly these Galois elements. Arrays are not copied.

        Raises:
            CiphertextError: an array lacks or is too many, has another type or shape than such keys have, names other
                elements, or holds a residue that is not below its prime.
        """
        elements = checked_elements(ring, galois_elements)
        if set(arrays) != set(_ARRAYS):
            raise CiphertextError(
                f"evaluation keys are the arrays {', '.join(_ARRAYS)}; what came lacks"
                f" {sorted(set(_ARRAYS) - set(arrays))} and has {len(set(arrays) - set(_ARRAYS))} others"
            )
        for name, shape in shapes(ring, elements).items():
            _shaped(name, arrays[name], shape)
        if arrays["elements"].tolist() != list(elements):
            raise CiphertextError("array elements: other automorphisms than were asked for")
        for element, key in zip((None, *elements), arrays["first"], strict=True):
            in_range(key, ring, f"array first, {_name(element)}")
        fingerprint = arrays["fingerprint"].astype("<u8").tobytes().hex()
        return cls(fingerprint, elements, arrays["first"], arrays["seeds"])

    def seal(self, ring: Ring) -> tuple[Any, Any]:
        """SEAL's RelinKeys and GaloisKeys.

        Raises:
            CiphertextError: they belong to another ring, or SEAL refuses them.
        """
        if self.first.shape[1:] != (ring.levels, len(ring.bits), ring.degree):
            raise CiphertextError("array first: keys of another ring")
        relinearisation, galois = ring.seal.RelinKeys(), ring.seal.GaloisKeys()
        with scratch() as file:
            for keys, elements, rows in (
                (relinearisation, None, slice(0, 1)),
                (galois, self.elements, slice(1, None)),
            ):
                data = KeyFrames(ring, file, elements).write(self.first[rows], self.seeds[rows])
                try:
                    keys.load(ring.context, file.write(data))
                except (RuntimeError, ValueError, IndexError) as error:
                    raise CiphertextError(f"SEAL refuses evaluation keys: {error}") from error
        return relinearisation, galois

    @property
    def digest(self) -> str:
        """SHA-256 over all arrays, hexadecimal."""
        hashed = hashlib.sha256()
        for name, array in sorted(self.to_arrays().items()):
            hashed.update(f"{name} {array.shape}\0".encode())
            hashed.update(np.ascontiguousarray(array, "<u8").data)
        return hashed.hexdigest()


class KeyFrames:
    """SEAL's stream of relinearisation or Galois keys whose second components are seeds.

    It is a list of key-switching keys, most of them empty: SEAL puts the key of element g at place (g - 1) / 2.

    Args:
        ring: of the keys.
        scratch: a file for SEAL to save to.
        elements: of Galois keys, ascending; None for a relinearisation key.
    """

    def __init__(self, ring: Ring, scratch: Scratch, elements: Sequence[int] | None) -> None:
        self._ring, self._frames = ring, Frames(ring.seal, scratch)
        self._identity = ring.identity(len(ring.bits))
        self._places = [0] if elements is None else [(one - 1) // 2 for one in elements]
        self._slots = 1 if elements is None else ring.degree

    def write(self, first: Residues, seeds: NDArray[np.uint64]) -> bytes:
        """The stream of residues (keys, primes - 1, primes, N) and seeds (keys, primes - 1, 8)."""
        return self._frames.framed(self._body(first, seeds))

    def read(self, keys: Any) -> tuple[Residues, NDArray[np.uint64]]:
        """Residues and seeds, as for `write`, of seeded keys that SEAL has made.

        Raises:
            RuntimeError: this TenSEAL writes another format.
        """
        count, decomposed, primes = len(self._places), self._ring.levels, len(self._ring.bits)
        first = np.zeros((count, decomposed, primes, self._ring.degree), np.uint64)
        seeds = np.zeros((count, decomposed, _SEED_WORDS), np.uint64)
        head = len(self._frames.array(np.empty(0, np.uint64)))
        body = self._frames.saved(keys, len(self._body(first, seeds)) - head, 0)
        layout = self._layout()
        begin = len(self._identity) + _COUNT.size
        for index, place in enumerate(self._places):
            at = begin + _COUNT.size * (place + 1) + index * decomposed * layout.itemsize
            key = np.frombuffer(body, layout, decomposed, at)
            first[index], seeds[index] = key["first"], key["seed"]
        if self._body(first, seeds) != body:
            raise RuntimeError("this TenSEAL writes other evaluation keys than SEAL 4's")
        return first, seeds

    def _body(self, first: Residues, seeds: NDArray[np.uint64]) -> bytes:
        parts, behind = [self._identity, _COUNT.pack(self._slots)], 0
        for place, residues, words in zip(self._places, first, seeds, strict=True):
            parts += [bytes(_COUNT.size * (place - behind)), _COUNT.pack(len(residues))]
            parts += [
                self._encryption(component, seed)
                for component, seed in zip(residues, words, strict=True)
            ]
            behind = place + 1
        return b"".join([*parts, bytes(_COUNT.size * (self._slots - behind))])

    def _encryption(self, component: Residues, seed: NDArray[np.uint64]) -> bytes:
        seed_bytes = seed.astype("<u8", copy=False).tobytes()
        return self._frames.ciphertext(self._identity, component[None], 1.0, seed=seed_bytes)

    def _layout(self) -> np.dtype[np.void]:
        """Where residues and seed lie in the stream of an encryption: at its end."""
        shape = (len(self._ring.bits), self._ring.degree)
        whole = len(self._encryption(np.zeros(shape, np.uint64), np.zeros(_SEED_WORDS, np.uint64)))
        between = len(self._frames.framed(bytes(1)))
        head = whole - 8 * math.prod(shape) - between - SEED_BYTES
        return np.dtype(
            [
                ("head", f"V{head}"),
                ("first", "<u8", shape),
                ("between", f"V{between}"),
                ("seed", "<u8", (_SEED_WORDS,)),
            ]
        )


def checked_elements(ring: Ring, galois_elements: Sequence[int]) -> tuple[int, ...]:
    """Galois elements in ascending order, each once.

    Raises:
        ValueError: one is no automorphism of the ring, or is the identity.
    """
    elements = tuple(sorted(set(galois_elements)))
    wrong = [one for one in elements if one % 2 == 0 or not 1 < one < 2 * ring.degree]
    if wrong:
        raise ValueError(f"Galois element {wrong[0]} is not odd within 3 and {2 * ring.degree - 1}")
    return elements


def shapes(ring: Ring, galois_elements: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a ring's evaluation keys."""
    elements = len(checked_elements(ring, galois_elements))
    keys = (1 + elements, ring.levels)
    return {
        "elements": (elements,),
        "fingerprint": (FINGERPRINT_BYTES // 8,),
        "first": (*keys, len(ring.bits), ring.degree),
        "seeds": (*keys, _SEED_WORDS),
    }


def evaluation_bytes(ring: Ring, galois_elements: Sequence[int]) -> int:
    """What a ring's evaluation keys take on the wire and in memory; SEAL's own objects take twice that beside them."""
    return 8 * sum(math.prod(shape) for shape in shapes(ring, galois_elements).values())


def _shaped(name: str, array: object, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint64:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise CiphertextError(f"array {name}: {kind} where uint64 was to come")
    if array.shape != shape:
        raise CiphertextError(f"array {name}: shape {array.shape} where {shape} was to come")


def _name(element: int | None) -> str:
    return "relinearisation key" if element is None else f"key of Galois element {element}"
