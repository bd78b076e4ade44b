"""Calling the client's code on a chunk of requests so that whatever it does, there is one sound reply to each."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Final

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from fl_app.engine.flwr_internals import ErrorCode, error_reply

Answer = Callable[[Sequence[Message]], Sequence[Message]]
"""Client code: one reply for each request, in the same order. The resident model lives in it.

An exception fails the whole chunk; `one_by_one` confines it to its own request. Requests of one chunk share the array
records that they were sent with, as one object; these must not be changed.
"""

_TRACEBACK_LIMIT: Final = 4_000


def describe(error: BaseException) -> str:
    """An exception in one line, its traceback (the end of it) in the following ones."""
    lines = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}\n{lines[-_TRACEBACK_LIMIT:]}"


def answer_chunk(answer: Answer, requests: Sequence[Message]) -> list[Message]:
    """One reply for each request, in order; an error reply where `answer` failed to give a sound one.

    `KeyboardInterrupt` passes through; any other exception, and `sys.exit`, becomes the reason of error replies.
    """
    arrays = _SharedArrays(requests)
    try:
        replies = list(answer(requests))
    except (Exception, SystemExit) as error:
        arrays.restore()
        return _all_failed(requests, describe(error))
    if arrays.restore():
        return _all_failed(
            requests, "the handler changed array records that its requests share: copy them first"
        )
    if len(replies) != len(requests):
        return _all_failed(
            requests, f"the handler gave {len(replies)} replies to {len(requests)} requests"
        )
    return [_sound(request, reply) for request, reply in zip(requests, replies, strict=True)]


def one_by_one(handle: Callable[[Message], Message]) -> Answer:
    """An `Answer` from a function of one message, whose failures concern that message alone."""

    def answer_one(requests: Sequence[Message]) -> list[Message]:
        return [handle(request) for request in requests]

    def answer(requests: Sequence[Message]) -> list[Message]:
        return [answer_chunk(answer_one, [request])[0] for request in requests]

    return answer


def _all_failed(requests: Sequence[Message], reason: str) -> list[Message]:
    return [
        error_reply(request, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason) for request in requests
    ]


def _sound(request: Message, reply: object) -> Message:
    """The reply, or an error reply that says why it is none."""
    if not isinstance(reply, Message):
        fault = f"the handler gave a {type(reply).__name__} where a Message is needed"
    elif reply.metadata.reply_to_message_id != request.metadata.message_id:
        fault = "the handler gave a reply to another request in this place: replies come in the order of the requests"
    elif isinstance(_payload(reply), Error | RecordDict):
        return reply
    else:
        fault = "the handler gave a reply that holds neither a RecordDict nor an Error"
    return error_reply(request, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, fault)


def _payload(reply: Message) -> object:
    if reply.has_error():
        return reply.error
    return reply.content if reply.has_content() else None


class _SharedArrays:
    """Remembers which bytes the requests' array records hold, without a copy, and puts them back."""

    def __init__(self, requests: Sequence[Message]) -> None:
        records = {
            id(record): record
            for request in requests
            for record in request.content.values()
            if isinstance(record, ArrayRecord)
        }
        self._saved = [
            (record, [(name, array, _fields(array)) for name, array in record.items()])
            for record in records.values()
        ]

    def restore(self) -> bool:
        """Undoes every change; True if there was one."""
        changed = False
        for record, items in self._saved:
            for _, array, fields in items:
                if any(now is not then for now, then in zip(_fields(array), fields, strict=True)):
                    array.dtype, array.shape, array.stype, array.data = fields
                    changed = True
            if [(name, id(array)) for name, array in record.items()] != [
                (name, id(a)) for name, a, _ in items
            ]:
                record.clear()
                record.update({name: array for name, array, _ in items})
                changed = True
        return changed


def _fields(array: Array) -> tuple[str, tuple[int, ...], str, bytes]:
    return array.dtype, array.shape, array.stype, array.data
