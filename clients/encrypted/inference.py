"""A polynomial network on ciphertexts, by whoever holds the model and no key.

A ciphertext is a polynomial in the secret key, its components residues in NTT form: (components, primes, N). Slots are
samples. A linear layer is one exact matrix product of integers modulo each prime (`linear`), whatever a residue stands
for; an activation is Horner's rule with products of such polynomials, point by point, after which there are more
components (Brakerski and Vaikuntanathan 2011, "Fully Homomorphic Encryption from Ring-LWE and Security for Key
Dependent Messages"). All is exact arithmetic modulo Q: `inference_plan` says why nothing is rescaled or wraps round.

Nothing here can decrypt. SEAL does one thing: it makes a fresh ciphertext's second half of its seed. Nothing knows
HTTP, files or torch. Values are hidden from the server by ring-LWE; the model is *not* hidden from who holds the key
(docs/encrypted_inference.md).
"""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.inference_plan import InferencePlan, Polynomial, scales
from clients.encrypted.linear import matmul
from clients.encrypted.ring import Desk
from strategies.ckks.streams import CiphertextError, Residues

_AT_ONCE: Final = 64
"""Inputs of the first layer."""


class EncryptedInference:
    """The forward pass of one network; any number of threads may call it at once.

    Args:
        network: in the clear.
        plan: with room for it, as `inference_plan.plan` finds.

    Raises:
        ValueError: the plan is another network's.
    """

    def __init__(self, network: Polynomial, plan: InferencePlan) -> None:
        if len(plan.weight_bits) != len(network.weights):
            raise ValueError(f"a plan of {len(plan.weight_bits)} layers for another network")
        monic = network.monic()
        self._ring, self._sizes = plan.terms.ring, network.sizes
        self._primes = self._ring.primes[: self._ring.levels]
        self._scales = scales(network.degree, plan.terms.input_bits, plan.weight_bits)
        self._weights = [
            np.rint(np.ldexp(weight, bits)).astype(np.int64)
            for weight, bits in zip(monic.weights, plan.weight_bits, strict=True)
        ]
        self._biases = [
            [_integer(value, scale) for value in bias]
            for bias, scale in zip(monic.biases, self._scales, strict=True)
        ]
        # Of z^p + … + c1·z + c0, from the second highest: each at the scale of what it is added to.
        self._lower = [
            [
                _integer(value, scale * power)
                for power, value in enumerate(monic.activation[-2::-1], 1)
            ]
            for scale in self._scales[:-1]
        ]
        self._local = threading.local()

    def __call__(self, first: Residues, seeds: NDArray[np.uint8]) -> Residues:
        """Encrypted logits of fresh ciphertexts, one a feature.

        Args:
            first: their first components (d, primes, N), residues below their primes.
            seeds: of their second ones, (d, bytes).

        Returns:
            (classes, components, primes, N).

        Raises:
            CiphertextError: they are no such ciphertexts.
        """
        ring = self._ring
        if first.shape != (self._sizes[0], ring.levels, ring.degree) or len(seeds) != len(first):
            raise CiphertextError(f"residues of shape {first.shape} are not the model's inputs")
        values = self._first_layer(first, seeds)
        for layer, weights in enumerate(self._weights):
            if layer:
                values = self._linear(weights, self._activated(values, self._lower[layer - 1]))
            self._add(values, self._biases[layer])
        return values

    def _first_layer(self, first: Residues, seeds: NDArray[np.uint8]) -> Residues:
        """Products with the first weights, some inputs at a time: whole ciphertexts are twice what came."""
        weights = self._weights[0]
        out = np.zeros((len(weights), 2, *first.shape[1:]), np.uint64)
        for start in range(0, len(first), _AT_ONCE):
            block = slice(start, start + _AT_ONCE)
            part = self._linear(weights[:, block], self._expanded(first[block], seeds[block]))
            for level, prime in enumerate(self._primes):
                out[:, :, level] = _sum(out[:, :, level], part[:, :, level], prime)
        return out

    def _expanded(self, first: Residues, seeds: NDArray[np.uint8]) -> Residues:
        """Whole ciphertexts (d, 2, primes, N)."""
        desk: Desk | None = getattr(self._local, "desk", None)
        if desk is None:
            desk = self._local.desk = Desk(self._ring)
        whole = np.empty((len(first), 2, *first.shape[1:]), np.uint64)
        for index, (one, seed) in enumerate(zip(first, seeds, strict=True)):
            whole[index] = desk.residues(desk.ciphertext(one[None], 1.0, seed=seed.tobytes()))
        return whole

    def _linear(self, weights: NDArray[np.int64], values: Residues) -> Residues:
        """(out, components, primes, N) of (in, components, primes, N)."""
        out = np.empty((len(weights), *values.shape[1:]), np.uint64)
        for component in range(values.shape[1]):
            for level, prime in enumerate(self._primes):
                out[:, component, level] = matmul(weights, values[:, component, level], prime)
        return out

    def _add(self, values: Residues, constants: list[int]) -> None:
        """Adds a constant to all slots of each ciphertext: in NTT form, to each residue of the first component."""
        for level, prime in enumerate(self._primes):
            column = np.array([constant % prime for constant in constants], np.uint64)
            values[:, 0, level] = _sum(values[:, 0, level], column[:, None], prime)

    def _activated(self, values: Residues, lower: list[int]) -> Residues:
        """z^p + … of (units, components, primes, N), a unit at a time so that little is held at once."""
        degree = len(lower)
        components = degree * (values.shape[1] - 1) + 1
        out = np.empty((len(values), components, *values.shape[2:]), np.uint64)
        for level, prime in enumerate(self._primes):
            for unit, own in enumerate(values[:, :, level]):
                power = own.copy()
                for step, constant in enumerate(lower):
                    power[0] = _sum(power[0], np.uint64(constant % prime), prime)
                    if step < degree - 1:
                        power = _product(power, own, prime)
                out[unit, :, level] = power
        return out


def _integer(value: float, scale_bits: int) -> int:
    """The value at a scale of 2^bits, which may be beyond what a double holds."""
    return round(Fraction(value) * Fraction(2) ** scale_bits)


def _product(left: Residues, right: Residues, prime: int) -> Residues:
    """The product (a + b - 1, N) of polynomials in the secret key, (a, N) and (b, N)."""
    out = np.zeros((len(left) + len(right) - 1, left.shape[1]), np.uint64)
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            out[i + j] = _sum(out[i + j], multiplied(one, other, prime), prime)
    return out


def _sum(left: Residues, right: Residues | np.uint64, prime: int) -> Residues:
    total = left + right
    total -= np.where(total >= prime, np.uint64(prime), np.uint64(0))
    return total


def multiplied(left: Residues, right: Residues, prime: int) -> Residues:
    """Products of residues modulo a prime of 30 to 56 bits, element by element.

    The quotient in double precision is off by at most 5 · 2^(bits - 53) + 1, so that what remains fits a signed word; a
    second quotient, at most one off, ends it. The products themselves wrap round 2^64 without harm.
    """
    quotient = (left.astype(np.float64) * right * (1 / prime)).astype(np.uint64)
    quotient *= np.uint64(prime)
    rest = (left * right - quotient).view(np.int64)
    rest -= np.floor(rest * (1 / prime)).astype(np.int64) * prime
    rest += (rest >> 63) & prime
    rest -= prime
    rest += (rest >> 63) & prime
    return rest.view(np.uint64)
