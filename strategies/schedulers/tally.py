"""What a scheduler counts on the way to one model version, and the door that every update goes through."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from strategies.admission import FAILURES, is_wrong
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.metrics import add_metrics, mean_metrics
from strategies.protocols import Accumulator, Event, Refusal, Reply, Request, Session, Void
from strategies.rounds import Rounds
from strategies.server_models import ServerModel
from strategies.update import Update
from strategies.wire import TRAINS, Refused, config_of

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """Counts of one model version, over its attempts.

    Attributes:
        sampled: clients that were asked, by attempt: nobody is, where a sum is there already.
        failed: of those, how many answered with an error or not at all.
        rejected: how many replies were refused.
        wrong: of these, those that were wrong, as rules count them.
        metrics: sums of the clients' figures and their weights.
        refusals: the reason, by client.
        updates: those of the last attempt, held where clients are watched.
        void: why the last attempt gave no aggregate, or fewer sums than were planned.
        staleness: of each update that was taken, where they have one.
        figures: what the combiner says of the last attempt.
        silent: clients of which nothing came in some attempt.
        heard: whether an update was taken.
    """

    sampled: int = 0
    failed: int = 0
    rejected: int = 0
    wrong: int = 0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    void: str = ""
    staleness: list[int] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    heard: bool = False

    def combined(
        self, accumulator: Accumulator, pipeline: Rounds, refused: int = 0
    ) -> Update | None:
        """What the combiner makes of its updates; what it says of them is kept unless a promise forbids it."""
        aggregate = accumulator.result(refused=refused)
        if pipeline.privacy is None:
            self.figures = getattr(accumulator, "figures", dict)()
        return aggregate

    def fell_short(self, pipeline: Rounds, good: int, asked: int) -> None:
        """Says why so many good updates, of so many asked for, came to no aggregate."""
        quorum = pipeline.admission.quorum
        short = (
            f"the quorum is {quorum}"
            if good < quorum
            else f"the rule needs {pipeline.least_inputs(asked)}"
        )
        # Where no sum came at all, its own reason says it; the quorum is another matter.
        if not self.void or good:
            said = f"{good} of {asked} clients sent a good update, {short}"
            self.void = "; ".join(filter(None, (said, self.void)))

    def refused(self, client: int, refusal: Refused) -> None:
        """One client's part is over, for this reason."""
        self.refusals[client] = refusal.reason
        self.wrong += is_wrong(refusal)
        if refusal.reason in FAILURES:
            self.failed += 1
        else:
            self.rejected += 1

    def taken(self, update: Update, pipeline: Rounds) -> None:
        """One decoded update is in; under a promise no figure of the updates themselves is seen."""
        self.heard = True
        if pipeline.privacy is None:
            add_metrics(self.metrics, update.metrics, update.weight)
        else:
            pipeline.privacy.told(update)
        if pipeline.watches:
            self.updates.append(update)


@dataclass(frozen=True)
class Meter:
    """When a model version was begun, and what had travelled by then."""

    began: float
    uploaded: int
    downloaded: int

    @classmethod
    def begin(cls, exchange: Exchange) -> Meter:
        """Now."""
        return cls(time.perf_counter(), exchange.uploaded, exchange.downloaded)

    def view(
        self,
        pipeline: Rounds,
        model: ServerModel,
        exchange: Exchange,
        tally: Tally,
        *,
        void: bool,
    ) -> RoundView:
        """The version that has just been made; who sent what is judged here."""
        pipeline.over(tally.silent, heard=tally.heard or tally.failed < tally.sampled)
        flagged = pipeline.judge(model.version, [] if void else tally.updates, tally.refusals)
        return RoundView(
            round=model.version,
            model=model,
            seconds=time.perf_counter() - self.began,
            clock=exchange.now(),
            upload_bytes=exchange.uploaded - self.uploaded,
            download_bytes=exchange.downloaded - self.downloaded,
            sampled=tally.sampled,
            failed=tally.failed,
            rejected=tally.rejected,
            void=void,
            void_reason=tally.void if void else "",
            flagged=flagged,
            epsilon=None if pipeline.privacy is None else pipeline.privacy.epsilon,
            staleness=tuple(tally.staleness),
            train_metrics={**mean_metrics(tally.metrics), **tally.figures},
        )


def trains(request: Request) -> bool:
    """Whether a client is asked to train, or to take its last turn."""
    return request.kind == "train" and bool(config_of(request.content).get(TRAINS, True))


def measured(pipeline: Rounds, reply: Reply, since: float | None = None) -> None:
    """Notes what a client took to train, where that is what it has answered.

    Args:
        pipeline: is told.
        reply: of a session.
        since: seconds until now from the first turn, where clients take turns of their own and the last one tells
            nothing; None for what the reply itself took.
    """
    request, seconds = reply.request, reply.seconds if since is None else since
    if trains(request) and reply.content is not None and seconds is not None:
        pipeline.answered(request.client, seconds)


def following(session: Session, reply: Reply | None) -> list[Event]:
    """What follows from a reply, or from a deadline that has passed where there is none."""
    if reply is None:
        return list(session.expire())
    try:
        return list(session.receive(reply))
    except Refused as refused:
        return [Refusal(reply.request.client, refused)]


def admitted(
    pipeline: Rounds,
    event: Event,
    tally: Tally,
    passes: Callable[[Update], None] = lambda update: None,
) -> Update | None:
    """The decoded update where the event is one that is let in; refusals and void sums are counted.

    Args:
        pipeline: whose admission and stages look at it.
        event: of a session.
        tally: takes the counts.
        passes: what else an admitted update must pass before it is decoded; raises `Refused`.
    """
    match event:
        case Update():
            try:
                pipeline.admission.admit(event)
                passes(event)
                return pipeline.decode(event)
            except Refused as refused:
                if len(event.members) == 1:
                    return admitted(pipeline, Refusal(event.members[0], refused), tally)
                # A sum has no author to strike, but it is one of the inputs that a rule bears f of.
                told = f"a sum of {len(event.members)} clients: {refused}"
                return admitted(pipeline, Void(told, wrong=is_wrong(refused)), tally)
        case Refusal(client, refused):
            pipeline.admission.record(client, refused)
            tally.refused(client, refused)
            if refused.reason in FAILURES:
                pipeline.timings.failed(client)
                tally.silent.add(client)
        case Void(reason, wrong):
            log.warning("no sum: %s", reason)
            tally.void = reason
            tally.wrong += wrong
    return None
