"""The private parts of flwr 1.41 that the engine needs, all in this file.

`Message()` reads the process-wide `TaskIdentity`, which Flower's own launchers set; message ids are private and set by
the SuperLink; `make_message` and `ErrorCode` are not exported publicly.
"""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from strategies.records import bundle

__all__ = ["ErrorCode", "Run"]  # passed on; everything else here is defined below

MetadataFields = tuple[int, str, int, int, str, str, float, float, str, int | None, int | None]


def claim_identity(run_id: int) -> None:
    """Lets this process make messages in the name of run `run_id`'s server."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1


def set_message_id(message: Message, message_id: str) -> None:
    """Gives a message the id that in Flower the SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


def metadata_fields(metadata: Metadata) -> MetadataFields:
    """Metadata as plain values, in the order in which its constructor takes them."""
    return (
        metadata.run_id,
        metadata.message_id,
        metadata.src_node_id,
        metadata.dst_node_id,
        metadata.reply_to_message_id,
        metadata.group_id,
        metadata.created_at,
        metadata.ttl,
        metadata.message_type,
        metadata.src_task_id,
        metadata.dst_task_id,
    )


def metadata_from(fields: MetadataFields) -> Metadata:
    """The metadata with these values."""
    return Metadata(*fields)


def copied(metadata: Metadata) -> Metadata:
    """Equal metadata in an object of its own."""
    copy = Metadata.__new__(Metadata)
    copy.__dict__.update(metadata.__dict__)
    return copy


def whole_message(metadata: Metadata, content: RecordDict) -> Message:
    """A message with exactly this metadata, without the checks of `Message`, which cost as much as all else here."""
    message = Message.__new__(Message)
    message.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return message


def snapshot(request: Message) -> Message:
    """The request as it is now: what the sender or a handler changes later in one does not show in the other.

    Array records are shared, not copied: the model that a whole cohort is sent stays one object.
    """
    content = bundle(
        {
            name: record if isinstance(record, ArrayRecord) else record.copy()
            for name, record in request.content.items()
        }
    )
    return whole_message(copied(request.metadata), content)


def error_reply(request: Message, code: int, reason: str) -> Message:
    """The error reply of the node that was asked."""
    return Message(Error(code, reason), reply_to=request)


def stamped_reply(reply: Message, request: Metadata, message_id: str, elapsed: float) -> Message:
    """The reply with the metadata that it has after a way of `elapsed` virtual seconds.

    `created_at` is the request's plus the time it took, and what is left of the request's ttl is the reply's, as in
    Flower. An error without a node behind it (`NODE_UNAVAILABLE`) comes from the SuperLink, as in Flower.
    """
    from_superlink = reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
    metadata = copied(request)
    metadata.__dict__.update(
        _message_id=message_id,
        _src_node_id=SUPERLINK_NODE_ID if from_superlink else request.dst_node_id,
        _dst_node_id=request.src_node_id,
        _reply_to_message_id=request.message_id,
        _created_at=request.created_at + elapsed,
        _ttl=max(0.0, request.ttl - elapsed),
        _src_task_id=request.dst_task_id,
        _dst_task_id=request.src_task_id,
    )
    if reply.has_error():
        return make_message(metadata, error=reply.error)
    return whole_message(metadata, reply.content)


_GONE = "the message expired before its reply was fetched, was pulled before, or never existed"


def message_unavailable(
    reply_to: str, run_id: int, message_id: str, reason: str = _GONE
) -> Message:
    """The error that Flower gives for a message that expired, was pulled before or never was.

    As in Flower it carries neither the group nor the type of what was asked: the SuperLink no longer has it.
    """
    metadata = Metadata(
        run_id=run_id,
        message_id=message_id,
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=reply_to,
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))


def check_request(message: Any) -> None:
    """Refuses what Flower's own grids refuse to send.

    Raises:
        ValueError: `message` is no fresh request with content and a positive ttl.
    """
    if not isinstance(message, Message):
        raise ValueError(f"only a Message can be pushed, not {type(message).__name__}")
    metadata = message.metadata
    for fault, is_there in (
        ("it replies to another message", bool(metadata.reply_to_message_id)),
        (f"its ttl is {metadata.ttl!r}, more than 0 seconds are needed", not metadata.ttl > 0),
        ("it was delivered before", bool(metadata.delivered_at)),
        ("it has no content", not message.has_content()),
    ):
        if is_there:
            raise ValueError(f"a message to node {metadata.dst_node_id} cannot be pushed: {fault}")
