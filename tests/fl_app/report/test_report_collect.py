"""What is found below a folder: every run once, and every other one with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import write_run

from fl_app.config.faults import ConfigError
from fl_app.report.collect import LeftOut, collect
from fl_app.sweep.record import Record

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join(9 * ['*' + old])}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def left(root: Path) -> dict[str, tuple[str, str]]:
    return {item.name: (item.status, item.reason) for item in collect(root).left_out}


def test_runs_are_found_at_any_depth(tmp_path: Path) -> None:
    write_run(tmp_path / "b", [0.5, 0.75], seed=1, client__lr=0.2)
    write_run(tmp_path / "a" / "deep" / "er", [0.25])
    write_run(tmp_path / "itself" / "run", seed=7)
    found = collect(tmp_path)
    assert [run.name for run in found.runs] == ["a/deep/er", "b", "itself/run"]
    run = found.runs[1]
    assert run.final == {"loss": 0.25, "accuracy": 0.75}
    assert [(number, row["accuracy"]) for number, row in run.history] == [(1, 0.5), (2, 0.75)]
    assert (run.upload_bytes, run.download_bytes, run.seconds) == (2000, 4000, 1.5)
    config = {key: run.config[key] for key in ("task", "client", "client.lr", "attack", "travel", "seed")}  # fmt: skip
    assert config == {
        "task": "digits", "client": "SGD", "client.lr": 0.2, "attack": None, "travel": '["*"]', "seed": 1
    }  # fmt: skip
    assert found.left_out == ()
    assert [run.name for run in collect(tmp_path / "b").runs] == ["."]


def test_runs_that_did_not_complete_are_listed_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "failed", status="failed", reason="ValueError:\n  too\x1b[31m bad")
    write_run(tmp_path / "stopped", status="stopped", reason="interrupted", seed=1)
    write_run(tmp_path / "running", status="running", seed=2)
    assert left(tmp_path) == {
        "failed": ("failed", "ValueError: too\\x1b[31m bad"),
        "stopped": ("stopped", "interrupted"),
        "running": (
            "running",
            "it has not ended, or was killed before it could say so; 2 rounds are there",
        ),
    }


def test_a_sweep_tells_of_jobs_that_left_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "done")
    write_run(tmp_path / "killed", status="running", seed=1)
    record = Record(tmp_path)
    record.announce(dict.fromkeys(("waits", "begun"), ()))
    record.note("begun", (), "running")
    record.note("refused", (), "failed", "out of clients")
    record.note("killed", (), "failed", "killed by signal 9")
    record.note("done", (), "failed", "an earlier try")
    record.note("removed", (), "completed")
    record.note("silent", (), "stopped")
    assert left(tmp_path) == {
        "waits": ("waiting", "its sweep has not started it"),
        "begun": ("running", "it has not written a summary yet"),
        "refused": ("failed", "out of clients"),
        "killed": ("failed", "killed by signal 9"),
        "removed": ("completed", "its summary is gone"),
        "silent": ("stopped", "it left no summary"),
    }
    assert [run.name for run in collect(tmp_path).runs] == ["done"]


def test_the_same_run_twice_is_one_figure(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run")
    write_run(tmp_path / "b" / "run", output_dir="elsewhere", run_name="other")
    write_run(tmp_path / "c" / "run", [0.5])
    assert [run.name for run in collect(tmp_path).runs] == ["a/run", "c/run"]
    assert left(tmp_path) == {
        "b/run": ("duplicate", "the same configuration as a/run, counted there")
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: "", "Invalid JSON"),
        (lambda text: '{"summary": "of something else"}', "status: Field required"),
        (lambda text: "[1, 2]", "Input should be an object"),
        (lambda text: text.replace('"completed"', '"done"'), "status: Input should be"),
        (lambda text: text.replace('"seed": 0', '"seed": -1'), "seed: Input should be"),
        (lambda text: text.replace('"seed": 0', '"seed": "0"'), "seed: Input should be"),
        (lambda text: text.replace('"wall_seconds": 1.5', '"wall_seconds": NaN'), "wall_seconds"),
        (lambda text: "[" * 200_000, "Invalid JSON"),
    ],
)
def test_a_summary_that_is_none_is_listed_as_unreadable(
    tmp_path: Path, change: Any, said: str
) -> None:
    summary = write_run(tmp_path / "run") / "summary.json"
    summary.write_text(change(summary.read_text()))
    ((status, reason),) = left(tmp_path).values()
    assert status == "unreadable"
    assert said in reason


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no config.yaml"),
        ("a: [", "config.yaml can't be read"),
        ("just a text", "config.yaml holds no keys"),
        ("a: &a {b: *a}", "is deeper than"),
        ("x: " + "[" * 100, "config.yaml can't be read"),
        ("\n".join(f"k{number}: 1" for number in range(3000)), "has over 2000 keys"),
        ("x: '" + "y" * 300_000 + "'", "config.yaml is larger than 256 kB"),
        (BOMB, "has over 2000 keys"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_none_makes_the_run_unreadable(
    tmp_path: Path, content: str | None, said: str
) -> None:
    config = write_run(tmp_path / "run") / "config.yaml"
    config.unlink()
    if content is not None:
        config.write_text(content)
    ((status, reason),) = left(tmp_path).values()
    assert status == "unreadable"
    assert said in reason


def test_a_record_that_is_none_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "sweep.json").write_text("{")
    assert left(tmp_path)["sweep.json"][0] == "unreadable"


def test_a_pipe_in_the_place_of_a_summary_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "summary.json")
    assert left(tmp_path) == {"run": ("unreadable", "there is no summary.json")}


def test_an_empty_folder_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        collect(tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        collect(tmp_path / "nowhere")


def test_figures_that_are_none_are_passed_over(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "run") / "summary.json"
    content = json.loads(summary.read_text())
    content["final"] = {"a": 1, "b": None, "c": True, "d": "x", "e": 1e300, "f": {"g": 1}, "h": 10**400}  # fmt: skip
    content["history"] += [{"round": "x"}, {"round": True}, {"no": 1}, {"round": 10**30}]
    summary.write_text(json.dumps(content))
    (run,) = collect(tmp_path).runs
    assert run.final == {"a": 1.0}
    assert [number for number, _ in run.history] == [1, 2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(
    changes=st.dictionaries(
        st.sampled_from(["status", "reason", "strategy", "task", "seed", "final", "history", "totals"]),
        json_values,
        max_size=3,
    )
)  # fmt: skip
def test_whatever_a_summary_holds_it_is_a_run_or_left_out(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = write_run(tmp_path_factory.mktemp("any") / "run")
    summary = folder / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | changes))
    found = collect(folder.parent)
    assert len(found.runs) + len(found.left_out) == 1
    for item in found.left_out:
        assert isinstance(item, LeftOut)
        assert item.reason.isprintable()
