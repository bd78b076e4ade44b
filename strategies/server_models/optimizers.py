"""Server optimisers: how the mean change of the clients moves the model.

Adaptive ones follow Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2 (no bias correction there);
momentum follows Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", §4 (FedAvgM).
All work in place on float64 vectors. The aggregate Δ points the way the model should go: it is added, not subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from strategies.contract import Claim, ContractError, name_of
from strategies.ranges import Ranged
from strategies.state import State, array_in
from strategies.update import Update, Vector

Rate = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0), Lt(1)]


class ServerOptimizer(Protocol):
    """Turns an aggregate into a step on the parameters."""

    @property
    def sections(self) -> tuple[str, ...]:
        """Sections beyond the model's own that each update must carry, laid out like the parameters."""
        ...

    def check(self, claim: Claim) -> Claim:
        """Folds the contract."""
        ...

    def begin(self, size: int) -> None:
        """Zero state for (size,) parameters."""
        ...

    def step(self, parameters: NDArray[np.float64], aggregate: Update) -> None:
        """Moves the (d,) float64 parameters in place."""
        ...

    def broadcast(self) -> Mapping[str, Vector]:
        """Vectors that travel down with the model."""
        ...

    def state_dict(self) -> State:
        """Moments and the like."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Takes them up; raises `ValueError` for another optimiser's."""
        ...


@dataclass
class OptimizerBase(Ranged):
    """What the optimisers share: named float64 vectors of state, all of the parameters' size."""

    _slots: dict[str, NDArray[np.float64]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    slot_names: ClassVar[tuple[str, ...]] = ()

    @property
    def sections(self) -> tuple[str, ...]:
        """None: the change of the parameters is enough."""
        return ()

    def check(self, claim: Claim) -> Claim:
        """Post-processing of the aggregate: promises nothing new, and refuses one that takes the model to a point.

        Raises:
            ContractError: the combiner's aggregate makes sense as a step of exactly 1 alone.
        """
        if claim.replaced and not self.exact:
            raise ContractError(
                claim.source("replaced"),
                name_of(self),
                "the aggregate is the way to new factors, and any other step along it leads to a product of neither",
                "use server=sgd with server.lr=1 and server.momentum=0",
            )
        return claim

    @property
    def exact(self) -> bool:
        """Whether a step adds the aggregate as it is."""
        return False

    def begin(self, size: int) -> None:
        """Zero state for (size,) parameters."""
        self._slots = {name: np.zeros(size) for name in self.slot_names}

    def broadcast(self) -> Mapping[str, Vector]:
        """Nothing beside the model."""
        return {}

    def state_dict(self) -> State:
        """The optimiser's kind and its vectors."""
        return {"kind": name_of(self), **self._slots}

    def load_state_dict(self, state: State) -> None:
        """Takes up the vectors of the same kind of optimiser.

        Raises:
            ValueError: the state is another optimiser's, or of another size.
        """
        if state.get("kind") != name_of(self):
            raise ValueError(
                f"the state is that of {state.get('kind')!r}, the server optimiser is {name_of(self)!r}"
            )
        self._slots = {
            name: array_in(state, name, slot.shape) for name, slot in self._slots.items()
        }


@dataclass
class SGD(OptimizerBase):
    """x ← x + lr·v with v ← momentum·v + Δ: FedAvg with lr = 1 and no momentum, FedAvgM with it.

    Attributes:
        lr: the server's learning rate η.
        momentum: β in [0, 1).
    """

    lr: Rate = 1.0
    momentum: Decay = 0.0

    label = "server SGD"

    @property
    def exact(self) -> bool:
        """With a rate of 1 and no momentum."""
        return self.lr == 1 and self.momentum == 0

    def begin(self, size: int) -> None:
        """Zero velocity, where there is momentum."""
        self._slots = {"velocity": np.zeros(size)} if self.momentum else {}

    def step(self, parameters: NDArray[np.float64], aggregate: Update) -> None:
        """Moves (d,) parameters."""
        direction: NDArray[np.floating] = aggregate.delta.vector
        if self.momentum:
            velocity = self._slots["velocity"]
            velocity *= self.momentum
            velocity += direction
            direction = velocity
        parameters += np.multiply(direction, self.lr, dtype=np.float64)


@dataclass
class _Adaptive(OptimizerBase):
    """Algorithm 2 of Reddi et al.: m ← β₁m + (1 − β₁)Δ, v by the variant, x ← x + lr·m / (√v + τ)."""

    lr: Rate = 0.01
    beta1: Decay = 0.9
    tau: Rate = 1e-3

    slot_names: ClassVar[tuple[str, ...]] = ("momentum", "second")

    def begin(self, size: int) -> None:
        """m₋₁ = 0; v₋₁ = τ², the least that the algorithm allows."""
        super().begin(size)
        self._slots["second"] += self.tau**2

    def step(self, parameters: NDArray[np.float64], aggregate: Update) -> None:
        """Moves (d,) parameters."""
        delta = aggregate.delta.vector.astype(np.float64)
        momentum, second = self._slots["momentum"], self._slots["second"]
        momentum *= self.beta1
        momentum += (1 - self.beta1) * delta
        np.square(delta, out=delta)
        self.accumulate(second, delta)
        step = np.sqrt(second)
        step += self.tau
        np.divide(momentum, step, out=step)
        step *= self.lr
        parameters += step

    def accumulate(self, second: NDArray[np.float64], square: NDArray[np.float64]) -> None:
        """The variant's v from Δ² in place; `square` may be used up."""
        raise TypeError(f"{type(self).__name__} does not say how the second moment grows")


@dataclass
class Adagrad(_Adaptive):
    """FedAdagrad: v ← v + Δ²; the paper runs it with β₁ = 0."""

    beta1: Decay = 0.0

    label = "server Adagrad"

    def accumulate(self, second: NDArray[np.float64], square: NDArray[np.float64]) -> None:
        """The variant's v from Δ², in place."""
        second += square


@dataclass
class Adam(_Adaptive):
    """FedAdam: v ← β₂v + (1 − β₂)Δ²."""

    beta2: Decay = 0.99

    label = "server Adam"

    def accumulate(self, second: NDArray[np.float64], square: NDArray[np.float64]) -> None:
        """The variant's v from Δ², in place."""
        second *= self.beta2
        square *= 1 - self.beta2
        second += square


@dataclass
class Yogi(_Adaptive):
    """FedYogi: v ← v − (1 − β₂)·Δ²·sign(v − Δ²)."""

    beta2: Decay = 0.99

    label = "server Yogi"

    def accumulate(self, second: NDArray[np.float64], square: NDArray[np.float64]) -> None:
        """The variant's v from Δ², in place."""
        sign = np.sign(second - square)
        square *= 1 - self.beta2
        square *= sign
        second -= square
