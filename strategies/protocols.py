"""The seams of a pipeline: what a part of each kind must offer. No behaviour lives here.

Parts that have a contract offer `check`; parts that must last through a restart offer `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, RecordDict
from numpy.typing import NDArray

from strategies.configuration import KEPT
from strategies.contract import Checked
from strategies.state import State
from strategies.update import Layout, Update, Vector
from strategies.wire import Refused

if TYPE_CHECKING:
    from strategies.timings import Timings

ConfigValue = ConfigRecordValues
"""What a Flower `ConfigRecord` may hold."""
Settings = Mapping[str, bool | int | float | str]
"""What one part's server half sends down to its client half."""
Memory = Mapping[str, NDArray[np.float32]]
"""Vectors by name that a client keeps from round to round."""


@dataclass(frozen=True)
class ClientContext:
    """What a client half may know: who is asked, for which round, and the settings that came down.

    Attributes:
        client: logical id.
        round: the round's number, from 1.
        settings: of the part that is called.
        state: what this stage of this client remembered with the last update that the model holds; vectors by name.
        proposed: what it is to remember if the server takes this update, filled by `encode`.
    """

    client: int
    round: int
    settings: Settings
    state: Memory = field(default_factory=dict)
    proposed: dict[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One message to one client.

    Attributes:
        client: logical id.
        kind: `train`, `evaluate` or `query`, Flower's message types.
        content: the records; large ones may be shared with other requests and are never changed.
        round: the round's number.
    """

    client: int
    kind: str
    content: RecordDict
    round: int


@dataclass(frozen=True)
class Reply:
    """What came back for a request: content, or the reason why there is none.

    Attributes:
        request: that it answers.
        content: the records; None where there are none.
        error: why, where there are none.
        seconds: from the request's sending until the reply was there, on the exchange's clock; None where that is not
            known.
    """

    request: Request
    content: RecordDict | None
    error: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Job:
    """What a round asks of its cohort.

    Attributes:
        round: the round's number, from 1.
        version: the version of the model that is sent.
        records: what every client is sent beside its configuration; shared by all requests, never changed.
        config: the settings that every client gets.
        included: for each client the last round whose update the model holds; absent when there is none.
        kept: the same of earlier models that the run may be sent back to: clients keep what they remember of them.
        layouts: the sections that the combiner will see.
        kinds: for each array that is sent, the section that its change belongs to.
        bounds: L2 bound of one client's contribution, by section, where the pipeline sets one.
        quorum: good updates without which the round will be void: a sum of fewer need not be opened.
        honest: honest members, as far as the collector's numbers go, without whom no sum may be opened: they bring the
            noise.
        members: clients that a sum may have at most, where the noise was made for so many; 0 for any.
        wire: the sections that must come back: as in `layouts`, but for those that a stage gives another shape.
        packing: the stage that packs some of them, None where all are sent as they are.
        taken: clients whose updates on this version the server has already; for schedulers that open several sessions
            on one version.
        part: what of the parameters each client is sent and trains, a layout of leading blocks (`strategies.parts`);
            None where all clients train all of them.
    """

    round: int
    version: int
    records: Mapping[str, ArrayRecord]
    config: Mapping[str, ConfigValue]
    included: Mapping[int, int]
    layouts: Mapping[str, Layout]
    kinds: Mapping[str, str]
    bounds: Mapping[str, float] = field(default_factory=dict)
    quorum: int = 1
    honest: int = 0
    members: int = 0
    wire: Mapping[str, Layout] = field(default_factory=dict)
    packing: Packing | None = None
    taken: frozenset[int] = frozenset()
    part: Callable[[int], Layout] | None = None
    kept: Sequence[Mapping[int, int]] = ()

    def __post_init__(self) -> None:
        if not self.wire:
            object.__setattr__(self, "wire", self.layouts)

    def own(self, client: int) -> dict[str, ConfigValue]:
        """Settings that are one client's own: who it is, and which of its updates are in the models that count."""
        included = self.included.get(client, 0)
        kept = sorted({model.get(client, 0) for model in self.kept} - {0, included})
        return {"client": client, "included": included, **({KEPT: kept} if kept else {})}


@dataclass(frozen=True)
class Refusal:
    """One client's part of a session is over, and why: it is missing, or what it sent was refused."""

    client: int
    refused: Refused


@dataclass(frozen=True)
class Void:
    """A sum that will not come, and why: nobody in particular is to blame.

    Attributes:
        reason: why.
        wrong: whether it came and was no honest clients': one of the f inputs that a rule bears.
    """

    reason: str
    wrong: bool = False


Event = Request | Update | Refusal | Void
"""What may follow from a reply, or from a deadline that has passed."""


@runtime_checkable
class Persistent(Protocol):
    """Anything whose state a checkpoint keeps."""

    def state_dict(self) -> State:
        """Plain data: numbers, strings, arrays, mappings."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Takes up that state; raises `ValueError` for another part's."""
        ...


class Stage(Checked, Protocol):
    """One transformation of an update, both halves in one class."""

    name: str

    def configure(self) -> Settings:
        """Server: what this round's clients must know."""
        ...

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half."""
        ...

    def decode(self, update: Update) -> Update:
        """Server half; raises `Refused` for what no honest client half can have made."""
        ...


@runtime_checkable
class Maker(Protocol):
    """A stage that adds sections to each update, and so can bound and lay them out."""

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Those that it makes, by name."""
        ...


@runtime_checkable
class Bounding(Protocol):
    """A stage that bounds sections, by as much as it says at the time."""

    def bounds(self) -> Mapping[str, float]:
        """L2 bounds of one client's sections in the round that comes."""
        ...


@runtime_checkable
class Shaping(Protocol):
    """A stage behind which sections have another shape."""

    def reshaped(self, layouts: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """All sections as they are behind its `encode`, given how they are before."""
        ...


@runtime_checkable
class Packing(Protocol):
    """The last stage, where its client half leaves sections packed; they are unpacked before anything else sees them.

    Attributes:
        sections: those that are packed.
    """

    sections: Sequence[str]

    def most_bytes(self, layout: Layout) -> int:
        """The largest packed size of a section: what is longer is refused unread."""
        ...

    def unpack(self, name: str, data: bytes | memoryview, layout: Layout) -> Vector:
        """A vector, in no more memory than its layout says; raises `Refused` for what no client half sends."""
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


class Session(Protocol):
    """One cohort's exchange as a state machine: no I/O, no clock.

    A session of several phases sends the requests of the next one when all have answered, or when the deadline of the
    present one has passed.
    """

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        ...

    def start(self) -> Sequence[Request]:
        """The first requests."""
        ...

    def receive(self, reply: Reply) -> Iterable[Event]:
        """What follows a reply; raises `Refused` for a bad one that nothing follows, and the session goes on."""
        ...

    def expire(self) -> Iterable[Event]:
        """The deadline of the present phase has passed: who is missing, and what follows."""
        ...


@dataclass(frozen=True)
class ClientOwn:
    """What a client has from whoever runs it, and never from a server.

    Attributes:
        folder: where it keeps what it must remember; on a device the same in all runs.
        settings: a SuperNode's node config; empty where the clients are this machine's own.
        simulated: whether they are, so that the run's configuration is theirs, too.
    """

    folder: Path
    settings: Mapping[str, ConfigValue | bool]
    simulated: bool


class Collector(Checked, Protocol):
    """How updates come out of a cohort."""

    @property
    def phases(self) -> int:
        """Requests to a client that takes part in all of a session."""
        ...

    def open(self, job: Job, cohort: Sequence[int]) -> Session:
        """A session over the clients with these logical ids."""
        ...

    def client_half(self, own: ClientOwn) -> ClientHalf:
        """The collector's half on a client; raises `ValueError` where the client lacks what it takes."""
        ...


class ClientHalf(Protocol):
    """A collector's half on the client. Requests of type `train` come to it, those that train and those that don't."""

    def prepare(self, request: RecordDict) -> RecordDict | None:
        """Looks at a request that trains, before it does: the reply where it is ready already, None to train.

        Raises:
            Refused: the client takes no part.
        """
        ...

    def reply(self, update: Update, request: RecordDict) -> RecordDict:
        """What is sent of an encoded update; raises `Refused` as `prepare`."""
        ...

    def answer(self, request: RecordDict) -> RecordDict:
        """The reply to a request that trains nothing; raises `Refused` as `prepare`."""
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


def settings_of(config: ConfigRecord, prefix: str) -> dict[str, bool | int | float | str]:
    """The settings of one part out of a request's flat configuration: `clip.norm` → `norm`."""
    dotted = f"{prefix}."
    return {
        key.removeprefix(dotted): value
        for key, value in config.items()
        if key.startswith(dotted) and isinstance(value, bool | int | float | str)
    }
