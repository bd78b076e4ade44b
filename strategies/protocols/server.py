"""The seams of what only the server has: who is asked, what becomes of the updates, and what is promised of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from strategies.contract import Checked
from strategies.protocols.stage import Stage
from strategies.state import State
from strategies.timings import Timings
from strategies.update import Layout, Update, Vector


@runtime_checkable
class Persistent(Protocol):
    """Anything whose state a checkpoint keeps."""

    def state_dict(self) -> State:
        """Plain data: numbers, strings, arrays, mappings."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Takes up that state; raises `ValueError` for another part's."""
        ...


@dataclass(frozen=True)
class Plan:
    """What a combiner knows of a round before the first update comes.

    Attributes:
        layouts: the sections that every update has.
        cohort: clients planned, however many there were to ask.
        inputs: updates planned: one a client, or one a group where the server sees sums of groups.
        round: the round's number, from 1.
        root: the server's own update from root data of its own, None where it has none.
        sent: the parameters as they were sent, (d,) float32 by the layout of `DELTA`: for rules over products of
            factors, whose change is no function of the factors' changes; None for all others.
    """

    layouts: Mapping[str, Layout]
    cohort: int
    inputs: int
    round: int = 1
    root: Update | None = None
    sent: Vector | None = None


class Accumulator(Protocol):
    """A combiner at work on one round."""

    def add(self, update: Update) -> None:
        """Takes one admitted, decoded update."""
        ...

    def result(self, refused: int = 0) -> Update | None:
        """The combined update, None when there are too few to combine.

        Args:
            refused: updates of this cohort that came and were refused as wrong.
        """
        ...


class Combiner(Checked, Protocol):
    """Updates to one."""

    def begin(self, plan: Plan) -> Accumulator:
        """A fresh accumulator for one round."""
        ...


@runtime_checkable
class Learner(Persistent, Protocol):
    """A combiner or a stage that remembers what came of earlier rounds."""

    def learn(self, aggregate: Update) -> None:
        """Sees the aggregate that has become part of the model."""
        ...


class Promise(Checked, Persistent, Protocol):
    """Differential privacy for a run: what is spent, and what noise the server adds (`strategies.privacy`)."""

    @property
    def repeats(self) -> bool:
        """Whether a round may ask a second cohort when the first fell short."""
        ...

    @property
    def unconditional(self) -> bool:
        """Whether an aggregate is released however few replied, since that must not show."""
        ...

    @property
    def epsilon(self) -> float | None:
        """Spent so far; None where nothing is promised."""
        ...

    def stages(self, bounds: Callable[[], Mapping[str, float]]) -> Sequence[Stage]:
        """What clients do of it, behind a clip with these bounds, as they are at the time."""
        ...

    def charge(self, round_number: int) -> None:
        """Pays for a round before anybody is asked; raises `BudgetSpentError` where that may not be."""
        ...

    def told(self, update: Update) -> None:
        """Sees each update that is taken, for what clients say that they have spent."""
        ...

    def privatise(self, aggregate: Update, bounds: Mapping[str, float]) -> Update:
        """The aggregate as it may be released, given the bounds of one client's sections in this round."""
        ...

    def report(self) -> Mapping[str, object] | None:
        """What is promised and spent, in plain data; None where nothing is promised."""
        ...

    def describe(self, size: int) -> str:
        """The plan in a line, for a model of so many parameters."""
        ...


class Parts(Checked, Protocol):
    """Who is sent and trains what of the parameters."""

    def part(self, client: int, whole: Layout) -> Layout:
        """A client's part in the round that comes: leading blocks of some of the whole's arrays."""
        ...

    def observe(self, change: Update, sent: Vector) -> None:
        """Sees what becomes of a round, and the parameters as they were sent, (d,) float32."""
        ...


class Sampler(Checked, Protocol):
    """Who is asked."""

    def draw(
        self, clients: Sequence[int], *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """A cohort out of the clients that are there (logical ids, sorted)."""
        ...


@runtime_checkable
class Picker(Protocol):
    """A sampler that can also say who is asked next, where clients are asked one after the other."""

    def pick(
        self, clients: Sequence[int], count: int, *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """`count` of the idle clients (logical ids, sorted), or fewer; another `attempt` is another draw."""
        ...

    def took(self, clients: Iterable[int], round_number: int) -> None:
        """Updates of these clients have become part of this round's model."""
        ...


@runtime_checkable
class Informed(Protocol):
    """A sampler that goes by how long clients take, and how often they fail."""

    def informed(self, timings: Timings) -> None:
        """Is given the pipeline's own, which change as the run goes on, before any round."""
        ...
