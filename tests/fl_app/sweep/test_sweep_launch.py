"""Jobs in processes: whatever becomes of one, the others run, and none is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fl_app.config.faults import ConfigError, Fault
from fl_app.sweep.launch import LOG, Ending, Launcher
from fl_app.sweep.plan import Job, plan


@pytest.fixture
def jobs(tmp_path: Path) -> tuple[Job, ...]:
    overrides = ["task=digits", "model=linear", "num_clients=2", f"output_dir={tmp_path}"]
    return plan([*overrides, "seed=1,2,3,4"]).jobs


def launch(work, jobs, at_once: int = 1) -> dict[int, Ending]:
    endings: dict[int, Ending] = {}
    begun: list[int] = []
    before = psutil.Process().children()  # of other tests
    launcher = Launcher(
        work,
        at_once,
        started=lambda job: begun.append(job.number),
        ended=lambda job, ending: endings.update({job.number: ending}),
    )
    try:
        launcher.run(jobs)
    finally:
        left = [item for item in psutil.Process().children() if item not in before]
        assert [item for item in left if item.status() != "zombie"] == []
    assert begun == [job.number for job in jobs]
    return endings


def _mixed(job: Job):
    print("says", job.number)
    if job.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.number == 2:
        raise ConfigError([Fault("client.lr", "must be less", 3)])
    if job.number == 3:
        raise ValueError("x" * 100_000)
    return "completed", ""


@pytest.mark.parametrize("at_once", [1, 3])
def test_each_job_ends_in_its_own_way(jobs: tuple[Job, ...], at_once: int) -> None:
    endings = launch(_mixed, jobs, at_once)
    told = {number: (ending.status, ending.reason[:60]) for number, ending in endings.items()}
    assert told == {
        1: ("failed", "its process was killed by signal 9 (Killed), perhaps for wan"),
        2: ("failed", "client.lr = 3: must be less"),
        3: ("failed", "ValueError: " + 48 * "x"),
        4: ("completed", ""),
    }
    assert "says 4\n" in (jobs[3].config.run_dir / LOG).read_text()
    assert "Traceback" in (jobs[2].config.run_dir / LOG).read_text()


def test_a_job_that_ends_while_another_starts_is_not_lost(jobs: tuple[Job, ...]) -> None:
    endings: dict[int, Ending] = {}

    def started(job: Job) -> None:
        if job.number > 1:
            # The jobs before it are over by now, and starting this one has them reaped.
            time.sleep(0.3)

    launcher = Launcher(
        _mixed,
        4,
        started=started,
        ended=lambda job, ending: endings.update({job.number: ending}),
    )
    launcher.run(jobs)
    assert [endings[number].status for number in (1, 2, 3, 4)] == 3 * ["failed"] + ["completed"]
    assert "killed by signal 9" in endings[1].reason


def _exits(job: Job):
    if job.number == 1:
        os._exit(7)
    sys.exit(3)


def test_a_job_that_ends_its_process_has_failed(jobs: tuple[Job, ...]) -> None:
    endings = launch(_exits, jobs[:2])
    assert endings[1].reason == "its process ended with exit code 7"
    assert (endings[2].status, endings[2].reason) == ("failed", "SystemExit: 3")


def _leaves_a_child(job: Job):
    child = subprocess.Popen(["sleep", "600"])
    (job.config.run_dir / "pid").write_text(str(child.pid))
    os._exit(0)


def test_what_a_job_leaves_running_is_ended(jobs: tuple[Job, ...]) -> None:
    launch(_leaves_a_child, jobs[:1])
    pid = int((jobs[0].config.run_dir / "pid").read_text())
    assert _gone(pid)


def _waits(job: Job):
    (job.config.run_dir / "pid").write_text(str(os.getpid()))
    time.sleep(600)
    return "completed", ""


def _will_not_stop(job: Job):
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            _waits(job)


def _interrupt_once_running(jobs: tuple[Job, ...], count: int, times: int = 1) -> None:
    while len([job for job in jobs if (job.config.run_dir / "pid").exists()]) < count:
        time.sleep(0.02)
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)


@pytest.mark.parametrize(("work", "times"), [(_waits, 1), (_will_not_stop, 2)])
def test_an_interrupt_stops_what_runs_and_starts_nothing_more(
    jobs: tuple[Job, ...], work, times: int
) -> None:
    endings: dict[int, Ending] = {}
    launcher = Launcher(
        work,
        2,
        started=lambda job: None,
        ended=lambda job, ending: endings.update({job.number: ending}),
    )
    thread = threading.Timer(0, _interrupt_once_running, (jobs, 2, times))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        launcher.run(jobs)
    thread.join()
    assert {number: ending.status for number, ending in endings.items()} == (
        {1: "stopped", 2: "stopped"} if work is _waits else {}
    )
    assert not jobs[2].config.run_dir.exists()
    for job in jobs[:2]:
        assert _gone(int((job.config.run_dir / "pid").read_text()))


def _gone(pid: int, patience: float = 10.0) -> bool:
    deadline = time.monotonic() + patience
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_folder_that_cannot_be_written_is_that_jobs_failure(jobs: tuple[Job, ...]) -> None:
    jobs[0].config.run_dir.write_text("a file stands there")
    endings = launch(_mixed, jobs[:1])
    assert endings[1].reason.startswith("its folder can't be written")
