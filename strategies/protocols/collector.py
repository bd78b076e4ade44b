"""The seam of collectors: how updates come out of a cohort, and what goes to a client and comes back.

A session is a state machine without I/O or a clock; its client half answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecordValues, RecordDict

from strategies.configuration import KEPT
from strategies.contract import Checked
from strategies.protocols.stage import Packing
from strategies.update import Layout, Update
from strategies.wire import Refused

ConfigValue = ConfigRecordValues
"""What a Flower `ConfigRecord` may hold."""


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
    """How updates come out of a cohort.

    One whose replies have more arrays than an update's few vectors says so by an attribute `most_arrays`: on real
    devices a reply of more is refused before any of it is fetched.
    """

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
