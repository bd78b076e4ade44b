"""Replies that are pulled one by one and given up as soon as they are too large: a peer can't fill the server's memory.

Flower's own grid pulls all replies that are there, each whole, before it gives the first. Here a message's objects are
counted as they come, and one whose announced length is beyond what is left is not read at all. So a server holds one
reply and one object more than it was asked to bear, whatever its peers send. Each object costs a request to the
SuperLink, however small it is: a reply of more than any that was asked for can have is given up before the first.

Flower's own grid waits for a reply that is announced and not whole, for minutes where its sender has died in the middle
and for hours where it dawdles, and all others with it, deadline or not. Here it is looked at again with the next pull.

This file knows the private parts of flwr 1.41's grid over HTTP. A simulation's replies are in memory already: they are
only turned away. What a SuperLink itself may be sent is the business of whatever stands before it (docs/security.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx
from flwr.app import Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as _PIECE
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.superlink.grid import HttpGrid

from fl_app.engine.flwr_internals import message_unavailable
from fl_app.flower.grid import GridAround
from strategies.sizes import count_bytes

log = logging.getLogger(__name__)

_FRAME = 1_024
"""Bytes round an object on the wire, at most."""
_AROUND = 16
"""Objects of a reply that are no arrays': the message, its records, and some to spare."""
_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What Flower raises on the records of a hostile peer as it reads them."""


class ReplyTooLargeError(Exception):
    """A reply beyond what the server bears."""


_SOON, _LATER = 0.1, 2.0
"""Seconds until a reply that is not whole is looked at again: doubled from the first to the second."""
_AT_ONCE = 16
"""Requests that the SuperLink is asked about at once: its answer lists all objects of all their replies."""
_MOST_ANNOUNCED = 1_000_000
"""Objects of all replies that are waited for; those of replies that nobody has asked for longest go first."""


@dataclass
class _Announced:
    """A reply of which the SuperLink knows what it will hold, and may not have all yet.

    Attributes:
        metadata: the reply's, as it came.
        objects: their ids, children first.
        missing: the object that was not there last time, which is asked for first.
        wait: seconds from one look to the next.
        again: when it may be looked at, by the monotonic clock.
    """

    metadata: Any
    objects: list[str]
    missing: str = ""
    wait: float = _SOON
    again: float = 0.0


class BoundedGrid(GridAround):
    """Another grid, whose replies are no larger than they may be.

    Args:
        grid: Flower's.
        most_bytes: of one reply. A larger one is answered by an error in its place.
        most_arrays: of one reply; as above. Over HTTP alone: elsewhere each costs next to nothing.
    """

    def __init__(self, grid: Grid, most_bytes: int, most_arrays: int) -> None:
        super().__init__(grid)
        self._most = most_bytes
        # An array and its last piece, and the pieces before.
        self._most_objects = _AROUND + 2 * most_arrays + most_bytes // _PIECE
        self._most_arrays = most_arrays
        self._watch = _Watch()
        self._announced: dict[str, _Announced] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies that have come, one in memory at a time; those that are not whole yet are left for a later pull."""
        if not isinstance(self._grid, HttpGrid):
            yield from map(self._weighed, self._grid.pull_messages(message_ids))
            return
        client: Any = self._grid._runtime_client
        self._watch.over(client._client)
        asked = list(message_ids)
        yield from self._ask(client, [one for one in asked if one not in self._announced])
        for answered in asked:
            announced = self._announced.pop(answered, None)
            if announced is None:
                continue
            reply = None
            if time.monotonic() >= announced.again:
                reply = self._pulled(client, announced)
            if reply is None:
                self._announced[answered] = announced
            else:
                yield reply

    def _ask(self, client: Any, message_ids: list[str]) -> Iterator[Message]:
        """Has the SuperLink say which of these are answered: once of each, after which it knows the request no more.

        Replies that have too many objects are answered by an error at once.
        """
        most = self._most_objects
        for begin in range(0, len(message_ids), _AT_ONCE):
            asked = message_ids[begin : begin + _AT_ONCE]
            found = client.PullMessages(PullAppMessagesRequest(message_ids=asked))
            refused: list[Any] = []
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                metadata = message.metadata
                answered = metadata.reply_to_message_id
                objects = [node.object_id for node in islice(iterate_object_tree(tree), most + 1)]
                if len(objects) > most:
                    refused.append(metadata)
                else:
                    self._announced[answered] = _Announced(metadata, objects)
            for metadata in refused:  # after the others are noted: whoever reads may stop here
                told = f"it has more than {most:,} objects, and {self._most_arrays:,} arrays were asked for at most"
                yield self._refused(client, metadata, told)
        held = sum(len(one.objects) for one in self._announced.values())
        for longest in list(self._announced):
            if held <= _MOST_ANNOUNCED:
                break
            held -= len(self._announced.pop(longest).objects)

    def _pulled(self, client: Any, announced: _Announced) -> Message | None:
        """The reply, or an error in its place; None where some of it is not there yet."""
        run_id, metadata = self.run.run_id, announced.metadata
        answered = metadata.reply_to_message_id
        pull = make_pull_object_fn_protobuf(client.PullObject, self._grid.node, run_id)  # type: ignore[attr-defined]
        missing: list[str] = []
        budget = _Budget(self._most)

        def taken(object_id: str) -> bytes:
            try:
                with self._watch.on(budget):
                    return budget.take(pull(object_id))
            except ObjectUnavailableError:
                missing.append(object_id)
                raise

        try:
            # One alone, which is the missing one where it is known: a look at what is not there costs one request.
            first = announced.missing or announced.objects[0]
            contents = {first: taken(first)}
            others = [object_id for object_id in announced.objects if object_id != first]
            contents |= pull_objects(others, taken, max_tries_per_object=1)
        except (ObjectPullError, ObjectUnavailableError) as error:
            if missing:
                announced.missing = missing[0]
                announced.again = time.monotonic() + announced.wait
                announced.wait = min(2 * announced.wait, _LATER)
                return None
            told = f"the reply was not uploaded to its end: {error!s:.200}"
            return message_unavailable(answered, run_id, "", told)
        except ReplyTooLargeError as error:
            return self._refused(client, metadata, str(error))
        self._confirm(client, run_id, metadata.message_id)
        try:
            inflated = inflate_object_from_contents(metadata.message_id, contents)
        except _UNREADABLE as error:
            told = f"the reply cannot be read: {type(error).__name__}: {error!s:.100}"
            return message_unavailable(answered, run_id, "", told)
        if not isinstance(inflated, Message):
            return message_unavailable(
                answered, run_id, "", f"the reply is a {type(inflated).__name__}"
            )
        inflated.metadata.__dict__["_message_id"] = metadata.message_id
        return inflated

    def _refused(self, client: Any, metadata: Any, told: str) -> Message:
        """An error in the place of a reply that is too large, which the SuperLink may drop."""
        log.warning("a reply is refused before it is read: %s", told)
        self._confirm(client, self.run.run_id, metadata.message_id)
        reason = f"the reply is too large: {told}"
        return message_unavailable(metadata.reply_to_message_id, self.run.run_id, "", reason)

    def _confirm(self, client: Any, run_id: int, message_id: str) -> None:
        """Lets the SuperLink drop what it holds of a message."""
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node,  # type: ignore[attr-defined]
                run_id=run_id,
                message_object_id=message_id,
            )
        )

    def _weighed(self, message: Message) -> Message:
        if message.has_error():
            return message
        size = count_bytes(message.content)
        if size <= self._most:
            return message
        told = f"the reply is too large: it has {size:,} bytes, {self._most:,} at most"
        log.warning("a reply is refused: %s", told)
        return message_unavailable(message.metadata.reply_to_message_id, self.run.run_id, "", told)


class _Budget:
    """Bytes that one reply may take; a thread that was left behind reads on the budget of the reply that it was for."""

    def __init__(self, most: int) -> None:
        self._lock = threading.Lock()
        self._most, self._held = most, 0

    def take(self, content: bytes) -> bytes:
        """Counts an object.

        Raises:
            ReplyTooLargeError: with it the reply is beyond its limit.
        """
        with self._lock:
            self._held += len(content)
            if self._held > self._most:
                raise ReplyTooLargeError(f"it has more than {self._most:,} bytes")
        return content

    def allow(self, size: int) -> None:
        """Looks at an object's length before it is read.

        Raises:
            ReplyTooLargeError: as `take`.
        """
        if size > self._most - self._held + _FRAME:
            raise ReplyTooLargeError(
                f"one of its objects has {size:,} bytes, the whole may have {self._most:,}"
            )


class _Watch:
    """Which budget each thread reads on, for the client that reads."""

    def __init__(self) -> None:
        self._reading = threading.local()
        self._client: httpx.Client | None = None

    def over(self, client: httpx.Client) -> None:
        """Looks at the length of whatever this client is about to read."""
        if self._client is not client:
            self._client = client
            client.event_hooks["response"].append(self._announced)

    @contextmanager
    def on(self, budget: _Budget) -> Iterator[None]:
        """What this thread reads meanwhile is on a budget."""
        self._reading.budget = budget
        try:
            yield
        finally:
            self._reading.budget = None

    def _announced(self, response: httpx.Response) -> None:
        """Called by httpx before it reads a body."""
        budget: _Budget | None = getattr(self._reading, "budget", None)
        length = response.headers.get("content-length", "")
        if budget is None or not length.isdecimal():
            return
        try:
            budget.allow(int(length))
        except ReplyTooLargeError:
            response.close()
            raise
