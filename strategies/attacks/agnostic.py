"""Attacks that need not know the server's rule: as far from the mean of the honest as an honest client could be.

Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
Federated Learning", their AGR-agnostic attacks: attackers send ∇m = mean + γ·∇p with the largest γ that keeps a
constraint on distances to the honest, found by the halving search of Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import numpy as np
from annotated_types import Gt
from numpy.typing import NDArray

from strategies.attacks.omniscient import Omniscient, Sight, against, blocks, length
from strategies.update import Vector

_ROUNDING: Final = 2.0**-22
"""Of a vector's length: more than rounding it to float32 moves it."""
_TRUST: Final = 1 - 1e-9
"""Of a bound: what the arithmetic of the distances is trusted with."""


@dataclass(frozen=True)
class _Agnostic(Omniscient):
    """What Min-Max and Min-Sum share.

    Attributes:
        direction: ∇p: `std`, minus the standard deviation by coordinate; `unit`, minus the mean at length 1; `sign`,
            minus the mean's signs.
        gamma_init: where the search begins; it ends below twice that.
        tolerance: the γ found is no further below the largest (τ).
    """

    direction: Literal["std", "unit", "sign"] = "std"
    gamma_init: Annotated[float, Gt(0)] = 10.0
    tolerance: Annotated[float, Gt(0)] = 1e-5

    def craft(self, rows: Sequence[Vector], seen: Sight) -> Vector:
        """Mean + γ·∇p, rounded to float32, for which the constraint still holds."""
        swarm = _Swarm.of(rows, self.direction)
        bound = self._bound(swarm) * _TRUST

        def holds(gamma: float) -> bool:
            return self._measured(swarm.distances(gamma)) <= bound

        if not holds(
            0.0
        ):  # the honest agree to the last bit: there is room for one of themselves only
            return rows[0]
        gamma = largest(holds, self.gamma_init, self.tolerance)
        return (swarm.mean + gamma * swarm.push).astype(np.float32)

    def _bound(self, swarm: _Swarm) -> float:
        """What no honest client exceeds."""
        raise NotImplementedError

    def _measured(self, distances: NDArray[np.float64]) -> float:
        """The same of a vector, by its (n,) distances to the honest."""
        raise NotImplementedError


@dataclass(frozen=True)
class MinMax(_Agnostic):
    """No further from any honest client than two of them are from each other: the paper's Min-Max.

    max_i ‖∇m − ∇_i‖ ≤ max_{i,j} ‖∇_i − ∇_j‖.
    """

    def _bound(self, swarm: _Swarm) -> float:
        return float(np.sqrt(swarm.squares.max()))

    def _measured(self, distances: NDArray[np.float64]) -> float:
        return float(distances.max())


@dataclass(frozen=True)
class MinSum(_Agnostic):
    """In sum no further from the honest clients than one of them is: the paper's Min-Sum.

    Σ_i ‖∇m − ∇_i‖² ≤ max_i Σ_j ‖∇_i − ∇_j‖².
    """

    def _bound(self, swarm: _Swarm) -> float:
        return float(swarm.squares.sum(1).max())

    def _measured(self, distances: NDArray[np.float64]) -> float:
        return float(distances @ distances)


@dataclass(frozen=True)
class _Swarm:
    """Honest vectors by their inner products, so that a distance costs no pass over their d coordinates.

    Attributes:
        mean: (d,) float64.
        push: ∇p, (d,) float64.
        squares: (n, n) squared distances among the honest.
        along: (n,) inner products of ∇p with each honest vector's offset from the mean.
        offsets: (n,) squared lengths of these offsets.
        height: length of the mean.
        reach: length of ∇p.
    """

    mean: NDArray[np.float64]
    push: NDArray[np.float64]
    squares: NDArray[np.float64]
    along: NDArray[np.float64]
    offsets: NDArray[np.float64]
    height: float
    reach: float

    @classmethod
    def of(cls, rows: Sequence[Vector], direction: str) -> _Swarm:
        """One pass over the vectors. Products of offsets, not of the vectors, lose nothing where these are near."""
        mean, push = np.empty(rows[0].size), np.empty(rows[0].size)
        gram, along = np.zeros((len(rows), len(rows))), np.zeros(len(rows))
        for part, block in blocks(rows):
            mean[part] = block.mean(0)
            if direction == "std":
                push[part] = -block.std(0)
            else:
                push[part] = -np.sign(mean[part]) if direction == "sign" else -mean[part]
            block -= mean[part]
            gram += block @ block.T
            along += against(block, push[part])
        height, reach = length(mean), length(push)
        if direction == "unit" and reach:
            push /= reach
            along /= reach
            reach = 1.0
        offsets = gram.diagonal()
        squares = np.maximum(offsets[:, None] + offsets - 2 * gram, 0)
        np.fill_diagonal(squares, 0)
        return cls(mean, push, squares, along, offsets, height, reach)

    def distances(self, gamma: float) -> NDArray[np.float64]:
        """(n,) upper limits on the distances of mean + γ·∇p, once rounded to float32, to each honest vector."""
        squares = self.offsets - 2 * gamma * self.along + (gamma * self.reach) ** 2
        rounding = _ROUNDING * (self.height + gamma * self.reach)
        found: NDArray[np.float64] = np.sqrt(np.maximum(squares, 0)) + rounding
        return found


def largest(holds: Callable[[float], bool], start: float, tolerance: float) -> float:
    """Algorithm 1: the largest γ in [0, 2·start) found to hold, by steps that halve; 0 where none is.

    Args:
        holds: true below some γ and false above.
        start: γ_init.
        tolerance: τ.
    """
    found, gamma, step = 0.0, start, start
    while abs(found - gamma) > tolerance:
        step /= 2
        if holds(gamma):
            found, gamma = gamma, gamma + step
        else:
            gamma -= step
    return found
