"""The accountant over privacy loss distributions: losses of releases add up, so their laws are convolved.

Meiser & Mohammadi 2018, "Tight on Budget? Tight Bounds for r-Fold Approximate Differential Privacy"; Koskela, Jälkö &
Honkela 2020, "Computing Tight Differential Privacy Guarantees Using FFT". δ(ε) = E[(1 − exp(ε − L))₊] of the sum L.

* Gaussian releases that claim no sampling come to one Gaussian with 1/z² = Σ 1/zᵢ², whose δ(ε) is a closed form (Balle
  & Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", Theorem 8; Dong, Roth & Su 2022, "Gaussian
  Differential Privacy", Corollary 3.3).
* Poisson-sampled ones are laws on a lattice, never below the truth (`losses.py`), convolved by Fourier transforms in a
  window around ε (`sums.py`).

Integer noise has no law here: `rdp` knows it. Cohorts of a fixed size are taken as if everyone were in.
"""

from __future__ import annotations

import math
from typing import Self

from scipy.special import log_ndtr

from strategies.privacy.composition import Composition, require_delta, require_epsilon
from strategies.privacy.events import GaussianRelease, Relation, Release
from strategies.privacy.sums import Part, Sum

_MOST_KINDS = 64
"""With more kinds of releases than these, such as are nearly alike are taken as alike."""

_NOISES, _RATES = 256, 4096
"""How many noise multipliers and rates an octave then has: they are 0.3 % and 0.02 % apart."""


class PLD(Composition):
    """Composes the laws of losses; an upper bound within a few tenths of a per cent of ε."""

    name = "pld"

    def __init__(self, relation: Relation = "add_or_remove_one") -> None:
        super().__init__(relation)
        self._precision = 0.0  # Σ 1/z² of what claims no sampling
        self._parts: dict[Part, int] = {}
        self._coarse: dict[Part, int] = {}
        self._sums = (Sum(0), Sum(1))

    def fork(self) -> Self:
        """An accountant of its own with the same releases."""
        other = super().fork()
        other._parts, other._coarse = dict(self._parts), dict(self._coarse)
        other._sums = (self._sums[0].copy(), self._sums[1].copy())
        return other

    def epsilon(self, delta: float) -> float:
        """The larger of the ε of adding and of removing a unit; 0 before the first release.

        Raises:
            ValueError: δ is not between 0 and 1.
        """
        require_delta(delta)
        if not self._parts:
            return gaussian_epsilon(math.sqrt(self._precision), delta)
        return max(one.epsilon(self._kinds, self._precision, delta) for one in self._sums)

    def delta(self, epsilon: float) -> float:
        """The larger of the δ of adding and of removing a unit; 0 before the first release.

        Raises:
            ValueError: ε is below 0 or infinite.
        """
        require_epsilon(epsilon)
        if not self._parts:
            return gaussian_delta(math.sqrt(self._precision), epsilon)
        return max(one.delta(self._kinds, self._precision, epsilon) for one in self._sums)

    @property
    def _kinds(self) -> dict[Part, int]:
        return self._parts if len(self._parts) <= _MOST_KINDS else self._coarse

    def _compose(self, release: Release, count: int) -> None:
        if not isinstance(release, GaussianRelease):
            raise ValueError(
                f"the accountant {self.name!r} knows Gaussian noise only, not {release.noise}: set"
                f" privacy.accountant=rdp"
            )
        if release.sampling != "poisson":
            self._precision += count / release.noise_multiplier**2
        elif release.rate > 0:
            part = (release.noise_multiplier, release.rate)
            self._parts[part] = self._parts.get(part, 0) + count
            dearer = _dearer(part)
            self._coarse[dearer] = self._coarse.get(dearer, 0) + count


def _dearer(part: Part) -> Part:
    """The next kind that costs no less: noise can be added afterwards, and a unit be left out by a further coin."""
    noise, rate = part
    return (
        math.exp2(math.floor(math.log2(noise) * _NOISES) / _NOISES),
        min(1.0, math.exp2(math.ceil(math.log2(rate) * _RATES) / _RATES)),
    )


def gaussian_delta(mu: float, epsilon: float) -> float:
    """δ(ε) of one Gaussian release with noise multiplier 1/mu, ε ≥ 0."""
    if mu == 0:
        return 0.0
    upper = float(log_ndtr(mu / 2 - epsilon / mu))
    lower = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return 0.0 if lower >= upper else math.exp(upper) * -math.expm1(lower - upper)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least ε ≥ 0 with δ(ε) ≤ δ of one Gaussian release with noise multiplier 1/mu, to twelve digits, above it."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = (
        0.0,
        mu**2 / 2 + mu * math.sqrt(-2 * math.log(delta)),
    )  # Φ's tail at `high` is δ at most
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if gaussian_delta(mu, middle) > delta:
            low = middle
        else:
            high = middle
    return high
