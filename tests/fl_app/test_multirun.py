"""`trellis run -m` as a user meets it: what it prints, leaves and returns, and how it can be stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fl_app.cli.main import main
from fl_app.config.schema import Config
from fl_app.folder import RunFolder
from fl_app.sweep import record
from fl_app.sweep.plan import plan

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["task=digits", "num_clients=2", "model=linear", "evaluate.every=1"]


def entries(folder: Path) -> dict[str, dict]:
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    return {job["folder"]: job for job in jobs}


def config_of(folder: Path, *overrides: str) -> Config:
    return plan([*SMALL, *overrides, f"output_dir={folder}"]).jobs[0].config


def test_a_sweep_runs_every_combination_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-m", *SMALL, "rounds=1", f"output_dir={tmp_path}", "seed=1,2"]
    assert main(command) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"2 jobs, in {tmp_path}"
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["1/2", "seed=1", "accuracy"],
        ["2/2", "seed=2", "accuracy"],
    ]
    assert lines[3:] == [
        "2 of 2 completed",
        f"trellis report {tmp_path}",
        str(tmp_path / "sweep.json"),
    ]
    there = entries(tmp_path)
    assert {job["status"] for job in there.values()} == {"completed"}
    summaries = {name: tmp_path / name / "summary.json" for name in there}
    assert {json.loads(path.read_text())["seed"] for path in summaries.values()} == {1, 2}

    # Again, and with one more: what is complete is left, what is new is added, also two at a time.
    before = {path: path.read_bytes() for path in summaries.values()}
    assert main([*command[:-1], "seed=1,2,3", "--jobs", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"3 jobs, 2 at a time, in {tmp_path}"
    assert [line.endswith("was there already") for line in lines[1:4]] == [True, True, False]
    assert before == {path: path.read_bytes() for path in summaries.values()}
    assert len(entries(tmp_path)) == 3
    assert all(entries(tmp_path)[name] == there[name] for name in there)


def test_a_dry_run_lists_the_jobs_and_makes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-m", *SMALL, f"output_dir={tmp_path}", "seed=1,2", "--dry-run"]
    assert main(command) == 0
    output, errors = capfd.readouterr()
    folders = [config_of(tmp_path, f"seed={seed}").run_dir for seed in (1, 2)]
    assert output.splitlines() == [f"1/2  seed=1  {folders[0]}", f"2/2  seed=2  {folders[1]}"]
    assert (errors, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=1,2", "client.lr=0.1,-1"], "[job 2: seed=1 client.lr=-1; job 4: "),
        (["server=sgd,scaffold"], "cannot be composed with"),
        (["seed=1", "--jobs", "0"], "--jobs = 0  must be a whole number of at least 1"),
    ],
)
def test_one_wrong_job_starts_none(
    arguments: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", *SMALL, f"output_dir={tmp_path / 'runs'}", *arguments]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert said in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "2"], "--jobs is for a sweep: add -m"),
        (["-m", "--jobs", "two"], "invalid int value: 'two'"),
    ],
)
def test_a_wrong_option_ends_with_code_2(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", *arguments])
    assert said in capfd.readouterr().err


def test_a_job_that_fails_does_not_stop_the_rest_and_is_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-m", *SMALL, "rounds=1", f"output_dir={tmp_path}", "seed=1,2"]
    blocked = config_of(tmp_path, "rounds=1", "seed=1").run_dir
    (blocked / "partition.png").mkdir(parents=True)  # in the way of a file
    assert main(command) == 1
    lines = capfd.readouterr().out.splitlines()
    assert "failed: IsADirectoryError" in lines[1]
    assert str(blocked / "output.log") in lines[1]
    assert lines[3] == "1 of 2 completed, 1 failed"
    assert entries(tmp_path)[blocked.name]["status"] == "failed"
    assert "IsADirectoryError" in entries(tmp_path)[blocked.name]["reason"]
    (blocked / "partition.png").rmdir()
    assert main(command) == 0
    assert entries(tmp_path)[blocked.name]["status"] == "completed"


def test_a_job_that_another_process_runs_is_left_to_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, "rounds=1", "seed=1")
    with RunFolder(config).opened():
        command = ["run", "-m", *SMALL, "rounds=1", f"output_dir={tmp_path}", "seed=1,2"]
        assert main(command) == 1
    assert "another process is running there" in capfd.readouterr().out.splitlines()[1]
    assert list(entries(tmp_path)) == [config_of(tmp_path, "rounds=1", "seed=2").folder_name]


def test_a_record_that_cannot_be_written_does_not_cost_the_jobs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        if b"completed" in data:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(record, "write_atomically", full)
    command = ["run", "-m", *SMALL, "rounds=1", f"output_dir={tmp_path}", "seed=1"]
    assert main(command) == 0
    assert "sweep.json is out of date" in capfd.readouterr().out


# -- stopped from outside --


@pytest.fixture
def start(tmp_path: Path):
    """Starts a sweep of two endless jobs or more in a process of its own."""
    programs: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        program = subprocess.Popen(
            [sys.executable, "-m", "fl_app.cli", "run", "-m", *SMALL, "output_dir=runs", *arguments],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        programs.append(program)
        return program

    yield start
    for program in programs:
        if program.poll() is None:
            program.kill()
        program.communicate(timeout=30)


def until(condition, patience: float = 60.0):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def rounds_of(folder: Path) -> int:
    try:
        return json.loads((folder / "summary.json").read_text())["rounds_completed"]
    except OSError:
        return 0


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [item for item in processes if item.is_running() and item.status() != "zombie"]


def test_a_killed_job_is_recorded_and_the_sweep_goes_on(start, tmp_path: Path) -> None:
    program = start("rounds=100000,1", "run_name='r${rounds}'", "runtime.workers=2")
    runs = tmp_path / "runs"
    until(lambda: rounds_of(runs / "r100000") > 0)
    (job,) = psutil.Process(program.pid).children()
    workers = job.children()
    assert len(workers) == 2
    job.kill()
    output, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (1, "")
    lines = output.splitlines()
    assert "failed: its process was killed by signal 9 (Killed)" in lines[1]
    assert lines[2].startswith("2/2  rounds=1       accuracy ")
    assert lines[3] == "1 of 2 completed, 1 failed"
    assert lines[-1] == str(runs / "sweep.json")
    found = {name: entry["status"] for name, entry in entries(runs).items()}
    assert found == {"r100000": "failed", "r1": "completed"}
    until(lambda: not alive(workers), 10)


def test_ctrl_c_stops_everything_and_the_same_command_goes_on(start, tmp_path: Path) -> None:
    seeds = ["seed=1,2,3", "runtime.workers=2"]
    program = start("rounds=100000", *seeds, "--jobs", "2")
    runs = tmp_path / "runs"
    folders = [config_of(runs, *seeds[1:], f"seed={seed}").run_dir for seed in (1, 2, 3)]
    until(lambda: all(rounds_of(folder) for folder in folders[:2]))
    family = psutil.Process(program.pid).children(recursive=True)
    assert len(family) == 6
    os.killpg(program.pid, signal.SIGINT)
    output, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (1, "")
    assert not alive(family)
    assert output.splitlines()[-3] == "0 of 3 completed, 2 stopped, 1 not begun (interrupted)"
    there = entries(runs)
    told = [there[folder.name]["status"] for folder in folders]
    assert told == ["stopped", "stopped", "waiting"]
    done = [rounds_of(folder) for folder in folders]
    assert done[2] == 0

    target = max(done) + 1
    again = [*SMALL, *seeds, f"rounds={target}", f"output_dir={runs}", "--jobs", "2"]
    assert main(["run", "-m", *again]) == 0
    assert [rounds_of(folder) for folder in folders] == [target] * 3
    # A round that is saved and not told of yet when the signal comes is not lost.
    said = (folders[0] / "output.log").read_text()
    assert any(f"goes on after round {number}" in said for number in (done[0], done[0] + 1))


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_no_job_running(start, tmp_path: Path) -> None:
    program = start("rounds=100000", "seed=1", "runtime.workers=2")
    folder = config_of(tmp_path / "runs", "seed=1").run_dir
    until(lambda: rounds_of(folder) > 0)
    family = psutil.Process(program.pid).children(recursive=True)
    assert len(family) == 3
    program.kill()
    program.communicate(timeout=30)
    until(lambda: not alive(family), 30)


@pytest.mark.slow
def test_two_sweeps_with_jobs_in_common_may_run_at_once(start, tmp_path: Path) -> None:
    programs = [start("rounds=3", "seed=1,2,3"), start("rounds=3", "seed=3,2,1,4")]
    for program in programs:
        output, errors = program.communicate(timeout=120)
        assert errors == ""
        # What the other was at work on is its failure here, and nothing else is.
        others = [line for line in output.splitlines() if "failed: " in line]
        assert all("another process is running there" in line for line in others)
        assert program.returncode == (1 if others else 0)
    runs = tmp_path / "runs"
    assert [entry["status"] for entry in entries(runs).values()] == 4 * ["completed"]
    assert {rounds_of(runs / name) for name in entries(runs)} == {3}


@pytest.mark.slow
def test_a_sweep_runs_on_flower(start, tmp_path: Path) -> None:
    program = start("backend=flower", "rounds=1", "seed=1,2")
    output, errors = program.communicate(timeout=240)
    assert program.returncode == 0, output + errors
    assert output.splitlines()[-3] == "2 of 2 completed"
    assert {entry["status"] for entry in entries(tmp_path / "runs").values()} == {"completed"}


def test_jobs_may_use_several_threads_though_they_are_forks(tmp_path: Path) -> None:
    # MNIST is large enough for torch to share out its arithmetic, in the parent and in its forks.
    overrides = ["task=mnist", "model=mlp", "num_clients=2", "rounds=1", "seed=1,2"]
    command = [sys.executable, "-m", "fl_app.cli", "run", "-m", *overrides]
    done = subprocess.run(
        [*command, f"output_dir={tmp_path}", "runtime.workers=1"],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "2 of 2 completed" in done.stdout
