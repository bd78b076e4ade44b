"""Model poisoning by clients that know nothing of one another.

Sign flip and Gaussian noise are the baselines of Blanchard et al. 2017, "Machine Learning with Adversaries", §5;
scaling is model replacement's boost (Bagdasaryan et al. 2020, "How To Backdoor Federated Learning", eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Gt

from strategies.attacks.attack import Attack
from strategies.update import Vector


@dataclass(frozen=True)
class SignFlip(Attack):
    """−scale times the honest update.

    Attributes:
        scale: how much longer than the honest one.
    """

    scale: Annotated[float, Gt(0)] = 1.0

    def lie(self, vector: Vector, rng: np.random.Generator) -> Vector:
        """−scale·x."""
        return vector * np.float32(-self.scale)


@dataclass(frozen=True)
class Gaussian(Attack):
    """Noise in place of the update.

    Attributes:
        sigma: standard deviation of each element.
    """

    sigma: Annotated[float, Gt(0)] = 1.0

    def lie(self, vector: Vector, rng: np.random.Generator) -> Vector:
        """N(0, σ²·I)."""
        return rng.standard_normal(vector.size, np.float32) * np.float32(self.sigma)


@dataclass(frozen=True)
class Scaling(Attack):
    """The honest update, much longer.

    Attributes:
        factor: how many times.
    """

    factor: Annotated[float, Gt(0)] = 1000.0

    def lie(self, vector: Vector, rng: np.random.Generator) -> Vector:
        """factor·x."""
        return vector * np.float32(self.factor)


@dataclass(frozen=True)
class Zero(Attack):
    """Nothing at all, with the weight of an honest update."""

    def lie(self, vector: Vector, rng: np.random.Generator) -> Vector:
        """Zeros."""
        return np.zeros_like(vector)


@dataclass(frozen=True)
class NotANumber(Attack):
    """NaN in every element, or infinities: what poisons a mean for good, unless the server looks.

    Attributes:
        infinite: +∞ in place of NaN.
    """

    infinite: bool = False

    def lie(self, vector: Vector, rng: np.random.Generator) -> Vector:
        """NaN or +∞."""
        return np.full_like(vector, np.inf if self.infinite else np.nan)
