"""How far a decrypted gradient lies from the exact one, by the noise of keys and encryptions: what flooding must cover.

CKKS computes on value + error (Cheon, Kim, Kim and Song 2017, "Homomorphic Encryption for Arithmetic of Approximate
Numbers", §3). Counted is the error that depends on the key and on encryptions' randomness: fresh noise, the rounding of
rescaling (times the secret key), and key switching (relinearisation, automorphisms), whose digits SEAL does not centre:
three quarters of its energy is a mean fixed by the key. Fixed-point weights, masks and constants are public, and what
is computed with them is the function; the rounding of encoded data is counted with the fresh noise.

An error is followed as an energy: mean squares over slots, summed over units, in values. White noise of variance V a
coefficient has N V / scale² of it. A product's error is each factor's error times the other's norm; a linear layer's is
that of independent inputs where they are, and else the spectral norm's. Assumed: noise independent of values, third
order left out, energies of two values over samples uncorrelated but for features, whose longest vector counts.

No key and no ciphertext is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.plan import MEANS_LEVEL, Plan
from clients.encrypted.ring import Ring
from clients.encrypted.spec import Spec, bias, weight

_BINOMIAL: Final = 42 / 4
"""Variance of a coefficient of SEAL's error: a centred binomial of 42 bits."""
_FRESH: Final = _BINOMIAL + 1 / 12
_TAIL: Final = 40 * log(2)
"""−ln of the probability with which one part of an error is longer than its bound."""
_GAUSSIAN: Final = {2: 1.0, 4: 3.0, 6: 15.0}
"""Moments of a standard Gaussian."""
_BIAS_DEGREES: Final = 2.0
"""Degrees of freedom of a key's mean error: a random walk over the coefficients, most of it in one sine and cosine."""


@dataclass(frozen=True)
class Matrix:
    """Norms of a layer's weights (outputs, inputs), biases among them as a last column.

    Attributes:
        whole: Frobenius.
        spectral: the largest singular value, of weights alone.
        row: the longest row.
        column: the longest column, of weights alone.
        biases: of the biases.
    """

    whole: float
    spectral: float
    row: float
    column: float
    biases: float


@dataclass(frozen=True)
class Hidden:
    """Root mean squares over samples, of norms over a hidden layer's units.

    Attributes:
        values: of z, before the activation z^p.
        slopes: of z^(p-1).
        units: of z^p.
        back: of e = p Wᵀ (gradients of the layer above).
        turned: of e times the derivative of z^(p-1).
        gradients: of e z^(p-1).
    """

    values: float
    slopes: float
    units: float
    back: float
    turned: float
    gradients: float


_Norms = TypeVar("_Norms", Matrix, Hidden)


@dataclass(frozen=True)
class Magnitudes:
    """How large the values of a step are, which its errors scale with.

    Attributes:
        features: the norm of the longest sample.
        errors: root mean square over samples of the norm of the outputs' errors.
        matrices: by layer.
        hidden: by hidden layer.
    """

    features: float
    errors: float
    matrices: tuple[Matrix, ...]
    hidden: tuple[Hidden, ...]

    @classmethod
    def assumed(cls, spec: Spec) -> Magnitudes:
        """What a run is taken to stay within: that of `benchmarks/encrypted_flooding.py`, and somewhat more.

        Nobody checks that another one does: an owner does not know the model, nor the compute party the values. But an
        owner knows its features: `over`.
        """
        # With squared loss logits are indicators, and start at 1 / K.
        small = 0.45 if spec.loss == "squared" else 1.0
        power, z, back = spec.power, 2.25 * small, 1.25 * small
        whole = 2 * sqrt(spec.sizes[1])
        matrices = [Matrix(small * whole, small * 3.5, small * 2.4, small * 1.7, 0.5)]
        hidden = list[Hidden]()
        for units, outputs in zip(spec.sizes[1:-1], spec.sizes[2:], strict=True):
            whole = 1.1 * sqrt(outputs)
            matrices.append(Matrix(small * whole, small * 1.7, small * 1.4, small * 0.9, 0.5))
            slopes = z ** (power - 1) * sqrt(_GAUSSIAN[2 * power - 2] * units)
            powers = z**power * sqrt(_GAUSSIAN[2 * power] * units)
            derived = z ** (power - 2)
            turned = back * (power - 1) * derived
            values, gradients = z * sqrt(units), 2 * small**2 * derived
            hidden.append(Hidden(values, slopes, powers, back, turned, gradients))
        return cls(1.25 * sqrt(spec.sizes[0]), 1.2, tuple(matrices), tuple(hidden))

    @classmethod
    def of(
        cls,
        spec: Spec,
        arrays: Mapping[str, NDArray[np.floating]],
        features: NDArray[np.floating],
        targets: NDArray[np.integer],
    ) -> Magnitudes:
        """Those of a step in the clear.

        Args:
            spec: what is trained.
            arrays: weights and biases, by name.
            features: (n, d).
            targets: (n,), classes.
        """
        power, last, values = spec.power, spec.layers - 1, []
        below = features
        for layer in range(last):
            values.append(below @ arrays[weight(layer)].T + arrays[bias(layer)])
            below = values[-1] ** power
        outputs = below @ arrays[weight(last)].T + arrays[bias(last)]
        if spec.loss == "cross_entropy":
            raised = np.exp(outputs - outputs.max(axis=1, keepdims=True))
            outputs = raised / raised.sum(axis=1, keepdims=True)
        errors = outputs - np.eye(spec.sizes[-1])[targets]
        above, hidden = errors, list[Hidden]()
        for layer in range(last - 1, -1, -1):
            back, z = power * above @ arrays[weight(layer + 1)], values[layer]
            above = back * z ** (power - 1)
            turned = back * (power - 1) * z ** (power - 2)
            six = (z, z ** (power - 1), z**power, back, turned, above)
            hidden.insert(0, Hidden(*map(_norm, six)))
        matrices = tuple(_matrix(arrays[weight(i)], arrays[bias(i)]) for i in range(spec.layers))
        longest = float(np.linalg.norm(features, axis=1).max())
        return cls(longest, _norm(errors), matrices, tuple(hidden))

    def over(self, features: NDArray[np.floating]) -> Magnitudes:
        """The same, where a mini-batch's longest sample is longer: that of its features (n, d)."""
        longest = float(np.linalg.norm(features, axis=1).max())
        return replace(self, features=max(self.features, longest))

    def largest(self, other: Magnitudes) -> Magnitudes:
        """What covers both."""
        return Magnitudes(
            max(self.features, other.features),
            max(self.errors, other.errors),
            tuple(_larger(a, b) for a, b in zip(self.matrices, other.matrices, strict=True)),
            tuple(_larger(a, b) for a, b in zip(self.hidden, other.hidden, strict=True)),
        )


@dataclass(frozen=True)
class Part:
    """One part of the error of all that a step releases.

    Attributes:
        name: what it comes of.
        energy: expected squared norm.
        degrees: independent directions of like size that it has at the least.
    """

    name: str
    energy: float
    degrees: float

    @property
    def bound(self) -> float:
        """Of its norm, exceeded with probability 2⁻⁴⁰ where errors are Gaussian.

        B. Laurent and P. Massart 2000, "Adaptive Estimation of a Quadratic Functional by Model Selection", Lemma 1.
        """
        tail = _TAIL / self.degrees
        return sqrt(self.energy * (1 + 2 * sqrt(tail) + 2 * tail))


@dataclass
class ErrorModel:
    """The parts of the error of a step's gradients.

    Args:
        plan: levels and scales.
        sizes: magnitudes of its values.
        samples: of the mini-batch, at the least; None for all that there is room for.
        chunk: leaves of a tree, at most.
    """

    plan: Plan
    sizes: Magnitudes
    samples: int | None = None
    chunk: int = 512
    _parts: dict[str, Part] = field(default_factory=dict, init=False)

    def parts(self) -> list[Part]:
        """By what they come of."""
        self._parts.clear()
        errors = self._forward()
        self._outputs(*errors)
        return list(self._parts.values())

    @property
    def energy(self) -> float:
        """Expected squared norm of the error of all mean gradients together."""
        return sum(part.energy for part in self.parts())

    @property
    def bound(self) -> float:
        """t: of the norm of the error of all mean gradients of a step together."""
        return sum(part.bound for part in self.parts())

    def _white(self, variance: float, scale: float) -> float:
        """The mean square over slots of white noise."""
        return float(self.plan.ring.degree * variance / 4.0**scale)

    def _rounding(self, name: str) -> float:
        return self._white(rounding(self.plan.ring), self.plan.formats[name].scale)

    def _forward(self) -> tuple[list[float], list[float], list[float], float]:
        """By hidden layer: energy of the noisiest unit's z, of all units, of a slope's own rounding; and of outputs."""
        spec, sizes = self.plan.spec, self.sizes
        inputs = self._white(_FRESH, self.plan.scales.inputs)
        units, below, rounded = list[float](), list[float](), list[float]()
        whole = largest = 0.0
        for layer in range(spec.layers):
            matrix = sizes.matrices[layer]
            if layer == 0:
                whole, largest = matrix.whole**2 * inputs, matrix.row**2 * inputs
                if self.plan.paired:
                    largest += self._turn()
                    whole += spec.sizes[1] * self._turn()
            else:
                ones = matrix.biases**2 * inputs
                whole = matrix.spectral**2 * below[-1] + ones
                largest = min(whole, matrix.row**2 * below[-1] + ones)
            if layer == spec.layers - 1:
                break
            norms = sizes.hidden[layer]
            units.append(largest)
            rounded.append(self._rounding(f"s{layer}") if spec.power == 3 else 0.0)
            energy = spec.power**2 * norms.slopes**2 * largest
            energy += norms.values**2 * rounded[-1]
            below.append(energy + spec.sizes[layer + 1] * self._rounding(f"h{layer}"))
        return units, below, rounded, whole

    def _turn(self) -> float:
        """Of the automorphism that joins two features of a ciphertext."""
        ring = self.plan.ring
        return self._white(sum(switching(ring, ring.levels)), self.plan.formats["z0"].scale)

    def _outputs(
        self, units: list[float], below: list[float], rounded: list[float], whole: float
    ) -> None:
        """The way back from the outputs' errors: what a unit has on its own, and what all have together."""
        plan, spec, sizes = self.plan, self.plan.spec, self.sizes
        classes, last = spec.sizes[-1], spec.layers - 1
        if spec.loss == "squared":
            own, joint = self._white(_FRESH, plan.scales.labels), whole
        else:
            # The mean over a sample's slots of a logit's real part; softmax changes by half of that at the most.
            own, joint = self._white(_FRESH, plan.formats["delta"].scale), whole / (8 * plan.copies)
        total, norm = classes * own + joint, sizes.errors
        self._add("loss", norm**2 * (total if spec.loss == "squared" else 4 * joint) / spec.batch)
        for layer in range(last, 0, -1):
            hidden, owner = sizes.hidden[layer - 1], layer == last and spec.loss != "squared"
            self._layer_means(layer, below[layer - 1], total - owner * classes * own, norm)
            self._biases(layer, joint if owner else total, tree=not owner)
            matrix, power = sizes.matrices[layer], spec.power
            back = power**2 * (
                matrix.column**2 * own + min(matrix.spectral, matrix.column) ** 2 * joint
            )
            z, slope = units[layer - 1], hidden.slopes**2 * back
            total = hidden.turned**2 * z + slope + hidden.back**2 * rounded[layer - 1]
            total += spec.sizes[layer] * self._rounding(f"g{layer - 1}")
            own, joint, norm = 0.0, total, hidden.gradients
        self._first_means(total, norm)
        if last or spec.loss == "squared":
            self._biases(0, total, tree=True)
        else:
            self._biases(0, joint, tree=False)

    def _first_means(self, energy: float, norm: float) -> None:
        """Of the first layer's weights, by gradients with so much error, of such a norm."""
        spec = self.plan.spec
        features, outputs = spec.sizes[:2]
        fresh = self._white(_FRESH, self.plan.scales.packed) / (2 * spec.batch)
        self._add("packed features", features * norm**2 * fresh, features)
        self._add("gradients times features", energy * self.sizes.features**2 / spec.batch)
        leaves = outputs * self.plan.packs(features)
        self._tree("means0", features * outputs, leaves, self._level("means0"))

    def _layer_means(self, layer: int, units: float, above: float, norm: float) -> None:
        """Of the weights of a layer behind the first."""
        plan, spec, below = self.plan, self.plan.spec, self.sizes.hidden[layer - 1].units
        inputs, outputs = spec.sizes[layer : layer + 2]
        if layer == spec.layers - 1 and spec.loss != "squared":
            fresh = self._white(_FRESH, plan.scales.packed) / (2 * spec.batch)
            self._add("packed errors", outputs * below**2 * fresh, outputs)
        self._add(f"units below layer {layer}", units * norm**2 / spec.batch)
        self._add(f"errors above layer {layer}", above * below**2 / spec.batch)
        name = f"means{layer}"
        self._tree(name, inputs * outputs, inputs * plan.packs(outputs), self._level(name))

    def _level(self, name: str) -> int:
        """At which products of a layer's means are taken."""
        return MEANS_LEVEL if f"{name}*" in self.plan.formats else 1

    def _biases(self, layer: int, energy: float, *, tree: bool) -> None:
        """Of a layer's biases, whose gradients are sums of errors with so much energy."""
        spec = self.plan.spec
        self._add(f"biases of layer {layer}", energy / spec.batch)
        outputs = spec.sizes[layer + 1]
        name = f"g{layer}" if layer < spec.layers - 1 else "delta"
        if tree:
            self._tree(name, outputs, -(-outputs // 2), 0)

    def _tree(self, name: str, elements: int, leaves: int, level: int) -> None:
        """What the last relinearisation and the automorphisms add; level 0 where nothing was multiplied."""
        ring, scale = self.plan.ring, self.plan.formats[name].scale
        count = min(leaves, self.chunk, ring.degree // (2 * self.plan.copies))
        lifted = scale + self.plan.lift(2.0**scale)
        noise, mean = switching(ring, 1)
        grown = (4.0 ** (count - 1).bit_length() - 1) / 3
        white, fixed = grown * noise / 4.0**lifted, grown * mean / 4.0**lifted
        if level == 1:
            white, fixed = white + noise / 4.0**scale, fixed + mean / 4.0**scale
        elif level:
            white += rounding(ring) / 4.0**scale
        by = elements * self.plan.copies
        self._add("key switching", by * white)
        self._add("key switching's mean", by * fixed, _BIAS_DEGREES)

    def _add(self, name: str, energy: float, degrees: float | None = None) -> None:
        full = self.plan.spec.batch / (self.samples or self.plan.spec.batch)
        before = self._parts.get(name)
        degrees = float(self.plan.spec.sizes[-1] if degrees is None else degrees)
        energy = energy * full**2 + (before.energy if before else 0.0)
        self._parts[name] = Part(name, energy, degrees)


def rounding(ring: Ring) -> float:
    """Variance of a coefficient after rescaling: the rounding of two components, the second times a ternary key."""
    return (1 + 2 * ring.degree / 3) / 12


def switching(ring: Ring, level: int) -> tuple[float, float]:
    """Variance that switching a key adds to a coefficient, and the mean square of what is fixed by the key."""
    special = ring.primes[-1]
    ratio = sum((prime / special) ** 2 for prime in ring.primes[:level])
    whole = ring.degree * _BINOMIAL * ratio
    return whole / 12 + rounding(ring), whole / 4


def _norm(values: NDArray[np.floating]) -> float:
    return sqrt(float(np.mean(np.square(values).sum(axis=1))))


def _matrix(weights: NDArray[np.floating], biases: NDArray[np.floating]) -> Matrix:
    joined = np.column_stack([weights, biases])
    return Matrix(
        float(np.linalg.norm(joined)),
        float(np.linalg.norm(weights, 2)),
        float(np.linalg.norm(joined, axis=1).max()),
        float(np.linalg.norm(weights, axis=0).max()),
        float(np.linalg.norm(biases)),
    )


def _larger(one: _Norms, other: _Norms) -> _Norms:
    names = one.__dataclass_fields__
    return replace(one, **{name: max(getattr(one, name), getattr(other, name)) for name in names})
