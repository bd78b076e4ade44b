"""One cohort's split training on the server, as a state machine: no I/O, no clock.

Each client takes its own turns: a request brings it what the server made of its last turn, its reply brings the next.
Nobody waits for anybody. What a turn holds is between the two halves of the model; here it is named arrays. The last
turn's request is an ordinary training request, whose reply is the change of the client's half, and the update that
comes of it is that change and the server's own beside it.

A client that fails, or sends what the server's half refuses, is out of the session; nothing of the others is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from numpy.typing import NDArray

from strategies.collectors.plain import bare
from strategies.collectors.portions import expected_of, part_of, records_for
from strategies.parts import returned
from strategies.protocols import ConfigValue, Event, Job, Refusal, Reply, Request
from strategies.records import bundle, extended, record_in
from strategies.update import DELTA, Layout, Section, Update, Vector
from strategies.wire import CONFIG, RECEIPT, TRAINS, Refused, pack, read_update, unpack

SPLIT: Final = "split"
"""The record of what crosses the cut, both ways; and, before a dot, the settings that go with it."""
TURN: Final = "split.turn"
SESSION: Final = "split.session"
LAST: Final = "last"
"""In a turn's receipt: nothing but the server's answer to this one is wanting."""

Arrays = Mapping[str, NDArray[np.generic]]

_MOST_ARRAYS = 10_000


class Learner(Protocol):
    """The server's half of the model, at work on what one client sends in a session, or on what all do."""

    def answer(self, client: int, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        """Trains on one turn, and says what goes back; raises `Refused` for what no honest client sends."""
        ...

    def change(self, client: int) -> tuple[Vector, Layout, Mapping[str, float]]:
        """What has changed of the server's parameters, (d,) float32 and its layout, and figures of a client's turns."""
        ...


class Served(Protocol):
    """The server's half of a model."""

    @property
    def partial(self) -> bool:
        """Whether clients train different parts of it."""
        ...

    def describe(self) -> str:
        """Who holds what of the model."""
        ...

    def clients_names(self, client: int) -> frozenset[str]:
        """The parameters that a client holds."""
        ...

    def settings(self) -> Mapping[str, ConfigValue]:
        """What clients must know of the cut, by name."""
        ...

    def begin(self, sent: Arrays) -> Learner:
        """A learner that starts from the whole model as it was sent, and shares nothing with others."""
        ...


@dataclass
class _Member:
    """One client of a session: whom it is waited for, and what of the model it trains."""

    part: Layout
    learner: Learner
    waiting: Request | None = None
    turn: int = 0
    closing: bool = False


@dataclass
class SplitSession:
    """Turns with each client of a cohort.

    Attributes:
        job: what the round asks of it.
        cohort: logical ids.
        served: the server's half.
        sent: the model as it is sent, by name.
        shared: whether one upper part learns of all clients, whose change all updates then have.
        settings: that clients are given with each turn.
        metrics: whether updates say how many examples they are of, and what training came to.
        most_turns: after which a client is out: it decides itself how many it needs.
        token: tells this session's turns from another's.
        done: nothing more will come.
    """

    job: Job
    cohort: Sequence[int]
    served: Served
    sent: Arrays
    shared: bool
    settings: Mapping[str, ConfigValue]
    most_turns: int
    token: str
    metrics: bool = True
    done: bool = field(default=False, init=False)
    phased: ClassVar[bool] = False
    """Each client takes its own turns, and one deadline is for all of them."""
    _members: dict[int, _Member] = field(default_factory=dict, init=False)
    _held: list[tuple[_Member, Update]] = field(default_factory=list, init=False)

    def start(self) -> list[Request]:
        """The first turn of each client."""
        one: Learner | None = None
        requests = []
        for client in self.cohort:
            one = one if one is not None and self.shared else self.served.begin(self.sent)
            names = self.served.clients_names(client)
            mine = {n: s for n, s in _shapes(part_of(self.job, client)).items() if n in names}
            member = _Member(_ordered(mine, self.job.layouts[DELTA]), one)
            self._members[client] = member
            requests.append(self._turn(client, member, {}))
        self.done = not requests
        return requests

    def receive(self, reply: Reply) -> list[Event]:
        """What follows a reply: the client's next turn, or its update.

        Raises:
            Refused: `duplicate`, of a client that is not waited for, or a reply to an earlier turn.
        """
        client = reply.request.client
        member = self._members.get(client)
        if member is None or member.waiting is not reply.request:
            raise Refused(
                "duplicate", "this client has answered before, or too late, or was not asked"
            )
        member.waiting = None
        try:
            if reply.content is None:
                raise Refused("client_error", reply.error or "the client gave no reason")
            if not member.closing:
                return [self._next(client, member, reply)]
            update = read_update(reply.content, expected_of(self.job, client, member.part))
            self._held.append((member, update))
            events: list[Event] = []
        except Refused as refused:
            events = [Refusal(client, refused)]
        del self._members[client]
        return events + self._released()

    def expire(self) -> list[Event]:
        """Goes on without those who have not answered."""
        late: list[Event] = [
            Refusal(client, Refused("timeout", "no reply before the turn's deadline"))
            for client in sorted(self._members)
        ]
        self._members.clear()
        return late + self._released()

    def _released(self) -> list[Event]:
        """Updates that are whole: at once, or where all share the upper part, when its last step is taken."""
        self.done = not self._members
        if self.shared and not self.done:
            return []
        held, self._held = self._held, []
        return [self._joined(member, update) for member, update in held]

    def _next(self, client: int, member: _Member, reply: Reply) -> Request:
        """Takes a turn, and asks for the next one."""
        assert reply.content is not None
        receipt = record_in(reply.content, RECEIPT, ConfigRecord)
        record = record_in(reply.content, SPLIT, ArrayRecord)
        if receipt is None or record is None:
            raise Refused("missing", f"a turn holds a record {SPLIT!r} and a {RECEIPT!r}")
        for key, wanted, reason in (
            ("client", client, "impostor"),
            ("round", self.job.round, "round"),
            ("turn", member.turn, "phase"),
        ):
            if receipt.get(key) != wanted:
                raise Refused(
                    reason, f"asked for {key} {wanted}, the receipt says {receipt.get(key)!r}"
                )
        if len(record) > _MOST_ARRAYS:
            raise Refused("too_large", f"a turn of {len(record)} arrays")
        arrays = {name: unpack(array, f"array {name!r}") for name, array in record.items()}
        answer = member.learner.answer(client, arrays)
        member.turn += 1
        member.closing = receipt.get(LAST) is True
        if member.turn >= self.most_turns and not member.closing:
            raise Refused("too_large", f"more than {self.most_turns} turns")
        return self._turn(client, member, answer)

    def _turn(self, client: int, member: _Member, answer: Arrays) -> Request:
        """The request that brings the answer to a client's last turn; the first and the last bring the model too."""
        own: dict[str, ConfigValue] = {
            **self.settings,
            "client": client,
            "included": self.job.included.get(client, 0),
            "phase": int(member.closing),
            "phases": 2,
            TRAINS: member.closing,
            TURN: member.turn,
            SESSION: self.token,
        }
        whole = member.turn == 0 or member.closing
        records = dict(records_for(self.job, member.part)) if whole else {}
        records[SPLIT] = ArrayRecord({name: pack(array) for name, array in answer.items()})
        content = bundle({**records, CONFIG: extended(self._config, own)})
        member.waiting = Request(client, "train", content, self.job.round)
        return member.waiting

    @property
    def _config(self) -> ConfigRecord:
        return ConfigRecord(
            {**self.job.config, "server-round": self.job.round, "version": self.job.version}
        )

    def _joined(self, member: _Member, update: Update) -> Update:
        """One update of both halves: what the client has changed of its own, and the server's change beside it."""
        whole = self.job.layouts[DELTA]
        vector, own, figures = member.learner.change(update.members[0])
        filled = np.zeros(whole.size, np.float32)
        views = whole.views(filled)
        theirs = returned(member.part)
        for layout, values in ((theirs, update.delta.vector), (own, vector)):
            for name, block in layout.views(values).items():
                views[name][tuple(map(slice, block.shape))] = block
        both = _ordered({**_shapes(theirs), **_shapes(own)}, whole)
        section = Section(filled, whole, part=None if both == whole else both)
        joined = update.with_section(DELTA, section)
        return (
            replace(joined, metrics={**update.metrics, **figures}) if self.metrics else bare(joined)
        )


def _shapes(part: Layout) -> dict[str, tuple[int, ...]]:
    return dict(zip(part.names, part.shapes, strict=True))


def _ordered(shapes: Mapping[str, tuple[int, ...]], whole: Layout) -> Layout:
    """A part of these blocks, in the whole's order."""
    names = tuple(name for name in whole.names if name in shapes)
    return Layout(names, tuple(shapes[name] for name in names))
