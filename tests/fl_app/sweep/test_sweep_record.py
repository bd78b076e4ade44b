"""sweep.json: what becomes of a job's entry, whoever writes at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from fl_app.config.faults import ConfigError
from fl_app.sweep.record import NAME, Record, read_record


def statuses(folder: Path) -> dict[str, str]:
    return {name: entry.status for name, entry in read_record(folder / NAME).items()}


def test_two_sweeps_into_one_folder_are_merged(tmp_path: Path) -> None:
    first, second = Record(tmp_path), Record(tmp_path)
    first.announce({"a": ("seed=1",), "b": ("seed=2",)})
    second.announce({"c": ("seed=3",)})
    first.note("a", ("seed=1",), "completed", "", 1.23456)
    second.note("c", ("seed=3",), "failed", "a line\nanother")
    entries = read_record(first.path)
    assert statuses(tmp_path) == {"a": "completed", "b": "waiting", "c": "failed"}
    assert (entries["a"].seconds, entries["a"].overrides) == (1.235, ("seed=1",))
    assert entries["c"].reason == "a line\nanother"
    assert entries["a"].sweep != entries["c"].sweep


def test_an_entry_that_another_sweep_works_on_is_left(tmp_path: Path) -> None:
    Record(tmp_path).note("a", ("seed=1",), "running")
    Record(tmp_path).announce({"a": ("seed=1",), "b": ()})
    assert statuses(tmp_path) == {"a": "running", "b": "waiting"}


def test_what_a_complete_job_took_is_kept(tmp_path: Path) -> None:
    Record(tmp_path).note("a", (), "completed", "", 5.0)
    Record(tmp_path).note("a", (), "completed")
    assert read_record(tmp_path / NAME)["a"].seconds == 5.0


def _write_many(folder: Path, name: str) -> None:
    record = Record(folder)
    for number in range(20):
        record.note(f"{name}{number}", (), "completed")


def test_nothing_is_lost_when_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_many, args=(tmp_path, name), daemon=True) for name in "xyz"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len(statuses(tmp_path)) == 60


def test_letters_that_are_none_can_be_written(tmp_path: Path) -> None:
    Record(tmp_path).note("a", ("output_dir=/\udcff",), "failed", "\udcff")
    assert read_record(tmp_path / NAME)["a"].overrides == ("output_dir=/\\udcff",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "the file"),
        (b'{"format": "other", "jobs": []}', "format"),
        (b'{"jobs": [{"folder": "../x", "overrides": [], "status": "failed", "sweep": ""}]}', "jobs.0.folder"),
        (b'{"jobs": [{"folder": "x", "overrides": [], "status": "odd", "sweep": ""}]}', "jobs.0.status"),
        (b"\xff" * 10, "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_record_is_refused_and_left(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ConfigError, match="is no record of a sweep") as caught:
        Record(tmp_path)
    assert said in str(caught.value)
    assert (tmp_path / NAME).read_bytes() == content


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        Record(tmp_path / "file" / "runs")


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    Record(tmp_path).announce({"a": ("seed=1",)})
    content = json.loads((tmp_path / NAME).read_text())
    assert content["format"] == "trellis-sweep-1"
    assert content["jobs"][0]["folder"] == "a"


def test_a_pipe_in_the_place_of_a_record_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sweep.json")
    with pytest.raises(ValueError, match="no regular file"):
        read_record(tmp_path / "sweep.json")
