"""Server optimisers: how the mean change of the clients moves the model.

Adaptive ones follow Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2 (no bias correction there; Adam
has it as an option, after Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", Algorithm 1); momentum
follows Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", §4 (FedAvgM). Where a run's number
of steps is known, the learning rate may fall to zero towards its end, in a straight line.
All work in place on float64 vectors. The aggregate Δ points the way the model should go: it is added, not subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray

from strategies.contract import Claim, ContractError, name_of
from strategies.ranges import Ranged
from strategies.state import State, array_in, integer_in
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
class _Scheduled(OptimizerBase):
    """An optimiser that counts its steps and whose rate may fall.

    Attributes:
        lr: the learning rate η, until it falls.
        total_steps: T, the steps that the run takes: from `decay_from`·T on step t = 0 … T - 1 has the rate
            lr·(T − t) / (T − decay_from·T), and steps past T move nothing. None keeps the rate.
        decay_from: the part of the steps before the fall.
    """

    lr: Rate = 1.0
    total_steps: Annotated[int, Ge(1)] | None = field(default=None, kw_only=True)
    decay_from: Annotated[float, Ge(0), Le(1)] = field(default=0.5, kw_only=True)
    _steps: int = field(default=0, init=False, repr=False, compare=False)

    def begin(self, size: int) -> None:
        """Zero state for (size,) parameters; no step has been taken."""
        super().begin(size)
        self._steps = 0

    def next_rate(self) -> float:
        """The rate of the step that is about to be taken, which is counted."""
        done, self._steps = self._steps, self._steps + 1
        if self.total_steps is None:
            return self.lr
        held = self.decay_from * self.total_steps
        if done <= held:
            return self.lr if done < self.total_steps else 0.0
        return self.lr * max(0.0, (self.total_steps - done) / (self.total_steps - held))

    @property
    def counts(self) -> bool:
        """Whether a step depends on how many there were: only then is their number part of the state."""
        return self.total_steps is not None

    def state_dict(self) -> State:
        """The optimiser's kind, its vectors, and its number of steps where that matters."""
        return {**super().state_dict(), **({"steps": self._steps} if self.counts else {})}

    def load_state_dict(self, state: State) -> None:
        """Takes up the state of the same kind of optimiser.

        Raises:
            ValueError: the state is another optimiser's, of another size, or of one that counted no steps.
        """
        super().load_state_dict(state)
        self._steps = integer_in(state, "steps") if self.counts else 0


@dataclass
class SGD(_Scheduled):
    """x ← x + lr·v with v ← momentum·v + Δ: FedAvg with lr = 1 and no momentum, FedAvgM with it.

    Attributes:
        momentum: β in [0, 1).
    """

    momentum: Decay = 0.0

    label = "server SGD"

    @property
    def exact(self) -> bool:
        """With a rate that is and stays 1, and no momentum."""
        return self.lr == 1 and self.momentum == 0 and self.total_steps is None

    def begin(self, size: int) -> None:
        """Zero velocity, where there is momentum."""
        super().begin(size)
        self._slots = {"velocity": np.zeros(size)} if self.momentum else {}

    def step(self, parameters: NDArray[np.float64], aggregate: Update) -> None:
        """Moves (d,) parameters."""
        direction: NDArray[np.floating] = aggregate.delta.vector
        if self.momentum:
            velocity = self._slots["velocity"]
            velocity *= self.momentum
            velocity += direction
            direction = velocity
        parameters += np.multiply(direction, self.next_rate(), dtype=np.float64)


@dataclass
class _Adaptive(_Scheduled):
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
        rate = self.next_rate()
        first_part, second_part = self.seen()
        step = np.sqrt(second)
        step /= second_part**0.5
        step += self.tau
        np.divide(momentum, step, out=step)
        step *= rate / first_part
        parameters += step

    def seen(self) -> tuple[float, float]:
        """By what the two moments are divided after this step: 1, unless their start at zero is corrected for."""
        return 1.0, 1.0

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
    """FedAdam: v ← β₂v + (1 − β₂)Δ².

    Attributes:
        bias_correction: as Kingma and Ba's Adam: v starts at 0, and after t steps the two moments are divided by
            1 − β₁ᵗ and 1 − β₂ᵗ. A run of few steps is not spent on warming up.
    """

    beta2: Decay = 0.99
    bias_correction: bool = field(default=False, kw_only=True)

    label = "server Adam"

    def begin(self, size: int) -> None:
        """As Reddi et al., or both moments 0."""
        super().begin(size)
        if self.bias_correction:
            self._slots["second"][:] = 0

    @property
    def counts(self) -> bool:
        """Also where the moments are corrected."""
        return self.bias_correction or super().counts

    def seen(self) -> tuple[float, float]:
        """1 − βᵗ of both moments, where they are corrected."""
        if not self.bias_correction:
            return 1.0, 1.0
        return 1 - self.beta1**self._steps, 1 - self.beta2**self._steps

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
