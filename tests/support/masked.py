"""A real `Masked` collector against real `MaskedClient`s over a folder: replies are handed over one by one.

A test says who is lost in which step, and may change any message on its way, as a hostile server or client would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from strategies.collectors.masked import Masked
from strategies.collectors.masked_session import MaskedSession
from strategies.protocols import Job, Refusal, Reply, Request, Void
from strategies.records import bundle, extended, record_in
from strategies.secagg.keys import Identity
from strategies.secagg.masking import codings
from strategies.secagg.member import MaskedClient
from strategies.secagg.policy import Policy, Roster
from strategies.secagg.terms import SECAGG, ModelDigest, Terms
from strategies.update import DELTA, Update
from strategies.wire import ARRAYS, CONFIG, TRAINS, Refused, pack_model
from tests.support.updates import flat, section

STEPS = ("keys", "shares", "upload", "unmask")
MALICIOUS_STEPS = ("keys", "shares", "upload", "agree", "unmask")

Hook = Callable[[str, int, RecordDict], RecordDict | None]
"""(step, client, message) → the message that arrives; None where none does."""


def step_of(content: RecordDict) -> str:
    return str(said(content)["step"])


def said(content: RecordDict) -> dict[str, Any]:
    """What a message says of the protocol."""
    record = record_in(content, SECAGG, ConfigRecord)
    assert record is not None
    return dict(record)


def altered(content: RecordDict, **values: Any) -> RecordDict:
    """A copy of a message with other values, or without those that are None; whatever the type."""
    given = said(content) | values
    kept = {name: value for name, value in given.items() if value is not None}
    record = extended(ConfigRecord(), kept)  # unchecked, as a peer's bytes might be
    return bundle({**dict(content.items()), SECAGG: record})


def at(step: str, client: int, change: Callable[[RecordDict], RecordDict | None]) -> Hook:
    """A hook that changes the message of one client in one step."""

    def hook(now: str, whose: int, content: RecordDict) -> RecordDict | None:
        return change(content) if (now, whose) == (step, client) else content

    return hook


@dataclass
class Outcome:
    """What came of a session.

    Attributes:
        ring: the opened sum modulo 2³², None where nothing was opened.
        asked: for each step that was reached, the clients that were asked.
        sent: every request and reply, as it left its author.
    """

    session: MaskedSession
    update: Update | None = None
    void: str | None = None
    refusals: dict[int, Refused] = field(default_factory=dict)
    asked: dict[str, list[int]] = field(default_factory=dict)
    sent: list[tuple[str, str, int, RecordDict]] = field(default_factory=list)

    @property
    def ring(self) -> np.ndarray:
        assert self.update is not None, self.void
        total = self.session._total
        assert total is not None
        return total

    def of(self, step: str, client: int, kind: str = "reply") -> RecordDict:
        """A message that was sent."""
        (found,) = [m for k, s, c, m in self.sent if (k, s, c) == (kind, step, client)]
        return found


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that is gone afterwards: in memory where there is one, since clients wait for their disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@contextmanager
def cohort(members: int = 5, *, mode: str = "semi-honest", **options: Any) -> Iterator[Cohort]:
    """So many clients over such a folder; options of the collector and of `Cohort`.

    By default two of five may drop out, and each masks with all others.
    """
    of_cohort = {
        name: options.pop(name)
        for name in ("vectors", "weights", "metrics", "size", "least", "policies")
        if name in options
    }
    numbers = {"dropouts": 0.4, "colluders": 0.0} | options
    with folder() as path:
        collector = Masked(malicious=mode == "malicious", **numbers)
        yield Cohort(path / "clients", collector, range(members), **of_cohort)


class Cohort:
    """Clients over a folder, and the server that sums their updates.

    Args:
        folder: the clients' own, and the identities' in the malicious mode.
        collector: the server half.
        members: logical ids.
        vectors: each client's update; random ones by default.
        weights: each client's number of examples.
        least: the clients' least cohort.
        metrics: each client's training metrics.
    """

    def __init__(
        self,
        folder: Path,
        collector: Masked,
        members: Sequence[int],
        *,
        vectors: Mapping[int, Sequence[float]] | None = None,
        weights: Mapping[int, float] | None = None,
        metrics: Mapping[str, float] | None = None,
        size: int = 6,
        least: int | None = None,
        policies: Mapping[int, Policy] | None = None,
    ) -> None:
        self.folder, self.collector, self.members = folder, collector, list(members)
        rng = np.random.default_rng(len(self.members))
        self.vectors = {
            one: np.asarray(
                rng.uniform(-1, 1, size) if vectors is None else vectors[one], np.float32
            )
            for one in self.members
        }
        self.weights = dict(weights or dict.fromkeys(self.members, 1.0))
        self.metrics = dict(metrics or {"train_loss": 0.5})
        self.identities = {one: Identity.generate() for one in self.members}
        self.policies = dict(policies or self._policies(least))
        self.clients: dict[int, MaskedClient] = {}
        self.restart()
        self.trained: list[int] = []
        self.model = {"w": np.zeros(len(next(iter(self.vectors.values()))), np.float32)}
        self.round, self.version, self.quorum = 1, 0, 1

    def _policies(self, least: int | None) -> dict[int, Policy]:
        if not self.collector.malicious:
            return dict.fromkeys(self.members, Policy(least_cohort=least))
        roster = Roster({one: identity.public for one, identity in self.identities.items()})
        return {
            one: Policy(
                True,
                roster,
                {one: self.identities[one]},
                least,
                self.collector.dropouts,
                self.collector.colluders,
            )
            for one in self.members
        }

    def restart(self) -> None:
        """New objects over the same folder, as after a crash of every client."""
        self.clients = {one: MaskedClient(self.folder, self.policies[one]) for one in self.members}

    def void(self) -> bytes:
        """Ids of the sessions on the present model that the server declares void."""
        return self.collector._once.void(ModelDigest().of(self.job().records))

    def restore(self) -> None:
        """A new server with the old one's state, and none of the sums that it has opened."""
        old = self.collector
        self.collector = Masked(
            malicious=old.malicious, dropouts=old.dropouts, colluders=old.colluders
        )
        self.collector.load_state_dict(old.state_dict())

    @property
    def steps(self) -> tuple[str, ...]:
        return MALICIOUS_STEPS if self.collector.malicious else STEPS

    def job(self) -> Job:
        layout = flat(len(self.model["w"]))
        return Job(
            self.round,
            self.version,
            {ARRAYS: pack_model(self.model)},
            {},
            {},
            {DELTA: layout},
            {"w": DELTA},
            quorum=self.quorum,
        )

    def open(self) -> MaskedSession:
        session = self.collector.open(self.job(), self.members)
        assert isinstance(session, MaskedSession)
        return session

    def updated(self, client: int) -> Update:
        """What a client's training gives."""
        self.trained.append(client)
        sections = {DELTA: section(self.vectors[client])}
        return Update(sections, self.weights[client], (client,), self.version, self.metrics)

    def answer(self, client: int, content: RecordDict) -> RecordDict:
        """A client's reply; raises `Refused`."""
        half = self.clients[client]
        config = record_in(content, CONFIG, ConfigRecord)
        if config is not None and not config.get(TRAINS, True):
            return half.answer(content)
        ready = half.prepare(content)
        return half.reply(self.updated(client), content) if ready is None else ready

    def run(
        self,
        *,
        lost: Mapping[str, Iterable[int]] | None = None,
        request: Hook | None = None,
        reply: Hook | None = None,
        until: str | None = None,
        session: MaskedSession | None = None,
    ) -> Outcome:
        """Runs a session to its end, or until a step has been asked for.

        Args:
            lost: who is gone from which step on.
            request: changes what a client is sent.
            reply: changes what the server is sent.
            until: the step whose requests are the last thing that happens.
            session: one that is open already.
        """
        outcome = Outcome(session or self.open())
        gone: set[int] = set()
        requests = outcome.session.start()
        while requests:
            step = step_of(requests[0].content)
            outcome.asked[step] = [one.client for one in requests]
            outcome.sent += [("request", step, one.client, one.content) for one in requests]
            gone |= set((lost or {}).get(step, ()))
            if step == until:
                break
            events: list[object] = []
            for one in requests:
                if one.client not in gone:
                    events += self._exchange(outcome, one, step, request, reply)
            if not outcome.session.done and not any(isinstance(e, Request) for e in events):
                events += outcome.session.expire()
            requests = self._note(outcome, events)
        return outcome

    def _exchange(
        self, outcome: Outcome, one: Request, step: str, request: Hook | None, reply: Hook | None
    ) -> list[object]:
        content = one.content if request is None else request(step, one.client, one.content)
        if content is None:
            return []
        try:
            answer: RecordDict | None = self.answer(one.client, content)
        except Refused as refused:
            return list(outcome.session.receive(Reply(one, None, f"Refused: {refused}")))
        assert answer is not None
        outcome.sent.append(("reply", step, one.client, answer))
        answer = answer if reply is None else reply(step, one.client, answer)
        return [] if answer is None else list(outcome.session.receive(Reply(one, answer)))

    def _note(self, outcome: Outcome, events: Iterable[object]) -> list[Request]:
        requests = []
        for event in events:
            match event:
                case Request():
                    requests.append(event)
                case Refusal(client, refused):
                    outcome.refusals[client] = refused
                case Void(reason):
                    outcome.void = reason
                case Update():
                    outcome.update = event
        return requests

    def terms(self, outcome: Outcome) -> Terms:
        client = outcome.asked["keys"][0]
        return Terms.read(said(outcome.of("keys", client, "request")))

    def encoded(self, terms: Terms, client: int) -> np.ndarray:
        """A client's whole vector in the ring, by the formula: nearest step, then the tail; (d + tail,) uint32."""
        most = self.collector.max_weight
        factor = 1.0 if most is None else min(1.0, self.weights[client] / most)
        coding, tail_scale = codings(terms)
        x = self.vectors[client].astype(np.float64)
        cut = np.clip(x, -terms.limit, terms.limit)
        steps = np.rint(cut * (factor * coding.scale))
        share = np.count_nonzero(cut != x) / len(x)
        given = [self.metrics.get(name, 0.0) / terms.metric_limit for name in terms.metrics]
        tail = np.clip([*given, share], -1, 1) * factor
        tail = np.rint(np.array([*tail, factor, 1.0]) * tail_scale)
        return np.concatenate([steps, tail]).astype(np.int64).astype(np.uint32)

    def sum_of(self, terms: Terms, clients: Iterable[int]) -> np.ndarray:
        return np.sum([self.encoded(terms, one) for one in clients], axis=0, dtype=np.uint32)
