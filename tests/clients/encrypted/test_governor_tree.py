"""A tree of real processes on ciphertexts, held below 400 MB: levers in order, recovery, and no way out."""

import json
import logging
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from clients.encrypted.governor import Governor, MemoryLimit, MemoryLimitError
from clients.encrypted.levers import Dial, Order
from clients.encrypted.memory import BatchKey, CiphertextCache, StoredCiphertexts

LIMIT = 400.0
PATIENCE = 90.0
"""Seconds after which the work has failed."""
OWNER = "0123456789abcdef"
HOLDS = 'import sys; held = b"x" * (int(sys.argv[1]) << 20); print(flush=True); sys.stdin.read()'
BATCHES = 4


class Processes:
    """Processes that hold memory: workers, and whatever else runs in the tree."""

    def __init__(self, megabytes: int) -> None:
        self._command = [sys.executable, "-S", "-c", HOLDS, str(megabytes)]
        self._running: list[subprocess.Popen[bytes]] = []

    def become(self, number: int) -> None:
        while len(self._running) < number:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen(self._command, **pipes)
            process.stdout.readline()  # it holds its memory by then
            self._running.append(process)
        while len(self._running) > number:
            process = self._running.pop()
            process.kill()
            process.communicate()


class Work:
    """64 MB of ciphertexts in memory, 48 MB of chunks in flight, three workers of 20 MB, and pressure on it."""

    def __init__(self, folder: Path, quiet: float, allow: tuple[str, ...] = ()) -> None:
        self.cache = CiphertextCache(folder, budget_mb=80)
        random = np.random.default_rng(0)
        self.residues = random.integers(0, 2**60, (128, 2, 2, 4096), np.uint64)  # 16 MB
        for number in range(BATCHES):
            self.cache.put(BatchKey(OWNER, number), self.residues)
        self.chunks: list[np.ndarray] = []
        self.workers, self.pressure, self.pressing = Processes(20), Processes(10), 0
        settings = {"interval": 0.02, "settle": 0.1, "quiet": quiet, "patience": 0.3}
        self.governor = Governor(MemoryLimit(limit_mb=LIMIT, allow=allow, **settings))
        self.batch = Dial("smaller batch", Order.BATCH, 4, needs_permission=True)
        self.batch.changed = lambda number: self.press(2 * number)
        for lever in (
            self.batch,
            Dial("fewer workers", Order.WORKERS, 3, unit_mb=30, changed=self.workers.become),
            Dial("smaller hidden width", Order.HIDDEN, 32, needs_permission=True),
            self.cache,
            Dial("smaller chunks", Order.CHUNKS, 48, 12, unit_mb=1.2, changed=self.hold),
        ):
            self.governor.register(lever)
        self.governor.on_failure(self.let_go)
        self.hold(48)
        self.workers.become(3)

    def hold(self, megabytes: int) -> None:
        self.chunks = [np.ones(2**14) for _ in range(8 * megabytes)]  # blocks of glibc's heap

    def press(self, number: int) -> None:
        self.pressing = number
        self.pressure.become(number)

    def let_go(self) -> None:
        self.cache.close()
        self.hold(0)
        self.workers.become(0)
        self.press(0)

    def until(self, condition, press: bool = False) -> None:
        """Works on: reads what is stored, checks, and presses a little more each time."""
        deadline, reader = time.monotonic() + PATIENCE, StoredCiphertexts(self.cache.folder)
        while not condition():
            assert time.monotonic() < deadline, self.governor.actions
            number = self.pressing % BATCHES
            read = reader.columns(BatchKey(OWNER, number), 1, 1024, 2048)
            assert np.array_equal(read, self.residues[:, :, 1, 1024:2048])
            self.governor.check()
            if press and self.governor.used_mb < 0.8 * LIMIT:
                self.press(self.pressing + 1)

    def story(self) -> list[str]:
        return [f"{action.what} {action.lever}".strip() for action in self.governor.actions]


def _shed_and_recover(folder: Path) -> dict[str, object]:
    work = Work(folder, quiet=0.5)
    with work.governor as governor:
        started = governor.check()
        work.until(lambda: len(governor.actions) >= 4, press=True)
        shed = work.story()
        figures = [(action.used_mb, action.limit_mb) for action in governor.actions]
        kept = work.cache.kept_mb
        work.press(0)
        work.until(lambda: len(governor.actions) >= 8)
        told = {
            "started": started.name,
            "shed": shed,
            "figures": figures,
            "kept": kept,
            "restored": work.story()[4:],
            "kept again": work.cache.kept_mb,
            "calm": governor.used_mb,
            "peak": governor.peak_mb,
        }
    work.let_go()
    return told


def _never_enough(folder: Path) -> dict[str, object]:
    work = Work(folder, quiet=1000)
    with work.governor as governor:
        try:
            while True:
                work.press(work.pressing + 1)
                governor.check()
        except MemoryLimitError as error:
            return {
                "error": str(error),
                "needed": error.needed_mb,
                "story": work.story(),
                "peak": governor.peak_mb,
                "left": governor.used_mb,
            }


def _allowed(folder: Path) -> dict[str, object]:
    work = Work(folder, quiet=1000, allow=("smaller batch",))
    with work.governor as governor:
        while work.batch.value == 4:
            work.press(work.pressing + 1)
            governor.check()
        told = {"story": work.story(), "tier": governor.actions[-1].tier.name}
        told["used"] = governor.used_mb
    work.let_go()
    return told


def _run(connection, work, folder: Path) -> None:
    logging.basicConfig(level="INFO")
    connection.send(json.dumps(work(folder)))
    connection.close()


def outcome(work, folder: Path) -> dict[str, object]:
    """What the work tells, done in a process of its own, which must come to its own end."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run, args=(theirs, work, folder))
    process.start()
    theirs.close()
    told = json.loads(ours.recv())
    ours.close()
    process.join(PATIENCE)
    assert process.exitcode == 0  # neither killed nor broken
    process.close()
    return told


SHED = [
    "shed cached ciphertexts",
    "shed smaller chunks",
    "shed smaller chunks",
    "shed fewer workers",
]


def test_levers_act_in_order_below_the_limit_and_all_comes_back(tmp_path):
    told = outcome(_shed_and_recover, tmp_path)
    assert told["started"] == "NORMAL"
    assert told["shed"] == SHED
    assert all(used >= 0.8 * LIMIT == 0.8 * limit for used, limit in told["figures"])
    assert told["kept"] == 0
    assert told["restored"] == [line.replace("shed", "restore") for line in reversed(SHED)]
    assert told["kept again"] > 64
    assert told["calm"] < 0.8 * LIMIT
    assert told["peak"] < LIMIT


def test_a_limit_that_cannot_be_met_ends_the_work_and_not_the_process(tmp_path):
    told = outcome(_never_enough, tmp_path)
    assert told["story"] == [*SHED, "give up"]
    assert "memory limit of 400 MB" in told["error"]
    assert f"raise limit_mb to at least {told['needed']}" in told["error"]
    assert "or allow 'smaller batch' or 'smaller hidden width'" in told["error"]
    assert told["needed"] >= LIMIT
    assert told["peak"] < 1.1 * LIMIT
    assert told["left"] < 0.5 * LIMIT


def test_a_smaller_batch_is_taken_at_critical_where_it_is_allowed(tmp_path):
    told = outcome(_allowed, tmp_path)
    assert told["story"] == [*SHED, "shed smaller batch"]
    assert told["tier"] == "CRITICAL"
    assert told["used"] < 0.95 * LIMIT
