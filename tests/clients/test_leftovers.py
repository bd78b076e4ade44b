"""What is half done on a device goes by its age, and never under the hands of a process that works on it."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from clients.encrypted.half_done import HalfDone as OwnersTurn
from clients.encrypted.half_done import OwnerFolder
from clients.half_done import HalfDoneFit, HalfDoneFits
from clients.leftovers import DAYS, LOCK, remove_leftovers, take_up
from clients.split.half_done import HalfDone, HalfDoneFolder
from clients.trainers.course import Point
from clients.trainers.sgd import FitJob
from tests.support.half_done import Watched

DAY = 86_400.0


def age(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def fit(folder: Path, run: str = "one", round_number: int = 2) -> HalfDoneFit:
    """Where a client's local training of a round is kept."""
    settings = {"server-round": round_number}
    job = FitJob(3, {"w": np.zeros(2, np.float32)}, {}, Watched().train(), 5, {}, settings)
    return HalfDoneFits(folder / "runs" / run / "half-done", run).of(job)


def half_done(folder: Path, run: str = "one") -> Path:
    """Half-done work of a client, written by the code that writes it."""
    fit(folder, run).save(Point({"w": torch.zeros(2)}, {"taken": 1}))
    return folder / "runs" / run / "half-done" / "client-3.half-done"


def split_turn(folder: Path) -> Path:
    shapes, nothing = {"w": (2,)}, torch.zeros(2)
    turn = HalfDone("session", 1, shapes, nothing, None, None, "00" * 32, {})
    HalfDoneFolder(folder).save(3, turn)
    return folder / "client-3.turn.safetensors"


def owners_turn(folder: Path) -> Path:
    own = OwnerFolder(folder / "encrypted", 3)
    own.save_turn(OwnersTurn("session", 1))
    return own.path / "turn-session.json"


def ciphertexts(folder: Path) -> Path:
    own = OwnerFolder(folder / "encrypted", 3)
    own.keep_ciphertexts("data", 0, {"c": np.arange(4, dtype=np.uint64)})
    return own.path / "data"


KINDS = [half_done, split_turn, owners_turn, ciphertexts]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_goes_when_it_is_older_than_it_is_kept_and_not_before(tmp_path, kind):
    path = kind(tmp_path)
    age(path, DAYS - 0.1)
    assert remove_leftovers(tmp_path) == []
    assert path.exists()
    age(path, DAYS + 0.1)
    assert remove_leftovers(tmp_path) == [path]
    assert not path.exists()


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (half_done, lambda folder: fit(folder).load()),
        (split_turn, lambda folder: HalfDoneFolder(folder).load(3, "session")),
        (owners_turn, lambda folder: OwnerFolder(folder / "encrypted", 3).turn("session")),
        (
            ciphertexts,
            lambda folder: OwnerFolder(folder / "encrypted", 3).ciphertexts("data", 0),
        ),
    ],
    ids=["fit", "split", "owner", "ciphertexts"],
)
def test_what_was_taken_up_is_kept_for_as_long_again(tmp_path, kind, read):
    path = age(kind(tmp_path), 1_000)
    assert read(tmp_path) is not None
    assert remove_leftovers(tmp_path) == []
    assert read(tmp_path) is not None
    assert path.exists()


def test_of_another_run_too_and_parts_of_a_write_that_was_cut_off(tmp_path):
    mine, other = half_done(tmp_path, "mine"), half_done(tmp_path, "other")
    part = other.with_name(f"{other.name}.4711.part")
    turn_part = tmp_path / "client-3.turn.4711.part"
    for path in (part, turn_part):
        path.write_bytes(b"torn")
    old = {age(path, 8) for path in (other, part, turn_part)}
    assert set(remove_leftovers(tmp_path)) == old
    assert mine.exists()


def test_nothing_else_is_touched_however_old_it_is(tmp_path):
    kept = [
        "client-3.spent", "client-3.spent.lock", "runs/one/client-3.safetensors",
        "runs/one/held/client-3/m.safetensors", "secagg/client-3/x", "ckks/client-3.json",
        "encrypted/client-3/owner-key-4096-36-36",
        "encrypted/client-3/owner-key-4096-36-36.told", "encrypted/client-3/party-00.json",
        "encrypted/client-3/other/ledger", "encrypted/compute/client-3/keys.safetensors",
    ]  # fmt: skip
    for name in kept:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for path in tmp_path.rglob("*"):
        age(path, 10_000)
    assert remove_leftovers(tmp_path) == []
    assert all((tmp_path / name).exists() for name in kept)
    assert not list(tmp_path.rglob(LOCK))  # nothing to do, nothing written


def test_a_folder_that_is_not_there_and_a_device_that_has_done_nothing(tmp_path):
    assert remove_leftovers(tmp_path / "none") == []
    take_up(tmp_path / "none" / "client-3.half-done")
    assert not (tmp_path / "none").exists()


def test_the_next_job_of_the_same_run_and_client_takes_the_place_of_the_last(tmp_path):
    path = half_done(tmp_path)
    assert fit(tmp_path, round_number=3).load() is None
    assert not path.exists()


def test_a_folder_in_which_somebody_takes_something_up_is_left_for_the_next_time(tmp_path):
    mine, other = age(half_done(tmp_path, "mine"), 8), age(half_done(tmp_path, "other"), 8)
    with FileLock(mine.with_name(LOCK)):
        assert remove_leftovers(tmp_path) == [other]
        os.utime(mine)  # as whoever holds the lock does
    assert remove_leftovers(tmp_path) == []
    assert mine.exists()


def test_what_is_looked_at_to_be_removed_is_not_taken_up_meanwhile(tmp_path):
    path = age(half_done(tmp_path), 8)
    before = path.stat().st_mtime_ns
    with ThreadPoolExecutor(1) as pool:
        with FileLock(path.with_name(LOCK)):
            taken = pool.submit(take_up, path)
            with pytest.raises(TimeoutError):
                taken.result(0.3)
            assert path.stat().st_mtime_ns == before
            path.unlink()
        taken.result(30)
    assert not path.exists()  # and is not made anew by the look at it


def test_a_folder_that_can_not_be_looked_through_keeps_no_other_from_it(tmp_path, caplog):
    old = age(half_done(tmp_path), 8)
    (tmp_path / "runs" / "closed").mkdir()
    closed = tmp_path / "runs" / "closed" / "half-done"
    closed.write_text("no folder")
    assert remove_leftovers(tmp_path) == [old]
    assert str(closed) in caplog.text


def test_where_there_is_nothing_nothing_is_said(tmp_path, caplog):
    assert remove_leftovers(tmp_path / "none") == []
    assert not caplog.text
