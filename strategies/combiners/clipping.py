"""Rules that shorten what lies too far away: centred clipping and norm bounding.

Both are means of clipped updates, so each has a sensitivity where its bound is fixed and its denominator is the cohort.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt

from strategies.combiners.distances import distances_to
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.contract import Claim, Visibility
from strategies.state import State, array_like, mapping_in
from strategies.update import MAXIMUM_SECTIONS, Update, Vector

Denominator = Literal["replies", "cohort"]
_MARGIN = 1e-5
"""Far more than float32 distances and weights can be wrong by."""


def clipped_mean(
    rows: Rows, centre: Vector | None, bound: float | None, denominator: int | None = None
) -> Vector:
    """The mean of updates clipped round a centre: c + Σᵢ (xᵢ − c)·min(1, τ/‖xᵢ − c‖) / denominator, (d,) float32.

    Args:
        rows: n updates x.
        centre: c, (d,); None for the origin.
        bound: τ; None for the median of the distances ‖xᵢ − c‖, which a majority of honest clients keeps among theirs.
        denominator: the cohort that was planned; n where it is None.
    """
    distances = distances_to(rows, centre)
    tau = float(np.median(distances)) if bound is None else bound
    scales = np.divide(tau, distances, out=np.ones(rows.n), where=distances > tau)
    if denominator is not None:  # a promise: rounding may not lift a clipped update above its bound
        scales *= 1 - _MARGIN
    weights = scales / (rows.n if denominator is None else denominator)
    mean = rows.combined(weights)
    if centre is not None:
        mean += np.float32(1 - weights.sum()) * centre
    return mean


def sensitivity(claim: Claim, bound: float | None, denominator: Denominator) -> float | None:
    """How far one client can move a mean of vectors clipped to one bound, None where it can by any length."""
    if bound is None or denominator != "cohort" or claim.cohort is None:
        return None
    if claim.visibility is not Visibility.EACH:  # one client moves its whole group's sum
        return None
    if claim.sections & MAXIMUM_SECTIONS:
        return None
    if claim.adaptive:  # noise follows the clip, and this bound does not
        return None
    return (2 if claim.sampling == "fixed" else 1) * bound / claim.cohort


@dataclass
class CenteredClipping(Robust):
    """Steps from the last aggregate towards the mean of updates clipped round it. Needs n > 2f.

    Karimireddy, He & Jaggi 2021, "Learning from History for Byzantine Robust Optimization", eq. (CC): v ← v + mean of
    (xᵢ − v)·min(1, τ/‖xᵢ − v‖). The paper's clients send momenta (`client.worker_momentum=0.9`).

    Attributes:
        tau: τ, in the units of the parameters; None for the median distance of the round, which is no fixed bound.
        iterations: steps a round, each round the point that the last one came to.
        denominator: what a step divides by: those who replied, or the cohort planned, which a sensitivity needs.
    """

    tau: Annotated[float, Gt(0)] | None = None
    iterations: Annotated[int, Ge(1)] = 1
    denominator: Denominator = "replies"
    _centre: dict[str, Vector] = field(default_factory=dict, init=False, repr=False)

    label: ClassVar[str] = "centred clipping"

    def least(self, f: int) -> int:
        """2f + 1: a majority is honest. With a fixed denominator 1, since a void round would tell who replied."""
        return 1 if self.denominator == "cohort" else 2 * f + 1

    def states(self, claim: Claim) -> Claim:
        """One step round the last aggregate moves by τ / cohort for one client more or less.

        By twice that for one whose update is there or zeros, as where nothing is said of sampling: zeros lie as far
        from the centre as it is long. The last aggregate must be what was released: a mechanism's noise goes on
        before `Pipeline.applied`.
        """
        found = sensitivity(claim, self.tau, self.denominator) if self.iterations == 1 else None
        if found is not None and claim.sampling == "uncontrolled":
            found *= 2
        return claim.given(self, denominator=self.denominator, sensitivity=found)

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        denominator = None if self.denominator == "replies" else side.planned
        centre = None if side.centre is None else np.concatenate(side.centre)
        for _ in range(self.iterations):
            centre = clipped_mean(rows, centre, self.tau, denominator)
        assert centre is not None  # one iteration at least
        return centre

    def memory(self) -> Mapping[str, Vector] | None:
        """The last aggregate that became part of the model."""
        return self._centre or None

    def learn(self, aggregate: Update) -> None:
        """Keeps the aggregate as the next round's centre."""
        self._centre = {
            name: section.vector
            for name, section in aggregate.sections.items()
            if name not in MAXIMUM_SECTIONS
        }

    def state_dict(self) -> State:
        """The centre."""
        return {"centre": dict(self._centre)}

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's centre."""
        centre = mapping_in(state, "centre")
        self._centre = {
            name: array_like(centre, name, np.empty(np.shape(value), np.float32))  # type: ignore[misc, arg-type]
            for name, value in centre.items()
        }


@dataclass
class NormBounding(Robust):
    """The mean of updates scaled down to a norm (Sun et al. 2019, "Can You Really Backdoor Federated Learning?", §4).

    Attributes:
        bound: the norm, in the units of the parameters; None for the median norm of the round, which is no fixed bound.
        denominator: as of `CenteredClipping`.
    """

    bound: Annotated[float, Gt(0)] | None = None
    denominator: Denominator = "replies"

    label: ClassVar[str] = "norm bounding"

    def least(self, f: int) -> int:
        """2f + 1: the median norm must be an honest one. With a fixed denominator 1, as of `CenteredClipping`."""
        return 1 if self.denominator == "cohort" else 2 * f + 1

    def states(self, claim: Claim) -> Claim:
        """With a fixed bound it is the mean of a clip."""
        found = sensitivity(claim, self.bound, self.denominator)
        return claim.given(self, denominator=self.denominator, sensitivity=found)

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        denominator = None if self.denominator == "replies" else side.planned
        return clipped_mean(rows, None, self.bound, denominator)
