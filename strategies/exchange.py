"""The only door to Flower's `Grid`: who is there, requests out, replies in until a deadline.

Knows clients by their logical ids and hides node ids and message ids from everything above.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from strategies.downlink import Downlink
from strategies.downlink.coding import REASON
from strategies.downlink.messages import is_change
from strategies.profiles import read_profile
from strategies.protocols import ConfigValue, Reply, Request
from strategies.records import record_in
from strategies.sizes import count_bytes
from strategies.wire import CONFIG, SENT

log = logging.getLogger(__name__)

HELLO: Final = "query.hello"
"""The message type by which a node is asked for its logical id."""
_HELLO_ATTEMPTS: Final = 3
"""Attempts one after the other, after which a node rests: it may have been cut off, or its machine busy."""
_REST, _LONGEST_REST = 600.0, 3600.0
"""Seconds of the first rest, and of the longest: each is twice the one before."""

_NEVER_ASKED: Final = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
"""Errors that tell nothing of the client."""

_UNREADABLE: Final = (AttributeError, LookupError, TypeError, ValueError)
"""What Flower raises on the records of a hostile peer as it reads them."""


class Clock(Protocol):
    """Time as the grid has it: the wall's, or an engine's own."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Waits until something may have arrived, `seconds` at most."""
        ...


class WallClock:
    """Real time; polls with a short back-off, since Flower's own `send_and_receive` sleeps 3 s in deployment."""

    def __init__(self, poll: float = 0.05) -> None:
        self._poll = poll

    def now(self) -> float:
        """Seconds of a clock that never steps back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleeps one back-off."""
        time.sleep(max(0.0, min(self._poll, seconds)))


class NoClientsError(RuntimeError):
    """Too few clients came before the deadline."""


class _Sent(NamedTuple):
    """A request on its way: when it was sent, how long it lasts, and whether it brings a change of the model only."""

    request: Request
    moment: float
    ttl: float | None
    is_change: bool


class Exchange:
    """Requests and replies by logical client.

    Args:
        grid: Flower's, or an engine's. A grid with a `roster` (logical id → node id) and a `clock` is asked for those.
        hello: settings of the hello query by which every new node gives its logical id; with None nodes are
            numbered in the order of their ids, as is right for vanilla apps, which answer no query.
        population: number of all clients; a node that gives a logical id past it is left out. None takes all.
        hello_timeout: seconds to wait for answers to a hello.
        lasting: without a hello, a node keeps its number for good and no other gets it, as limits on how often a client
            takes part need.

    Attributes:
        uploaded: bytes of all replies so far.
        downloaded: bytes of all requests so far, as they were sent.
        downlink: makes requests smaller for clients that hold a model already; None sends them as they are.
        profiles: what devices have told of themselves, by client, in the words of `strategies.profiles`.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        hello: Mapping[str, ConfigValue] | None = None,
        population: int | None = None,
        hello_timeout: float = 120.0,
        lasting: bool = False,
    ) -> None:
        self._grid = grid
        self._clock: Clock = getattr(grid, "clock", None) or WallClock()
        self._hello = hello
        self._population = population
        self._hello_timeout, self._lasting = hello_timeout, lasting
        self._numbered: dict[int, int] = {}
        self._nodes: Mapping[int, int] = {}
        self._failed_hellos: Counter[int] = Counter()
        self._resting: dict[int, float] = {}
        self._rivals: dict[int, int] = {}
        self._outstanding: dict[str, _Sent] = {}
        self._arrived: deque[Reply] = deque()
        self._incoming: Iterator[Message] = iter(())
        self.downlink: Downlink | None = None
        self.profiles: dict[int, Mapping[str, str]] = {}
        self.uploaded = 0
        self.downloaded = 0

    def now(self) -> float:
        """The clock's time in seconds."""
        return self._clock.now()

    def clients(self) -> list[int]:
        """Logical ids of the clients that are there now, sorted."""
        self._refresh()
        return sorted(self._nodes)

    def wait_for_clients(self, least: int, timeout: float) -> list[int]:
        """Logical ids once `least` clients are there.

        Raises:
            NoClientsError: they did not come within `timeout` seconds.
        """
        deadline = self.now() + timeout
        while len(found := self.clients()) < least:
            if self.now() >= deadline:
                raise NoClientsError(
                    f"{len(found)} of {least} clients came within {timeout:g} s: start more SuperNodes "
                    f"(simulation: num-supernodes), or lower num_clients"
                )
            self._clock.sleep(1.0)
        return found

    def send(self, requests: Iterable[Request], *, ttl: float | None = None) -> None:
        """Sends requests to clients that are there; one whose node is gone is answered by an error at once."""
        messages, sent, now = [], [], self.now()
        for request in requests:
            node = self._nodes.get(request.client)
            if node is None:
                self._arrived.append(Reply(request, None, f"client {request.client} is not there"))
                continue
            content = request.content if self.downlink is None else self.downlink.content(request)
            messages.append(
                Message(content, node, request.kind, ttl=ttl, group_id=str(request.round))
            )
            sent.append(request)
            self.downloaded += count_bytes(content)
        ids = self._push(messages)
        for message_id, request, message in zip(ids, sent, messages, strict=True):
            if message_id:
                self._outstanding[message_id] = _Sent(
                    request, _begun(request, now), ttl, is_change(message.content)
                )
            else:
                self._arrived.append(Reply(request, None, "the SuperLink did not take the message"))

    def receive(self, deadline: float) -> Reply | None:
        """The next reply, None when the deadline passes first or nothing is outstanding."""
        while not self._arrived:
            message = next(self._incoming, None)
            if message is not None:
                self._arrive(message)
                continue
            late = self.now() >= deadline
            if not self._outstanding or (late and self.virtual):
                return None
            # Taken one by one: an engine runs client code as its iterator advances, so that replies need not pile up.
            self._incoming = self._pull(list(self._outstanding))
            message = next(self._incoming, None)
            if message is not None:
                self._arrive(message)
            elif late and not self._arrived:
                return None  # a server that was busy for long has still looked once
            elif not self._arrived:
                self._clock.sleep(deadline - self.now())
        return self._arrived.popleft()

    def forget(self) -> None:
        """Drops whatever is outstanding: late replies of a round that is over are never looked at."""
        self._outstanding.clear()
        self._arrived.clear()
        self._incoming = iter(())

    def abandon(self, requests: Iterable[Request]) -> None:
        """Gives up these requests: their replies are never looked at."""
        given_up = {id(request) for request in requests}
        self._outstanding = {
            message_id: sent
            for message_id, sent in self._outstanding.items()
            if id(sent.request) not in given_up
        }
        self._arrived = deque(one for one in self._arrived if id(one.request) not in given_up)

    def ask(self, requests: Sequence[Request], timeout: float) -> Iterator[Reply]:
        """Sends requests and gives their replies; others that come meanwhile are kept for `receive`."""
        deadline = self.now() + timeout
        waiting, others = {id(request) for request in requests}, list[Reply]()
        self.send(requests, ttl=timeout)
        try:
            while waiting and (reply := self.receive(deadline)) is not None:
                if id(reply.request) in waiting:
                    waiting.discard(id(reply.request))
                    yield reply
                else:
                    others.append(reply)
        finally:
            self.abandon(requests)
            self._arrived.extend(others)

    @property
    def virtual(self) -> bool:
        """Whether the clock is an engine's, which goes on after a restart where it was."""
        return not isinstance(self._clock, WallClock)

    def node_of(self, client: int) -> int:
        """Node id of a client that is there."""
        return self._nodes[client]

    def _push(self, messages: Sequence[Message]) -> list[str | None]:
        """An id for each message, None for one that was not taken.

        Flower's in-memory grid leaves out what it did not take, and a deployed one gives an empty list for a push
        that is too large; both have marked each message with the id that it would have.
        """
        ids: list[str | None] = list(self._grid.push_messages(messages))
        if len(ids) == len(messages):
            return ids
        taken = set(ids)
        own = (message.metadata.message_id for message in messages)
        return [message_id if message_id in taken else None for message_id in own]

    def _pull(self, ids: list[str]) -> Iterator[Message]:
        """Replies that are there. One that Flower can't inflate is an error of its client, and of no other's."""
        try:
            yield from self._grid.pull_messages(ids)
        except _UNREADABLE as error:
            if len(ids) > 1:
                for message_id in ids:
                    yield from self._pull([message_id])
            elif (sent := self._outstanding.pop(ids[0], None)) is not None:
                reason = f"the reply cannot be read: {type(error).__name__}: {error!s:.100}"
                self._arrived.append(Reply(sent.request, None, reason))

    def _arrive(self, message: Message) -> None:
        message_id = message.metadata.reply_to_message_id
        sent = self._outstanding.pop(message_id, None)
        if sent is None:
            log.warning("a reply to no request of this run was dropped")
        elif message.has_error():
            if self._asked_again(sent, message.error):
                return
            reason = f"{message.error.reason} (code {message.error.code})"
            self._arrived.append(Reply(sent.request, None, reason))
        else:
            if self.downlink is not None:
                self.downlink.answered(sent.request)
            self._arrived.append(self._weighed(sent, message.content))

    def _asked_again(self, sent: _Sent, error: Error) -> bool:
        """Whether an error is no reply yet: a client that could not restore its model is sent the whole, once."""
        if self.downlink is None:
            return False
        client = sent.request.client
        if error.code not in _NEVER_ASKED:
            self.downlink.lost(client)
        if not sent.is_change or not str(error.reason).startswith(f"{REASON}:"):
            return False
        log.info("client %d is sent the whole model: %s", client, error.reason)
        self.send([sent.request], ttl=sent.ttl)
        return True

    def _weighed(self, sent: _Sent, content: RecordDict) -> Reply:
        request = sent.request
        try:
            self.uploaded += count_bytes(content)
        # An engine's client may put in what no wire carries, such as an integer past 64 bits.
        except (ValueError, TypeError, AttributeError) as error:
            return Reply(request, None, f"the reply cannot be serialised: {error!s:.100}")
        return Reply(request, content, seconds=max(0.0, self.now() - sent.moment))

    def _refresh(self) -> None:
        """Keeps the table of nodes true: drops those that left, identifies those that came."""
        roster = getattr(self._grid, "roster", None)
        if roster is not None:
            self._nodes = roster
            return
        online = set(self._grid.get_node_ids())
        self._nodes = {client: node for client, node in self._nodes.items() if node in online}
        given_up = {node for node, until in self._resting.items() if until > self.now()}
        # A client that restarts comes as a new node while its old one still counts as there: it waits its turn.
        waiting = {node for node, client in self._rivals.items() if client in self._nodes}
        fresh = sorted(online - set(self._nodes.values()) - given_up - waiting)
        if self._hello is not None:
            self._identify(fresh)
            return
        if self._lasting:
            for node in fresh:
                self._numbered.setdefault(node, len(self._numbered))
            self._nodes = {
                client: node for node, client in self._numbered.items() if node in online
            }
            return
        free = (
            index for index in range(len(online) + len(self._nodes)) if index not in self._nodes
        )
        self._nodes = {**self._nodes, **dict(zip(free, fresh, strict=False))}

    def _identify(self, nodes: Iterable[int]) -> None:
        content = RecordDict({CONFIG: ConfigRecord(dict(self._hello or {}))})
        messages = [Message(content, node, HELLO) for node in nodes]
        if not messages:
            return
        pushed = zip(self._push(messages), (m.metadata.dst_node_id for m in messages), strict=True)
        asked = {message_id: node for message_id, node in pushed if message_id}
        deadline = self.now() + self._hello_timeout
        while asked and self.now() < deadline:
            for message in self._introductions(list(asked)):
                asked_node = asked.pop(message.metadata.reply_to_message_id, None)
                if asked_node is not None:
                    self._introduce(asked_node, message)
            if asked:
                self._clock.sleep(deadline - self.now())
        for node in asked.values():
            self._gave_no_id(node)
            log.warning("node %d did not answer a hello within %g s", node, self._hello_timeout)

    def _introductions(self, ids: Iterable[str]) -> Iterator[Message]:
        """Answers to hellos, pulled one by one: one that can't be read is as good as none."""
        for message_id in ids:
            try:
                yield from self._grid.pull_messages([message_id])
            except _UNREADABLE as error:
                log.warning("a hello's answer cannot be read: %s", type(error).__name__)

    def _gave_no_id(self, node: int) -> None:
        self._failed_hellos[node] += 1
        beyond = self._failed_hellos[node] - _HELLO_ATTEMPTS
        if beyond >= 0:
            self._resting[node] = self.now() + min(_REST * 2.0**beyond, _LONGEST_REST)

    def _introduce(self, node: int, message: Message) -> None:
        if message.has_error():
            self._gave_no_id(node)
            log.warning("node %d did not give its logical id: %s", node, message.error.reason)
            return
        record = record_in(message.content, CONFIG, ConfigRecord)
        client = None if record is None else record.get("client")
        if not isinstance(client, int) or isinstance(client, bool) or client < 0:
            self._gave_no_id(node)
            log.warning(
                "node %d gave %r for its logical id, a whole number >= 0 is needed", node, client
            )
        elif self._population is not None and client >= self._population:
            self._resting[node] = math.inf
            log.warning(
                "node %d is client %d of %d: it is left out", node, client, self._population
            )
        elif client in self._nodes:
            self._rivals[node] = client
            log.warning(
                "node %d claims to be client %d, which another node already is", node, client
            )
        else:
            self._nodes = {**self._nodes, client: node}
            self.profiles.pop(client, None)
            if profile := read_profile(message.content):
                self.profiles[client] = profile


def _begun(request: Request, now: float) -> float:
    """When a request that is sent now was first sent: by an earlier process, where it says so."""
    record = record_in(request.content, CONFIG, ConfigRecord)
    first = None if record is None else record.get(SENT)
    return min(first, now) if isinstance(first, float) else now
