"""Rounds without training or a network: real client halves, whose replies are handed to a real session one by one.

Processor seconds of clients and server are measured apart, and the bytes of each message. Nothing is held that a server
would not hold: a reply is gone when the session has taken it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from strategies.combiners import Mean
from strategies.protocols import ClientHalf, Collector, Job, Plan, Reply, Request, Void
from strategies.secagg.terms import SECAGG, Said
from strategies.sizes import count_bytes
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import ARRAYS, CONFIG, TRAINS, pack

SEED = 1
LARGEST_WEIGHT = 1_000
VECTORS = 8
"""Different updates in a round: clients take turns with them."""


class Watch:
    """Processor and wall seconds of what runs under it."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Runs while the block does."""
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu += time.process_time() - cpu
            self.wall += time.perf_counter() - wall


@dataclass
class Round:
    """What a round took.

    Attributes:
        server: of the whole round.
        phases: the server's, by phase: taking its replies, and what follows of them.
        clients: by client, over all phases.
        down: bytes to a client by phase, for each client that was asked.
        up: bytes of a client's reply by phase.
        result: the combined update.
    """

    server: Watch = field(default_factory=Watch)
    phases: dict[str, Watch] = field(default_factory=lambda: defaultdict(Watch))
    clients: dict[int, Watch] = field(default_factory=lambda: defaultdict(Watch))
    down: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    up: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    result: Update | None = None

    def client(self, gone: Collection[int]) -> float:
        """Processor seconds of the median client that stayed to the end."""
        return median(watch.cpu for client, watch in self.clients.items() if client not in gone)

    def bytes_a_client(self, way: str) -> dict[str, float]:
        """The median message of each phase."""
        return {phase: median(sizes) for phase, sizes in getattr(self, way).items()}


class Cohort:
    """A model of `size` parameters, and a cohort with its updates.

    Args:
        members: how many clients.
        size: elements of an update.
    """

    def __init__(self, members: int, size: int) -> None:
        rng = np.random.default_rng(SEED)
        self.members, self.size = members, size
        self._vectors = (0.01 * rng.standard_normal((min(VECTORS, members), size))).astype(
            np.float32
        )
        self._weights = rng.integers(100, LARGEST_WEIGHT, members)
        model = {"weights": np.zeros(size, np.float32)}
        self.layout = Layout.of(model)
        self._records = {ARRAYS: ArrayRecord({name: pack(array) for name, array in model.items()})}

    def job(self, number: int = 1) -> Job:
        """What a round asks."""
        return Job(
            round=number,
            version=number - 1,
            records=self._records,
            config={"attempt": 0},
            included={},
            layouts={DELTA: self.layout},
            kinds={"weights": DELTA},
        )

    def update(self, client: int) -> Update:
        """A client's own."""
        vector = self._vectors[client % len(self._vectors)]
        section = {DELTA: Section(vector, self.layout)}
        return Update(section, float(self._weights[client]), (client,), 0, {"train_loss": 0.5})

    def gone(self, part: float) -> frozenset[int]:
        """So large a part of the clients, drawn at random."""
        rng = np.random.default_rng(SEED + 1)
        return frozenset(rng.permutation(self.members)[: int(part * self.members)].tolist())

    def mean_without(self, gone: Collection[int]) -> np.ndarray[Any, Any]:
        """What the round is to give, (size,) float64."""
        there = [client for client in range(self.members) if client not in gone]
        shares = np.zeros(len(self._vectors))
        np.add.at(shares, np.array(there) % len(self._vectors), self._weights[there])
        mean: np.ndarray[Any, Any] = shares @ self._vectors / shares.sum()
        return mean


def play(
    cohort: Cohort, collector: Collector, half: ClientHalf, gone: Collection[int] = ()
) -> Round:
    """One round, in which some clients are gone from the moment on that they are asked for their upload.

    Raises:
        RuntimeError: a client was refused that should not have been, or the round came to nothing.
    """
    taken = Round()
    job = cohort.job()
    with taken.server.on(), taken.phases["open"].on():
        accumulator = Mean().begin(Plan({DELTA: cohort.layout}, cohort.members, cohort.members))
        session = collector.open(job, range(cohort.members))
        requests: list[Request] = list(session.start())
    while requests:
        phase, following = _phase(requests[0]), list[Request]()
        for request in requests:
            taken.down[phase].append(count_bytes(request.content))
            if request.content[CONFIG].get(TRAINS, True) and request.client in gone:
                continue
            with taken.clients[request.client].on():
                content = _answer(half, request, cohort)
            taken.up[phase].append(count_bytes(content))
            with taken.server.on(), taken.phases[phase].on():
                for event in session.receive(Reply(request, content)):
                    _sort(event, accumulator, following)
            del content
        if not session.done and not following:
            with taken.server.on(), taken.phases[phase].on():
                for event in session.expire():
                    _sort(event, accumulator, following, gone)
        requests = following
    with taken.server.on(), taken.phases["combine"].on():
        taken.result = accumulator.result()
    _check(cohort, taken, gone)
    return taken


def _phase(request: Request) -> str:
    content = request.content
    return Said.of(content).step() if SECAGG in content else "upload"


def _answer(half: ClientHalf, request: Request, cohort: Cohort) -> RecordDict:
    """As `clients.Client` does, but that nothing is trained."""
    if not request.content[CONFIG].get(TRAINS, True):
        return half.answer(request.content)
    ready = half.prepare(request.content)
    if ready is not None:
        return ready
    return half.reply(cohort.update(request.client), request.content)


def _sort(
    event: object, accumulator: Any, following: list[Request], gone: Collection[int] = ()
) -> None:
    match event:
        case Request():
            following.append(event)
        case Update():
            accumulator.add(event)
        case Void(reason):
            raise RuntimeError(f"the round came to nothing: {reason}")
        case _ if getattr(event, "client", None) not in gone:
            raise RuntimeError(f"refused: {event}")


def _check(cohort: Cohort, taken: Round, gone: Collection[int]) -> None:
    """Fast, and wrong, would be worth nothing: a step is limit · n / 2³¹."""
    if taken.result is None:
        raise RuntimeError("the round has no result")
    off = np.abs(taken.result.delta.vector - cohort.mean_without(gone)).max()
    if off > 4e-9 * cohort.members + 1e-8:
        raise RuntimeError(f"the mean is off by {off:.2g}")
