"""Turns with each client of a cohort, as a state machine: no I/O, no clock.

Each client takes its own turns: a request brings it what was made of its last turn, its reply brings the next. Nobody
waits for anybody. What a turn holds is named arrays, which are passed on and not read here: activations and gradients
where a model is cut in two, ciphertexts where it is trained on what the server can't read. The last turn's request is
an ordinary training request, and its reply is an update.

A client that fails, or sends what the other side refuses, is out of the session; nothing of the others is lost. Who
computes, and with what, is a subclass's; so is what of the model a client is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Generic, Protocol, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from strategies.collectors.plain import bare
from strategies.collectors.portions import expected_of, records_for
from strategies.protocols import ConfigValue, Event, Job, Refusal, Reply, Request
from strategies.records import bundle, extended, record_in
from strategies.replies import read_update
from strategies.update import Layout, Update
from strategies.wire import CONFIG, RECEIPT, TRAINS, Refused, failure_of, pack, unpack

LAST: Final = "last"
"""In a turn's receipt: nothing but the answer to this one is wanting."""

Arrays = Mapping[str, NDArray[np.generic]]
Receipt = Mapping[str, bool | int | str]

_MOST_ARRAYS = 10_000


class Learner(Protocol):
    """The other side of the turns, at work on what one client sends in a session, or on what all do."""

    def answer(self, client: int, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        """Computes on one turn, and says what goes back; raises `Refused` for what no honest client sends."""
        ...


def write_turn(record: str, arrays: Arrays, receipt: Receipt) -> RecordDict:
    """A reply that is a turn: arrays under the record's name, and what they are.

    Args:
        record: the protocol's name.
        arrays: by name, of any plain numbers.
        receipt: `client`, `round`, `turn` and `LAST`, and what a protocol says beside them.
    """
    packed = ArrayRecord({name: pack(array) for name, array in arrays.items()})
    return bundle({record: packed, RECEIPT: ConfigRecord(dict(receipt))})


def read_turn(
    content: RecordDict, record: str, wanted: Receipt, *, most_bytes: int | None = None
) -> tuple[dict[str, NDArray[np.generic]], ConfigRecord]:
    """The arrays of a turn and its receipt; the arrays are views of the reply's own bytes.

    Args:
        content: as it came.
        record: the protocol's name.
        wanted: what the receipt must say.
        most_bytes: of all arrays together; None for any number.

    Raises:
        Refused: `missing`, `impostor` (another client), `round`, `phase` (another turn), `too_large`, `malformed` or
            `dtype`.
    """
    receipt = record_in(content, RECEIPT, ConfigRecord)
    arrays = record_in(content, record, ArrayRecord)
    if receipt is None or arrays is None:
        raise Refused("missing", f"a turn holds a record {record!r} and a {RECEIPT!r}")
    for key, value in wanted.items():
        if receipt.get(key) != value:
            told = f"asked for {key} {value}, the receipt says {receipt.get(key)!r}"
            raise Refused(_REASONS.get(key, key), told)
    if len(arrays) > _MOST_ARRAYS:
        raise Refused("too_large", f"a turn of {len(arrays)} arrays")
    size = sum(len(array.data) for array in arrays.values())
    if most_bytes is not None and size > most_bytes:
        raise Refused("too_large", f"a turn of {size} bytes, {most_bytes} at most")
    return {name: unpack(array, f"array {name!r}") for name, array in arrays.items()}, receipt


_REASONS: Final = {"client": "impostor", "turn": "phase"}


@dataclass
class Member:
    """One client of a session: what of the model it trains, and how far it is.

    Attributes:
        part: of the parameters.
        waiting: the request that its reply is awaited for.
        turn: from 0.
        closing: whether that reply is the update.
    """

    part: Layout
    waiting: Request | None = None
    turn: int = 0
    closing: bool = False


M = TypeVar("M", bound=Member)


@dataclass(kw_only=True)
class TurnSession(ABC, Generic[M]):
    """Turns with each client of a cohort.

    Attributes:
        job: what the round asks of it.
        cohort: logical ids.
        settings: that clients are given with each turn.
        most_turns: after which a client is out: it decides itself how many it needs.
        token: tells this session's turns from another's.
        metrics: whether updates say how many examples they are of, and what training came to.
        most_bytes: of a turn's arrays, beyond which a client is out; None for any number.
        done: nothing more will come.
    """

    record: ClassVar[str]
    """The record of what passes, both ways; and, before a dot, the settings that go with it."""
    travels: ClassVar[bool] = True
    """Whether the model goes with the first and the last turn."""
    phased: ClassVar[bool] = False
    """Each client takes its own turns, and one deadline is for all of them."""

    job: Job
    cohort: Sequence[int]
    settings: Mapping[str, ConfigValue]
    most_turns: int
    token: str
    metrics: bool = True
    most_bytes: int | None = None
    done: bool = field(default=False, init=False)
    _members: dict[int, M] = field(default_factory=dict, init=False)
    _held: list[tuple[M, Update]] = field(default_factory=list, init=False)

    def start(self) -> list[Request]:
        """The first turn of each client."""
        requests = []
        for client in self.cohort:
            member = self._members[client] = self._member(client)
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
                raise failure_of(reply.error)
            if not member.closing:
                return self._taken(client, member, reply.content)
            update = read_update(reply.content, expected_of(self.job, client, member.part))
            self._held.append((member, update))
        except Refused as refused:
            return self._out(client, refused)
        del self._members[client]
        return self._released()

    def expire(self) -> list[Event]:
        """Goes on without those who have not answered."""
        late: list[Event] = [
            Refusal(client, self._late(member)) for client, member in sorted(self._members.items())
        ]
        self._members.clear()
        return late + self._released()

    # ---- what a protocol has of its own ----

    @abstractmethod
    def _member(self, client: int) -> M:
        """A client at its beginning."""

    @abstractmethod
    def _answer(self, client: int, member: M, arrays: Arrays, *, last: bool) -> list[Event]:
        """What follows a turn; raises `Refused` where its client is out."""

    def _concluded(self, member: M, update: Update) -> Update:
        """What becomes of the update that a client sent at its end."""
        return update if self.metrics else bare(update)

    def _late(self, member: M) -> Refused:
        """Why a client that has come to no end is out at the deadline."""
        return Refused("timeout", "no reply before the turn's deadline")

    # ---- what all have in common ----

    def _out(self, client: int, refused: Refused) -> list[Event]:
        """A client's part is over, for this reason."""
        del self._members[client]
        return [Refusal(client, refused), *self._released()]

    def _released(self) -> list[Event]:
        """Updates that are whole."""
        self.done = not self._members
        held, self._held = self._held, []
        return [self._concluded(member, update) for member, update in held]

    def _taken(self, client: int, member: M, content: RecordDict) -> list[Event]:
        """Takes a turn, and asks for the next one."""
        wanted = {"client": client, "round": self.job.round, "turn": member.turn}
        arrays, receipt = read_turn(content, self.record, wanted, most_bytes=self.most_bytes)
        return self._answer(client, member, arrays, last=receipt.get(LAST) is True)

    def _next(self, client: int, member: M, answer: Arrays, *, last: bool) -> Request:
        """The request that follows an answered turn; raises `Refused` where there were too many."""
        member.turn += 1
        member.closing = last
        if member.turn >= self.most_turns and not last:
            raise Refused("too_large", f"more than {self.most_turns} turns")
        return self._turn(client, member, answer)

    def _turn(self, client: int, member: M, answer: Arrays) -> Request:
        """The request that brings the answer to a client's last turn; where the model travels, the ends bring it."""
        whole = self.travels and (member.turn == 0 or member.closing)
        own: dict[str, ConfigValue] = {
            **self.job.own(client),
            "phase": int(member.closing),
            TRAINS: member.closing,
        }
        records = records_for(self.job, member.part) if whole else {}
        member.waiting = self._request(client, member.turn, records, answer, own)
        return member.waiting

    def _request(
        self,
        client: int,
        turn: int,
        records: Mapping[str, ArrayRecord],
        arrays: Arrays,
        own: Mapping[str, ConfigValue],
    ) -> Request:
        """A request of this session to one client."""
        config: dict[str, ConfigValue] = {
            **self.settings,
            "client": client,
            "phases": 2,
            f"{self.record}.turn": turn,
            f"{self.record}.session": self.token,
            **own,
        }
        common = {**self.job.config, "server-round": self.job.round, "version": self.job.version}
        turned = ArrayRecord({name: pack(array) for name, array in arrays.items()})
        content = bundle(
            {
                **records,
                self.record: turned,
                CONFIG: extended(ConfigRecord(common), config),
            }
        )
        return Request(client, "train", content, self.job.round)
