"""Training on encrypted examples: owners keep the key, a party that has the model computes on ciphertexts.

An owner's examples are encrypted under a key of its own, and whoever holds the model evaluates the mean gradient of a
mini-batch on them (as in K. Nandakumar et al. 2019, "Towards Deep Neural Network Training on Encrypted Data", CVPR
Workshops; scheme of J. Cheon et al. 2017, "Homomorphic Encryption for Arithmetic of Approximate Numbers"). The owner
alone can decrypt it; what it then sends is an ordinary update, and a round is one step of FedSGD (McMahan et al. 2017).

This file holds the settings, what they mean for the contract, and the session, in which arrays pass between an owner
and who computes: the server, or a client. It must not know what is in them, nor any key.
"""

from __future__ import annotations

import re
import secrets
from abc import ABC
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Protocol

from annotated_types import Ge, Gt

from strategies.collectors.plain import PlainClient
from strategies.collectors.portions import part_of
from strategies.collectors.turns import Arrays, Learner, Member, TurnSession, read_turn
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import ClientOwn, ConfigValue, Event, Job, Refusal, Reply, Request
from strategies.ranges import Ranged
from strategies.update import DELTA
from strategies.wire import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    REPLY_BYTES,
    TRAINS,
    Refused,
    failure_of,
    unpack_model,
)

ENCRYPTED: Final = "encrypted"
"""The record of what passes between an owner and who computes; and, before a dot, the settings that go with it."""
TURN: Final = f"{ENCRYPTED}.turn"
SESSION: Final = f"{ENCRYPTED}.session"
MODE: Final = f"{ENCRYPTED}.mode"
ROLE: Final = "role"
"""The setting that is `COMPUTE` in a request to the client that computes; owners' requests have none."""
COMPUTE: Final = "compute"
OWNER: Final = "owner"
"""Whose turn a request with that role brings: a setting, and an entry of its reply's receipt."""
REFUSED: Final = "refused"
"""In a computing client's receipt: why the owner's turn is refused, in one word."""

_WORD: Final = re.compile(r"[a-z_]{1,32}")


class Served(Protocol):
    """The computing party's half, where that is the server: public keys and the model, and no secret of an owner."""

    def describe(self) -> str:
        """What is computed, with which parameters."""
        ...

    def settings(self) -> Mapping[str, ConfigValue]:
        """What owners must know of it, by name."""
        ...

    def turn_bytes(self) -> int:
        """Of the arrays of an owner's longest turn."""
        ...

    def begin(self, sent: Arrays) -> Learner:
        """A learner for one session, of all owners in it, that computes with the model as it is in this round."""
        ...


@dataclass(frozen=True)
class Encrypted(Ranged):
    """Turns of ciphertexts with each owner of the cohort.

    Attributes:
        mode: `ce`: owners decrypt the logits of their own mini-batch besides, and send back encrypted errors of the
            cross-entropy. `strict`: they decrypt mean gradients of the squared loss and nothing else.
        metrics: owners say how many examples they have, and rounds what training came to; without, as a promise needs,
            an update's vector is all that travels in clear.
        most_turns: after which an owner is out.
        most_bytes_mb: 10⁶ bytes of one turn's arrays, beyond which an owner is refused. Where the server computes, less
            is taken where its plan says that no honest turn is as long.
        compute_client: the logical client that computes in the server's place, which then passes its turns on. It is
            no owner. None where the server computes.
        served: the server's half; None on clients, and where a client computes.
    """

    mode: Literal["ce", "strict"] = "ce"
    metrics: bool = True
    most_turns: Annotated[int, Ge(1)] = 16
    most_bytes_mb: Annotated[float, Gt(0)] = 1000.0
    compute_client: Annotated[int, Ge(0)] | None = None
    served: Served | None = field(default=None, repr=False, compare=False)

    label: ClassVar[str] = "collector=encrypted"
    phases: ClassVar[int] = 2
    most_arrays: ClassVar[int] = 64
    """Of one turn: keys, a mini-batch's ciphertexts, errors; nine in all at most."""

    def check(self, claim: Claim) -> Claim:
        """The server sees each owner's update; where a client computes, one client of a cohort of all is no owner.

        Raises:
            ContractError: clients are asked one by one, without rounds; they train parts of the model, or send more
                than a gradient; or nobody is left to own anything.
        """
        claim.need_rounds(
            self,
            why="an owner's turns are on one version of the model, which a buffer would have left behind",
            instead="use scheduler=synchronous; scheduler.deadline ends the turns of all that are not through by then",
        )
        self._check_update(claim)
        changes: dict[str, object] = {}
        if self.compute_client is not None and claim.rate == 1 and claim.cohort is not None:
            if claim.cohort < 2:
                raise ContractError(
                    claim.source("cohort"),
                    name_of(self),
                    "the only client is the one that computes, and no other owns examples",
                    "raise num_clients, or set collector.compute_client=null",
                )
            changes["cohort"] = claim.cohort - 1
        return claim.given(
            self,
            visibility=Visibility.EACH,
            clear=claim.clear
            | (frozenset({NUM_EXAMPLES, METRICS}) if self.metrics else frozenset()),
            summed=None if self.metrics else "uniform",
            blind=True,
            **changes,
        )

    def _check_update(self, claim: Claim) -> None:
        """An owner has a gradient of the whole model, and nothing else."""
        if claim.parts:
            raise ContractError(
                claim.source("parts"),
                name_of(self),
                "who computes has one model for all owners, and each gradient is of all of it",
                "give all clients the whole model: ranks=none, and one head",
            )
        if beside := sorted(claim.sections - {DELTA}):
            raise ContractError(
                claim.source("sections"),
                name_of(self),
                f"an owner decrypts gradients of the parameters, and has no {', '.join(beside)} to send",
                "use client=encrypted, server=sgd or adam, and a model without running statistics",
            )

    @property
    def apart(self) -> frozenset[int]:
        """Logical clients that take no part in a cohort: they are drawn and left out, and nobody misses them."""
        return frozenset(() if self.compute_client is None else (self.compute_client,))

    def least_clients(self) -> int:
        """Clients without which no round can be had."""
        return 1 + len(self.apart)

    def open(self, job: Job, cohort: Sequence[int]) -> EncryptedSession | RelayedSession:
        """A session over the owners with these logical ids.

        Raises:
            ValueError: nobody computes, or the client that does is in the cohort.
        """
        common: dict[str, Any] = {
            "job": job,
            "cohort": cohort,
            "settings": self._settings(job),
            "most_turns": self.most_turns,
            "most_bytes": self._most_bytes(),
            "metrics": self.metrics,
            "token": secrets.token_hex(8),
        }
        if self.compute_client is not None:
            if self.compute_client in cohort:
                raise ValueError(f"client {self.compute_client} computes, and is no owner")
            return RelayedSession(**common, party=self.compute_client)
        if self.served is None:
            raise ValueError("collector=encrypted needs who computes: served, or compute_client")
        return EncryptedSession(**common, served=self.served)

    def _most_bytes(self) -> int:
        most = int(self.most_bytes_mb * 1e6)
        return most if self.served is None else min(most, self.served.turn_bytes())

    def _settings(self, job: Job) -> dict[str, ConfigValue]:
        """What goes with every turn."""
        settings: dict[str, ConfigValue] = {MODE: self.mode}
        if REPLY_BYTES not in job.config:  # the request brings ciphertexts: no measure of its reply
            settings[REPLY_BYTES] = 4 * sum(layout.size for layout in job.wire.values())
        return settings | ({} if self.served is None else dict(self.served.settings()))

    def describe(self, clients: int) -> str:
        """Who computes, and who sees what."""
        party = "the server" if self.compute_client is None else f"client {self.compute_client}"
        told = "" if self.served is None else f"{self.served.describe()}; "
        logits = "mean gradients and the logits of their own examples"
        sees = logits if self.mode == "ce" else "mean gradients"
        return (
            f"{told}{party} holds the model and computes on ciphertexts, owners decrypt {sees}; sizes and times of"
            " ciphertexts are nobody's secret"
        )

    def client_half(self, own: ClientOwn) -> PlainClient:
        """What an owner's last turn comes to goes in clear; the turns before are its trainer's."""
        return PlainClient(metrics=self.metrics)


@dataclass(kw_only=True)
class _OwnersSession(TurnSession[Member], ABC):
    """Turns of owners, who are sent no model."""

    record: ClassVar[str] = ENCRYPTED
    travels: ClassVar[bool] = False

    def _member(self, client: int) -> Member:
        return Member(part_of(self.job, client))


@dataclass(kw_only=True)
class EncryptedSession(_OwnersSession):
    """Turns of owners with the server, which has the model: it is sent to nobody.

    Attributes:
        served: the server's half.
    """

    served: Served
    _learner: Learner | None = field(default=None, init=False)

    def _answer(self, client: int, member: Member, arrays: Arrays, *, last: bool) -> list[Event]:
        if self._learner is None:
            self._learner = self.served.begin(unpack_model(self.job.records[ARRAYS]))
        return [self._next(client, member, self._learner.answer(client, arrays), last=last)]


class _Turn(NamedTuple):
    """An owner's turn on its way to the client that computes."""

    owner: int
    arrays: Arrays
    last: bool


@dataclass(kw_only=True)
class RelayedSession(_OwnersSession):
    """Turns of owners with a client that computes: the server passes them on, one after the other.

    The client is sent the model with each turn, since it may keep nothing between two; turns that wait for it are held
    in memory as they came. What it fails at is no owner's fault: without it, whoever still needs it is out, and whoever
    has its gradient already goes on.

    Attributes:
        party: the client that computes, a logical id.
    """

    party: int
    _queue: deque[_Turn] = field(default_factory=deque, init=False)
    _asked: tuple[Request, _Turn] | None = field(default=None, init=False)
    _excused: set[int] = field(default_factory=set, init=False)

    def receive(self, reply: Reply) -> list[Event]:
        """As every session's; a reply of the client that computes brings an owner's next turn.

        Raises:
            Refused: as every session's.
        """
        client = reply.request.client
        if client == self.party:
            return self._computed(reply)
        if client in self._excused:  # it was asked before the other failed, and is not to blame
            self._excused.discard(client)
            return []
        return super().receive(reply)

    def _answer(self, client: int, member: Member, arrays: Arrays, *, last: bool) -> list[Event]:
        self._queue.append(_Turn(client, arrays, last))
        return list(self._passed_on())

    def _late(self, member: Member) -> Refused:
        if member.waiting is not None:
            return super()._late(member)
        return Refused("timeout", f"{self._name} has not computed by the deadline")

    @property
    def _name(self) -> str:
        return f"the party that computes, client {self.party},"

    def _passed_on(self) -> list[Request]:
        """The next turn for the client that computes, where it has none."""
        if self._asked is not None or not self._queue:
            return []
        turn = self._queue.popleft()
        own: dict[str, ConfigValue] = {
            "included": 0,
            "phase": 0,
            TRAINS: False,
            ROLE: COMPUTE,
            OWNER: turn.owner,
        }
        number = self._members[turn.owner].turn
        request = self._request(self.party, number, self.job.records, turn.arrays, own)
        self._asked = request, turn
        return [request]

    def _computed(self, reply: Reply) -> list[Event]:
        """What follows a computed turn: its owner's next one, and another owner's for the client that computes."""
        if self._asked is None or self._asked[0] is not reply.request or self.done:
            raise Refused("duplicate", f"{self._name} has answered before, or was not asked")
        (_, turn), self._asked = self._asked, None
        member = self._members[turn.owner]
        try:
            answer, refused = self._read(reply, turn.owner, member)
        except Refused as failure:
            return self._without_party(failure)
        try:
            if refused is not None:
                raise refused
            events: list[Event] = [self._next(turn.owner, member, answer, last=turn.last)]
        except Refused as reason:
            events = self._out(turn.owner, reason)
        return events + self._passed_on()

    def _read(self, reply: Reply, owner: int, member: Member) -> tuple[Arrays, Refused | None]:
        """The answer to an owner's turn, or why it is refused; raises `Refused` where the reply is no answer."""
        if reply.content is None:
            raise failure_of(reply.error)
        round_number = self.job.round
        wanted = {"client": self.party, "round": round_number, "turn": member.turn, OWNER: owner}
        most = self.most_bytes
        arrays, receipt = read_turn(reply.content, self.record, wanted, most_bytes=most)
        reason = receipt.get(REFUSED)
        if reason is None:
            return arrays, None
        if not isinstance(reason, str) or not _WORD.fullmatch(reason):
            raise Refused("malformed", f"a turn is refused for {reason!r:.40}")
        return {}, Refused(reason, f"{self._name} refuses this owner's turn {member.turn}")

    def _without_party(self, failure: Refused) -> list[Event]:
        """Goes on with those who need nothing more computed."""
        refused = Refused("client_error", f"{self._name} failed: {failure}")
        lost = sorted(client for client, member in self._members.items() if not member.closing)
        self._excused |= {client for client in lost if self._members[client].waiting is not None}
        self._queue.clear()
        for client in lost:
            del self._members[client]
        return [*(Refusal(client, refused) for client in lost), *self._released()]
