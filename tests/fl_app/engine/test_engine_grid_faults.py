from __future__ import annotations

import time
from typing import Any

import pytest
from engine_helpers import (
    INSTANT,
    SLOWER_AND_SLOWER,
    CountingPool,
    client_in,
    client_of,
    collect,
    echo,
    handling,
    make_grid,
    reply_to,
    request,
)
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from fl_app.engine import DeviceModel, InProcessPool, Occasion
from fl_app.engine.flwr_internals import ErrorCode, claim_identity

# --- what goes wrong -------------------------------------------------------------------------


def error_of(reply: Message) -> Error:
    assert reply.has_error()
    return reply.error


def test_a_reply_that_would_come_after_the_ttl_is_an_error_at_its_end_and_nothing_is_run() -> None:
    pool = CountingPool(echo)
    grid = make_grid(pool, devices=SLOWER_AND_SLOWER)
    ids = grid.push_messages([request(grid, 0, ttl=4.0), request(grid, 8, ttl=4.0)])
    (_, good), (when, late) = collect(grid, ids)
    assert client_in(good) == 0
    assert when == 4.0
    assert error_of(late).code == ErrorCode.MESSAGE_UNAVAILABLE
    assert late.metadata.reply_to_message_id == ids[1]
    assert pool.ran == [0]


def test_a_reply_that_nobody_fetched_in_time_is_gone() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER)
    ids = grid.push_messages([request(grid, 0, ttl=4.0)])
    grid.clock.sleep(1.0)
    grid.clock.sleep(5.0)
    [late] = grid.pull_messages(ids)
    assert error_of(late).code == ErrorCode.MESSAGE_UNAVAILABLE


def test_what_was_pulled_before_or_never_was_is_unavailable() -> None:
    grid = make_grid(InProcessPool(echo), devices=INSTANT)
    ids = grid.push_messages([request(grid, 0)])
    assert len(list(grid.pull_messages(ids))) == 1
    replies = list(grid.pull_messages([*ids, "never"]))
    assert [error_of(reply).code for reply in replies] == [ErrorCode.MESSAGE_UNAVAILABLE] * 2
    assert {reply.metadata.reply_to_message_id for reply in replies} == {*ids, "never"}


def flowers_own_grid() -> tuple[Grid, int]:
    """Flower's in-memory SuperLink with one node that never answers."""
    factory = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
    )
    state = factory.state()
    run_id = state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)
    node = state.create_node("owner", "owner", b"key", 1e6)
    assert state.activate_node(node, 1e6)
    grid = InMemoryGrid(factory)
    grid.set_run(state.get_run_info(run_ids=[run_id])[0])
    claim_identity(run_id)
    return grid, node


def test_an_expired_message_looks_as_flower_makes_it_look() -> None:
    flowers, node = flowers_own_grid()
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    [message_id] = flowers.push_messages([Message(content, node, "train", ttl=0.01, group_id="3")])
    time.sleep(0.03)
    [theirs] = flowers.pull_messages([message_id])

    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER)
    [ours] = grid.send_and_receive([request(grid, 5, ttl=0.01, round_number=3)])

    assert ours.error.code == theirs.error.code
    for name in ("src_node_id", "dst_node_id", "group_id", "message_type", "ttl", "delivered_at"):
        assert getattr(ours.metadata, name) == getattr(theirs.metadata, name)


def test_a_message_to_a_node_that_does_not_exist_fails_at_once() -> None:
    grid = make_grid(InProcessPool(echo))
    [reply] = grid.send_and_receive([Message(RecordDict(), 77, "train", group_id="1")])
    assert error_of(reply) == Error(ErrorCode.NODE_UNAVAILABLE, "there is no node 77")
    assert grid.clock.now() == 0.0


def test_a_handler_that_raises_costs_its_own_reply_only() -> None:
    def handle(message: Message) -> Message:
        if client_of(message) == 2:
            raise RuntimeError("battery empty")
        return reply_to(message)

    grid = make_grid(InProcessPool(handling(handle)), devices=SLOWER_AND_SLOWER)
    arrived = collect(grid, grid.push_messages([request(grid, c) for c in range(4)]))
    assert [reply.has_error() for _, reply in arrived] == [False, False, True, False]
    when, failed = arrived[2]
    assert when == 3.0
    assert error_of(failed).code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert (failed.error.reason or "").startswith("RuntimeError: battery empty")
    assert failed.metadata.src_node_id == grid.roster[2]


def test_a_client_that_drops_out_answers_before_its_phase_and_not_after() -> None:
    devices = DeviceModel(dropout=0.5, latency=0.0, detection_seconds=2.5)
    pool = CountingPool(echo)
    grid = make_grid(pool, num_clients=40, devices=devices)
    gone = 0
    for client in range(40):
        drops_at = devices.drops_at(Occasion(7, client, 1), phases=3)
        for phase in range(3):
            began = grid.clock.now()
            [reply] = grid.send_and_receive(
                [request(grid, client, kind="query", phase=phase, phases=3)]
            )
            assert reply.has_error() == (drops_at is not None and drops_at <= phase)
            if reply.has_error():
                gone += 1
                assert error_of(reply).code == ErrorCode.NODE_UNAVAILABLE
                assert f"client {client} dropped out of round 1" in (reply.error.reason or "")
                assert grid.clock.now() == pytest.approx(began + 2.5)
    assert 0 < gone < 120
    assert len(pool.ran) == 120 - gone


def test_messages_outside_any_round_meet_no_drop_outs() -> None:
    grid = make_grid(InProcessPool(echo), devices=DeviceModel(dropout=1.0))
    [reply] = grid.send_and_receive([request(grid, 0, kind="query.hello", round_number=0)])
    assert reply.has_content()
    [bare] = grid.send_and_receive([Message(RecordDict(), grid.roster[0], "query")])
    assert error_of(bare).code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION  # echo needs a config


def test_a_second_attempt_at_a_round_is_told_apart() -> None:
    grid = make_grid(
        InProcessPool(echo), num_clients=64, devices=DeviceModel(dropout=0.5, latency=0.0)
    )
    outcomes = [
        [
            reply.has_error()
            for client in range(64)
            for reply in grid.send_and_receive([request(grid, client, attempt=attempt)])
        ]
        for attempt in (0, 1)
    ]
    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"round_number": -1}, "server-round=-1"),
        ({"phase": 2, "phases": 2}, "phase=2"),
        ({"phases": 0}, "phases=0"),
        ({"attempt": "1"}, "attempt='1'"),
    ],
)
def test_a_request_whose_whereabouts_make_no_sense_is_refused(
    config: dict[str, Any], fault: str
) -> None:
    grid = make_grid(InProcessPool(echo))
    with pytest.raises(ValueError, match=fault):
        grid.push_messages([request(grid, 0, **config)])


def test_what_flower_would_not_send_is_refused() -> None:
    grid = make_grid(InProcessPool(echo))
    reply = Message(RecordDict(), reply_to=request(grid, 0))
    grid.push_messages([sent := request(grid, 0)])
    replying = Message(RecordDict(), reply_to=sent)
    error = Message(Error(1), reply_to=request(grid, 0))
    spent = request(grid, 0)
    spent.metadata.ttl = 0.0
    for message, fault in ((replying, "replies to"), (error, "no content"), (spent, "ttl is 0.0")):
        with pytest.raises(ValueError, match=fault):
            grid.push_messages([message])
    junk: Any = "hello"
    with pytest.raises(ValueError, match="not str"):
        grid.push_messages([junk])
    assert reply.metadata.reply_to_message_id == ""


def test_an_interrupt_during_a_batch_loses_nothing() -> None:
    interrupts = [KeyboardInterrupt()]

    def handle(message: Message) -> Message:
        if client_of(message) == 1 and interrupts:
            raise interrupts.pop()
        return reply_to(message)

    grid = make_grid(InProcessPool(handling(handle)), devices=INSTANT)
    ids = grid.push_messages([request(grid, client) for client in range(3)])
    taken: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        taken.extend(client_in(reply) for reply in grid.pull_messages(ids))
    rest = set(ids) - set(ids[: len(taken)])
    assert taken + [client_in(reply) for reply in grid.pull_messages(rest)] == [0, 1, 2]
