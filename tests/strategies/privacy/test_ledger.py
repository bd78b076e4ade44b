"""A charge that was acknowledged is never lost, whatever ends the process; ledgers of others are refused."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from strategies.privacy.events import GaussianRelease, LatticeRelease
from strategies.privacy.ledger import Ledger

MECHANISM = "gaussian, unit client"
ONE = GaussianRelease(1.0, 0.01, "poisson")
TWO = LatticeRelease("skellam", 100.0, 10, 20.0, 60.0, 16)


def test_charges_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, MECHANISM)
    assert not path.exists()
    ledger.charge(ONE, 1)
    ledger.charge(TWO, 2)
    ledger.charge(TWO, 2)  # the round was run again
    assert ledger.charges == [(ONE, 1), (TWO, 2), (TWO, 2)]
    again = Ledger(path, MECHANISM)
    assert again.charges == ledger.charges
    again.charge(ONE, 3)
    assert Ledger(path, MECHANISM).charges == [*ledger.charges, (ONE, 3)]
    assert path.stat().st_mode & 0o077 == 0


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, MECHANISM)
    ledger.charge(ONE, 1)
    assert ledger.charges == [(ONE, 1)]
    assert list(tmp_path.iterdir()) == []


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, MECHANISM)
    ledger.charge(ONE, 1)
    ledger.charge(TWO, 2)
    whole = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(whole) if byte == ord("\n")]
    for length in sorted({0, 1, *range(3, len(whole), 17), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(whole[:length])
        again = Ledger(path, MECHANISM)
        lines = sum(end <= length for end in ends)
        assert again.charges == ledger.charges[: max(0, lines - 1)]
        again.charge(ONE, 9)
        assert Ledger(path, MECHANISM).charges == [*again.charges]


@pytest.mark.parametrize("mechanism", ["ftrl, unit client", {"name": "gaussian"}])
def test_a_ledger_of_another_mechanism_is_refused(tmp_path: Path, mechanism: object) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, MECHANISM).charge(ONE, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="its mechanism is 'gaussian, unit client', not"):
        Ledger(path, mechanism)  # type: ignore[arg-type]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line", ["no json", "[]", '{"round": "1"}', '{"round": 1, "release": {"kind": "laplace"}}']
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, MECHANISM).charge(ONE, 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 3 of"):
        Ledger(path, MECHANISM)


def test_a_full_disk_is_said_before_the_release_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, MECHANISM)
    ledger.charge(ONE, 1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 20):  # nothing more, or a piece of a line, can be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
        try:
            with pytest.raises(OSError, match=r"too large|could be written"):
                ledger.charge(ONE, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert ledger.charges == [(ONE, 1)]
    ledger.charge(ONE, 2)
    assert Ledger(path, MECHANISM).charges == [(ONE, 1), (ONE, 2)]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Ledger(tmp_path / "missing" / "ledger.jsonl", MECHANISM).charge(ONE, 1)


# ---- checkpoints ----


@pytest.mark.parametrize("plain", [True, False])
def test_the_longer_of_file_and_checkpoint_counts(tmp_path: Path, plain: bool) -> None:
    path = tmp_path / "ledger.jsonl"
    full = Ledger(None, MECHANISM)
    for number in range(4):
        full.charge(ONE, number)
    remembered = full.to_json() if plain else full.charges
    for kept in range(6):
        path.unlink(missing_ok=True)
        ledger = Ledger(path, MECHANISM)
        for number in range(kept):
            ledger.charge(ONE, number)
        ledger.take_up(remembered)
        assert len(ledger.charges) == max(kept, 4)
        assert Ledger(path, MECHANISM).charges == ledger.charges


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, MECHANISM)
    ledger.charge(ONE, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="of two runs"):
        ledger.take_up([(TWO, 1), (TWO, 2)])
    assert path.read_bytes() == before


# ---- kill -9 ----

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from strategies.privacy.events import GaussianRelease
from strategies.privacy.ledger import Ledger

path, draw = Path(sys.argv[1]), random.Random(1)
one = GaussianRelease(1.0, 0.01, "poisson")
for kill in range(30):
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        ledger = Ledger(path, "gaussian, unit client")
        number = len(ledger.charges)
        while True:
            ledger.charge(one, number)
            os.write(send, b"%d\\n" % number)  # the release
            number += 1
    os.close(send)
    with os.fdopen(receive, "rb") as acknowledged:
        acknowledged.readline()
        time.sleep(draw.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rest = acknowledged.read().splitlines()
    released = int(rest[-1]) + 1 if rest else None
    charged = [number for _, number in Ledger(path, "gaussian, unit client").charges]
    assert charged == list(range(len(charged))), charged
    assert released is None or released <= len(charged) <= released + 1, (released, len(charged))
print(len(charged))
"""


def test_no_acknowledged_charge_is_lost_to_a_kill(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "ledger.jsonl")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30
