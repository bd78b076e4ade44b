"""A battery that runs low in the middle of training, in real processes: paused, ended, and gone on from in another."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.low_battery import ASKED, EPOCHS, HOLD, PER_EPOCH, REPLY, batches

ROOT = Path(__file__).parents[2]
LONGEST = 120.0
BATCHES = EPOCHS * PER_EPOCH


@dataclass
class Device:
    """A device's folder and battery, and the processes that it starts: those left over end with `over`."""

    home: Path
    over: ExitStack

    def __post_init__(self) -> None:
        self.home.mkdir()

    def charge(self, percent: float, *, plugged: bool) -> None:
        """Says how the battery stands, as whoever watches it does: by a rename."""
        fresh = self.home / "battery.new"
        fresh.write_text(json.dumps({"percent": percent, "plugged": plugged}))
        fresh.rename(self.home / "battery.json")

    def process(self, name: str, *, held: bool = False) -> tuple[subprocess.Popen[str], Path]:
        """A process that answers the request, and where its marks are."""
        marks = self.home / name
        marks.mkdir()
        if held:
            (marks / HOLD).touch()
        where = [str(self.home / "state"), str(self.home / "battery.json"), str(marks)]
        command = [sys.executable, "-m", "tests.support.low_battery", *where]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        self.over.enter_context(child)
        self.over.callback(child.kill)
        return child, marks

    def half_done(self) -> list[str]:
        """Names of the files of what it is in the middle of."""
        return [path.name for path in (self.home / "state").rglob("*.half-done*")]


def ended(child: subprocess.Popen[str], marks: Path):
    """What a process has sent, and what it wrote into its log, once it is over."""
    _, log = child.communicate(timeout=LONGEST)
    assert child.returncode == 0, log
    return json.loads((marks / REPLY).read_text()), log


def in_epoch_two(child: subprocess.Popen[str], marks: Path) -> None:
    deadline = time.monotonic() + LONGEST
    while not (marks / ASKED).exists():
        assert child.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def over() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.slow
def test_a_low_battery_pauses_training_and_another_process_comes_to_the_same_bits(tmp_path, over):
    device, calm = Device(tmp_path / "device", over), Device(tmp_path / "calm", over)
    for each in (device, calm):
        each.charge(80, plugged=False)
    undisturbed = calm.process("whole")
    child, marks = device.process("paused", held=True)
    in_epoch_two(child, marks)
    device.charge(10, plugged=False)
    (marks / HOLD).unlink()
    told, log = ended(child, marks)
    assert told == "paused: this client takes no part, and its own log says why"
    assert "battery is at 10 %" in log
    done = batches(marks)
    assert PER_EPOCH + 3 <= done < BATCHES
    assert device.half_done() == ["client-0.half-done"]

    device.charge(80, plugged=True)
    again, marks = device.process("goes on")
    reply, _ = ended(again, marks)
    plain, _ = ended(*undisturbed)
    assert reply == plain
    assert list(plain) == ["update", "metrics", "receipt"]
    assert batches(calm.home / "whole") == BATCHES
    assert batches(marks) == BATCHES - done
    assert device.half_done() == []
