"""How deep a training step goes: the ring it takes, and the level and scale of everything computed in it.

A product of two ciphertexts has the product of their scales, and dividing by a prime (rescaling) brings it down again,
one level deeper. Linear layers multiply by weights in fixed point, which costs scale but no level. Each product is
rescaled once, to about 2^30, before its next use; mean gradients come out at level 1, where automorphisms are cheapest.

What a step takes, in levels: D hidden layers with an activation of degree 2 take D on the way up and D on the way down,
of which the last forward one is also the first backward one where the owner sends the errors (cross-entropy). So a
logistic regression takes a ciphertext of one prime, one hidden layer of squares two (cross-entropy) or three (squared
loss), two hidden layers four or five; a cubic takes one more a layer on the way up.

A coefficient of a polynomial is an average of its slots times roots of unity: it is never larger than their mean
magnitude. Sums wrap round silently where scale times that reaches half the modulus, so `Format.room` says how many bits
are left.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import log2, prod
from typing import Final

from clients.encrypted.ring import MOST_BITS, Ring
from clients.encrypted.spec import Loss, Spec

HEADROOM: Final = 3
"""Bits that stay free above the largest value of a step, at the least."""
_MEANS_ROOM: Final = 7
"""Bits above 1 that mean gradients have, at the least: an owner refuses what comes within `HEADROOM` of wrapping."""
MEANS_LEVEL: Final = 2
"""Products for mean gradients are taken at this level, or below: each is rescaled once, or not at all."""
_KEEP: Final = 30
"""What a scale is brought down to."""
_SHORTEST, _LONGEST = 40, 60
_LEAST_MASK, _MOST_MASK = 12, 30
_PAIRED_FROM: Final = 257
"""Features from which two share a ciphertext: half the upload, for an automorphism a unit and step."""


@dataclass(frozen=True)
class Scales:
    """Fixed-point precision, in bits.

    Attributes:
        inputs: of encrypted features.
        first: of the weights of the first layer.
        weights: of those behind it.
        back: of weights on the way back.
        packed: of the features packed for the first layer's gradient.
        errors: of the errors that an owner sends, at the most.
        labels: of encrypted labels.
    """

    inputs: int
    first: int
    weights: int
    back: int
    packed: int
    errors: int = 30
    labels: int = 24


_SCALES: Final[dict[Loss, Scales]] = {
    "cross_entropy": Scales(inputs=24, first=18, weights=16, back=16, packed=20),
    "squared": Scales(inputs=22, first=16, weights=16, back=12, packed=18),
}
_STRAIGHT: Final = Scales(inputs=19, first=16, weights=16, back=12, packed=17)
"""Of a logistic regression with squared loss: its errors meet the packed features without being rescaled."""


@dataclass(frozen=True)
class Format:
    """Level and scale of a value.

    Attributes:
        level: primes that are left.
        scale: log2 of what it is multiplied by.
        modulus: log2 of the product of those primes.
    """

    level: int
    scale: float
    modulus: float

    @property
    def room(self) -> float:
        """log2 of the largest coefficient that does not wrap round."""
        return self.modulus - 1 - self.scale


@dataclass(frozen=True)
class Plan:
    """A spec's ring and formats.

    Attributes:
        spec: what is trained.
        ring: of the ciphertexts.
        scales: precision.
    """

    spec: Spec
    ring: Ring
    scales: Scales

    @property
    def copies(self) -> int:
        """b: neighbouring slots that hold the same sample, each another feature where features are packed."""
        return self.ring.slots // self.spec.batch

    @property
    def paired(self) -> bool:
        """Whether two features share a ciphertext, the second times X^(N/2)."""
        return self.spec.sizes[0] >= _PAIRED_FROM

    @property
    def inputs(self) -> int:
        """Ciphertexts of a mini-batch's features, and one of ones where there is a sample: for the biases."""
        features = self.spec.sizes[0]
        return 1 + (-(-features // 2) if self.paired else features)

    def packs(self, units: int) -> int:
        """Ciphertexts that hold so many units packed, 2 b of them each."""
        return -(-units // (2 * self.copies))

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Level and scale of each value, by name: `x`, `z0` (before an activation), `h0` (behind), `o`, `delta`, ..."""
        walk = _Walk(self.spec, self.scales, len(self.ring.bits) - 1)
        walk.primes = {level: log2(self.ring.primes[level - 1]) for level in range(1, walk.top + 1)}
        walk.run()
        moduli = [log2(prod(self.ring.primes[:level])) for level in range(walk.top + 1)]
        return {
            name: Format(level, scale, moduli[level]) for name, (level, scale) in walk.found.items()
        }

    def room(self, scale: float) -> float:
        """log2 of the largest coefficient at level 1, of a value with this scale, that does not wrap round."""
        return log2(self.ring.primes[0]) - 1 - log2(scale)

    def lift(self, scale: float) -> int:
        """Bits that such a value may be multiplied with before it is packed."""
        # Rounded first: both ends find the same for scales that are the same but for rounding.
        return max(0, min(self.scales.packed, int(round(self.room(scale), 4)) - 3 * HEADROOM))

    def packed_scale(self, name: str) -> float:
        """The scale with which a value comes packed to the owner; by the names of `formats`."""
        scale: float = 2.0 ** self.formats[name].scale
        return scale * 2.0 ** self.lift(scale)

    @property
    def galois(self) -> tuple[int, ...]:
        """Elements of the automorphisms that a step takes, and no other."""
        degree = self.ring.degree
        first = (2 * self.copies).bit_length()
        tree = tuple((1 << level) + 1 for level in range(first, degree.bit_length()))
        return (*tree, 2 * degree - 1) if self.paired else tree


@dataclass
class _Walk:
    """A step in levels and scales, with primes that are given, or chosen on the way."""

    spec: Spec
    scales: Scales
    top: int
    primes: dict[int, float] = field(default_factory=dict)
    found: dict[str, tuple[int, float]] = field(default_factory=dict)

    def run(self) -> None:
        """Up and down again."""
        scales, hidden = self.scales, self.spec.layers - 1
        value = self.note("x", self.top, scales.inputs)
        slopes = []
        for layer in range(hidden):
            level, scale = self.note(
                f"z{layer}", value[0], value[1] + (scales.weights if layer else scales.first)
            )
            value, slope = self.activation(layer, level, scale)
            slopes.append(slope)
        level, scale = self.note(
            "o",
            1 if self.spec.loss == "cross_entropy" else value[0],
            value[1] + (scales.weights if hidden else scales.first),
        )
        value = self.errors(level, scale, slopes)
        for layer in range(hidden - 1, -1, -1):
            level, scale = self.note(f"e{layer}", value[0], value[1] + scales.back)
            slope = slopes[layer]
            value = self.product(f"g{layer}", min(level, slope[0]), scale + slope[1])
        self.primes.setdefault(1, _LONGEST)
        self.means(hidden)

    def note(self, name: str, level: int, scale: float) -> tuple[int, float]:
        """Remembers a value."""
        self.found[name] = (level, scale)
        return level, scale

    def product(self, name: str, level: int, scale: float) -> tuple[int, float]:
        """A product, rescaled."""
        self.note(f"{name}*", level, scale)
        prime = self.primes.setdefault(level, min(max(round(scale) - _KEEP, _SHORTEST), _LONGEST))
        return self.note(name, level - 1, scale - prime)

    def activation(
        self, layer: int, level: int, scale: float
    ) -> tuple[tuple[int, float], tuple[int, float]]:
        """A power of z, and the level and scale of its slope but for a factor."""
        if self.spec.power == 2:
            return self.product(f"h{layer}", level, 2 * scale), (level, scale)
        square = self.product(f"s{layer}", level, 2 * scale)
        return self.product(f"h{layer}", square[0], square[1] + scale), square

    def errors(
        self, level: int, scale: float, slopes: list[tuple[int, float]]
    ) -> tuple[int, float]:
        """The outputs' errors: the owner's own, at the level where they are needed; or o − y."""
        if self.spec.loss == "squared":
            return self.note("delta", level, scale)
        if not slopes:
            return self.note("delta", level, self.scales.errors - 6)
        at, slope = slopes[-1]
        fits = self.primes.get(at, _LONGEST) + _KEEP + 2 - slope - self.scales.back
        return self.note("delta", at, float(min(self.scales.errors, max(20, int(fits)))))

    def means(self, hidden: int) -> None:
        """Products whose constant coefficients are mean gradients; behind the first layer, of packed gradients."""
        first = self.found["g0" if hidden else "delta"]
        self.note("means0", 1, first[1] + self.scales.packed)
        for layer in range(1, hidden + 1):
            below = self.found[f"h{layer - 1}"]
            if layer == hidden and self.spec.loss == "cross_entropy":
                self.note(f"means{layer}", 1, below[1] + self.scales.packed)
                continue
            level, scale = self.found[f"g{layer}" if layer < hidden else "delta"]
            level = min(level, below[0], MEANS_LEVEL)
            mask = _KEEP - scale - below[1] + (self.primes[level] if level > 1 else 0)
            mask = float(min(max(round(mask), _LEAST_MASK), _MOST_MASK))
            self.note(f"mask{layer}", level, mask)
            if level > 1:
                self.product(f"means{layer}", level, scale + mask + below[1])
            else:
                self.note(f"means{layer}", level, scale + mask + below[1])
        if self.spec.loss == "squared":
            level, scale = self.found["delta"]
            self.product("loss", level, 2 * scale)


@lru_cache(maxsize=64)
def plan_of(spec: Spec) -> Plan:
    """The smallest ring in which a step of a spec can be computed, and its formats.

    Raises:
        ValueError: none of the standard's table is large enough.
    """
    scales = _SCALES[spec.loss]
    if spec.loss == "squared" and spec.layers == 1:
        scales = _STRAIGHT
    top = _levels(spec)
    walk = _Walk(spec, scales, top)
    walk.run()
    chain = [round(walk.primes.get(level, _SHORTEST)) for level in range(1, top + 1)]
    for degree, most in sorted(MOST_BITS.items()):
        if degree // 2 < spec.batch:
            continue
        bits = list(chain)
        if degree == 4096:
            bits[0] = min(bits[0], 54)
        special = min(_LONGEST, most - sum(bits))
        if special >= _SHORTEST + 6:
            lacking = round(walk.found["means0"][1]) + 1 + _MEANS_ROOM - bits[0]
            packed = scales.packed - max(0, lacking)
            return Plan(spec, Ring(degree, (*bits, special)), replace(scales, packed=packed))
    raise ValueError(
        f"sizes {list(spec.sizes)} with activation {spec.activation} take {sum(chain)} bits, more than is 128-bit"
        " secure: use fewer hidden layers, or the square activation"
    )


def _levels(spec: Spec) -> int:
    """Primes of a fresh ciphertext, with which mean gradients come out at level 1."""
    hidden, up = spec.layers - 1, spec.power - 1
    if spec.loss == "squared":
        return max(hidden * up + hidden + 1, 2)
    if not hidden:
        return 1
    # The errors come in at the level of the last slope, from where as many products follow as there are layers.
    return (hidden - 1) * up + (up - 1) + hidden + 1
