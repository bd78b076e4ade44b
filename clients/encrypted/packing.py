"""Where a mini-batch's numbers lie in ciphertexts, and how mean gradients come out of products.

A ring element has N / 2 complex slots; slot i is the value at the 3^i-th power of a root of X^N + 1. With m samples and
b = N / (2 m) copies, slot i belongs to sample i // b. A *repeated* vector has the same number in all b slots of a
sample. A *packed* one has 2 b different numbers of it: number f < b in the slots with i mod b = f, and the other b
beside them, times X^(N/2), whose slots are ±1j.

The slots with the same i mod b are those over one slot of the subring Z[X^(N / 2b)], because 3 has order b modulo 4 b.
So in a product of a packed vector and a repeated one, the coefficients at the 2 b multiples of N / 2b form the element
of the subring whose slots are the means over the samples: 2 b inner products at once.

Many products' coefficients are brought into one ciphertext by automorphisms X -> X^(2^l + 1), which double what they
keep and cancel the rest: H. Chen, W. Dai, M. Kim and Y. Song 2021, "Efficient Homomorphic Conversion Between (Ring) LWE
Ciphertexts", Algorithm 2 (PackLWEs). The factor is taken off beforehand, exactly, by its inverse modulo the prime.

Keys are handed in; no secret one is known here, and no model.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.ring import Desk, Ring
from strategies.ckks.streams import Residues

Complex = NDArray[np.complex128]
Leaf = Callable[[], Any]
"""Makes one product at level 1, of two components."""


class Slots:
    """The places of a ring's slots.

    Args:
        ring: of the ciphertexts.
        copies: b, a power of two.
    """

    def __init__(self, ring: Ring, copies: int) -> None:
        self.ring, self.copies = ring, copies
        self.samples = ring.slots // copies
        self.first = (2 * copies).bit_length()
        """The first step of the automorphisms' tree."""

    @cached_property
    def exponents(self) -> NDArray[np.int64]:
        """3^i modulo 2 N, of each slot i."""
        found, two = np.empty(self.ring.slots, np.int64), 2 * self.ring.degree
        power = 1
        for index in range(self.ring.slots):
            found[index], power = power, power * 3 % two
        return found

    def monomial(self, power: int) -> Complex:
        """The slots of X^power."""
        degree = self.ring.degree
        slots: Complex = np.exp(1j * np.pi * (self.exponents * power % (2 * degree)) / degree)
        return slots

    @cached_property
    def second(self) -> Complex:
        """The slots of X^(N/2): ±1j."""
        return self.monomial(self.ring.degree // 2)

    def repeated(self, values: NDArray[np.floating]) -> Complex:
        """Numbers (m,) or fewer as repeated slots; missing samples are 0."""
        padded = np.zeros(self.samples)
        padded[: len(values)] = values
        return np.repeat(padded, self.copies).astype(np.complex128)

    def pair(self, first: NDArray[np.floating], second: NDArray[np.floating]) -> Complex:
        """Two repeated vectors in one."""
        return self.repeated(first) + self.second * self.repeated(second)

    def packed(self, values: NDArray[np.floating]) -> Complex:
        """Numbers (m, up to 2 b) or of fewer samples as packed slots."""
        padded = np.zeros((self.samples, 2 * self.copies))
        padded[: len(values), : values.shape[1]] = values
        real, other = padded[:, : self.copies], padded[:, self.copies :]
        return real.reshape(-1) + self.second * other.reshape(-1)

    def mask(self, place: int) -> Complex:
        """The slots that take a repeated vector to one place of a packed one."""
        chosen = np.zeros((1, 2 * self.copies))
        chosen[0, place] = 1
        return self.packed(np.broadcast_to(chosen, (self.samples, 2 * self.copies)))

    def means(self, coefficients: NDArray[np.floating]) -> NDArray[np.float64]:
        """Means over the samples (..., 2 b) of coefficients (..., 2 b) at the multiples of N / 2b."""
        copies, step = self.copies, self.ring.degree // (2 * self.copies)
        powers = self.exponents[:copies, None] * (np.arange(2 * copies) * step)
        angles = np.pi * (powers % (2 * self.ring.degree)) / self.ring.degree
        slots = coefficients @ np.exp(1j * angles).T
        return np.concatenate([slots.real, slots.imag / self.second[:copies].imag], axis=-1)

    def steps(self, leaves: int) -> int:
        """Steps of the tree over so many leaves."""
        return (leaves - 1).bit_length()

    @property
    def most_leaves(self) -> int:
        """Leaves that one ciphertext can hold."""
        return self.ring.degree // (2 * self.copies)

    def places(self, leaves: int) -> NDArray[np.int64]:
        """The coefficients (leaves, 2 b) at which the leaves of one tree stand."""
        within = self.ring.degree >> (self.first - 1 + self.steps(leaves))
        of_one = np.arange(2 * self.copies) * (self.ring.degree // (2 * self.copies))
        return np.arange(leaves)[:, None] * within + of_one


class Packer:
    """The automorphisms' tree.

    Args:
        slots: the places.
        desk: for residues.
        galois: SEAL's keys for the elements 2^l + 1.
    """

    def __init__(self, slots: Slots, desk: Desk, galois: Any) -> None:
        ring = slots.ring
        self._slots, self._desk, self._galois = slots, desk, galois
        self._seal, self._evaluator = ring.seal, ring.seal.Evaluator(ring.context)
        self._monomials: dict[int, Any] = {}

    def shrink(self, leaves: int, bits: int = 0) -> Any:
        """A plaintext that divides by what the tree over so many leaves multiplies with, and multiplies by 2^bits."""
        prime = self._slots.ring.primes[0]
        inverse = pow(1 << self._slots.steps(leaves), -1, prime)
        return self._desk.constant([inverse * (1 << bits) % prime], 2.0**bits)

    def pack(self, leaves: Sequence[Leaf]) -> Any:
        """One ciphertext with the leaves at `Slots.places`; what stands elsewhere is masked."""
        packed = self._tree(leaves, self._slots.first - 1 + self._slots.steps(len(leaves)))
        self._hide(packed, len(leaves))
        return packed

    def _tree(self, leaves: Sequence[Leaf], level: int) -> Any:
        """Leaves at multiples of N / 2^level."""
        if level == self._slots.first - 1:
            return leaves[0]()
        even = self._tree(leaves[0::2], level - 1)
        evaluator, element = self._evaluator, (1 << level) + 1
        turned = self._seal.Ciphertext()
        if len(leaves) == 1:
            evaluator.apply_galois(even, element, self._galois, turned)
        else:
            odd = self._tree(leaves[1::2], level - 1)
            evaluator.multiply_plain_inplace(odd, self._monomial(level))
            difference = self._seal.Ciphertext()
            evaluator.sub(even, odd, difference)
            evaluator.apply_galois(difference, element, self._galois, turned)
            evaluator.add_inplace(turned, odd)
        evaluator.add_inplace(turned, even)
        return turned

    def _monomial(self, level: int) -> Any:
        """X^(N / 2^level) as a plaintext at level 1."""
        if level not in self._monomials:
            slots = self._slots.monomial(self._slots.ring.degree >> level)
            self._monomials[level] = encode(self._slots.ring, slots, 1.0, 1)
        return self._monomials[level]

    def _hide(self, packed: Any, leaves: int) -> None:
        """Adds uniform residues to all coefficients but the leaves', so that a plaintext holds these alone.

        This is no circuit privacy: the ciphertext's second component stays a function of the model, and of what the
        owner itself has made.
        """
        ring = self._slots.ring
        mask = _uniform(ring.primes[0], ring.degree)
        mask[self._slots.places(leaves)] = 0
        cover = self._desk.plaintext(self._desk.transformed(mask[None]), packed.scale)
        self._evaluator.add_plain_inplace(packed, cover)


def encode(ring: Ring, slots: Complex, scale: float, level: int) -> Any:
    """SEAL's plaintext of complex slots."""
    plaintext = ring.seal.Plaintext()
    ring.seal.CKKSEncoder(ring.context).encode(
        slots.tolist(), ring.parms_id(level), scale, plaintext
    )
    return plaintext


def _uniform(prime: int, count: int) -> Residues:
    """Uniform residues from the operating system's entropy, by rejection."""
    found = np.empty(0, np.uint64)
    shift = np.uint64(64 - prime.bit_length())
    while len(found) < count:
        words = np.frombuffer(secrets.token_bytes(16 * count), "<u8") >> shift
        found = np.concatenate([found, words[words < prime]])
    return found[:count]
