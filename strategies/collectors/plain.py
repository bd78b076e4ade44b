"""The plain collector: every client is asked once and its update is seen by the server.

Server half of FedAvg's exchange (McMahan et al. 2017, Algorithm 1): one request, one reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from flwr.app import ConfigRecord, RecordDict

from strategies.collectors.portions import expected_of, part_of, records_for, whole
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import ClientOwn, Job, Refusal, Reply, Request
from strategies.records import bundle, extended
from strategies.replies import Expected, read_update, read_weights, write_update
from strategies.update import EPSILON, Update
from strategies.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    Refused,
    config_of,
    failure_of,
    integer_in,
    unpack_model,
)


@dataclass(frozen=True)
class Plain:
    """Asks each client of the cohort once.

    Attributes:
        vanilla: clients are plain Flower ClientApps that return weights; the server subtracts what it sent.
        metrics: clients say how many examples they have and what their training came to. Without, vectors are all that
            is asked for and looked at, as differential privacy needs: but `epsilon`, a client's own account of what it
            has spent, which depends on no example.
    """

    vanilla: bool = False
    metrics: bool = True

    label = "collector plain"
    phases: ClassVar[int] = 1

    def check(self, claim: Claim) -> Claim:
        """The server sees each update, and its number of examples and metrics in clear unless it asks for none."""
        told = frozenset({NUM_EXAMPLES, METRICS}) if self.metrics else frozenset[str]()
        if self.vanilla and claim.parts:
            raise ContractError(
                claim.source("parts"),
                name_of(self),
                "a plain Flower client trains whatever it is sent, and knows of no parts",
                "use clients with the pipeline's client half",
            )
        return claim.given(
            self,
            visibility=Visibility.EACH,
            clear=claim.clear | told,
            client_half=not self.vanilla,
            summed=None if self.metrics else "uniform",
        )

    def open(self, job: Job, cohort: Sequence[int]) -> PlainSession:
        """A session over the clients with these logical ids."""
        return PlainSession(job, cohort, vanilla=self.vanilla, metrics=self.metrics)

    def client_half(self, own: ClientOwn) -> PlainClient:
        """Nothing of the client's own is needed."""
        return PlainClient(metrics=self.metrics)


BARE: Final = "bare"
"""The setting by which clients are asked for vectors alone, whatever they are used to send."""


class PlainSession:
    """One request to each client; each may answer once."""

    def __init__(
        self, job: Job, cohort: Sequence[int], *, vanilla: bool, metrics: bool = True
    ) -> None:
        self._job, self._metrics = job, metrics
        self._cohort = tuple(cohort)
        self._waiting = set(cohort)
        # Asked once: whose part it is may have changed when a late reply comes.
        self._parts = {client: part_of(job, client) for client in cohort}
        self._sent = unpack_model(job.records[ARRAYS]) if vanilla else None
        # Flower checks every value that a record is given: what all clients are told alike is checked once.
        self._config = ConfigRecord(
            {
                **job.config,
                "server-round": job.round,
                "version": job.version,
                "phase": 0,
                "phases": 1,
                **({} if metrics else {BARE: True}),
            }
        )

    @property
    def done(self) -> bool:
        """Everybody has answered, or the deadline has passed."""
        return not self._waiting

    def start(self) -> list[Request]:
        """One request a client; they share the records of the model."""
        return [
            Request(client, "train", self._content(client), self._job.round)
            for client in self._cohort
        ]

    def receive(self, reply: Reply) -> list[Update]:
        """The update of a reply.

        Raises:
            Refused: `duplicate`, `client_error`, `paused`, or as the reply deserves.
        """
        client = reply.request.client
        if client not in self._waiting:
            raise Refused("duplicate", "this client has answered before, or was not asked")
        self._waiting.discard(client)
        if reply.content is None:
            raise failure_of(reply.error)
        part = self._parts[client]
        if self._sent is not None:
            expected = Expected.of(self._job, client)
            update = read_weights(reply.content, expected, self._sent, self._job.kinds)
        else:
            update = read_update(reply.content, expected_of(self._job, client, part))
            update = whole(update, part, self._job)
        return [update if self._metrics else bare(update)]

    def expire(self) -> list[Refusal]:
        """Those who have not answered by the deadline."""
        late = sorted(self._waiting)
        self._waiting.clear()
        return [
            Refusal(client, Refused("timeout", "no reply before the round's deadline"))
            for client in late
        ]

    def _content(self, client: int) -> RecordDict:
        records = records_for(self._job, self._parts[client])
        return bundle({**records, CONFIG: extended(self._config, self._job.own(client))})


def bare(update: Update) -> Update:
    """The update without what its client's examples came to: a weight of 1, and no metric but `epsilon`."""
    told = {name: value for name, value in update.metrics.items() if name == EPSILON}
    return replace(update, weight=1.0, metrics=told)


@dataclass(frozen=True)
class PlainClient:
    """The client half: the update as it is, with its number of examples and metrics in clear unless none are asked for.

    Attributes:
        metrics: as `Plain`'s.
    """

    metrics: bool = True

    def prepare(self, request: RecordDict) -> RecordDict | None:
        """Nothing is to be done before training."""
        return None

    def reply(self, update: Update, request: RecordDict) -> RecordDict:
        """The update's records."""
        (client,), config = update.members, config_of(request)
        if not self.metrics or config.get(BARE):
            update = bare(update)
        return write_update(update, client=client, round_number=integer_in(config, "server-round"))

    def answer(self, request: RecordDict) -> RecordDict:
        """Refuses: each request of the plain collector trains."""
        raise Refused(
            "phase", "this client sends its updates in clear: the server's collector is another"
        )
