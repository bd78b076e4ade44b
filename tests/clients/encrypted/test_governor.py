"""A governor holds a tree of processes below its limit: levers in order, recovery, and an error instead of a kill."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from clients.encrypted.governor import (
    Governor,
    MemoryLimit,
    MemoryLimitError,
    StepAbandonedError,
    Tier,
)
from clients.encrypted.levers import Dial, Order

HOG = """
import sys
held = []
for line in sys.stdin:
    megabytes = int(line)
    if megabytes > 0:
        held.append(b"x" * (megabytes << 20))
    else:
        del held[megabytes:]
    print(len(held), flush=True)
"""
PATIENCE = 60.0
"""Seconds after which a test that waits for something has failed."""


class Hog:
    """A process that takes memory when it is told to."""

    def __init__(self):
        command = [sys.executable, "-S", "-c", HOG]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.process = psutil.Process(self.popen.pid)
        self.free()  # answers once it runs

    def take(self, megabytes: int) -> None:
        print(megabytes, file=self.popen.stdin, flush=True)
        assert self.popen.stdout.readline()

    def free(self, last: int = 0) -> None:
        """Everything, or the last pieces taken."""
        self.take(-last)

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def hog():
    hog = Hog()
    yield hog
    hog.end()


def limit(megabytes: float = 100, **settings) -> MemoryLimit:
    fast = {"interval": 0.01, "settle": 0.02, "quiet": 0.05, "patience": 0.2}
    return MemoryLimit(limit_mb=megabytes, **{**fast, **settings})


def until(condition, work=lambda: None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        work()
        time.sleep(0.005)


def done(governor: Governor, what: str) -> list[str]:
    return [action.lever for action in governor.actions if action.what == what]


@contextmanager
def governed(settings: MemoryLimit, hog: Hog, *levers: Dial):
    with Governor(settings, hog.process) as governor:
        for lever in levers:
            governor.register(lever)
        yield governor


def test_levers_that_cost_time_go_at_warning_in_their_order_and_no_others(hog):
    hidden = Dial("hidden", Order.HIDDEN, 64, needs_permission=True)
    workers = Dial("workers", Order.WORKERS, 4)
    chunks = Dial("chunks", Order.CHUNKS, 2)
    settings = limit(allow=("hidden",))
    with governed(settings, hog, hidden, workers, chunks) as governor:
        assert governor.check() is Tier.NORMAL
        hog.take(78)
        until(lambda: workers.value == 1, governor.check)
        until(lambda: governor.check() is Tier.WARNING)
        assert done(governor, "shed") == ["chunks", "workers", "workers"]
        assert hidden.value == 64
        assert governor.report()["shed"] == {"chunks": 1, "workers": 2}
        hog.free()
        until(lambda: len(done(governor, "restore")) == 3, governor.check)
        assert done(governor, "restore") == ["workers", "workers", "chunks"]
        assert (chunks.value, workers.value) == (2, 4)
        assert governor.report()["peak_mb"] >= 80


def test_what_changes_the_model_goes_at_critical_and_only_where_it_is_allowed(hog):
    batch = Dial("smaller batch", Order.BATCH, 8, needs_permission=True)
    hidden = Dial("smaller hidden width", Order.HIDDEN, 64, needs_permission=True)
    batch.changed = lambda value: hog.free() if value == 2 else None
    with governed(limit(allow=("smaller batch",)), hog, batch, hidden) as governor:
        hog.take(95)
        until(lambda: governor.tier is Tier.CRITICAL)  # it has been looked at
        until(lambda: governor.check() is Tier.NORMAL)
        assert done(governor, "shed") == 2 * ["smaller batch"]
        assert all(action.tier is Tier.CRITICAL for action in governor.actions)
        assert hidden.value == 64


def test_the_sampling_thread_pulls_what_any_thread_may_and_leaves_the_rest_to_the_work(hog):
    first = Dial("workers", Order.CACHE, 4)
    second = Dial("chunks", Order.CHUNKS, 4, immediate=True)
    with governed(limit(), hog, first, second) as governor:
        hog.take(85)
        until(lambda: second.value == 1)
        assert first.value == 4
        governor.check()
        until(lambda: first.value == 1, governor.check)
        hog.free()
        until(lambda: governor.tier is Tier.NORMAL)
        threading.Event().wait(0.2)  # four times as long as it must be quiet
        assert second.value == 1  # the last to go comes back first, and that needs the work
        until(lambda: second.value == 4, governor.check)


def test_work_that_is_over_the_line_waits_until_there_is_room(hog):
    with governed(limit(patience=PATIENCE), hog) as governor:
        hog.take(100)
        until(lambda: governor.tier is Tier.CRITICAL)
        room = threading.Timer(0.3, hog.free)
        begun = time.monotonic()
        room.start()
        assert governor.check() is Tier.NORMAL
        assert time.monotonic() - begun >= 0.3
        room.join()


def test_where_nothing_helps_everything_is_let_go_and_the_error_says_what_would(hog, caplog):
    let_go: list[str] = []
    chunks = Dial("chunks", Order.CHUNKS, 2)
    batch = Dial("smaller batch", Order.BATCH, 8, needs_permission=True)
    with governed(limit(), hog, chunks, batch) as governor:
        governor.on_failure(lambda: let_go.append("arrays"))
        governor.on_failure(lambda: 1 / 0)
        governor.on_failure(lambda: let_go.append("workers"))
        governor.on_failure(hog.free)
        hog.take(120)
        until(lambda: governor.tier is Tier.CRITICAL)
        with pytest.raises(MemoryLimitError, match="limit of 100 MB") as told:
            governor.check()
        assert let_go == ["workers", "arrays"]
        assert told.value.needed_mb > 120 / 0.95
        for words in (
            "shed already: chunks",
            f"at least {told.value.needed_mb}",
            "'smaller batch'",
        ):
            assert words in str(told.value)
        assert governor.used_mb < 50
        with pytest.raises(MemoryLimitError):  # whoever else is at work must stop, too
            governor.check(midway=True)
    assert hog.popen.poll() is None
    assert "ZeroDivisionError" in caplog.text
    assert "Work is let go" in caplog.text


def test_work_that_begins_when_there_is_room_again_is_let_in_and_guarded_as_before(hog):
    let_go: list[str] = []
    with governed(limit(), hog) as governor:
        governor.on_failure(lambda: let_go.append("workers"))
        for times in range(1, 3):
            hog.take(120)
            until(lambda: governor.tier is Tier.CRITICAL)
            with pytest.raises(MemoryLimitError):
                governor.check()
            assert let_go == times * ["workers"]
            with pytest.raises(MemoryLimitError):  # there is no room yet
                governor.check()
            assert let_go == times * ["workers"]
            hog.free()
            assert governor.check() is Tier.NORMAL
            assert governor.check(midway=True) is Tier.NORMAL


def test_in_the_middle_of_a_step_only_what_any_thread_may_pull_goes_at_warning(hog):
    chunks, workers = Dial("chunks", 1, 2, immediate=True), Dial("workers", 2, 2)
    with governed(limit(), hog, chunks, workers) as governor:
        hog.take(80)
        until(lambda: chunks.value == 1, lambda: governor.check(midway=True))
        until(time_is_over(0.1), lambda: governor.check(midway=True))
        assert workers.value == 2
        until(lambda: workers.value == 1, governor.check)


def test_a_step_that_does_not_fit_is_abandoned_with_one_lever_pulled_until_there_is_none(hog):
    chunks, workers = Dial("chunks", 1, 2, immediate=True), Dial("workers", 2, 4)
    with governed(limit(), hog, chunks, workers) as governor:
        governor.on_failure(hog.free)
        hog.take(95)
        until(lambda: governor.tier is Tier.CRITICAL)
        for left in (2, 1):
            with pytest.raises(StepAbandonedError, match="fit into 100 MB: workers shed"):
                governor.check(midway=True)
            assert (chunks.value, workers.value) == (1, left)
        with pytest.raises(MemoryLimitError, match="shed already: chunks, workers"):
            governor.check(midway=True)


GROWS = """
import sys, time
held = sys.stdin.readline()
held = [held]
for _ in range(3000):
    held.append(b"x" * (1 << 20))
    time.sleep(0.001)
print("has all it wants")
"""


@pytest.mark.parametrize("size", [2, 1])
def test_a_call_that_passes_the_limit_is_interrupted_and_its_step_begun_again_with_less(size):
    """Work waits for a worker that would take 3 GB; nothing but the sampling thread can end that."""
    worker = subprocess.Popen(
        [sys.executable, "-S", "-c", GROWS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = Dial("workers", Order.WORKERS, size)
    with Governor(limit(), psutil.Process(worker.pid)) as governor:
        governor.register(workers)
        governor.on_overrun(worker.kill)
        assert worker.communicate("go\n")[0] == ""
        if size == 2:
            with pytest.raises(StepAbandonedError, match="workers shed"):
                governor.check(midway=True)
            assert workers.value == 1
            assert governor.check(midway=True) is Tier.NORMAL
        else:
            with pytest.raises(MemoryLimitError, match="shed already: nothing") as told:
                governor.check(midway=True)
            assert told.value.needed_mb > 100


def test_what_passed_the_limit_between_steps_abandons_none(hog):
    ended = threading.Event()
    with governed(limit(), hog, Dial("workers", Order.WORKERS, 2)) as governor:
        governor.on_overrun(ended.set)
        hog.take(120)
        assert ended.wait(PATIENCE)
        hog.free()
        until(lambda: governor.tier is Tier.NORMAL)
        governor.check()
        assert governor.check(midway=True) is Tier.NORMAL


def test_a_lever_that_is_pulled_again_is_given_back_after_twice_the_quiet(hog):
    dial = Dial("chunks", Order.CHUNKS, 2)
    quiet = 0.2
    with governed(limit(quiet=quiet), hog, dial) as governor:
        for times in range(1, 4):
            hog.take(85)
            until(lambda: dial.value == 1, governor.check)
            calm = time.monotonic()
            hog.free()
            until(lambda: dial.value == 2, governor.check)
            assert time.monotonic() - calm >= quiet * 2 ** (times - 1)


def test_what_would_not_fit_is_not_given_back(hog):
    dial = Dial("workers", Order.WORKERS, 2, unit_mb=50)
    with governed(limit(), hog, dial) as governor:
        hog.take(50)
        hog.take(35)
        until(lambda: dial.value == 1, governor.check)
        hog.free(last=1)
        until(lambda: governor.check() is Tier.NORMAL)
        until(time_is_over(0.3), governor.check)
        assert dial.value == 1
        hog.free()
        until(lambda: dial.value == 2, governor.check)


def time_is_over(seconds: float):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_a_lever_that_breaks_does_not_end_the_watch(hog, caplog):
    def breaks(value: int) -> None:
        raise OSError("no such worker")

    with governed(limit(), hog, Dial("chunks", 1, 2, immediate=True, changed=breaks)) as governor:
        hog.take(85)
        until(lambda: "no such worker" in caplog.text)
        hog.free()
        until(lambda: governor.tier is Tier.NORMAL)


def test_without_a_limit_only_the_peak_is_taken(hog):
    dial = Dial("chunks", Order.CHUNKS, 2, immediate=True)
    with governed(MemoryLimit(interval=0.01), hog, dial) as governor:
        hog.take(50)
        until(lambda: governor.peak_mb > 50, governor.check)
        assert governor.tier is Tier.NORMAL
        assert dial.value == 2
        assert governor.report()["limit_mb"] is None


def test_each_action_is_logged_with_its_figures(hog, caplog):
    dial = Dial("chunks", Order.CHUNKS, 2)
    caplog.set_level("INFO", "clients.encrypted.governor")
    with governed(limit(), hog, dial) as governor:
        hog.take(80)
        until(lambda: dial.value == 1, governor.check)
        hog.free()
        until(lambda: dial.value == 2, governor.check)
    used = round(governor.actions[0].used_mb)
    assert f"memory: {used} of 100 MB (warning): shed chunks; now" in caplog.text
    assert "of 100 MB (normal): restored chunks; now" in caplog.text


def test_two_levers_of_one_name_are_refused(hog):
    with (
        governed(limit(), hog, Dial("chunks", 1, 2)) as governor,
        pytest.raises(ValueError, match="already"),
    ):
        governor.register(Dial("chunks", 2, 2))
