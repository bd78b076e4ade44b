"""Real worker processes: the same results for any number of them, and a clean end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import (
    client_of,
    clients_in,
    echo,
    gone,
    handling,
    loose_requests,
    make_grid,
    payloads,
    reply_to,
    request,
    singly,
    trainer,
    trainer_arrays,
)
from flwr.app import ArrayRecord, Message, RecordDict

from fl_app.engine import (
    Answer,
    ClientPool,
    DeviceModel,
    InProcessPool,
    ProcessPool,
    make_pool,
    resolve_workers,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills by signals")


# --- the same results ------------------------------------------------------------------------


def run_rounds(pool: ClientPool, rounds: int = 3) -> list[Any]:
    """A few rounds of training with drop-outs, expiries and slow devices: everything a server sees, in its order."""
    devices = DeviceModel(speed_sigma=1.0, jitter_sigma=0.3, dropout=0.2, detection_seconds=0.3)
    grid = make_grid(pool, num_clients=12, devices=devices)
    seen: list[Any] = []
    for number in range(1, rounds + 1):
        messages = [
            request(grid, client, round_number=number, arrays=trainer_arrays(), ttl=0.6)
            for client in range(12)
        ]
        replies = grid.send_and_receive(messages)
        seen.append((grid.clock.now(), payloads(replies)))
    return seen


def test_a_run_is_the_same_to_the_last_bit_for_any_number_of_workers() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with InProcessPool(trainer) as here:
            runs = [run_rounds(here)]
        for workers in (1, 2, 3):
            with ProcessPool(trainer, workers) as pool:
                runs.append(run_rounds(pool))
    finally:
        torch.set_num_threads(threads)
    assert runs[1:] == runs[:1] * 3
    outcomes = {type(payload[3]) for _, replies in runs[0] for payload in replies}
    assert outcomes == {int, tuple}, "the run should hold errors and trained models"


def test_replies_keep_the_order_of_the_chunks_when_workers_finish_in_another(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def handle(message: Message) -> Message:
        time.sleep(0.3 if client_of(message) == 0 else 0.0)
        return reply_to(message)

    replies = list(pool_of(handling(handle)).stream(singly(7)))
    assert clients_in(replies) == [[client] for client in range(7)]


def test_chunks_go_to_whoever_is_free(pool_of: Callable[..., ProcessPool]) -> None:
    def handle(message: Message) -> Message:
        time.sleep(0.5 if client_of(message) == 0 else 0.0)
        return reply_to(message, pid=os.getpid())

    replies = list(pool_of(handling(handle)).stream(singly(7)))
    pids = [reply.content.metric_records["metrics"]["pid"] for [reply] in replies]
    assert pids.count(pids[0]) == 1


def test_the_model_is_resident_and_built_once_in_each_worker(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def factory() -> Answer:
        built = [0]

        def answer(messages: Sequence[Message]) -> list[Message]:
            built[0] += 1
            return [reply_to(message, call=built[0]) for message in messages]

        return answer

    pool = pool_of(factory, 1)
    calls = [
        reply.content.metric_records["metrics"]["call"]
        for _ in range(3)
        for [reply] in list(pool.stream(singly(2)))
    ]
    assert calls == [1, 2, 3, 4, 5, 6]


def test_a_chunks_requests_share_the_model_in_a_worker_as_they_do_in_process(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def factory() -> Answer:
        def answer(messages: Sequence[Message]) -> list[Message]:
            models = {id(message.content["arrays"]) for message in messages}
            return [reply_to(message, models=len(models)) for message in messages]

        return answer

    chunk = loose_requests(5, ArrayRecord([np.zeros(4)]))
    for pool in (pool_of(factory, 1), InProcessPool(factory)):
        [replies] = list(pool.stream([chunk]))
        assert {r.content.metric_records["metrics"]["models"] for r in replies} == {1}


def test_client_code_runs_on_one_thread_and_leaves_no_trace_in_this_process() -> None:
    def handle(message: Message) -> Message:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - what careless client code does
        torch.manual_seed(1)
        return reply_to(message, threads=torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
        with InProcessPool(handling(handle)) as pool:
            [[reply]] = list(pool.stream([loose_requests(1)]))
        assert reply.content.metric_records["metrics"]["threads"] == 1
        assert torch.get_num_threads() == 2
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])
    finally:
        torch.set_num_threads(before)


# --- large messages ----------------------------------------------------------------------------


def test_forty_megabytes_cross_both_ways_at_once(pool_of: Callable[..., ProcessPool]) -> None:
    model = ArrayRecord([np.arange(10_000_000, dtype=np.float32)])

    def handle(message: Message) -> Message:
        update = message.content.array_records["arrays"]["0"].numpy() + client_of(message)
        return Message(RecordDict({"update": ArrayRecord([update])}), reply_to=message)

    replies = list(pool_of(handling(handle)).stream(singly(4, model)))
    for client, [reply] in enumerate(replies):
        update = reply.content.array_records["update"]["0"].numpy()
        assert update[0] == client
        assert update[-1] == np.float32(9_999_999 + client)


# --- the end -----------------------------------------------------------------------------------


def test_closing_ends_idle_and_busy_workers_promptly(pool_of: Callable[..., ProcessPool]) -> None:
    pool = pool_of(handling(sleepy))
    pool.start()
    pids = pool.pids
    answering = threading.Thread(target=swallow, args=(pool, singly(1)))
    answering.start()
    time.sleep(0.2)
    began = time.monotonic()
    pool.close()
    assert gone(pids, within=1.0)
    assert time.monotonic() - began < 3.0
    answering.join()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(pool.stream(singly(1)))


def sleepy(message: Message) -> Message:
    time.sleep(60.0)
    return reply_to(message)


def swallow(pool: ProcessPool, chunks: list[list[Message]]) -> None:
    """Answers in a thread whose pool is torn away, which is an error there but not here."""
    try:
        list(pool.stream(chunks))
    except (OSError, ValueError, RuntimeError, TypeError):
        return


def test_a_pool_closed_before_it_started_or_twice_is_no_error() -> None:
    for pool in (ProcessPool(echo, 2), InProcessPool(echo)):
        pool.close()
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            pool.start()


def test_a_pool_can_be_used_again_after_an_interrupt_and_gives_no_stale_reply(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def handle(message: Message) -> Message:
        if client_of(message) < 2:
            time.sleep(60.0)
        return reply_to(message)

    pool = pool_of(handling(handle))
    pool.start()
    chunks = singly(4)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(pool.stream(chunks[:2]))
    assert clients_in(list(pool.stream(chunks[2:]))) == [[2], [3]]


SCRIPT = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from engine_helpers import handling, loose_requests, reply_to
from fl_app.engine import ProcessPool

def handle(message):
    print("busy", flush=True)
    time.sleep(60.0)
    return reply_to(message)

pool = ProcessPool(handling(handle), 2)
pool.start()
print(*pool.pids, flush=True)
try:
    list(pool.stream([[message] for message in loose_requests(1)]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
finally:
    pool.close()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process of its own, in a group of its own, with one busy and one idle worker."""
    path = [str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(path=path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        yield process
        process.kill()


def workers_once_busy(parent: subprocess.Popen[str]) -> list[int]:
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert parent.stdout.readline() == "busy\n"
    assert len(pids) == 2
    return pids


def test_workers_end_when_their_parent_is_killed(parent: subprocess.Popen[str]) -> None:
    pids = workers_once_busy(parent)
    parent.kill()
    assert gone(pids)


def test_control_c_ends_the_run_and_its_workers_without_a_traceback(
    parent: subprocess.Popen[str],
) -> None:
    pids = workers_once_busy(parent)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=10)
    assert out == "interrupted\n"
    assert err == ""
    assert parent.returncode == 0
    assert gone(pids)


# --- choosing ----------------------------------------------------------------------------------


def test_one_worker_is_this_process_and_more_are_processes() -> None:
    with make_pool(echo, 1) as one, make_pool(echo, 2) as two:
        assert isinstance(one, InProcessPool)
        assert isinstance(two, ProcessPool)
        assert len(two.pids) == 2


def test_auto_is_the_number_of_usable_cpus() -> None:
    assert 1 <= resolve_workers("auto") <= (os.cpu_count() or 1)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "many"])
def test_a_number_of_workers_that_makes_no_sense_is_refused(workers: Any) -> None:
    with pytest.raises(ValueError, match=f"runtime.workers={workers!r}"):
        resolve_workers(workers)


def test_a_pool_of_no_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        ProcessPool(echo, 0)


@pytest.mark.slow
def test_workers_can_be_spawned_where_there_is_no_fork(pool_of: Callable[..., ProcessPool]) -> None:
    pool = pool_of(trainer, 2, start_method="spawn")
    arrays = trainer_arrays()
    chunks = singly(3, arrays)
    with InProcessPool(trainer) as here:
        expected = [payloads(replies) for replies in list(here.stream(chunks))]
    assert [payloads(replies) for replies in list(pool.stream(chunks))] == expected


def test_a_stream_is_worked_at_no_further_ahead_than_it_is_taken(
    pool_of: Callable[..., ProcessPool], tmp_path: Path
) -> None:
    def handle(message: Message) -> Message:
        (tmp_path / str(client_of(message))).touch()
        return reply_to(message)

    stream = pool_of(handling(handle)).stream(singly(40))
    next(stream)
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) < 20
    assert clients_in(list(stream)) == [[client] for client in range(1, 40)]
