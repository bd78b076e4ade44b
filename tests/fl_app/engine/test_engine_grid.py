from __future__ import annotations

import gc
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from engine_helpers import INSTANT, client_of, echo, handling, make_grid, reply_to, request
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from fl_app.engine import DeviceModel, EngineGrid, InProcessPool, Occasion
from fl_app.engine.flwr_internals import ErrorCode, Run, claim_identity

SLOWER_AND_SLOWER = DeviceModel(
    seconds_per_example=0.1, latency=0.0, bandwidth_mbps=float("inf"), detection_seconds=2.5
)
"""With the work of `make_grid`, client c takes c + 1 seconds to train, and no time for anything else."""


def collect(grid: EngineGrid, message_ids: Sequence[str]) -> list[tuple[float, Message]]:
    """All replies with the time at which they came, by the loop that a server runs."""
    outstanding, arrived = set(message_ids), []
    while outstanding:
        for reply in grid.pull_messages(outstanding):
            outstanding.discard(reply.metadata.reply_to_message_id)
            arrived.append((grid.clock.now(), reply))
        if outstanding:
            grid.clock.sleep(math.inf)
    return arrived


class CountingPool(InProcessPool):
    """A pool that remembers which clients it ran, call by call."""

    calls: list[list[list[int]]]

    def answer(self, chunks: Sequence[Sequence[Message]]) -> list[list[Message]]:
        self.__dict__.setdefault("calls", []).append(
            [[client_of(message) for message in chunk] for chunk in chunks]
        )
        return super().answer(chunks)

    @property
    def ran(self) -> list[int]:
        return [
            client for call in self.__dict__.get("calls", []) for chunk in call for client in chunk
        ]


def test_replies_come_when_the_devices_are_done_and_not_before() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER)
    ids = grid.push_messages([request(grid, client) for client in (4, 0, 2)])
    assert list(grid.pull_messages(ids)) == []
    arrived = collect(grid, ids)
    assert [(when, client_in(reply)) for when, reply in arrived] == [(1.0, 0), (3.0, 2), (5.0, 4)]


def client_in(reply: Message) -> Any:
    return reply.content.metric_records["metrics"]["client"]


def test_replies_of_one_moment_come_in_the_order_of_logical_clients() -> None:
    grid = make_grid(InProcessPool(echo), devices=INSTANT)
    ids = grid.push_messages([request(grid, client) for client in (7, 3, 9, 0)])
    assert [client_in(reply) for reply in grid.pull_messages(ids)] == [0, 3, 7, 9]


def test_a_reply_names_its_request_its_node_its_group_and_its_virtual_time() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER, run_id=12)
    sent = request(grid, 2, round_number=5, ttl=100.0)
    [message_id] = grid.push_messages([sent])
    [(_, reply)] = collect(grid, [message_id])
    assert reply.metadata.reply_to_message_id == message_id == sent.metadata.message_id
    assert reply.metadata.src_node_id == grid.roster[2]
    assert reply.metadata.dst_node_id == sent.metadata.src_node_id
    assert reply.metadata.group_id == "5"
    assert reply.metadata.run_id == 12
    assert reply.metadata.message_type == "train"
    assert reply.metadata.created_at == pytest.approx(sent.metadata.created_at + 3.0)
    assert reply.metadata.ttl == pytest.approx(97.0)
    assert reply.metadata.message_id not in ("", message_id)


def test_only_training_takes_the_time_of_training() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER)
    kinds = ("evaluate", "query", "train.unmask", "query.hello")
    replies = grid.send_and_receive([request(grid, 9, kind=kind) for kind in kinds])
    assert len(replies) == 4
    assert grid.clock.now() == 0.0


def test_the_bytes_of_the_model_take_time_both_ways() -> None:
    devices = DeviceModel(latency=0.0, bandwidth_mbps=8.0, seconds_per_example=0.0)
    model = ArrayRecord([np.zeros(250_000, np.float32)])
    size = sum(len(array.data) for array in model.values())
    for kind, ways in (("train", 2), ("evaluate", 1)):
        grid = make_grid(InProcessPool(echo), devices=devices)
        grid.send_and_receive([request(grid, 0, kind=kind, arrays=model)])
        assert grid.clock.now() == pytest.approx(ways * size / 1e6)


def test_client_code_runs_when_a_reply_is_first_needed_and_for_all_at_once() -> None:
    pool = CountingPool(echo)
    grid = make_grid(pool, devices=SLOWER_AND_SLOWER)
    ids = grid.push_messages([request(grid, client) for client in (5, 1, 3)])
    grid.clock.sleep(1.5)
    assert list(grid.pull_messages(ids)) == []
    assert pool.ran == []
    collect(grid, ids)
    assert pool.calls == [[[1], [3], [5]]]


def test_chunks_depend_on_how_many_messages_there_are_and_on_nothing_else() -> None:
    pool = CountingPool(echo)
    grid = make_grid(pool, num_clients=600, devices=INSTANT, max_chunk=10)
    grid.send_and_receive([request(grid, client) for client in range(600)])
    sizes = [[len(chunk) for chunk in call] for call in pool.calls]
    assert sizes == [[10] * 25 + [6], [10] * 25 + [6], [6] * 14 + [4]]
    assert pool.ran == list(range(600))


def test_two_requests_to_one_client_never_run_at_the_same_time() -> None:
    pool = CountingPool(echo)
    grid = make_grid(pool, devices=INSTANT)
    replies = grid.send_and_receive([request(grid, c) for c in (0, 1, 0, 1, 2)])
    assert [client_in(reply) for reply in replies] == [0, 0, 1, 1, 2]
    for call in pool.calls:
        clients = [client for chunk in call for client in chunk]
        assert len(set(clients)) == len(clients)


def test_a_caller_that_takes_replies_one_by_one_needs_little_memory() -> None:
    payload = 100_000

    def handle(message: Message) -> Message:
        update = ArrayRecord([np.full(payload // 8, client_of(message), np.float64)])
        return Message(RecordDict({"update": update}), reply_to=message)

    grid = make_grid(InProcessPool(handling(handle)), num_clients=1_000, devices=INSTANT)
    ids = grid.push_messages([request(grid, client) for client in range(1_000)])
    tracemalloc.start()
    assert sum(1 for _ in grid.pull_messages(ids)) == 1_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 256 * payload


def test_what_is_not_taken_from_the_iterator_can_be_pulled_again() -> None:
    grid = make_grid(InProcessPool(echo), devices=INSTANT)
    ids = grid.push_messages([request(grid, client) for client in range(4)])
    first = next(iter(grid.pull_messages(ids)))
    rest = [client_in(reply) for reply in grid.pull_messages(ids[1:])]
    assert (client_in(first), rest) == (0, [1, 2, 3])


def test_two_iterators_over_one_reply_deliver_it_once() -> None:
    grid = make_grid(InProcessPool(echo), devices=INSTANT)
    ids = grid.push_messages([request(grid, 0, ttl=5.0)])
    one, two = grid.pull_messages(ids), grid.pull_messages(ids)
    assert len(list(one)) == 1
    grid.clock.sleep(9.0)
    assert list(two) == []


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
    with pytest.raises(KeyboardInterrupt):
        list(grid.pull_messages(ids))
    assert [client_in(reply) for reply in grid.pull_messages(ids)] == [0, 1, 2]


# --- what is sent ----------------------------------------------------------------------------


def test_a_request_is_taken_as_it_is_when_it_is_pushed() -> None:
    grid = make_grid(InProcessPool(echo), devices=INSTANT)
    message = request(grid, 0)
    config = message.content.config_records["config"]
    ids = []
    for client in range(3):
        config["client"] = client
        message.metadata.dst_node_id = grid.roster[client]
        ids += grid.push_messages([message])
    assert len(set(ids)) == 3
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(ids)}
    assert [client_in(replies[message_id]) for message_id in ids] == [0, 1, 2]


def test_a_handler_that_scribbles_on_its_request_changes_nobody_elses() -> None:
    seen = []

    def handle(message: Message) -> Message:
        seen.append(sorted(message.content))
        seen.append(sorted(message.content["config"]))
        reply = reply_to(message)
        message.content.config_records["config"]["scribble"] = 1
        message.content["more"] = ConfigRecord()
        message.metadata.group_id = "other"
        return reply

    grid = make_grid(InProcessPool(handling(handle)), devices=INSTANT)
    shared = RecordDict({"config": ConfigRecord({"server-round": 1, "client": 0})})
    messages = [Message(shared, grid.roster[c], "train", group_id="1") for c in (0, 0, 1)]
    replies = grid.send_and_receive(messages)
    assert seen == [["config"], ["client", "server-round"]] * 3
    assert sorted(shared) == ["config"]
    assert {reply.metadata.group_id for reply in replies} == {"1"}


def test_all_clients_of_a_chunk_get_the_one_model_object_that_was_sent() -> None:
    seen = set()

    def handle(message: Message) -> Message:
        seen.add(id(message.content["arrays"]))
        return reply_to(message)

    model = ArrayRecord([np.zeros(10)])
    grid = make_grid(InProcessPool(handling(handle)))
    grid.send_and_receive([request(grid, client, arrays=model) for client in range(10)])
    assert seen == {id(model)}


# --- the rest of the interface -----------------------------------------------------------------


def test_it_is_a_grid_with_a_run_and_nodes() -> None:
    grid = make_grid(InProcessPool(echo), num_clients=3, run_id=41)
    assert isinstance(grid, Grid)
    assert grid.run.run_id == 41
    assert list(grid.get_node_ids()) == [grid.roster[client] for client in range(3)]
    assert [node.node_id for node in grid.get_nodes()] == list(grid.roster.values())
    grid.set_run(Run.create_empty(42))
    message = grid.create_message(RecordDict(), "query", grid.roster[0], "g", 3.0)
    assert (message.metadata.run_id, message.metadata.ttl, message.metadata.group_id) == (
        42,
        3.0,
        "g",
    )


def test_flowers_own_fedavg_runs_on_it_and_cannot_tell() -> None:
    def handle(message: Message) -> Message:
        client = grid.roster.client_of(message.metadata.dst_node_id)
        assert client is not None
        if client == 3:
            raise RuntimeError("out of memory")
        [array] = message.content.array_records["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": client + 1, "loss": 0.5})
        records: dict[str, Any] = {"arrays": ArrayRecord([array + client]), "metrics": metrics}
        return Message(RecordDict(records), reply_to=message)

    grid = make_grid(InProcessPool(handling(handle)), num_clients=4, devices=SLOWER_AND_SLOWER)
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=4)
    result = strategy.start(grid, ArrayRecord([np.zeros(2)]), num_rounds=3)
    [averaged] = result.arrays.to_numpy_ndarrays()
    step = (1 * 0 + 2 * 1 + 3 * 2) / (1 + 2 + 3)
    np.testing.assert_allclose(averaged, 3 * step)
    assert grid.clock.now() == 3 * 4.0


def test_send_and_receive_stops_at_its_timeout_and_leaves_the_rest_to_be_pulled() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER)
    messages = [request(grid, client) for client in range(5)]
    replies = grid.send_and_receive(messages, timeout=3.5)
    assert [client_in(reply) for reply in replies] == [0, 1, 2]
    assert grid.clock.now() == 3.5
    left = [message.metadata.message_id for message in messages[3:]]
    assert [client_in(reply) for _, reply in collect(grid, left)] == [3, 4]


def test_a_resumed_clock_goes_on_from_where_it_was() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER, start=100.0)
    grid.send_and_receive([request(grid, 0)])
    assert grid.clock.now() == 101.0


def test_ten_million_clients_cost_nothing_until_they_are_asked() -> None:
    began = time.perf_counter()
    grid = make_grid(
        InProcessPool(echo),
        num_clients=10_000_000,
        devices=DeviceModel(speed_sigma=1.0, dropout=0.1),
        work=lambda client: 1.0,
    )
    replies = grid.send_and_receive([request(grid, client) for client in range(0, 10**7, 10**6)])
    assert len(replies) == 10
    assert time.perf_counter() - began < 2.0


def blocks_after(*steps: Callable[[], None]) -> list[int]:
    """How many blocks of memory Python holds after each step."""
    used = []
    for step in steps:
        step()
        gc.collect()
        used.append(sys.getallocatedblocks())
    return used


def test_a_long_run_that_forgets_late_replies_does_not_grow() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER)

    def rounds() -> None:
        for _ in range(300):
            ids = grid.push_messages([request(grid, client, ttl=50.0) for client in (0, 9)])
            grid.clock.sleep(1.0)
            assert len(list(grid.pull_messages(ids))) == 1

    _, before, after = blocks_after(rounds, rounds, rounds)
    assert after < before + 600  # two for each late reply


def test_a_long_run_keeps_nothing_of_messages_that_were_delivered_long_before_their_ttl() -> None:
    grid = make_grid(InProcessPool(echo), devices=INSTANT)

    def rounds() -> None:
        for _ in range(200):
            grid.send_and_receive([request(grid, client) for client in range(10)])

    _, before, after = blocks_after(rounds, rounds, rounds)
    assert after < before + 4_000  # two for each message
