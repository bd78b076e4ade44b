from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
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
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fl_app.engine import DeviceModel, InProcessPool
from fl_app.engine.flwr_internals import Run


def test_replies_come_when_the_devices_are_done_and_not_before() -> None:
    grid = make_grid(InProcessPool(echo), devices=SLOWER_AND_SLOWER)
    ids = grid.push_messages([request(grid, client) for client in (4, 0, 2)])
    assert list(grid.pull_messages(ids)) == []
    arrived = collect(grid, ids)
    assert [(when, client_in(reply)) for when, reply in arrived] == [(1.0, 0), (3.0, 2), (5.0, 4)]


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
