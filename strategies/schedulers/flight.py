"""Who is at work on which version of the model: the sessions that a buffered scheduler has under way.

Knows sessions, their clients and their deadlines; not when a session is opened, nor what becomes of an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord

from strategies.protocols import Job, Request, Session
from strategies.records import extended
from strategies.state import State, array_like, mapping_in
from strategies.wire import ARRAYS, CONFIG, SENT, config_of, pack_model, unpack_model

_COLUMNS = ("clients", "versions", "attempts", "steps")


@dataclass(eq=False)
class Wave:
    """One session under way.

    Attributes:
        job: what its clients were asked.
        session: the exchange with them.
        waiting: logical ids of those whose part is not over.
        sent: when it was opened, seconds of the exchange's clock.
        deadline: when its present phase ends.
        requests: those outstanding, by client.
        attempt: how often its clients were asked on this version before.
        steps: local steps that they were told to take; 0 where that is left to them.
    """

    job: Job
    session: Session
    waiting: set[int]
    sent: float
    deadline: float
    requests: dict[int, Request] = field(default_factory=dict)
    attempt: int = 0
    steps: int = 0


class Flight:
    """All sessions under way; no client is in two."""

    def __init__(self) -> None:
        self._waves: dict[int, Wave] = {}
        self._of: dict[int, Wave] = {}

    def __len__(self) -> int:
        """Clients at work."""
        return len(self._of)

    def __contains__(self, client: object) -> bool:
        """Whether a client is at work."""
        return client in self._of

    def add(self, wave: Wave) -> None:
        """A session has been opened; raises `ValueError` where one of its clients is in another."""
        if twice := wave.waiting & self._of.keys():
            raise ValueError(f"client {min(twice)} is at work already")
        self._waves[id(wave)] = wave
        self._of |= dict.fromkeys(wave.waiting, wave)

    def of(self, client: int) -> Wave:
        """The session that a client is in."""
        return self._of[client]

    def free(self, wave: Wave, clients: Iterable[int]) -> None:
        """These clients' part of a session is over."""
        for client in clients:
            if client in wave.waiting:
                wave.waiting.discard(client)
                del self._of[client]
        if not wave.waiting:
            self._waves.pop(id(wave), None)

    def due(self, now: float) -> list[Wave]:
        """Sessions whose present phase has had its time."""
        return [wave for wave in self._waves.values() if wave.deadline <= now]

    @property
    def deadline(self) -> float:
        """When the first of them has; infinite where nobody is at work."""
        return min((wave.deadline for wave in self._waves.values()), default=float("inf"))

    # ---- through a restart ----

    def state_dict(self) -> State:
        """Whom to ask again, and on which models: of sessions of one phase, which alone can be asked again."""
        single = [wave for wave in self._waves.values() if _can_be_asked_again(wave)]
        models = {wave.job.version: wave.job.records[ARRAYS] for wave in single}
        rows = [
            (client, wave.job.version, wave.attempt, wave.steps)
            for wave in single
            for client in sorted(wave.waiting)
        ]
        table = np.array(rows, np.int64).reshape(-1, len(_COLUMNS))
        return {
            **{name: table[:, place].copy() for place, name in enumerate(_COLUMNS)},
            "sent": np.array([wave.sent for wave in single for _ in wave.waiting], np.float64),
            "models": {
                str(version): dict(unpack_model(record)) for version, record in models.items()
            },
        }


@dataclass(frozen=True)
class Again:
    """A request that an earlier process had under way.

    Attributes:
        client: logical id.
        version: of the model that it was sent.
        attempt: as `Wave`'s.
        steps: as `Wave`'s.
        sent: when, seconds of the earlier exchange's clock.
    """

    client: int
    version: int
    attempt: int
    steps: int
    sent: float


@dataclass(frozen=True)
class Resumed:
    """What `Flight.state_dict` left.

    Attributes:
        requests: in the order in which they were sent.
        models: the records of the models that they are about, by version.
    """

    requests: tuple[Again, ...] = ()
    models: Mapping[int, ArrayRecord] = field(default_factory=dict)

    @classmethod
    def of(cls, state: State) -> Resumed:
        """Reads a state; raises `ValueError` for another part's."""
        sent = state.get("sent")
        if not isinstance(sent, np.ndarray) or sent.ndim != 1 or sent.dtype != np.float64:
            raise ValueError("the state's 'sent' should be a vector of float64")
        like = np.zeros(len(sent), np.int64)
        columns = [array_like(state, name, like).tolist() for name in _COLUMNS]
        requests = tuple(
            Again(int(row[0]), int(row[1]), int(row[2]), int(row[3]), float(moment))
            for row, moment in zip(zip(*columns, strict=True), sent, strict=True)
        )
        models = {}
        for version in {one.version for one in requests}:
            arrays = mapping_in(mapping_in(state, "models"), str(version))
            named = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
            models[version] = pack_model(named)
        return cls(requests, models)

    def job(self, version: int, present: Job) -> Job:
        """What the clients of a version were asked, given what they would be asked now."""
        records = {**present.records, ARRAYS: self.models[version]}
        return replace(present, round=version + 1, version=version, records=records)


def sent_before(request: Request, moment: float) -> Request:
    """A request that was first sent at this moment: an engine answers it as if it had been under way since."""
    config = extended(config_of(request.content), {SENT: moment})
    request.content[CONFIG] = config
    return request


def _can_be_asked_again(wave: Wave) -> bool:
    """A session of several phases can't: its keys are gone with the process that made them."""
    return all(
        config_of(request.content).get("phases", 1) == 1 for request in wave.requests.values()
    )
