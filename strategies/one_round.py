"""One round whose messages somebody else carries: what to send, and what the replies come to.

For code that drives a strategy round by round, as Flower's own loop does. The messages go out in one batch and the
replies come back in one, so that the session has one phase, nobody's time is known, and no second cohort is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import Message, MetricRecord

from strategies.exchange import Exchange
from strategies.metrics import mean_metrics
from strategies.protocols import Accumulator, Event, Refusal, Reply, Request, Void
from strategies.rounds import Rounds
from strategies.schedulers.tally import Tally
from strategies.server_models import ServerModel
from strategies.update import Update
from strategies.wire import Refused

log = logging.getLogger(__name__)


class OneRound:
    """The round that makes the model's next version.

    Args:
        pipeline: the parts.
        model: is changed by `conclude`.
        exchange: knows the nodes.
        seed: the run's, for the sampler.

    Raises:
        BudgetSpentError: the round must not run.
    """

    def __init__(self, pipeline: Rounds, model: ServerModel, exchange: Exchange, seed: int) -> None:
        self._pipeline, self._model, self._tally = pipeline, model, Tally()
        there = exchange.clients()
        self._job = pipeline.job(model)
        pipeline.prepare(there, self._job, 0)
        cohort = pipeline.draw(there, seed=seed, round_number=self._job.round, attempt=0)
        self._session = pipeline.collector.open(self._job, cohort)
        self._asked = {exchange.node_of(one.client): one for one in self._session.start()}

    def messages(self) -> list[Message]:
        """What goes to which node."""
        return [
            Message(one.content, node, one.kind, group_id=str(one.round))
            for node, one in self._asked.items()
        ]

    def conclude(self, replies: Iterable[Message]) -> MetricRecord | None:
        """Takes the replies and changes the model; the clients' metrics, or None where the round is void."""
        pipeline, model, tally = self._pipeline, self._model, self._tally
        accumulator = pipeline.begin(self._job, len(self._asked))
        good = sum(self._taken(event, accumulator) for event in self._events(replies))
        aggregate = tally.combined(accumulator, pipeline, tally.wrong)
        aggregate = pipeline.concluded(aggregate, good, self._job)
        if aggregate is None:
            log.warning("round %d is void: %d good updates came", self._job.round, good)
            model.skip()
            pipeline.judge(model.version, [], tally.refusals)
            return None
        model.apply(aggregate)
        joined = dict.fromkeys(aggregate.members, model.version)
        pipeline.applied(aggregate, joined, model.version)
        pipeline.judge(model.version, tally.updates, tally.refusals)
        return MetricRecord({**mean_metrics(tally.metrics), **tally.figures})

    def _taken(self, event: Event, accumulator: Accumulator) -> int:
        """Clients whose update is in, by this event."""
        match event:
            case Update():
                try:
                    self._pipeline.admission.admit(event)
                    update = self._pipeline.decode(event)
                except Refused as refused:
                    self._refused(event.members[0], refused)
                    return 0
                accumulator.add(update)
                self._tally.taken(update, self._pipeline)
                return len(event.members)
            case Refusal(client, refused):
                self._refused(client, refused)
            case Void(reason):
                log.warning("no sum: %s", reason)
            case _:
                raise RuntimeError("a collector of several phases runs by `start` only")
        return 0

    def _refused(self, client: int, refused: Refused) -> None:
        self._pipeline.admission.record(client, refused)
        self._tally.refused(client, refused)

    def _events(self, replies: Iterable[Message]) -> Iterable[Event]:
        """What follows the replies and the deadline; a session that was done at once gives its sums there."""
        for request, reply in self._replies(replies):
            try:
                yield from list(self._session.receive(reply))
            except Refused as refused:
                yield Refusal(request.client, refused)
        yield from self._session.expire()

    def _replies(self, messages: Iterable[Message]) -> Iterable[tuple[Request, Reply]]:
        for message in messages:
            request = self._asked.get(message.metadata.src_node_id)
            if request is None:
                log.warning("node %d answered and was not asked", message.metadata.src_node_id)
            elif message.has_error():
                yield request, Reply(request, None, str(message.error.reason))
            else:
                yield request, Reply(request, message.content)
