"""The accountant over privacy random variables, as Opacus has it.

Gopi, Lee & Wutschitz 2021, "Numerical Composition of Differential Privacy": losses are truncated, put on a mesh with
the right mean, and convolved; the error of ε is bounded and added. Opacus's implementation takes a removed unit's loss
only (Proposition B.1), and composes afresh at each question: seconds where there are many releases. It is here as a
second, independent opinion on `pld`; choose that for runs.

Gaussian noise only, sampled by Poisson's coins or not at all. Gaussians that claim no sampling come to one with
1/z² = Σ 1/zᵢ², and alone to a closed form (Balle & Wang 2018, "Improving the Gaussian Mechanism for Differential
Privacy", Theorem 8).
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from opacus.accountants import PRVAccountant

from strategies.privacy.composition import require_delta, require_epsilon
from strategies.privacy.pld import PLD, gaussian_delta, gaussian_epsilon

_LEAST_DELTA = 1e-10
"""Below it Opacus's sums have no digits left."""


class PRV(PLD):
    """Composes by Opacus, with its default errors: ε is at most 0.02 above the truth."""

    name = "prv"

    def epsilon(self, delta: float) -> float:
        """Opacus's upper bound; 0 before the first release.

        Raises:
            ValueError: δ is not between 0 and 1, or Opacus can't compose so much at so small a δ.
        """
        require_delta(delta)
        mu = math.sqrt(self._precision)
        if not self._parts:
            return gaussian_epsilon(mu, delta)
        accountant = PRVAccountant()
        accountant.history = [(*part, count) for part, count in self._parts.items()]
        if mu:
            accountant.history.append((1 / mu, 1.0, 1))
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter(
                    "ignore"
                )  # overflows beyond its mesh, and advice on its own RDP orders
                found = float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError, MemoryError, IndexError) as error:
            raise ValueError(
                f"Opacus can't compose these releases at delta = {delta:g} ({error}): set privacy.accountant=pld"
            ) from error
        if not math.isfinite(found):
            raise ValueError(
                f"Opacus finds no epsilon at delta = {delta:g}: set privacy.accountant=pld"
            )
        return max(0.0, found)

    def delta(self, epsilon: float) -> float:
        """The least δ from 1e-10 to 1 whose ε is at most that, to a per cent, by bisection; 0 before the first release.

        Raises:
            ValueError: ε is below 0 or infinite, or Opacus can't compose so much.
        """
        require_epsilon(epsilon)
        if not self._parts:
            return gaussian_delta(math.sqrt(self._precision), epsilon)
        low, high = math.log(_LEAST_DELTA), 0.0
        while high - low > 0.01:
            middle = (low + high) / 2
            if self.epsilon(math.exp(middle)) > epsilon:
                low = middle
            else:
                high = middle
        return math.exp(high)
