"""Checkpoints as files: whole or skipped, whatever is done to them; pruned, held back, and out of room."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import save

from fl_app.services.checkpoint import CheckpointError, Checkpoints, dump, read
from fl_app.services.files import remove_leftovers, write_atomically
from strategies.hooks import RoundView
from tests.support.examples import many

STATE = {
    "strategy": {"model": {"version": 3, "vectors": {"delta": np.linspace(0, 1, 7)}}},
    "run_id": "a1b2",
    "names": "naïve ✓",
    "counts": np.arange(5, dtype=np.int64),
    "nothing": None,
    "flag": True,
}
DATA = dump(STATE)


def view(number: int) -> RoundView:
    return RoundView(number, None, 0.0, 0.0, 0, 0, 0, 0, 0, False)


def same(one, other) -> bool:
    """Equality of states, bit for bit, types included."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(
            same(one[key], other[key]) for key in one
        )  # fmt: skip
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and (
            (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        )
    return type(one) is type(other) and one == other


class Run:
    """A state that changes in place with each round, as a model's does."""

    def __init__(self, folder: Path, size: int = 100, **settings) -> None:
        self.vector = np.zeros(size)
        self.checkpoints = Checkpoints(folder, state=lambda: {"vector": self.vector}, **settings)

    def rounds(self, *numbers: int) -> None:
        for number in numbers:
            self.vector += 1
            self.checkpoints(view(number))

    @property
    def there(self) -> list[int]:
        return sorted(int(name[8:16]) for name in self.checkpoints.names)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "version-00000003.safetensors"


def test_what_was_written_is_read_bit_for_bit(place):
    place.write_bytes(DATA)
    assert same(read(place), STATE)


@settings(max_examples=many(300))
@given(length=st.integers(0, len(DATA) - 1))
def test_a_file_that_is_cut_off_anywhere_is_torn(place, length):
    place.write_bytes(DATA[:length])
    with pytest.raises((ValueError, OSError, SafetensorError)):
        read(place)


@settings(max_examples=many(500))
@given(bit=st.integers(0, 8 * len(DATA) - 1))
def test_one_bit_that_has_changed_is_seen_or_changes_nothing(place, bit):
    data = bytearray(DATA)
    data[bit // 8] ^= 1 << bit % 8
    place.write_bytes(data)
    try:
        found = read(place)
    except (ValueError, OSError, SafetensorError):
        return
    assert same(found, STATE)


@settings(max_examples=many(100))
@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_checkpoint(place, data):
    place.write_bytes(data)
    with pytest.raises((ValueError, OSError, SafetensorError)):
        read(place)


FOREIGN = {
    "torn": DATA[:-1],
    "empty": b"",
    "another format": DATA.replace(b"trellis-checkpoint-1", b"trellis-checkpoint-9"),
    "a model": save({"weight": np.zeros(3, np.float32)}),
    "text": b"nothing to see here",
    "of another round": dump({**STATE, "round": 7}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_whole_checkpoint_is_named_and_the_next_older_one_is_taken(
    tmp_path, caplog, name
):
    run = Run(tmp_path)
    run.rounds(1, 2)
    (tmp_path / "version-00000003.safetensors").write_bytes(FOREIGN[name])
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert (found.round, found.path.name) == (2, "version-00000002.safetensors")
    assert found.age < 60
    np.testing.assert_array_equal(found.state["vector"], np.full(100, 2.0))
    assert "version-00000003.safetensors is skipped" in caplog.text


def test_other_files_in_the_folder_are_nobodys_business(tmp_path):
    run = Run(tmp_path, keep=1)
    for name in ("version-3.txt", "version-x.safetensors", "notes"):
        (tmp_path / name).write_text("mine")
    run.rounds(1, 2)
    assert run.there == [2]
    assert {path.name for path in tmp_path.iterdir()} == {
        "version-3.txt", "version-x.safetensors", "notes", "version-00000002.safetensors",
    }  # fmt: skip


def test_torn_ones_do_not_count_among_those_that_are_kept(tmp_path):
    """Pruned by their names alone, the only whole one would go."""
    run = Run(tmp_path)
    run.rounds(1, 2, 3)
    assert run.there == [2, 3]
    shutil.copy(
        tmp_path / "version-00000002.safetensors", tmp_path / "version-00000001.safetensors"
    )
    newest = tmp_path / "version-00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = Run(tmp_path)
    found = again.checkpoints.newest()
    again.checkpoints.take_up(found)
    assert found.round == 2
    torn = tmp_path / "version-00000005.safetensors"
    torn.write_bytes(b"torn")
    again.rounds(3)
    assert again.there == [2, 3, 5]  # what this process has not come to stays
    again.rounds(4)
    assert again.there == [3, 4, 5]
    again.rounds(5)
    assert again.there == [4, 5]


def test_a_process_that_looks_at_nothing_first_prunes_by_what_is_whole_all_the_same(tmp_path):
    Run(tmp_path, keep=5).rounds(1, 2, 3)
    newest = tmp_path / "version-00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    run = Run(tmp_path)
    run.rounds(4)
    assert run.there == [2, 4]


@settings(max_examples=60)
@given(every=st.integers(0, 4), keep=st.integers(1, 4), last=st.integers(1, 12), data=st.data())
def test_whatever_the_interval_the_newest_state_is_there_once_a_run_has_ended(
    tmp_path_factory, every, keep, last, data
):
    folder = tmp_path_factory.mktemp("run")
    stopped = data.draw(st.integers(1, last))
    run = Run(folder, every=every, keep=keep, last=last)
    run.rounds(*range(1, stopped + 1))
    due = [n for n in range(1, stopped + 1) if n == last or (every and n % every == 0)]
    assert run.there == due[-keep:]
    run.checkpoints.settle()
    assert run.there == sorted({*due, stopped})[-keep:]
    found = Checkpoints(folder).newest()
    np.testing.assert_array_equal(found.state["vector"], np.full(100, float(stopped)))
    run.checkpoints.settle()  # there is nothing left to be saved
    assert run.there == sorted({*due, stopped})[-keep:]


def test_what_is_noted_of_kept_ones_follows_them_through_a_restart(tmp_path):
    noted = {"noted": lambda state: state["vector"][0], "keep": 3, "every": 2}
    run = Run(tmp_path, **noted)
    run.rounds(*range(1, 10))
    assert run.checkpoints.kept == {4: 4.0, 6: 6.0, 8: 8.0}
    again = Run(tmp_path, **noted)
    again.checkpoints.take_up(again.checkpoints.newest())
    assert again.checkpoints.kept == {4: 4.0, 6: 6.0, 8: 8.0}


def test_leftovers_of_killed_writers_go_and_nothing_else_does(tmp_path):
    write_atomically(tmp_path / "summary.json", b"{}")
    (tmp_path / ".summary.json.12345.part").write_bytes(b"half")
    (tmp_path / ".lock").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "summary.json"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte; None where this process may not mount any."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may mount nothing")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_older_checkpoints_first(small_disk):
    """Each takes 0.3 MB of 1 MB, and a new one is written beside those that are kept."""
    run = Run(small_disk / "checkpoints", size=37_500, keep=3)
    run.rounds(1, 2, 3)
    assert run.there == [1, 2, 3]
    run.rounds(4)
    assert run.there == [3, 4]


def test_a_checkpoint_for_which_there_is_no_room_leaves_the_one_before_and_says_what_is_lacking(
    small_disk,
):
    run = Run(small_disk / "checkpoints", size=37_500)
    (small_disk / "other").write_bytes(bytes(600_000))
    run.rounds(5)
    with pytest.raises(CheckpointError) as refused:
        run.rounds(6)
    told = str(refused.value)
    assert "checkpoint of round 6 can't be written" in told
    assert "No space left on device; it takes 0.3 MB, and 0.1" in told
    assert "goes on after round 5" in told
    assert run.there == [5]
    assert not list(small_disk.rglob("*.part"))
    found = Checkpoints(small_disk / "checkpoints").newest()
    np.testing.assert_array_equal(found.state["vector"], np.full(37_500, 1.0))
    (small_disk / "other").unlink()
    run.rounds(7)
    assert run.there == [5, 7]
