"""How long a phase is waited for: until its deadline, or until k of its n clients have answered and a little longer.

Completion at a share of those asked is what Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design",
section 2.2, call a minimal target count. A session is not told: to it the rest is late, as at a deadline. The k are a
share of all whom the session asked first, in each of its phases: a sum so loses no more clients over all phases
together than that share leaves, which is what its parameters were made for.

Nor is a phase of training waited for longer when each of those that are left has had the time that it alone may take,
if that is known of all of them: a quick client that has died is not waited for as a slow one is. Of phases that train
nothing no times are known.

Where a cohort is several sessions, each is waited for alone: a group that lacks one more client than it bears gives no
sum, however many have answered in the others. Where clients take turns of their own (a session that is not `phased`),
who has sent the last one has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import ceil, inf

from strategies.protocols import Reply, Request, Session
from strategies.wire import TRAINS, config_of


@dataclass(eq=False)
class _Part:
    """One session at work: who is still to answer in its present phase, and when that is over before its deadline."""

    session: Session
    needed: float = inf
    began: float = 0.0
    answered: int = 0
    due: float = inf
    waiting: dict[int, Request] = field(default_factory=dict)
    slowest: list[tuple[float, int]] = field(default_factory=list)
    """A heap of all who were asked: minus the seconds that each may take, and who."""

    @property
    def phased(self) -> bool:
        return bool(getattr(self.session, "phased", True))


class Waiting:
    """Who is waited for in a round.

    Args:
        session: of the round's cohort; one of several groups gives its `sessions`.
        share: of the clients of each session, in (0, 1]; 1 waits for all.
        grace: how much longer is waited then, as a share of what the phase has taken so far.
        limits: gives the seconds that a training request to each of some clients may take, infinite where nothing is
            known of one; None for no such limits.
    """

    def __init__(
        self,
        session: Session,
        share: float,
        grace: float,
        limits: Callable[[Sequence[int]], Iterable[float]] | None = None,
    ) -> None:
        self._parts = [_Part(one) for one in getattr(session, "sessions", (session,))]
        self._session, self._share, self._grace = session, share, grace
        self._limits = limits

    def start(self, now: float) -> list[Request]:
        """The first requests of all sessions."""
        first = list(self._session.start())
        for part, requests in self._by_part(first):
            if self._share < 1:
                part.needed = ceil(round(self._share * len(requests), 9))
            self._begin(part, requests, now)
        return first

    def asked(self, requests: Iterable[Request], now: float) -> None:
        """Further requests, of one session or of several."""
        for part, own in self._by_part(requests):
            if part.phased:
                self._begin(part, own, now)
            else:
                part.waiting |= {request.client: request for request in own}
                for entry in self._entries(part, own):
                    heappush(part.slowest, entry)

    def answered(self, reply: Reply, now: float, *, good: bool) -> None:
        """A reply has come, nothing being wrong with it where it is `good`; one to an earlier phase does not count."""
        client = reply.request.client
        part = self._part_of(client)
        if part.waiting.get(client) is not reply.request:
            return
        del part.waiting[client]
        last = part.phased or _trains(reply.request)
        part.answered += bool(good and last)
        if part.answered >= part.needed and part.due == inf:
            part.due = now + self._grace * (now - part.began)

    @property
    def due(self) -> float:
        """When the first session has been waited for as long as is worth it; infinite where none has."""
        return min((part.due for part in self._parts if not part.session.done), default=inf)

    @property
    def hopeless(self) -> float:
        """When all who are waited for have had their own time; infinite where it is not known of one."""
        parts = [part for part in self._parts if part.waiting and not part.session.done]
        if self._limits is None or not parts:
            return inf
        return max(part.began + _longest(part) for part in parts)

    def over(self, now: float) -> list[Session]:
        """The sessions that are not waited for any more."""
        return [part.session for part in self._parts if part.due <= now and not part.session.done]

    def given_up(self, sessions: Sequence[Session] | None = None) -> list[Request]:
        """The requests of these sessions, or of all, that nobody waits for any more."""
        left: list[Request] = []
        for part in self._parts:
            if sessions is None or any(part.session is one for one in sessions):
                left += part.waiting.values()
                part.waiting, part.due = {}, inf
        return left

    def _part_of(self, client: int) -> _Part:
        if len(self._parts) == 1:
            return self._parts[0]
        own = self._session.of(client)  # type: ignore[attr-defined]  # a session of groups
        return next(part for part in self._parts if part.session is own)

    def _by_part(self, requests: Iterable[Request]) -> Iterable[tuple[_Part, list[Request]]]:
        found: dict[_Part, list[Request]] = {}
        for request in requests:
            found.setdefault(self._part_of(request.client), []).append(request)
        return found.items()

    def _begin(self, part: _Part, requests: Sequence[Request], now: float) -> None:
        part.waiting = {request.client: request for request in requests}
        part.began, part.answered, part.due = now, 0, inf
        part.slowest = self._entries(part, requests)
        heapify(part.slowest)

    def _entries(self, part: _Part, requests: Sequence[Request]) -> list[tuple[float, int]]:
        if self._limits is None:
            return []
        clients = [request.client for request in requests]
        limits = self._limits(clients)
        # Of turns that clients take by themselves the time of all together is known.
        known = [not part.phased or _trains(request) for request in requests]
        return [
            (-limit if one else -inf, client)
            for limit, client, one in zip(limits, clients, known, strict=True)
        ]


def _trains(request: Request) -> bool:
    return bool(config_of(request.content).get(TRAINS, True))


def _longest(part: _Part) -> float:
    """The longest time that any of those who are waited for may take."""
    while part.slowest[0][1] not in part.waiting:
        heappop(part.slowest)
    return -part.slowest[0][0]
