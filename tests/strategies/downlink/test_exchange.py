"""Changes over the exchange: counted as sent, believed once answered, and the whole model for who can't use one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from strategies.downlink import Downlink
from strategies.downlink.messages import is_change
from strategies.exchange import Exchange
from strategies.protocols import Reply, Request
from strategies.records import bundle
from strategies.sizes import count_bytes
from strategies.wire import ARRAYS, CONFIG, Refused
from tests.support.grids import Node, ScriptedGrid, numbers

START = np.random.default_rng(0).normal(0, 0.1, (40, 30)).astype(np.float32)


def error(code: int, reason: str) -> Callable[[Message], list[Message]]:
    return lambda message: [Message(Error(code, reason), reply_to=message)]


def well(message: Message) -> list[Message]:
    return [Message(numbers(1), reply_to=message)]


HELD_REFUSED = error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, Refused("held", "not here").told)


class Wire:
    """One client behind a scripted grid, and a model that changes with every request."""

    def __init__(self) -> None:
        self.downlink = Downlink()
        self.grid = ScriptedGrid({7: well})
        self.exchange = Exchange(self.grid)
        self.exchange.downlink = self.downlink
        self.exchange.clients()
        self.version = 0

    def ask(self, node: Node | None) -> tuple[list[RecordDict], list[Reply]]:
        """One request that this node answers: all that was sent for it, and all replies."""
        self.version += 1
        arrays = {"w": START + np.float32(0.01 * self.version)}
        content = bundle({ARRAYS: self.downlink.release(arrays), CONFIG: ConfigRecord({})})
        before = len(self.grid.sent)
        self.grid.nodes = {} if node is None else {7: node}
        self.exchange.send([Request(0, "train", content, 1)], ttl=50.0)
        deadline = self.exchange.now() + 100.0
        replies = list(iter(lambda: self.exchange.receive(deadline), None))
        return [message.content for message in self.grid.sent[before:]], replies


def test_the_second_request_is_a_change_and_the_bytes_are_those_that_were_sent():
    wire = Wire()
    (first,), _ = wire.ask(well)
    before = wire.exchange.downloaded
    (second,), (reply,) = wire.ask(well)
    assert (is_change(first), is_change(second)) == (False, True)
    assert before == count_bytes(first)
    assert wire.exchange.downloaded - before == count_bytes(second)
    assert set(reply.request.content) == {ARRAYS, CONFIG}
    assert reply.error is None


def test_a_client_that_can_not_restore_its_model_is_sent_the_whole_at_once():
    """The session sees one reply, and the same request as ever."""
    wire = Wire()
    wire.ask(well)

    def forgetful(message: Message) -> list[Message]:
        return HELD_REFUSED(message) if is_change(message.content) else well(message)

    sent, (reply,) = wire.ask(forgetful)
    assert [is_change(content) for content in sent] == [True, False]
    assert (reply.request.client, reply.error) == (0, None)
    assert wire.grid.sent[-1].metadata.ttl == 50.0
    (again,), _ = wire.ask(well)
    assert is_change(again)


def test_a_client_that_refuses_the_whole_model_too_is_not_asked_for_ever():
    wire = Wire()
    wire.ask(well)
    sent, (reply,) = wire.ask(HELD_REFUSED)
    assert [is_change(content) for content in sent] == [True, False]
    assert str(reply.error).startswith("held: this client takes no part")
    sent, (reply,) = wire.ask(HELD_REFUSED)
    assert [is_change(content) for content in sent] == [False]
    assert reply.content is None


def test_after_an_error_of_its_own_a_client_is_sent_the_whole_next():
    wire = Wire()
    wire.ask(well)
    sent, (reply,) = wire.ask(error(ErrorCode.CLIENT_APP_CRASHED, "out of memory"))
    assert [is_change(content) for content in sent] == [True]
    assert "out of memory" in str(reply.error)
    (next_one,), _ = wire.ask(well)
    assert not is_change(next_one)


@pytest.mark.parametrize("code", [ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE])
def test_a_client_that_was_not_reached_holds_what_it_held(code):
    wire = Wire()
    wire.ask(well)
    wire.ask(error(code, "gone"))
    (sent,), _ = wire.ask(well)
    assert is_change(sent)


def test_a_client_that_is_gone_when_it_should_be_asked_again_is_an_error():
    wire = Wire()
    wire.ask(well)

    def leaves(message: Message) -> list[Message]:
        wire.grid.nodes = {}
        return HELD_REFUSED(message)

    _, (reply,) = wire.ask(leaves)
    assert reply.error == "the SuperLink did not take the message"


def test_silence_says_nothing_of_what_is_held():
    wire = Wire()
    wire.ask(well)
    sent, replies = wire.ask(lambda message: [])
    assert (len(sent), replies) == (1, [])
    wire.exchange.forget()
    (again,), _ = wire.ask(well)
    assert is_change(again)
    wire.exchange.forget()
