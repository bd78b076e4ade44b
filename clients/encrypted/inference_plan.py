"""Which ring and which scales serve a polynomial network's forward pass on ciphertexts, without any key.

The pass is one polynomial with integer coefficients in integer inputs, modulo Q: inputs are rounded to multiples of
2^-`input_bits`, each layer's weights to 2^-`weight_bits`, biases and the activation's lower coefficients to the scale
of what they are added to. Nothing is rescaled and nothing relinearised: an activation of degree p takes z from scale s
to s^p, and the ciphertext's degree in the secret key to p times what it was (Cheon, Kim, Kim and Song 2017,
"Homomorphic Encryption for Arithmetic of Approximate Numbers", for encodings and scales; Brakerski and Vaikuntanathan
2011, "Fully Homomorphic Encryption from Ring-LWE and Security for Key Dependent Messages", for products without
relinearisation). So a server holds no key at all, and depth is paid for by Q alone.

A value wraps round at Q/2. The worst case is taken layer by layer, from the weights as they are rounded and the stated
bound of inputs, and `HEADROOM_BITS` more are left. Nothing here knows ciphertexts, keys or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.polynomial.polynomial import polyval
from numpy.typing import NDArray

from clients.encrypted.ring import Ring

HEADROOM_BITS: Final = 3
"""Left between the worst case and Q/2."""
RINGS: Final = (
    (4096, (54, 55)),
    (8192, (55, 55, 56)),
    (8192, (54, 54, 54, 56)),
    (8192, (47, 47, 47, 47, 30)),
    (16384, (54, 54, 54, 54, 55)),
    (16384, (54, 54, 54, 54, 54, 54, 54, 55)),
)
"""Degrees and lengths of primes, tried in this order. The last prime is for keys only: no ciphertext has it."""

_LEAST, _MOST = 12, 20
"""Bits of a layer's largest weight: with fewer, labels begin to change; with more, they don't."""
_INPUT_BITS: Final = 10
"""By which an input at its bound has more: a fresh ciphertext's noise is some 2^8 units in a slot."""
_INPUT_BITS_RANGE: Final = (1, 50)
_WEIGHT_BITS: Final = (-64, 64)
"""Whatever the largest weight or input is."""
_NOISE_BITS: Final = 12
"""Of the noise that a slot of a fresh ciphertext has at most: eight deviations at N = 16384."""
_LONGEST_PRIME: Final = 56
"""Bits: products of longer residues are not exact in `inference`."""
_MOST_COMPONENTS: Final = 16
"""That SEAL decrypts."""


@dataclass(frozen=True)
class Polynomial:
    """A network of linear layers with one polynomial between them, and what its inputs may be.

    Attributes:
        weights: of each layer, (out, in) float64.
        biases: of each layer, (out,) float64.
        activation: coefficients c0, c1, …, cp, with cp ≠ 0 and p = 2 or 3; used between layers only.
        bound: the largest magnitude of an input.

    Raises:
        ValueError: shapes do not fit, a number is not finite, or the activation is of another degree.
    """

    weights: tuple[NDArray[np.float64], ...]
    biases: tuple[NDArray[np.float64], ...]
    activation: tuple[float, ...]
    bound: float

    def __post_init__(self) -> None:
        if not self.weights or len(self.weights) != len(self.biases):
            raise ValueError(f"{len(self.weights)} layers' weights and {len(self.biases)} biases")
        width = self.weights[0].shape[-1]
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"layer {number}: weights {weight.shape} and biases {bias.shape} after {width} units"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError(f"layer {number} holds a number that is not finite")
            width = len(bias)
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"bound {self.bound}: must be finite and greater than 0")
        finite = all(map(math.isfinite, self.activation))
        if not finite or len(self.activation) not in (3, 4) or not self.activation[-1]:
            raise ValueError(f"activation {self.activation}: needs degree 2 or 3, all finite")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Inputs, units of each hidden layer, classes."""
        return (self.weights[0].shape[1], *map(len, self.biases))

    @property
    def degree(self) -> int:
        """Of the activation."""
        return len(self.activation) - 1

    def __call__(self, inputs: NDArray[np.floating]) -> NDArray[np.float64]:
        """Logits (n, classes) of inputs (n, d), in the clear."""
        values: NDArray[np.float64] = np.asarray(inputs, np.float64)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            values = np.asarray(polyval(values @ weight.T + bias, self.activation))
        logits: NDArray[np.float64] = values @ self.weights[-1].T + self.biases[-1]
        return logits

    def monic(self) -> Polynomial:
        """The same function, with cp = 1: the next layer's weights take the coefficient over."""
        leading = self.activation[-1]
        later = tuple(weight * leading for weight in self.weights[1:])
        lower = tuple(coefficient / leading for coefficient in self.activation)
        return replace(self, weights=(self.weights[0], *later), activation=lower)

    def rounded(self, weight_bits: Sequence[int]) -> Polynomial:
        """The function with each layer's weights as multiples of 2^-bits."""
        pairs = zip(self.weights, weight_bits, strict=True)
        return replace(self, weights=tuple(np.ldexp(np.rint(np.ldexp(w, b)), -b) for w, b in pairs))

    def largest(self) -> float:
        """What no logit exceeds in magnitude for inputs within the bound: the worst case of each layer in turn."""
        top = np.full(self.sizes[0], self.bound)
        with np.errstate(over="ignore", invalid="ignore"):
            for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
                top = polyval(np.abs(weight) @ top + np.abs(bias), np.abs(self.activation))
            found = float((np.abs(self.weights[-1]) @ top + np.abs(self.biases[-1])).max())
        return math.inf if math.isnan(found) else found


@dataclass(frozen=True)
class Terms:
    """What both sides must agree on; nothing in it is secret.

    Attributes:
        ring: degree and primes; ciphertexts have all primes but the last.
        input_bits: inputs are encrypted at scale 2^input_bits.
        logit_bits: encrypted logits are at scale 2^logit_bits.
        components: polynomials of an encrypted logit.
        bound: the largest magnitude of an input that there is room for.

    Raises:
        ValueError: a number is none that a plan of ours can have.
    """

    ring: Ring
    input_bits: int
    logit_bits: int
    components: int
    bound: float

    def __post_init__(self) -> None:
        modulus = sum(self.ring.bits[:-1])
        if max(self.ring.bits[:-1]) > _LONGEST_PRIME:
            raise ValueError(
                f"primes {self.ring.bits}: ciphertexts' have {_LONGEST_PRIME} bits or less"
            )
        low, high = _INPUT_BITS_RANGE
        if not low <= self.input_bits <= high or not self.input_bits < self.logit_bits < modulus:
            raise ValueError(
                f"inputs at 2^{self.input_bits} and logits at 2^{self.logit_bits} in a modulus of {modulus} bits"
            )
        if not 2 <= self.components <= _MOST_COMPONENTS:
            raise ValueError(
                f"{self.components} components: 2 to {_MOST_COMPONENTS} can be decrypted"
            )
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"bound {self.bound}: must be finite and greater than 0")

    @property
    def samples(self) -> int:
        """The most that one request may hold: one a slot."""
        return self.ring.slots


@dataclass(frozen=True)
class InferencePlan:
    """How one network is served.

    Attributes:
        terms: that clients are told.
        weight_bits: of each layer; its weights are multiples of 2^-bits.
        headroom_bits: between the worst case and Q/2.
    """

    terms: Terms
    weight_bits: tuple[int, ...]
    headroom_bits: float


class HeadroomError(ValueError):
    """A ring without room for a network."""


def plan(
    network: Polynomial, rings: Sequence[tuple[int, tuple[int, ...]]] = RINGS
) -> InferencePlan:
    """The smallest ring with room for the network, and the finest weights that it has room for.

    Raises:
        HeadroomError: none has; the message says what is short and how to mend it.
    """
    monic = network.monic()
    for degree, bits in rings:
        ring = Ring(degree, bits)
        for precision in range(_MOST, _LEAST - 1, -1):
            weights = [
                _within(precision - _exponent(float(np.abs(weight).max())), *_WEIGHT_BITS)
                for weight in monic.weights
            ]
            inputs = _within(precision + _INPUT_BITS - _exponent(network.bound), *_INPUT_BITS_RANGE)
            try:
                return fitted(network, ring, inputs, weights)
            except HeadroomError as error:
                refusal = error
    raise refusal


def fitted(
    network: Polynomial, ring: Ring, input_bits: int, weight_bits: Sequence[int]
) -> InferencePlan:
    """The plan of a network for a ring and scales.

    Raises:
        HeadroomError: the ring has no room for them.
        ValueError: the bits are none that a plan of ours can have.
    """
    bounded = all(bits == _within(bits, *_WEIGHT_BITS) for bits in weight_bits)
    if len(weight_bits) != len(network.weights) or not bounded:
        raise ValueError(f"weight bits {list(weight_bits)} for {len(network.weights)} layers")
    monic, hidden = network.monic(), len(weight_bits) - 1
    noisy = network.bound + math.ldexp(1, _NOISE_BITS - input_bits)
    largest = replace(monic.rounded(weight_bits), bound=noisy).largest()
    scale = scales(network.degree, input_bits, weight_bits)[-1]
    modulus = sum(map(math.log2, ring.primes[: ring.levels]))
    room = modulus - 1 - scale - (math.log2(largest) if largest > 0 else 0.0)
    if not room >= HEADROOM_BITS:
        raise HeadroomError(
            f"logits of up to {largest:.3g} after {hidden} hidden layers of degree {network.degree} leave {room:.0f}"
            f" bits of headroom in a modulus of {modulus:.0f}, and {HEADROOM_BITS} are needed: fewer layers, smaller"
            f" weights, or a smaller bound of inputs than {network.bound:.3g}"
        )
    terms = Terms(ring, input_bits, scale, 1 + network.degree**hidden, network.bound)
    return InferencePlan(terms, tuple(weight_bits), room)


def _within(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _exponent(value: float) -> int:
    """The e with 2^(e-1) ≤ value < 2^e; 0 for 0."""
    return math.frexp(value)[1]


def scales(degree: int, input_bits: int, weight_bits: Sequence[int]) -> list[int]:
    """Binary logarithms of the scales of what each layer's product comes to; the last is the logits'."""
    scale, found = input_bits, []
    for bits in weight_bits:
        scale += bits
        found.append(scale)
        scale *= degree
    return found
