from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from engine_helpers import client_of, loose_requests, reply_to
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from fl_app.engine import one_by_one
from fl_app.engine.answering import answer_chunk
from fl_app.engine.flwr_internals import ErrorCode

RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def reasons(replies: Sequence[Message]) -> list[str]:
    assert all(reply.has_error() and reply.error.code == RAISED for reply in replies)
    return [reply.error.reason or "" for reply in replies]


def test_replies_are_what_the_handler_returned() -> None:
    requests = loose_requests(3)
    given = [reply_to(message, loss=0.5) for message in requests]
    assert answer_chunk(lambda _: given, requests) == given


def test_a_client_may_answer_with_an_error_of_its_own() -> None:
    [message] = loose_requests(1)
    [reply] = answer_chunk(lambda _: [Message(Error(99, "no data"), reply_to=message)], [message])
    assert reply.error == Error(99, "no data")


def test_a_handler_that_raises_gives_error_replies_with_the_place_and_reason() -> None:
    def broken(_: Sequence[Message]) -> list[Message]:
        raise KeyError("weights")

    for reason in reasons(answer_chunk(broken, loose_requests(3))):
        assert reason.startswith("KeyError: 'weights'\n")
        assert "in broken" in reason


def test_a_handler_that_exits_gives_error_replies() -> None:
    replies = answer_chunk(lambda _: sys.exit(3), loose_requests(2))
    assert [reason.partition("\n")[0] for reason in reasons(replies)] == ["SystemExit: 3"] * 2


def test_an_interrupt_passes_through() -> None:
    def interrupted(_: Sequence[Message]) -> list[Message]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_chunk(interrupted, loose_requests(1))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_replies_is_an_error_for_all(count: int) -> None:
    requests = loose_requests(3)
    replies = answer_chunk(lambda _: [reply_to(requests[0])] * count, requests)
    assert reasons(replies) == [f"the handler gave {count} replies to 3 requests"] * 3


@pytest.mark.parametrize("answer", [lambda _: None, lambda _: 5])
def test_something_that_is_no_list_of_replies_is_an_error(answer: Callable[..., Any]) -> None:
    assert len(reasons(answer_chunk(answer, loose_requests(2)))) == 2


def test_one_unsound_reply_does_not_spoil_the_others() -> None:
    requests = loose_requests(4)
    hollow, odd = reply_to(requests[2]), reply_to(requests[3])
    hollow.__dict__["_content"] = None
    odd.__dict__["_content"] = {"loss": 1.0}
    unsound: list[Any] = [reply_to(requests[0]), "done", hollow, odd]
    replies = answer_chunk(lambda _: unsound, requests)
    assert not replies[0].has_error()
    gave_text, gave_nothing, gave_dict = reasons(replies[1:])
    assert "gave a str where a Message is needed" in gave_text
    assert "neither a RecordDict nor an Error" in gave_nothing
    assert "neither a RecordDict nor an Error" in gave_dict


def test_replies_in_another_order_than_the_requests_are_refused() -> None:
    requests = loose_requests(2)
    replies = answer_chunk(lambda _: [reply_to(m) for m in reversed(requests)], requests)
    assert all("reply to another request" in reason for reason in reasons(replies))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.clear(),
        lambda record: record.to_numpy_ndarrays(keep_input=False),
        lambda record: record.update(extra=Array(np.zeros(1))),
        lambda record: record.__setitem__("0", Array(np.ones(3))),
        lambda record: setattr(record["0"], "data", b""),
        lambda record: setattr(record["0"], "shape", (9,)),
    ],
)
def test_a_handler_that_changes_the_shared_model_is_told_and_the_model_put_back(
    spoil: Callable[[ArrayRecord], object],
) -> None:
    model = ArrayRecord([np.arange(3.0), np.arange(2.0)])
    before = [array.tolist() for array in model.to_numpy_ndarrays()]

    def careless(message: Message) -> Message:
        if client_of(message) == 1:
            spoil(message.content.array_records["arrays"])
        return reply_to(message)

    replies = answer_chunk(one_by_one(careless), loose_requests(3, model))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "copy them first" in reasons(replies[1:2])[0]
    assert list(model) == ["0", "1"]
    assert [array.tolist() for array in model.to_numpy_ndarrays()] == before


def test_one_by_one_confines_a_failure_to_its_own_request() -> None:
    def picky(message: Message) -> Message:
        if client_of(message) == 1:
            raise ValueError("not me")
        return Message(RecordDict(), reply_to=message)

    replies = one_by_one(picky)(loose_requests(3))
    assert [reply.has_error() for reply in replies] == [False, True, False]
