"""An in-process `Grid` in virtual time.

Server code sees what it would see of Flower's: messages pushed to node ids, replies pulled when they are there, error
replies for what went wrong. When a reply is there, a `DeviceModel` says; what is in it, client code in a `ClientPool`.
Virtual durations are known when a message is pushed, so client code runs only when its reply is first needed, together
with whatever else is on its way.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, RecordDict
from flwr.serverapp import Grid

from fl_app.engine import flwr_internals as internals
from fl_app.engine.clock import VirtualClock
from fl_app.engine.devices import DeviceModel, Occasion
from fl_app.engine.flwr_internals import ErrorCode, Run
from fl_app.engine.pool import ClientPool
from fl_app.engine.roster import Roster
from strategies.wire import LOCAL_STEPS, REPLY_BYTES, SENT

_CHUNKS_PER_BATCH: Final = 16
_BATCH_MESSAGES: Final = 256
_BATCH_BYTES: Final = 256 * 2**20
_NOBODY: Final = -1


@dataclass(slots=True, eq=False)
class _Parcel:
    """One request on its way.

    Attributes:
        client: logical id, −1 where there is no such node.
        pushed: moment of sending.
        due: moment at which the reply is there.
        expiry: moment from which on neither request nor reply exists any more.
        metadata: the request's, in a copy that client code cannot reach.
        size: bytes of its arrays.
        request: until client code has run.
        reply: what client code gave, or an error that was certain from the start.
        delivered: it was given to the server.
    """

    client: int
    pushed: float
    due: float
    expiry: float
    metadata: Metadata
    size: int
    request: Message | None
    reply: Message | None = None
    delivered: bool = False


_Pending = tuple[float, int, str, _Parcel]
"""When a parcel is due, its client, its message's id, and itself."""


class EngineGrid(Grid):
    """Flower's `Grid` over virtual devices.

    * Replies come in the order of (virtual time, logical client), whatever the pool.
    * A message whose reply would come at or after the end of its ttl is answered by `MESSAGE_UNAVAILABLE` then, as by
      Flower's SuperLink, and client code is not run for it; nor is it for a client that has dropped out
      (`NODE_UNAVAILABLE` after `detection_seconds`) or for a node that does not exist (`NODE_UNAVAILABLE` at once).
    * Requests are taken as they are when pushed, but array records are shared, not copied: leave them as they are.
    * Client code runs in the order in which replies are due, in batches of at most 256 messages or 256 MiB of request
      arrays (of all that are on their way, with `whole_rounds`), no client twice in one; each batch is cut into chunks
      whose size depends on the batch alone.

    What it reads of a request's `config` record, each an int: `server-round` (absent: outside any round, no drop-
    outs), `attempt` (absent: 0), `phase` and `phases` (absent: 0 of 1); and `sent`, a float, of a request that an
    earlier process of the run had sent at that time, and whose reply comes when it would have come. Requests of
    type `train` train unless `trains` is false there; any others, subtypes of `train` too, take the network's time
    only.

    Args:
        pool: runs client code; the grid does not close it.
        num_clients: logical clients 0 … num_clients − 1; costs nothing per client.
        devices: speeds, network and drop-outs.
        seed: the run's.
        work: logical client → examples that one `train` request processes (train examples × local epochs).
        run_id: Flower's id of the run.
        max_chunk: requests given to client code at once, at most.
        together: requests that client code gains from being given at once; 1 where it goes through them one by one.
        start: virtual time at the beginning, in seconds.
        whole_rounds: a batch is everything that is on its way, for a pool that must see a round's requests together;
            the replies of a round are then held in memory together, too.
        batch_size: examples of a local step, for requests that say how many steps to take (`local-steps`).

    Attributes:
        clock: virtual time.
        roster: logical id → node id, so that nobody need be asked.
    """

    def __init__(
        self,
        pool: ClientPool,
        *,
        num_clients: int,
        devices: DeviceModel,
        seed: int,
        work: Callable[[int], float],
        run_id: int = 1,
        max_chunk: int = 32,
        together: int = 1,
        start: float = 0.0,
        whole_rounds: bool = False,
        batch_size: int = 1,
    ) -> None:
        self.clock = VirtualClock(start)
        self.roster = Roster(num_clients)
        self._pool = pool
        self._devices = devices
        self._seed = seed
        self._work = work
        self._batch_size = batch_size
        self._max_chunk = max_chunk
        self._together = together
        self._most = (math.inf, math.inf) if whole_rounds else (_BATCH_MESSAGES, _BATCH_BYTES)
        self._count = 0
        self._parcels: dict[str, _Parcel] = {}
        self._pending: list[_Pending] = []
        self._expiries: list[tuple[float, str]] = []
        self._running: deque[list[_Pending]] = deque()
        self._answers: Iterator[list[Message]] = iter(())
        self.set_run(Run.create_empty(run_id))

    def set_run(self, run: Run) -> None:
        """Sets the run in whose name messages are made."""
        self._run = run
        internals.claim_identity(run.run_id)

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node; the same as `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients, in the order of their logical ids."""
        return self.roster.values()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages; their ids, one for each, in order.

        Raises:
            ValueError: one is no fresh request with content and a positive ttl; those before it are on their way.
        """
        self._drop_expired()
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies that are there by now, out of those asked for, as an iterator to go through at once.

        Client code runs while the iterator is advanced, so a caller that lets go of each reply before it takes the next
        needs memory for one batch of replies at most. What is not taken from the iterator can be pulled again.
        """
        now = self.clock.now()
        found: list[tuple[float, int, str, _Parcel | None]] = []
        for message_id in set(message_ids):
            parcel = self._parcels.get(message_id)
            if parcel is None:
                found.append((-math.inf, _NOBODY, message_id, None))
            elif (moment := parcel.due if now < parcel.expiry else parcel.expiry) <= now:
                found.append((moment, parcel.client, message_id, parcel))
        self._drop_expired()
        return self._deliver(sorted(found, key=lambda item: item[:3]))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Pushes messages and pulls their replies until all are there or `timeout` virtual seconds are over."""
        outstanding = set(self.push_messages(messages))
        deadline = math.inf if timeout is None else self.clock.now() + timeout
        replies: list[Message] = []
        while True:
            fresh = list(self.pull_messages(outstanding))
            outstanding.difference_update(reply.metadata.reply_to_message_id for reply in fresh)
            replies += fresh
            if not outstanding or self.clock.now() >= deadline:
                return replies
            self.clock.sleep(deadline - self.clock.now())

    def _push(self, message: Message) -> str:
        internals.check_request(message)
        message_id = self._next_id()
        internals.set_message_id(message, message_id)
        parcel = self._plan(internals.snapshot(message), internals.copied(message.metadata))
        self._parcels[message_id] = parcel
        heapq.heappush(self._expiries, (parcel.expiry, message_id))
        self.clock.expect(min(parcel.due, parcel.expiry))
        if parcel.due >= parcel.expiry:
            parcel.request = None
        elif parcel.reply is None:
            heapq.heappush(self._pending, (parcel.due, parcel.client, message_id, parcel))
        return message_id

    def _next_id(self) -> str:
        self._count += 1
        return f"{self._run.run_id}-{self._count:012d}"

    def _plan(self, request: Message, metadata: Metadata) -> _Parcel:
        """When the reply to a request that is sent now will be there, or which error takes its place."""
        now = self.clock.now()
        client = self.roster.client_of(metadata.dst_node_id)
        size = _array_bytes(request.content)
        if client is None:
            parcel = _Parcel(_NOBODY, now, now, now + metadata.ttl, metadata, size, None)
            parcel.reply = _unreachable(request, f"there is no node {metadata.dst_node_id}")
            return parcel
        record = request.content.get("config")
        config: Mapping[str, object] = record if isinstance(record, ConfigRecord) else {}
        begun = _begun(config, now)
        expiry = begun + metadata.ttl
        round_number, attempt, phase, phases = _whereabouts(config)
        occasion = Occasion(self._seed, client, round_number, attempt)
        dropped = self._devices.drops_at(occasion, phases) if round_number else None
        if dropped is not None and dropped <= phase:
            due = begun + self._devices.detection_seconds
            parcel = _Parcel(client, now, due, expiry, metadata, size, None)
            parcel.reply = _unreachable(
                request, f"client {client} dropped out of round {round_number} at phase {dropped}"
            )
            return parcel
        trains = metadata.message_type == MessageType.TRAIN and config.get("trains", True) is True
        duration = self._devices.duration(
            occasion,
            examples=self._examples(client, config) if trains else 0,
            down_bytes=size,
            up_bytes=_reply_bytes(config, size) if trains else 0,
        )
        return _Parcel(client, begun, begun + duration, expiry, metadata, size, request)

    def _examples(self, client: int, config: Mapping[str, object]) -> float:
        """What a training request takes, in examples."""
        steps = config.get(LOCAL_STEPS)
        return self._work(client) if not isinstance(steps, int) else steps * self._batch_size

    def _deliver(self, found: list[tuple[float, int, str, _Parcel | None]]) -> Iterator[Message]:
        for _, _, message_id, parcel in found:
            if parcel is not None and parcel.delivered:
                continue
            if parcel is None or self.clock.now() >= parcel.expiry:
                reply = internals.message_unavailable(message_id, self._run.run_id, self._next_id())
            else:
                while parcel.reply is None:
                    self._advance()
                elapsed = parcel.due - parcel.pushed
                reply = internals.stamped_reply(
                    parcel.reply, parcel.metadata, self._next_id(), elapsed
                )
            if parcel is not None:
                parcel.delivered, parcel.reply = True, None
            self._parcels.pop(message_id, None)
            yield reply

    def _advance(self) -> None:
        """Takes the replies of one more chunk of the batch under way, or of the next one."""
        if not self._running:
            self._begin_batch()
        chunk: list[_Pending] = []
        try:
            chunk = self._running.popleft()
            replies = next(self._answers)
        except BaseException:
            for item in (item for items in (chunk, *self._running) for item in items):
                heapq.heappush(self._pending, item)
            self._running.clear()
            raise
        for (*_, parcel), reply in zip(chunk, replies, strict=True):
            parcel.reply, parcel.request = reply, None

    def _begin_batch(self) -> None:
        """Has client code run for the pending requests that are due first."""
        batch = self._next_batch()
        size = self._chunk_size(len(batch))
        self._running.extend(batch[i : i + size] for i in range(0, len(batch), size))
        requests = [
            [parcel.request for *_, parcel in chunk if parcel.request is not None]
            for chunk in self._running
        ]
        self._answers = self._pool.stream(requests)

    def _chunk_size(self, requests: int) -> int:
        """Depends on nothing but the number of requests, so that no result depends on the number of workers."""
        if self._together > 1:
            return math.ceil(requests / math.ceil(requests / self._together))  # all about equal
        return min(self._max_chunk, math.ceil(requests / _CHUNKS_PER_BATCH))

    def _next_batch(self) -> list[_Pending]:
        batch: list[_Pending] = []
        clients: set[int] = set()
        size = 0
        most_messages, most_bytes = self._most
        while self._pending and len(batch) < most_messages:
            _, client, _, parcel = self._pending[0]
            if parcel.request is not None:
                full = len(batch) >= _CHUNKS_PER_BATCH and size + parcel.size > most_bytes
                if client in clients or full:
                    break
                batch.append(self._pending[0])
                clients.add(client)
                size += parcel.size
            heapq.heappop(self._pending)
        return batch

    def _drop_expired(self) -> None:
        """Lets go of what has expired: nobody can pull it any more."""
        while self._expiries and self._expiries[0][0] <= self.clock.now():
            parcel = self._parcels.pop(heapq.heappop(self._expiries)[1], None)
            if parcel is not None:
                parcel.request = parcel.reply = None
        if len(self._expiries) > 2 * len(self._parcels) + 1_000:
            self._expiries = [
                (parcel.expiry, message_id) for message_id, parcel in self._parcels.items()
            ]
            heapq.heapify(self._expiries)


def _array_bytes(content: RecordDict) -> int:
    records = (record for record in content.values() if isinstance(record, ArrayRecord))
    return sum(len(array.data) for record in records for array in record.values())


def _reply_bytes(config: Mapping[str, object], size: int) -> int:
    """How long a reply is taken to be: as the model that came, unless the server says how small it is made."""
    told = config.get(REPLY_BYTES)
    return told if isinstance(told, int) else size


def _begun(config: Mapping[str, object], now: float) -> float:
    """When a request was sent: now, unless an earlier process sent it before."""
    sent = config.get(SENT)
    return min(sent, now) if isinstance(sent, float) else now


def _whereabouts(config: Mapping[str, object]) -> tuple[int, int, int, int]:
    """Round, attempt, phase and number of phases that a request belongs to.

    Raises:
        ValueError: one of them is no whole number, or is out of its range.
    """
    values = []
    for key, least, absent in (
        ("server-round", 0, 0),
        ("attempt", 0, 0),
        ("phase", 0, 0),
        ("phases", 1, 1),
    ):
        value = config.get(key, absent)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"a request's config holds {key}={value!r}: a whole number of at least {least} is needed"
            )
        values.append(value)
    round_number, attempt, phase, phases = values
    if phase >= phases:
        raise ValueError(
            f"a request's config holds phase={phase}, but phases={phases}: they count from 0"
        )
    return round_number, attempt, phase, phases


def _unreachable(request: Message, reason: str) -> Message:
    return internals.error_reply(request, ErrorCode.NODE_UNAVAILABLE, reason)
