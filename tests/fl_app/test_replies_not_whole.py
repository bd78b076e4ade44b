"""A reply whose sender died in its upload, or dawdles over it, holds up nobody: no other reply, and no deadline."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from fl_app.engine.flwr_internals import claim_identity
from fl_app.flower.bounded import BoundedGrid


class Link:
    """What a SuperLink says, and what it has of each reply: an object is b"" at first, None once it is given up."""

    def __init__(self) -> None:
        self._client = SimpleNamespace(event_hooks={"response": []})
        self.replies: dict[str, Message] = {}
        self.objects: dict[str, bytes | None] = {}
        self.announced: set[str] = set()
        self.pulled: list[str] = []
        self.confirmed: list[str] = []
        self.slow: dict[str, float] = {}

    def answer(self, request: Message, text: str, records: int = 1) -> list[str]:
        """A reply is announced; the ids of its objects, none of which is there."""
        more = {str(number): ConfigRecord({"number": number}) for number in range(1, records)}
        content = RecordDict({"said": ConfigRecord({"text": text}), **more})
        reply = Message(content, reply_to=request)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            self.replies[request.metadata.message_id] = reply
            self._all = get_all_nested_objects(reply)
            self.objects |= dict.fromkeys(self._all, b"")
            self.whole = {key: item.deflate() for key, item in self._all.items()}
        return list(self._all)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        # Of a request whose reply it has announced the SuperLink knows no more: to ask again is an error.
        assert not self.announced.intersection(request.message_ids)
        found = [self.replies.pop(one) for one in request.message_ids if one in self.replies]
        self.announced |= {reply.metadata.reply_to_message_id for reply in found}
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(reply) for reply in found],
            message_object_trees=[get_object_tree(reply) for reply in found],
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        self.pulled.append(request.object_id)
        time.sleep(self.slow.get(request.object_id, 0.0))
        content = self.objects[request.object_id]
        return PullObjectResponse(
            object_found=content is not None, object_available=bool(content), object_content=content
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def grid(link: Link) -> BoundedGrid:
    claim_identity(run_id=1)
    inner = HttpGrid("127.0.0.1:1", insecure=True, token="token")
    inner.set_run(Run.create_empty(1))
    inner._client = link  # type: ignore[assignment]
    return BoundedGrid(inner, most_bytes=10_000, most_arrays=1_000)


def asked(number: int) -> Message:
    request = Message(RecordDict(), dst_node_id=number, message_type="train")
    request.metadata.__dict__["_message_id"] = f"{number:064x}"
    return request


def pull(grid: BoundedGrid, *requests: Message) -> dict[int, str]:
    """What each request was answered by, or the error's reason."""
    began = time.monotonic()
    ids = {request.metadata.message_id: request.metadata.dst_node_id for request in requests}
    found = {}
    for reply in grid.pull_messages(ids):
        node = ids[reply.metadata.reply_to_message_id]
        found[node] = (
            str(reply.error.reason) if reply.has_error() else str(reply.content["said"]["text"])
        )
    assert time.monotonic() - began < 5  # Flower's own would wait for three minutes at least
    return found


def test_a_reply_that_is_not_whole_is_left_and_the_others_pass(grid, link):
    half, whole = asked(1), asked(2)
    parts = link.answer(half, "late")
    late = link.whole
    link.objects[parts[0]] = late[parts[0]]
    link.answer(whole, "in time")
    link.objects |= link.whole
    assert pull(grid, half, whole) == {2: "in time"}
    assert pull(grid, half) == {}
    link.objects |= late
    time.sleep(0.5)
    assert pull(grid, half) == {1: "late"}
    assert len(link.confirmed) == 2


def test_what_is_missing_is_asked_for_first_and_not_all_the_time(grid, link):
    half = asked(1)
    parts = link.answer(half, "never")
    link.objects |= {part: link.whole[part] for part in parts[:-1]}
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert pull(grid, half) == {}
        time.sleep(0.05)
    # Looked at after 0, 0.1, 0.3, 0.7 and 1.5 s, from the second time on for the missing one alone.
    assert link.pulled.count(parts[-1]) <= 5
    assert len(link.pulled) <= len(parts) + 4


def test_a_reply_of_many_objects_that_never_come_costs_one_request_a_look(grid, link):
    many = asked(1)
    link.answer(many, "never", records=2_000)
    for look in range(3):
        assert pull(grid, many) == {}
        time.sleep(0.5)
        assert len(link.pulled) <= look + 1


def test_a_reply_of_too_many_objects_is_refused_and_the_next_one_passes(grid, link):
    many, whole = asked(1), asked(2)
    link.answer(many, "never", records=5_000)
    link.answer(whole, "in time")
    link.objects |= link.whole
    found = pull(grid, many, whole)
    assert "more than 2,016 objects, and 1,000 arrays were asked for at most" in found[1]
    assert found[2] == "in time"
    assert not set(link.pulled) - set(link.whole)


def test_what_a_thread_still_reads_of_one_reply_is_not_counted_as_the_next_ones(grid, link):
    """Flower lets go of its threads where one object is missing; what they read then is another reply's."""
    half, whole = asked(1), asked(2)
    text = "x" * 6_000
    parts = link.answer(half, text)
    late = link.whole
    slow = max(late, key=lambda part: len(late[part]))
    link.objects |= {slow: late[slow]}
    link.slow[slow] = 0.4
    link.answer(whole, text)
    link.objects |= {part: data for part, data in link.whole.items() if part not in parts}
    link.slow |= dict.fromkeys(set(link.whole) - set(parts), 0.2)
    assert pull(grid, half, whole).get(2, text) == text


def test_an_upload_that_was_given_up_is_an_error_of_its_client(grid, link):
    half = asked(1)
    parts = link.answer(half, "never")
    link.objects |= {part: link.whole[part] for part in parts[:-1]}
    assert pull(grid, half) == {}
    link.objects[parts[-1]] = None
    time.sleep(0.2)
    assert "not uploaded to its end" in pull(grid, half)[1]
