"""A cohort cut in groups: one session each, which share nothing but the deadline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from strategies.protocols import Event, Reply, Request, Session
from strategies.wire import Refused


class Grouped:
    """Several sessions over disjoint sets of clients, as one.

    Args:
        sessions: each with its own clients.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = tuple(sessions)
        self._of: dict[int, Session] = {}

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Each group's own."""
        return self._sessions

    def of(self, client: int) -> Session | None:
        """The session of a client's group; None for a client of none, and before `start`."""
        return self._of.get(client)

    @property
    def done(self) -> bool:
        """All of them are."""
        return all(session.done for session in self._sessions)

    def start(self) -> list[Request]:
        """The first requests of each."""
        first: list[Request] = []
        for session in self._sessions:
            requests = session.start()
            self._of |= dict.fromkeys((request.client for request in requests), session)
            first += requests
        return first

    def receive(self, reply: Reply) -> list[Event]:
        """What follows in the client's own group."""
        session = self.of(reply.request.client)
        if session is None:
            raise Refused("duplicate", "this client is in no group")
        return list(session.receive(reply))

    def expire(self) -> list[Event]:
        """What follows in the groups that wait."""
        return list(self._expired())

    def _expired(self) -> Iterator[Event]:
        for session in self._sessions:
            if not session.done:
                yield from session.expire()
