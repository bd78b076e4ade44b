"""What integer noise costs: the Rényi divergence of one `LatticeRelease`, before and after sampling.

* n discrete Gaussians of variance σ² each (Kairouz, Liu & Steinke 2021, "The Distributed Discrete Gaussian Mechanism
  for Federated Learning with Secure Aggregation", Proposition 14). Their sum is no discrete Gaussian, but for σ ≥ 1/2
  its log-probabilities are within a range of τ of one, τ = 10·Σ_{k<n} exp(−2π²σ²·k/(k + 1)). With Δ over √n·σ,

      D_α ≤ min(α/2·Δ₂² + τd, α/2·(Δ₂² + 2τΔ₁ + τ²d)).

* Skellam shares (Agarwal, Kairouz & Liu 2021, "The Skellam Mechanism for Differentially Private Federated Learning",
  Theorem 3.5), whose sum is a Skellam variable of variance μ: for whole α ≥ 2,

      D_α ≤ α/2·Δ₂²/μ + min(((2α − 1)Δ₂² + 6Δ₁)/(4μ²), 3Δ₁/(2μ)).

* Poisson sampling at rate γ (Zhu & Wang 2019, "Poisson Subsampled Rényi Differential Privacy", Theorem 5, which asks
  nothing of the mechanism): for whole α ≥ 2,

      (α − 1)·D_α ≤ log(1 + Σ_{l=2…α} C(α, l)·γˡ(1 − γ)^{α−l}·(c_l·e^{(l−1)·D_l} − 1)),   c₂ = 1, later ones 3,

  their formula with 1 taken out of the sum by the binomial theorem, so that small costs keep their digits. It speaks of
  a unit added or removed, so nothing is claimed of units replaced, nor of cohorts of a fixed size.

Between whole orders (α − 1)·D_α is convex in α and 0 at α = 1, so a chord through upper bounds is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.privacy.events import LatticeRelease

Floats = NDArray[np.float64]

_LEAST_VARIANCE = 0.25
"""Of a share, where several discrete Gaussians are summed: the bound on τ is proved from σ = 1/2."""


def renyi(release: LatticeRelease, orders: Sequence[float]) -> list[float]:
    """Rényi divergence of one release at each order, an upper bound, in nats.

    Args:
        release: what was released; more shares than it says only add noise.
        orders: each above 1, whole or not.

    Raises:
        ValueError: an order that is not above 1, or shares of which nothing is known (several discrete Gaussians with
            σ < 1/2).
    """
    for order in orders:
        if not 1 < order < math.inf:
            raise ValueError(f"order {order!r}: a Rényi divergence is bounded at orders above 1")
    bounds = _bounds(release, orders)
    # A divergence rises with the order, which its bounds need not do: each of them holds at all lower orders, too.
    least = math.inf
    for place in sorted(range(len(orders)), key=lambda place: -orders[place]):
        bounds[place] = least = min(least, bounds[place])
    return bounds


def _bounds(release: LatticeRelease, orders: Sequence[float]) -> list[float]:
    """The formulas' own value at each order."""
    curve, whole = _curve(release)
    sampled = release.sampling == "poisson" and release.relation == "add_or_remove_one"
    rate = release.rate if sampled else 1.0
    if rate == 0.0:
        return [0.0] * len(orders)
    if whole:
        return _between(lambda order: _amplified(order, rate, curve), orders)
    plain = [float(value) for value in curve(np.array(orders, dtype=np.float64))]
    if rate == 1.0:
        return plain
    chords = _between(lambda order: _amplified(order, rate, curve), orders)
    return [min(pair) for pair in zip(chords, plain, strict=True)]


def share_variance(noise_multiplier: float, l2: float, shares: int) -> float:
    """σ² of one of so many shares whose sum has standard deviation `noise_multiplier`·`l2`, in squared steps.

    Args:
        noise_multiplier: z, above 0.
        l2: L2 change of the integer sum that one unit makes, in steps, above 0.
        shares: how many the sum holds at least.

    Raises:
        ValueError: one of them is not above 0.
    """
    if not (noise_multiplier > 0 and l2 > 0 and shares >= 1):
        raise ValueError(
            f"noise multiplier {noise_multiplier!r}, L2 change {l2!r}, {shares!r} shares: all must be above 0"
        )
    return (noise_multiplier * l2) ** 2 / shares


def inflation(variance: float, shares: int) -> float:
    """τ: the range of log-probabilities of a sum of discrete Gaussians against the discrete Gaussian of its variance.

    Args:
        variance: σ² of one share, in squared steps; at least 1/4 where there are several.
        shares: how many.

    Raises:
        ValueError: several shares of a smaller variance: no τ is known.
    """
    if shares == 1:
        return 0.0
    if variance < _LEAST_VARIANCE:
        raise ValueError(
            f"a share's variance of {variance:g} squared steps is below {_LEAST_VARIANCE}: sums of such discrete"
            f" Gaussians have no known bound; take finer steps, more noise, or Skellam noise"
        )
    # k/(k + 1) ≥ 1/2 and grows: beyond this many terms all are taken as large as the last one that was computed.
    terms = min(shares - 1, 1_000)
    k = np.arange(1, terms + 1)
    sizes = np.exp(-2 * math.pi**2 * variance * k / (k + 1))
    return 10 * float(sizes.sum() + (shares - 1 - terms) * sizes[-1])


def _curve(release: LatticeRelease) -> tuple[Callable[[Floats], Floats], bool]:
    """The divergence without sampling at an array of orders, and whether it is known at whole ones only."""
    variance = release.variance * release.shares
    l2 = release.l2**2 / variance
    # No vector's L1 norm is larger than √d times its L2 norm.
    l1 = min(release.l1, math.sqrt(release.dimension) * release.l2)

    def skellam(order: Floats) -> Floats:
        fine = ((2 * order - 1) * release.l2**2 + 6 * l1) / (4 * variance**2)
        return order / 2 * l2 + np.minimum(fine, 1.5 * l1 / variance)

    if release.noise == "skellam":
        return skellam, True
    tau = inflation(release.variance, release.shares)
    spread = tau * release.dimension
    cross = l2 + 2 * tau * l1 / math.sqrt(variance) + tau * spread

    def gaussian(order: Floats) -> Floats:
        return np.minimum(order / 2 * l2 + spread, order / 2 * cross)

    return gaussian, False


def _amplified(order: int, rate: float, curve: Callable[[Floats], Floats]) -> float:
    """The divergence at a whole order of at least 2 where each unit is in with probability `rate`, above 0."""
    plain = float(curve(np.array([float(order)]))[0])
    if rate == 1.0:
        return plain
    steps = np.arange(1, order + 1, dtype=np.float64)
    log_binomial = np.cumsum(np.log((order - steps + 1) / steps))
    chance = log_binomial + steps * math.log(rate) + (order - steps) * math.log1p(-rate)
    loss = (steps[1:] - 1) * curve(steps[1:])
    factor = np.where(steps[1:] > 2, 3.0, 1.0)
    # log(c·eˣ − 1), without eˣ: it would overflow.
    with np.errstate(divide="ignore"):
        grown = loss + np.log((factor - 1) - np.expm1(-loss))
    excess = np.logaddexp.reduce(chance[1:] + grown)
    # A mixture of the two outputs is no further from one of them than they are from each other.
    return min(plain, float(np.logaddexp(0.0, excess)) / (order - 1))


def _between(at: Callable[[int], float], orders: Sequence[float]) -> list[float]:
    """Upper bounds at any orders from those at whole ones, by chords of (α − 1)·D_α."""
    known: dict[int, float] = {1: 0.0}

    def scaled(order: int) -> float:
        if order not in known:
            known[order] = (order - 1) * at(order)
        return known[order]

    found = []
    for order in orders:
        below = math.floor(order)
        part = order - below
        value = (1 - part) * scaled(below) + (part * scaled(below + 1) if part else 0.0)
        found.append(value / (order - 1))
    return found
