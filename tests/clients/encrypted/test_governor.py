"""A governor holds a tree of processes below its limit: levers in order, recovery, and an error instead of a kill."""

import pickle
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.encrypted.footprint import tree_mb, trim
from clients.encrypted.governor import Governor, MemoryLimit, MemoryLimitError, Tier, require
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


@given(used=st.lists(st.floats(0, 200), min_size=1, max_size=20), hysteresis=st.floats(0.001, 0.3))
def test_a_tier_is_entered_at_its_line_and_left_below_the_hysteresis(used, hysteresis):
    settings = MemoryLimit(limit_mb=100, hysteresis=hysteresis)
    tier = Tier.NORMAL
    for figure in used:
        before, tier = tier, settings.tier(figure, tier)
        for line, reached in ((80, Tier.WARNING), (95, Tier.CRITICAL)):
            if figure >= line:
                assert tier >= reached
            elif before < reached or figure < line - 100 * hysteresis - 1e-6:
                assert tier < reached
            elif figure > line - 100 * hysteresis + 1e-6:
                assert tier >= reached


@given(start=st.integers(1, 1000), least=st.integers(1, 1000), steps=st.integers(0, 15))
def test_a_dial_gives_back_what_it_took(start, least, steps):
    told: list[int] = []
    dial = Dial("any", Order.CHUNKS, start, least=least, unit_mb=2.0, changed=told.append)
    values = [start]
    for _ in range(steps):
        if dial.shed():
            assert dial.value == max(least, values[-1] // 2)
            assert dial.returns_mb == 2.0 * (values[-1] - dial.value)
            values.append(dial.value)
        else:
            assert values[-1] <= least
    downwards = values[1:]
    for value in reversed(values[:-1]):
        assert dial.restore()
        assert dial.value == value
    assert not dial.restore()
    assert told == downwards + values[-2::-1]


@pytest.mark.parametrize(
    "wrong", [{"warning": 0.96}, {"hysteresis": 0.8}, {"limit_mb": 0.0}, {"interval": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="MemoryLimit"):
        MemoryLimit(**wrong)


def test_work_that_cannot_fit_is_refused_before_it_begins():
    require(400, 379, "")
    require(None, 1e9, "")
    with pytest.raises(
        MemoryLimitError, match=r"limit of 400 MB.*take 381 MB.*at least 402.*"
    ) as told:
        require(400, 381, "A batch of 256 takes 300 MB.")
    assert "A batch of 256 takes 300 MB." in str(told.value)
    assert (told.value.limit_mb, told.value.needed_mb) == (400, 402)
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)
    require(told.value.needed_mb, 381, "")


@given(st.floats(1, 1e6))
def test_the_limit_that_an_error_names_would_do(estimate):
    with pytest.raises(MemoryLimitError) as told:
        require(estimate / 2, estimate, "")
    require(told.value.needed_mb, estimate, "")


MAPS = """
import mmap, subprocess, sys
file, more = open("shared"), sys.argv[1:]
pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
pages[::mmap.PAGESIZE]
print(flush=True)
if more:
    subprocess.Popen([sys.executable, "-S", "maps.py", *more[1:]])
sys.stdin.read()
"""


def test_children_count_and_what_they_share_counts_once(tmp_path):
    (tmp_path / "shared").write_bytes(bytes(60 << 20))
    (tmp_path / "maps.py").write_text(MAPS)
    root = subprocess.Popen(
        [sys.executable, "-S", "maps.py", "and", "two more"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process = psutil.Process(root.pid)
    for _ in range(3):
        assert root.stdout.readline()
    family = [process, *process.children(recursive=True)]
    assert len(family) == 3
    assert 60 < tree_mb(process) < 100
    assert sum(each.memory_info().rss for each in family) > 180 << 20
    for each in reversed(family):
        each.kill()
    root.communicate()
    assert tree_mb(process) == 0


def test_freed_memory_goes_back_when_it_is_trimmed():
    blocks = [np.ones(2**13) for _ in range(1600)]  # 100 MB in blocks below any threshold
    last = blocks[-1]  # holds the heap's end
    full = tree_mb(psutil.Process())
    del blocks
    trim()
    assert full - tree_mb(psutil.Process()) > 80
    assert last[0] == 1


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
        with pytest.raises(MemoryLimitError):  # whoever else works must stop, too
            governor.check()
    assert hog.popen.poll() is None
    assert "ZeroDivisionError" in caplog.text
    assert "Work is let go" in caplog.text


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
