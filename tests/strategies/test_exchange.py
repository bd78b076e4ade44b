"""Requests out and replies in, over a grid in virtual time whose nodes do as the test says."""

import time

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from strategies.exchange import Exchange, NoClientsError, WallClock
from strategies.protocols import Request
from strategies.sizes import count_bytes
from strategies.wire import CONFIG
from tests.support.grids import ScriptedGrid, numbers


def request(client: int, round_number: int = 1) -> Request:
    content = RecordDict({CONFIG: ConfigRecord({"client": client})})
    return Request(client, "train", content, round_number)


def after(*delays: float, content: RecordDict | None = None):
    """A node that answers each request once for each delay."""

    def node(message: Message):
        return [(delay, Message(content or numbers(1), reply_to=message)) for delay in delays]

    return node


def silent(message: Message) -> list[Message]:
    return []


def failing(message: Message) -> list[Message]:
    return [
        Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "out of memory"), reply_to=message)
    ]


def opened(nodes: dict) -> tuple[ScriptedGrid, Exchange]:
    grid = ScriptedGrid(nodes)
    exchange = Exchange(grid)
    exchange.clients()
    return grid, exchange


def drain(exchange: Exchange, deadline: float = 100.0) -> list:
    return list(iter(lambda: exchange.receive(deadline), None))


def test_a_request_reaches_its_client_and_the_reply_its_request():
    grid, exchange = opened({40: after(0), 41: after(0)})
    exchange.send([request(0, 7), request(1, 7)], ttl=60.0)
    replies = drain(exchange)
    assert [reply.request.client for reply in replies] == [0, 1]
    assert all(reply.error is None and reply.content is not None for reply in replies)
    metadata = grid.sent[1].metadata
    assert (metadata.dst_node_id, metadata.group_id, metadata.ttl) == (41, "7", 60.0)
    assert metadata.message_type == "train"


def test_replies_come_in_the_order_of_time_not_of_requests():
    _, exchange = opened({1: after(9), 2: after(3), 3: after(6)})
    exchange.send([request(client) for client in range(3)])
    assert [reply.request.client for reply in drain(exchange)] == [1, 2, 0]


def test_waiting_sleeps_to_the_next_reply_and_no_longer():
    grid, exchange = opened({1: after(3), 2: after(8)})
    exchange.send([request(0), request(1)])
    exchange.receive(100.0)
    assert grid.clock.now() == 3
    exchange.receive(100.0)
    assert exchange.now() == 8


def test_nothing_is_received_after_the_deadline():
    grid, exchange = opened({1: after(3), 2: after(30), 3: silent})
    exchange.send([request(client) for client in range(3)])
    assert [reply.request.client for reply in drain(exchange, 20.0)] == [0]
    assert grid.clock.now() == 20


def test_with_nothing_outstanding_there_is_nothing_to_wait_for():
    grid, exchange = opened({1: after(0)})
    assert exchange.receive(1e9) is None
    assert grid.clock.now() == 0


def test_replies_to_a_round_that_is_over_are_never_looked_at(caplog):
    grid, exchange = opened({1: after(50), 2: after(0)})
    exchange.send([request(0), request(1)])
    assert len(drain(exchange, 10.0)) == 1
    exchange.forget()
    late = Message(numbers(1), reply_to=grid.sent[0])
    exchange.send([request(1, 2)])
    grid.strays.append(late)
    assert [reply.request.round for reply in drain(exchange, 100.0)] == [2]
    assert "a reply to no request of this run was dropped" in caplog.text


def test_a_second_reply_to_the_same_request_is_dropped():
    _, exchange = opened({1: after(0, 0, 0)})
    exchange.send([request(0)])
    assert len(drain(exchange)) == 1


def test_a_reply_to_an_id_that_was_never_given_is_dropped():
    grid, exchange = opened({1: after(5)})
    stranger = ScriptedGrid({1: after(0)})
    foreign = Message(RecordDict(), 1, "train")
    stranger.push_messages([foreign])
    foreign.metadata.__dict__["_message_id"] = "never given"
    exchange.send([request(0)])
    grid.strays.append(Message(numbers(1), reply_to=foreign))
    assert [reply.request.client for reply in drain(exchange)] == [0]


def test_a_clients_error_arrives_with_its_reason():
    _, exchange = opened({1: failing})
    exchange.send([request(0)])
    reply = exchange.receive(1.0)
    assert reply.content is None
    assert reply.error == f"out of memory (code {ErrorCode.CLIENT_APP_RAISED_EXCEPTION})"


def test_a_client_that_is_not_there_is_answered_by_an_error_at_once():
    grid, exchange = opened({1: after(0)})
    exchange.send([request(5)])
    reply = exchange.receive(100.0)
    assert (reply.content, reply.error) == (None, "client 5 is not there")
    assert grid.clock.now() == 0


def test_a_node_that_vanished_after_it_was_seen_is_answered_by_an_error():
    grid, exchange = opened({1: after(0), 2: after(0)})
    del grid.nodes[1]
    exchange.send([request(0), request(1)])
    replies = {reply.request.client: reply for reply in drain(exchange)}
    assert replies[0].error == "the SuperLink did not take the message"
    assert replies[1].error is None


class LeavesOut(ScriptedGrid):
    """As Flower's in-memory grid: what was not taken is missing from the ids."""

    def push_messages(self, messages):
        return [number for number in super().push_messages(messages) if number]


class TooLarge(ScriptedGrid):
    """As Flower's deployed grid when a push is too large: no ids at all."""

    def push_messages(self, messages):
        return []


def test_messages_that_a_grid_leaves_out_are_found_by_their_own_ids():
    grid = LeavesOut({1: after(0), 2: after(0), 3: after(0)})
    exchange = Exchange(grid)
    exchange.clients()
    del grid.nodes[2]
    exchange.send([request(client) for client in range(3)])
    errors = {reply.request.client: reply.error for reply in drain(exchange)}
    assert errors == {0: None, 1: "the SuperLink did not take the message", 2: None}


def test_a_push_that_is_too_large_is_an_error_for_each_client():
    exchange = Exchange(TooLarge({1: after(0), 2: after(0)}))
    exchange.clients()
    exchange.send([request(0), request(1)])
    assert len([reply for reply in drain(exchange) if reply.error]) == 2


def test_a_reply_that_no_wire_carries_is_an_error():
    _, exchange = opened({1: after(0, content=numbers(10**400))})
    exchange.send([request(0)])
    reply = exchange.receive(1.0)
    assert reply.content is None
    assert reply.error.startswith("the reply cannot be serialised: ")
    assert exchange.uploaded == 0


def test_bytes_are_counted_both_ways():
    answer = numbers(1)
    _, exchange = opened({1: after(0, content=answer), 2: failing})
    requests = [request(0), request(1)]
    exchange.send(requests)
    drain(exchange)
    assert exchange.downloaded == sum(count_bytes(item.content) for item in requests)
    assert exchange.uploaded == count_bytes(answer)


def test_vanilla_nodes_are_numbered_in_the_order_of_their_ids():
    _, exchange = opened({90: silent, 30: silent, 60: silent})
    assert exchange.clients() == [0, 1, 2]
    assert [exchange.node_of(client) for client in range(3)] == [30, 60, 90]


def test_vanilla_nodes_keep_their_numbers_as_others_come_and_go():
    grid, exchange = opened({10: silent, 20: silent, 30: silent})
    del grid.nodes[10]
    assert exchange.clients() == [1, 2]
    grid.nodes[5] = silent
    assert exchange.clients() == [0, 1, 2]
    assert [exchange.node_of(client) for client in range(3)] == [5, 20, 30]
    grid.nodes[10] = silent
    assert exchange.clients() == [0, 1, 2, 3]
    assert exchange.node_of(3) == 10
    assert [exchange.node_of(client) for client in range(3)] == [5, 20, 30]


def test_a_grid_that_knows_its_clients_is_asked_for_them():
    grid = ScriptedGrid({70: after(0), 80: after(0)})
    grid.roster = {4: 70, 2: 80}
    exchange = Exchange(grid)
    assert exchange.clients() == [2, 4]
    assert exchange.node_of(4) == 70


def test_waiting_for_clients_ends_when_they_are_there():
    grid = ScriptedGrid({})
    exchange = Exchange(grid)
    came = {3.0: 11, 5.0: 12}

    def arrive() -> list[int]:
        return [node for moment, node in came.items() if moment <= grid.clock.now()]

    grid.get_node_ids = arrive
    assert exchange.wait_for_clients(2, timeout=60.0) == [0, 1]
    assert grid.clock.now() == 5


def test_too_few_clients_by_the_deadline_are_an_error_that_says_how_to_mend_it():
    grid = ScriptedGrid({1: silent})
    with pytest.raises(
        NoClientsError, match="1 of 3 clients came within 30 s: start more SuperNod"
    ):
        Exchange(grid).wait_for_clients(3, timeout=30.0)
    assert grid.clock.now() == 30


def test_a_wall_clock_sleeps_no_longer_than_its_poll():
    clock, began = WallClock(poll=0.01), time.monotonic()
    clock.sleep(60.0)
    clock.sleep(-1.0)
    assert 0.01 <= clock.now() - began < 5


def test_a_grid_without_a_clock_is_polled_in_real_time():
    grid = ScriptedGrid({1: silent})
    del grid.clock
    exchange = Exchange(grid)
    before = exchange.now()
    assert exchange.receive(before + 10) is None  # nothing was asked
    assert exchange.now() - before < 5


class Inflating(ScriptedGrid):
    """Reads what peers sent as it is pulled, as Flower does, and meets node 2's reply among the others."""

    def pull_messages(self, message_ids):
        kept = list(self._mail)
        messages = super().pull_messages(message_ids)
        if any(message.metadata.src_node_id == 2 for message in messages):
            self._mail = kept
            raise AttributeError("'NoneType' object has no attribute 'vals'")
        return messages


def test_a_reply_that_flower_cannot_inflate_is_its_clients_error_and_no_others():
    grid = Inflating({node: after(0.0) for node in (1, 2, 3)})
    exchange = Exchange(grid)
    exchange.send(request(client) for client in exchange.clients())
    replies = [exchange.receive(10.0) for _ in range(3)]
    errors = {reply.request.client: reply.error for reply in replies}
    assert errors.pop(1).startswith("the reply cannot be read: AttributeError")
    assert errors == {0: None, 2: None}
    assert exchange.receive(10.0) is None
