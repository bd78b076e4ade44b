"""How much less an update counts for the versions that its client's model was behind.

s(τ) of Xie, Koyejo & Gupta 2019, "Asynchronous Federated Optimization", §5.2, which FedBuff takes over.

A function of one's own is a subclass of `Staleness` with one method, named by `scheduler.staleness._target_`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from strategies.ranges import Ranged


@dataclass(frozen=True)
class Staleness(Ranged, ABC):
    """A weight in [0, 1] for each staleness."""

    @abstractmethod
    def weight(self, staleness: int) -> float:
        """s(τ) for τ ≥ 0 model versions."""

    def checked(self, staleness: int) -> float:
        """The same; raises `ValueError` for a weight outside [0, 1], which would void bounds and sensitivities."""
        weight = float(self.weight(staleness))
        if not 0 <= weight <= 1:
            raise ValueError(
                f"{type(self).__name__} weighs a staleness of {staleness} by {weight:g}, which is not in [0, 1]"
            )
        return weight


@dataclass(frozen=True)
class Constant(Staleness):
    """All alike."""

    def weight(self, staleness: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Polynomial(Staleness):
    """(1 + τ)^−α.

    Attributes:
        alpha: α; with 1/2, the default and FedBuff's, an update that is fresh counts 2.4 times one of τ = 5.
    """

    alpha: Annotated[float, Ge(0)] = 0.5

    def weight(self, staleness: int) -> float:
        """(1 + τ)^−α."""
        return float((1 + staleness) ** -self.alpha)


@dataclass(frozen=True)
class Hinge(Staleness):
    """1 up to `grace` versions, then 1 / (1 + slope · (τ − grace)).

    Xie et al. write 1 / (a (τ − b) + 1), the same.

    Attributes:
        slope: a.
        grace: b, versions that cost nothing.
    """

    slope: Annotated[float, Ge(0)] = 1.0
    grace: Annotated[int, Ge(0)] = 2

    def weight(self, staleness: int) -> float:
        """As the class says."""
        return 1.0 / (1.0 + self.slope * max(0, staleness - self.grace))
