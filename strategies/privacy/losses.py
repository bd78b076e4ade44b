"""The privacy loss of one sampled Gaussian release, on a lattice, never below the truth.

A unit is in with probability q; with it the release is P = (1 − q)·N(0, z²) + q·N(1, z²), without it Q = N(0, z²), in
units of its sensitivity (Abadi et al. 2016, "Deep Learning with Differential Privacy", Lemma 3: one dimension is
enough). Removing the unit has the loss L = ln dP/dQ under P, adding it −L under Q; P and Q dominate under composition
(Zhu, Dong & Wang 2022, "Optimal Accounting of Differential Privacy via Characteristic Function", Theorem 11).

Losses between two points of the lattice go to both, such that the probability of their cell stays what it is under P
and under Q. This gives the least curve δ(ε) above the true one among all laws on the lattice (Doroshenko, Ghazi,
Kamath, Kumar & Manurangsi 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions",
Algorithm 1; computed here from the cells' probabilities, not from differences of δ, which lose digits). What lies
beyond the lattice goes up to its lower end, or to infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]

ORDERS: Array = np.concatenate(
    [-(2.0 ** np.arange(6, -5, -1)), [0.0], 2.0 ** np.arange(-8, 17.25, 0.25)]
)
"""At which orders θ the moments ln E[exp(θL)] are known, in ascending order."""

_REACH = 10.0
"""How many standard deviations the lattice spans to either side: 8e-24 of a Gaussian's mass lies beyond each."""

_MOST_POINTS = 2**18


@dataclass(frozen=True, eq=False)
class Loss:
    """A law of losses on the points (first + i)·step.

    Attributes:
        step: distance of neighbouring points, in nats.
        first: the lowest point, in steps.
        masses: (n,) probabilities.
        infinite: the probability of an infinite loss.
    """

    step: float
    first: int
    masses: Array
    infinite: float

    @property
    def last(self) -> int:
        """The highest point, in steps."""
        return self.first + len(self.masses) - 1

    @property
    def values(self) -> Array:
        """(n,) losses of the points."""
        return np.arange(self.first, self.last + 1, dtype=np.float64) * np.float64(self.step)

    @cached_property
    def moments(self) -> Array:
        """Cumulants ln Σ mass·exp(θ·loss) at each of `ORDERS`."""
        some = self.masses > 0
        logs, values = np.log(self.masses[some]), self.values[some]
        moments = np.empty(len(ORDERS))
        for number, order in enumerate(ORDERS):
            exponents = logs + order * values
            top = float(exponents.max())
            moments[number] = top + math.log(float(np.exp(exponents - top).sum()))
        return moments


@lru_cache(maxsize=128)
def losses(noise: float, rate: float, step: float) -> tuple[Loss, Loss]:
    """Of a unit that is removed, and of one that is added.

    Args:
        noise: z, the noise's standard deviation over the sensitivity, above 0.
        rate: q, above 0 and at most 1.
        step: of the lattice, in nats; at least `least_step`.
    """
    lowest, highest = _span(noise, rate)
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    points: Array = np.arange(first, last + 1, dtype=np.float64) * np.float64(step)
    edges = _outcome(points, noise, rate)  # the output at which the loss is the point
    without = _between(edges / noise)
    with_unit = (1 - rate) * without + rate * _between((edges - 1) / noise)
    below, above = float(ndtr(edges[0] / noise)), float(ndtr(-edges[-1] / noise))
    below_with = (1 - rate) * below + rate * float(ndtr((edges[0] - 1) / noise))
    above_with = (1 - rate) * above + rate * float(ndtr((1 - edges[-1]) / noise))
    removed = _divided(with_unit, without, points[:-1], step)
    removed[0] += below_with
    added = _divided(without[::-1], with_unit[::-1], -points[:0:-1], step)
    added[0] += above
    return Loss(step, first, removed, above_with), Loss(step, -last, added, below)


@lru_cache(maxsize=4096)
def deviation(noise: float, rate: float) -> float:
    """Standard deviation of the loss of a removed unit, in nats, to a few per cent."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    weights = weights / weights.sum()
    outputs = noise * nodes
    values = np.concatenate([_loss(outputs, noise, rate), _loss(outputs + 1, noise, rate)])
    masses = np.concatenate([(1 - rate) * weights, rate * weights])
    mean = float(masses @ values)
    return math.sqrt(float(masses @ (values - mean) ** 2))


def least_step(noise: float, rate: float) -> float:
    """The step below which the lattice would have more than 2¹⁸ points."""
    lowest, highest = _span(noise, rate)
    return (highest - lowest) / _MOST_POINTS


def _span(noise: float, rate: float) -> tuple[float, float]:
    """The losses at the ends of what outputs are looked at."""
    ends = _loss(np.array([-_REACH * noise, 1 + _REACH * noise]), noise, rate)
    return float(ends[0]), float(ends[1])


def _loss(outputs: Array, noise: float, rate: float) -> Array:
    """Ln dP/dQ."""
    exponents = math.log(rate) + (2 * outputs - 1) / (2 * noise**2)
    out: Array = np.logaddexp(_log_rest(rate), exponents)
    return out


def _outcome(points: Array, noise: float, rate: float) -> Array:
    """The output with that loss; −∞ where every output has a larger one."""
    # What overflows under little noise is where the branch below takes the other value.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # ln(exp(ε) − (1 − q)), without loss of digits where ε is small, and without overflow where it is large
        logs = points + np.log(-np.expm1(_log_rest(rate) - points))
    logs = np.where(points > _log_rest(rate), logs, -np.inf)
    return noise**2 * (logs - math.log(rate)) + 0.5


def _log_rest(rate: float) -> float:
    return math.log1p(-rate) if rate < 1 else -math.inf


def _between(edges: Array) -> Array:
    """A standard Gaussian's probabilities between neighbouring edges, each from its nearer tail."""
    lower, upper = edges[:-1], edges[1:]
    out: Array = np.where(lower > 0, ndtr(-lower) - ndtr(-upper), ndtr(upper) - ndtr(lower))
    return out


def _divided(upper: Array, lower: Array, begins: Array, step: float) -> Array:
    """Each cell's probability divided between its two ends.

    Args:
        upper: (n,) probabilities of the cells under the law whose losses these are.
        lower: (n,) probabilities under the other law.
        begins: (n,) losses at the cells' lower ends; they go up by `step`.
        step: of the lattice.

    Returns:
        (n + 1,) probabilities of the points.
    """
    with np.errstate(divide="ignore"):
        other = np.exp(np.log(lower) + begins)
    # a + b = upper and a·exp(−begin) + b·exp(−begin − step) = lower; where digits are lost, within what is possible
    ends = np.clip((upper - other) / -math.expm1(-step), 0.0, upper)
    masses = np.zeros(len(upper) + 1)
    masses[:-1] = upper - ends
    masses[1:] += ends
    return masses
