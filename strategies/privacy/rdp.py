"""The Rényi accountant: divergences at many orders, which add up, and the (ε, δ) that follow.

Mironov 2017, "Rényi Differential Privacy", Proposition 1 (composition); the conversion is Proposition 12 of Canonne,
Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy". The divergence of one release:

* Gaussian noise, Poisson sampling: Mironov, Talwar & Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian
  Mechanism", §3.3; neighbours by adding or removing one.
* Gaussian noise, cohorts of a fixed size: Wang, Balle & Kasiviswanathan 2019, "Subsampled Rényi Differential Privacy
  and Analytical Moments Accountant", Theorem 27; neighbours by replacing one. Under adding or removing one nothing is
  known, so nothing is claimed.
* Integer noise: `strategies.privacy.lattice`.

Orders, divergences of Gaussian noise and the conversion are dp_accounting's, of which this is a cache: one release's
divergences are found once, and a thousand releases of them are a product.
"""

from __future__ import annotations

import logging
from fractions import Fraction
from functools import lru_cache

import numpy as np
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
)
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import (
    DEFAULT_RDP_ORDERS,
    compute_delta,
    compute_epsilon,
)
from numpy.typing import NDArray

from strategies.privacy.composition import Composition, require_delta, require_epsilon
from strategies.privacy.events import GaussianRelease, Relation, Release
from strategies.privacy.lattice import renyi

_ORDERS: NDArray[np.float64] = np.array(DEFAULT_RDP_ORDERS, dtype=np.float64)


class RDP(Composition):
    """Composes divergences at dp_accounting's default orders (1.1 … 1024)."""

    name = "rdp"

    def __init__(self, relation: Relation = "add_or_remove_one") -> None:
        super().__init__(relation)
        self._divergence: NDArray[np.float64] | None = None

    def epsilon(self, delta: float) -> float:
        """The least ε over all orders; 0 before the first release.

        Raises:
            ValueError: δ is not between 0 and 1.
        """
        require_delta(delta)
        if self._divergence is None:
            return 0.0
        return float(compute_epsilon(_ORDERS, self._divergence, delta)[0])

    def delta(self, epsilon: float) -> float:
        """The least δ over all orders; 0 before the first release.

        Raises:
            ValueError: ε is below 0 or infinite.
        """
        require_epsilon(epsilon)
        if self._divergence is None:
            return 0.0
        return float(compute_delta(_ORDERS, self._divergence, epsilon)[0])

    def _compose(self, release: Release, count: int) -> None:
        one = count * _divergences(release)
        self._divergence = one if self._divergence is None else self._divergence + one


@lru_cache(maxsize=4096)
def _divergences(release: Release) -> NDArray[np.float64]:
    """Of one release, at each order, in nats."""
    if isinstance(release, GaussianRelease):
        return _gaussian(release)
    return np.array(renyi(release, _ORDERS.tolist()), dtype=np.float64)


def _gaussian(release: GaussianRelease) -> NDArray[np.float64]:
    event = GaussianDpEvent(release.noise_multiplier)
    if release.sampling == "poisson":
        event = PoissonSampledDpEvent(release.rate, event)
    elif release.sampling == "fixed":
        share = Fraction(
            release.rate
        )  # exact: the event wants two whole numbers, and divides them again
        event = SampledWithoutReplacementDpEvent(share.denominator, share.numerator, event)
    relation = NeighboringRelation[release.relation.upper()]
    accountant = RdpAccountant(orders=_ORDERS, neighboring_relation=relation)
    log = logging.getLogger("absl")
    log.addFilter(_converged)  # an order that does not converge is left out: infinite
    try:
        accountant.compose(event)
    finally:
        log.removeFilter(_converged)
    return np.asarray(accountant.rdp, dtype=np.float64)


def _converged(record: logging.LogRecord) -> bool:
    return "failed to converge" not in record.msg
