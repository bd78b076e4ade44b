"""Real worker processes that are killed, raise and write nonsense: error replies, never a hang or a crash."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import (
    INSTANT,
    client_of,
    clients_in,
    echo,
    handling,
    loose_requests,
    make_grid,
    reply_to,
    request,
    singly,
)
from flwr.app import ArrayRecord, Message, RecordDict

from fl_app.engine import (
    Answer,
    InProcessPool,
    ProcessPool,
    WorkerError,
)
from fl_app.engine.flwr_internals import ErrorCode

CRASHED = ErrorCode.CLIENT_APP_CRASHED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills by signals")


# --- what goes wrong -------------------------------------------------------------------------


def kill_if_client(*doomed: int) -> Callable[[], Answer]:
    def handle(message: Message) -> Message:
        if client_of(message) in doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply_to(message)

    return handling(handle)


def test_a_killed_worker_costs_what_it_held_and_the_run_goes_on(
    pool_of: Callable[..., ProcessPool], caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of(kill_if_client(3))
    requests = loose_requests(12)
    chunks = [requests[i : i + 2] for i in range(0, 12, 2)]
    with caplog.at_level(logging.WARNING):
        replies = list(pool.stream(chunks))
    assert [[r.has_error() for r in chunk] for chunk in replies] == [
        [client // 2 == 1] * 2 for client in range(0, 12, 2)
    ]
    for failed in replies[1]:
        assert failed.error.code == CRASHED
        assert "was killed by signal 9" in (failed.error.reason or "")
    assert "was killed by signal 9" in caplog.text
    assert clients_in(list(pool.stream([requests[:1], requests[1:2]]))) == [[0], [1]]
    assert len(pool.pids) == 2


def test_a_pool_outlives_the_death_of_every_worker_again_and_again(
    pool_of: Callable[..., ProcessPool],
) -> None:
    replies = pool_of(kill_if_client(*range(0, 20, 2))).stream(singly(20))
    assert [reply.has_error() for [reply] in replies] == [True, False] * 10


def test_a_worker_that_was_killed_while_idle_costs_nothing(
    pool_of: Callable[..., ProcessPool], caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of(echo)
    pool.start()
    killed = pool.pids
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with caplog.at_level(logging.WARNING):
        assert clients_in(list(pool.stream(singly(4)))) == [[0], [1], [2], [3]]
    assert "lost while idle: it was killed by signal 9" in caplog.text


def test_a_worker_that_dies_while_it_writes_costs_what_it_held(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def handle(message: Message) -> Message:
        if client_of(message) == 1:
            threading.Timer(0.05, os._exit, (7,)).start()
            update = ArrayRecord([np.zeros(2_000_000)] * 20)
            return Message(RecordDict({"update": update}), reply_to=message)
        return reply_to(message)

    for _ in range(3):
        replies = list(pool_of(handling(handle)).stream(singly(3)))
        assert not replies[0][0].has_error()
        assert not replies[2][0].has_error()
        if replies[1][0].has_error():
            assert replies[1][0].error.code == CRASHED


@pytest.mark.parametrize(
    ("leave", "cause"),
    [
        (lambda: os._exit(5), "ended with exit code 5"),
        (lambda: os.closerange(3, 64), ""),
    ],
    ids=["exit", "closed pipe"],
)
def test_a_worker_that_ends_or_closes_its_pipe_costs_what_it_held(
    leave: Callable[[], None], cause: str, pool_of: Callable[..., ProcessPool]
) -> None:
    def handle(message: Message) -> Message:
        if client_of(message) == 1:
            leave()
        return reply_to(message)

    _, [failed], [last] = list(pool_of(handling(handle)).stream(singly(3)))
    assert failed.error.code == CRASHED
    assert cause in (failed.error.reason or "")
    assert not last.has_error()


def test_nonsense_on_a_workers_pipe_costs_what_it_held(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def handle(message: Message) -> Message:
        if client_of(message) == 1:
            for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
                with contextlib.suppress(OSError):
                    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                        os.write(descriptor, b"\0\0\0\4junk")
        return reply_to(message)

    replies = list(pool_of(handling(handle), 1).stream(singly(3)))
    assert [reply.has_error() for [reply] in replies] == [False, True, False]
    assert "it wrote something unreadable" in (replies[1][0].error.reason or "")


def test_a_dead_worker_whose_child_holds_its_pipe_open_is_still_missed(
    pool_of: Callable[..., ProcessPool], tmp_path: Path
) -> None:
    def handle(message: Message) -> Message:
        if client_of(message) == 0:
            child = os.fork()
            if child == 0:
                time.sleep(30.0)
                os._exit(0)
            (tmp_path / "pid").write_text(str(child))
            os._exit(1)
        return reply_to(message)

    try:
        [failed], [good] = list(pool_of(handling(handle), 1).stream(singly(2)))
        assert failed.error.code == CRASHED
        assert not good.has_error()
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_handler_that_raises_in_a_worker_gives_the_reason_and_keeps_the_worker(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def handle(message: Message) -> Message:
        if client_of(message) == 1:
            raise LookupError("no such layer")
        return reply_to(message)

    pool = pool_of(handling(handle))
    pool.start()
    pids = pool.pids
    replies = list(pool.stream(singly(4)))
    assert [reply.has_error() for [reply] in replies] == [False, True, False, False]
    reason = replies[1][0].error.reason or ""
    assert reason.startswith("LookupError: no such layer\n")
    assert pool.pids == pids


@pytest.mark.parametrize("make", [InProcessPool, lambda factory: ProcessPool(factory, 1)])
def test_an_unsendable_reply_is_an_error_reply(make: Callable[..., Any]) -> None:
    def handle(message: Message) -> Message:
        reply: Any = reply_to(message)
        if client_of(message) == 1:
            reply.__dict__["_content"] = lambda: None
        if client_of(message) == 2:
            return reply.content  # type: ignore[no-any-return]
        return reply  # type: ignore[no-any-return]

    with make(handling(handle)) as pool:
        replies = list(pool.stream(singly(4)))
    assert [reply.has_error() for [reply] in replies] == [False, True, True, False]


def test_client_code_that_cannot_be_built_fails_at_the_start(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def factory() -> Answer:
        raise ImportError("no module named rainbow")

    pool = pool_of(factory, 3)
    with pytest.raises(WorkerError, match="ImportError: no module named rainbow"):
        pool.start()
    assert pool.pids == []
    with pytest.raises(ImportError):
        InProcessPool(factory).start()


def test_a_worker_that_dies_at_its_start_fails_the_start(
    pool_of: Callable[..., ProcessPool],
) -> None:
    def factory() -> Answer:
        os._exit(9)

    with pytest.raises(WorkerError, match="did not start: it ended with exit code 9"):
        pool_of(factory).start()


def test_a_replacement_that_cannot_be_built_costs_its_chunks_and_no_more(
    pool_of: Callable[..., ProcessPool], tmp_path: Path
) -> None:
    def factory() -> Answer:
        flag = tmp_path / "built"
        if flag.exists():
            raise MemoryError("no more room")
        flag.touch()
        return kill_if_client(1)()

    pool = pool_of(factory, 1)
    replies = list(pool.stream(singly(4)))
    assert [reply.has_error() for [reply] in replies] == [False, True, True, True]
    assert "MemoryError: no more room" in (replies[3][0].error.reason or "")


def test_a_grid_over_worker_processes_takes_a_crash_for_an_error_reply(
    pool_of: Callable[..., ProcessPool],
) -> None:
    grid = make_grid(pool_of(kill_if_client(2)), devices=INSTANT)
    replies = grid.send_and_receive([request(grid, client) for client in range(5)])
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False]
    assert replies[2].error.code == CRASHED
    assert replies[2].metadata.src_node_id == grid.roster[2]
