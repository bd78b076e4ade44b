"""The law of a sum of many privacy losses around the ε in question, by one Fourier transform a query.

The law of one loss (`losses.py`) is tilted: weighted by exp(θ·loss) and normalised. Tilted laws are convolved like
plain ones: transformed, raised to their counts, multiplied, transformed back (Koskela, Jälkö & Honkela 2020, "Computing
Tight Differential Privacy Guarantees Using FFT", Algorithm 1); θ is taken off at the end. With a θ near the one that
minimises Chernoff's bound of δ, the tilted sum lies around ε, so that the window of the transform can be small, and
rounding errors are relative to δ, however small that is (Alghamdi et al. 2023, "The Saddle-Point Method in Differential
Privacy"). Moments at a ladder of orders (`ORDERS`) give θ, and by Chernoff's bound a window with all but 1e-12 of the
tilted mass.

Everything left out is added to δ: mass above the window and the lattice, and a bound of the transforms' rounding. Mass
that comes round the window's lower end is counted where it lands, too high; such above its upper end is counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from strategies.privacy.losses import ORDERS, Array, Loss, deviation, least_step, losses

Part = tuple[float, float]
"""A kind of release: its noise multiplier and its rate."""

_COARSENESS = 2e-3
"""How much the lattice may add to the variance of a loss: half of it, relatively, shows in ε."""

_LEFT_OUT = math.log(1e-12)
_SLACK, _EXACTING = math.log(1e6), math.log(1e-12)
"""How far from the best order's a bound may be where that allows a smaller window: digits that rounding may take. At a
δ of 1e-12 all digits are needed."""

_MOST_CELLS = 2**21
_POSITIVE = int(np.searchsorted(ORDERS, 0.0)) + 1
"""Place of the least order above 0."""

_ROUNDING = 8 * 2.0**-52
"""A value of a transform with 2^k points is off by at most k times this, where absolute values sum to 1."""

_VANISHED = -40.0
"""ln of absolute values that are taken for 0, which is off by less than they are."""

_LARGEST = 600.0
"""Exponents up to this, of either sign, neither overflow nor vanish."""


@dataclass
class _Running:
    """A sum over releases, kept while the kind of its rows stays the same.

    Attributes:
        kind: of the rows.
        done: how many of each part are in it.
        total: Σ count·row, of a row's shape.
        lowest: the elementwise least row.
    """

    kind: object = None
    done: dict[Part, int] = field(default_factory=dict)
    total: Array = field(default_factory=lambda: np.zeros(0))
    lowest: Array = field(default_factory=lambda: np.zeros(0))

    def copy(self) -> _Running:
        """Its own; arrays are shared, since they are replaced and never written to."""
        return _Running(self.kind, dict(self.done), self.total, self.lowest)

    def take(self, kind: object, parts: Mapping[Part, int], row: Callable[[Part], Array]) -> None:
        """Brings the sum up to date; begins anew for other rows, or where counts are less than they were."""
        if kind != self.kind or any(parts.get(part, 0) < had for part, had in self.done.items()):
            self.kind, self.done = kind, {}
        for part, count in parts.items():
            if more := count - self.done.get(part, 0):
                one = row(part)
                self.lowest = np.minimum(self.lowest, one) if self.done else one
                self.total = self.total + more * one if self.done else more * one
                self.done[part] = count


@dataclass(frozen=True)
class _Summary:
    """What is known of a sum before it is composed.

    Attributes:
        step: of the lattice.
        moments: at `ORDERS`.
        first: its lowest point, in steps.
        last: its highest.
        infinite: probability of an infinite loss.
    """

    step: float
    moments: Array
    first: float
    last: float
    infinite: float

    def window(self, bounds: Array) -> tuple[int, int, int]:
        """Which order to tilt by, and what window then holds all but 1e-12 of the tilted mass.

        Args:
            bounds: ln of Chernoff's bound of δ at each order; infinite for orders that won't do.

        Returns:
            The order's place in `ORDERS`, the window's first point, and how many there are: 2^k or 3·2^k.
        """
        best = float(bounds.min())
        near = np.flatnonzero(bounds <= best + min(_SLACK, max(0.0, best - _EXACTING)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = (self.moments - self.moments[near, None] - _LEFT_OUT) / (
                ORDERS - ORDERS[near, None]
            )
        places = np.arange(len(ORDERS))
        below = np.where(places < near[:, None], ends, -math.inf).max(axis=1) / self.step
        above = np.where(places > near[:, None], ends, math.inf).min(axis=1) / self.step
        first = np.floor(np.maximum(self.first, below))
        sizes = np.maximum(np.ceil(np.minimum(self.last, above)) - first + 1, 2)
        powers = np.exp2(np.ceil(np.log2(sizes)))
        sizes = np.where(sizes <= 0.75 * powers, 0.75 * powers, powers)
        chosen = np.lexsort((bounds[near], sizes))[0]
        return int(near[chosen]), int(first[chosen]), int(sizes[chosen])

    def beyond(self, last: int) -> float:
        """A bound of the probability of a loss above that point."""
        if last >= self.last:
            return self.infinite
        positive = slice(_POSITIVE, None)
        bound = float(np.min(self.moments[positive] - ORDERS[positive] * last * self.step))
        return self.infinite + math.exp(min(0.0, bound))


@dataclass(frozen=True)
class _Law:
    """A composed law within its window.

    Attributes:
        values: (n,) losses, ascending by `step`.
        masses: (n,) probabilities, never too small; meaningless where they'd be far above 1.
        step: of the lattice.
        beyond: probability of a loss above the window.
        below: a bound of the weight of all below the window, at any ε there: times exp(−θ·ε).
        order: θ.
    """

    values: Array
    masses: Array
    step: float
    beyond: float
    below: float
    order: float


class Sum:
    """The sum of all losses on one side: 0 for a unit that is removed, 1 for one that is added.

    Methods take `parts`, how often each kind of release was made (at least one), and
    `precision`, Σ 1/z² of the releases that claim no sampling.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._summaries = _Running()
        self._transforms = _Running()

    def copy(self) -> Sum:
        """Its own."""
        other = Sum(self._side)
        other._summaries, other._transforms = self._summaries.copy(), self._transforms.copy()
        return other

    def epsilon(self, parts: Mapping[Part, int], precision: float, delta: float) -> float:
        """The least ε ≥ 0 at δ in (0, 1), on the safe side."""

        def bounds(moments: Array) -> Array:
            least = float(np.min((moments - math.log(delta)) / ORDERS[_POSITIVE:]))
            return moments - ORDERS[_POSITIVE:] * max(0.0, least)

        law = self._law(parts, precision, bounds)
        room = delta - law.beyond
        if room <= 0:
            return math.inf
        found = _epsilon(law, room)
        return self._below(parts, precision, delta, law) if found is None else found

    def delta(self, parts: Mapping[Part, int], precision: float, epsilon: float) -> float:
        """The least δ at ε ≥ 0, on the safe side."""
        law = self._law(parts, precision, lambda moments: moments - ORDERS[_POSITIVE:] * epsilon)
        above = law.values > epsilon
        inside = float(law.masses[above] @ -np.expm1(epsilon - law.values[above]))
        if epsilon < law.values[0]:
            inside += math.exp(min(0.0, law.below - law.order * epsilon))
        return min(1.0, inside + law.beyond)

    def _below(self, parts: Mapping[Part, int], precision: float, delta: float, law: _Law) -> float:
        """The least ε between 0 and the window, by bisection: where a few losses are far above all others."""
        if self.delta(parts, precision, 0.0) <= delta:
            return 0.0
        low, high = 0.0, float(law.values[0])
        while high - low > max(1e-3 * high, 1e-3 * law.step):
            middle = (low + high) / 2
            if self.delta(parts, precision, middle) > delta:
                low = middle
            else:
                high = middle
        return high

    def _law(
        self,
        parts: Mapping[Part, int],
        precision: float,
        bounds: Callable[[Array], Array],
    ) -> _Law:
        """The law around where `bounds`, of δ by the moments at orders above 0, are least."""
        step = _step(parts, precision)
        while True:
            summary = self._summary(parts, precision, step)
            every = np.full(len(ORDERS), math.inf)
            every[_POSITIVE:] = bounds(summary.moments[_POSITIVE:])
            order, first, size = summary.window(every)
            if size <= _MOST_CELLS:
                break
            step *= 2
        tilted = self._composed(parts, precision, step, order, size)
        values: Array = (first + np.arange(size, dtype=np.float64)) * np.float64(step)
        moment, theta = float(summary.moments[order]), float(ORDERS[order])
        masses = np.roll(tilted, -(first % size)) * np.exp(
            np.clip(moment - theta * values, -_LARGEST, _LARGEST)
        )
        beyond = summary.beyond(first + size - 1)
        return _Law(values, masses, step, beyond, moment + _LEFT_OUT, theta)

    def _summary(self, parts: Mapping[Part, int], precision: float, step: float) -> _Summary:
        self._summaries.take(step, parts, lambda part: _row(losses(*part, step)[self._side]))
        row = self._summaries.total
        if precision:
            row = row + _row(losses(precision**-0.5, 1.0, step)[self._side])
        first, last, finite = map(float, row[:3])
        return _Summary(step, row[3:], first, last, -math.expm1(finite))

    def _composed(
        self, parts: Mapping[Part, int], precision: float, step: float, order: int, size: int
    ) -> Array:
        """(size,) tilted probabilities of the points that are 0, 1, … modulo `size`, none too small."""
        self._transforms.take(
            (step, order, size),
            parts,
            lambda part: _transform(*part, step, self._side, order, size),
        )
        total, least = self._transforms.total, self._transforms.lowest[0]
        count = sum(parts.values())
        if precision:
            gaussian = _transform(precision**-0.5, 1.0, step, self._side, order, size)
            total, least, count = total + gaussian, np.minimum(least, gaussian[0]), count + 1
        some = total[0] > _VANISHED
        composed = np.zeros(total.shape[1], np.complex128)
        composed[some] = np.exp(total[0, some] + 1j * total[1, some])
        # A value v of a transform is off by e, so vᵀ by T·e·|v|ᵀ⁻¹; the inverse takes the mean, and rounds once more.
        rounding = _ROUNDING * math.log2(size)
        powers = float(np.exp(np.minimum(0.0, total[0] - least)).mean())
        off = rounding * (1 + count * powers) + math.exp(_VANISHED)
        out: Array = np.maximum(np.fft.irfft(composed, size), 0.0) + off
        return out


def _epsilon(law: _Law, room: float) -> float | None:
    """The least ε ≥ 0 at which what the law has above it comes to `room`; None if it lies below the window."""
    # δ(ε) at a point = Σ mass − Σ mass·exp(point − loss) over the losses from there on. It is below the first sum, and
    # above half of what that is a nat further up: ε lies a little below where the first sum is `room`.
    upper = np.cumsum(law.masses[::-1])[::-1]
    centre = float(law.values[np.flatnonzero(upper > room)[-1]]) if upper[0] > room else -math.inf
    near = law.values >= centre - _LARGEST
    values, masses, upper = law.values[near], law.masses[near], upper[near]
    centre = max(centre, float(values[0]))
    lower = np.cumsum((masses * np.exp(np.maximum(centre - values, -_LARGEST)))[::-1])[::-1]
    lower = lower * np.exp(np.minimum(values - centre, _LARGEST)) * (1 - len(values) * 2.0**-52)
    over = np.flatnonzero(upper - lower > room)
    if not len(over):
        return None if values[0] > 0 else 0.0
    place = min(int(over[-1]) + 1, len(values) - 1)
    if lower[place] <= 0:
        return max(0.0, float(values[place]))
    # Within a cell both sums stay what they are, and the second grows as exp(ε).
    excess = float((upper[place] - lower[place] - room) / lower[place])
    return max(0.0, float(values[place]) + max(-law.step, math.log1p(max(excess, -0.999))))


def _step(parts: Mapping[Part, int], precision: float) -> float:
    """A power of √2, as coarse as the sum's variance allows: a lattice adds at most step²/4 to a loss's, mostly /6."""
    variance, count, least = precision, 1 if precision else 0, 0.0
    for (noise, rate), times in parts.items():
        variance += times * deviation(noise, rate) ** 2
        count += times
        least = max(least, least_step(noise, rate))
    if precision:
        least = max(least, least_step(precision**-0.5, 1.0))
    wanted = math.sqrt(6 * _COARSENESS * variance / count)
    exponent = max(math.floor(2 * math.log2(wanted)), math.ceil(2 * math.log2(least)))
    return math.exp2(exponent / 2)


def _row(loss: Loss) -> Array:
    """What adds up: ends, ln of the finite mass, moments."""
    return np.concatenate([[loss.first, loss.last, math.log1p(-loss.infinite)], loss.moments])


@lru_cache(maxsize=64)
def _transform(noise: float, rate: float, step: float, side: int, order: int, size: int) -> Array:
    """(2, size/2 + 1): the tilted law's transform as ln of its absolute values, and its angles."""
    loss = losses(noise, rate, step)[side]
    with np.errstate(divide="ignore"):
        tilted = np.exp(np.log(loss.masses) + ORDERS[order] * loss.values - loss.moments[order])
    begin = loss.first % size
    padded = np.zeros(-(-(begin + len(tilted)) // size) * size)
    padded[begin : begin + len(tilted)] = tilted
    transformed = np.fft.rfft(padded.reshape(-1, size).sum(axis=0))
    return np.stack([np.log(np.maximum(np.abs(transformed), 1e-300)), np.angle(transformed)])
