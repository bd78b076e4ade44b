"""What a limit says of a figure, what a dial gives back, what a process takes: what a governor goes by."""

import pickle
import subprocess
import sys

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.encrypted.footprint import tree_mb, trim
from clients.encrypted.governor import MemoryLimit, MemoryLimitError, Tier, require
from clients.encrypted.levers import Dial, Order


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
