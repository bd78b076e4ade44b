"""The project's own app on Flower: real SuperLinks, SuperNodes and Ray, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fl_app.flower import run_flower
from fl_app.flower.processes import Port, Program, environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower"), pytest.mark.timeout(600)]

CHECKOUT = Path(__file__).resolve().parents[2]
PARTS = ("fl_app", "strategies", "clients", "conf", "pyproject.toml", "README.md", "LICENSE")
SMALL = ["task=digits", "rounds=2", "run_name=small"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every process that a test starts has ended when the test has."""
    known = set(psutil.pids())
    yield
    deadline = time.monotonic() + 30
    while left := [p for p in psutil.process_iter() if p.pid not in known and _is_flowers(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _is_flowers(process: psutil.Process) -> bool:
    """Whether it is one of Flower's or Ray's programs that this test session started."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        words = " ".join(process.cmdline())
        ours = process.environ().get("PYTEST_CURRENT_TEST") is not None
    except psutil.Error:
        return False
    return ours and any(name in words for name in ("flower-", "flwr", "ray", "tether.py"))


def checkout_in(directory: Path) -> Path:
    """A checkout of its own, with the app and nothing else."""
    directory.mkdir()
    for part in PARTS:
        source = CHECKOUT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, directory / part, ignore=ignored)
        else:
            shutil.copy(source, directory / part)
    return directory


def summary_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "small" / "summary.json").read_text())
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return checkout_in(tmp_path / "project")


def test_a_simulated_run_shows_a_line_a_round_and_leaves_its_summary(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative output_dir is the caller's, not the SuperLink's
    lines: list[str] = []
    overrides = [*SMALL, "num_clients=3", "output_dir=runs here"]
    assert run_flower(overrides, num_supernodes=3, project=project, echo=lines.append) == 0
    summary = summary_in(tmp_path / "runs here")
    assert (summary["status"], summary["rounds_completed"], summary["num_clients"]) == (
        "completed",
        2,
        3,
    )
    assert [row["clients_sampled"] for row in summary["history"]] == [3, 3]
    assert len([line for line in lines if line.startswith("round ")]) == 2
    assert lines[-1] == str(tmp_path / "runs here" / "small" / "summary.json")
    assert list((project / ".flwr").iterdir()) == []


def test_clients_run_the_code_of_the_run_wherever_the_superlink_was_started(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkout_in(tmp_path / "other")
    with (other / "clients" / "client.py").open("a") as file:
        file.write("\nraise RuntimeError('code of another checkout')\n")
    monkeypatch.chdir(other)
    overrides = [*SMALL, "num_clients=2", f"output_dir={tmp_path}"]
    assert run_flower(overrides, num_supernodes=2, project=project, echo=lambda line: None) == 0
    assert summary_in(tmp_path)["final"]["accuracy"] > 0


def test_a_configuration_that_is_refused_fails_with_its_reason(
    project: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    overrides = [*SMALL, "roundz=3", f"output_dir={tmp_path}"]
    assert run_flower(overrides, num_supernodes=2, project=project, echo=lines.append) == 1
    assert any("roundz" in line for line in lines)


def test_the_demonstration_runs_three_rounds_on_two_supernodes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fl_app.flower", "--deployment", "--supernodes", "2"]
    command += ["task=digits", "num_clients=2", "rounds=3", "run_name=small"]
    command += [f"output_dir={tmp_path}"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_in(tmp_path)
    assert (summary["status"], summary["rounds_completed"]) == ("completed", 3)
    assert [row["clients_sampled"] for row in summary["history"]] == [2, 2, 2]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "small" / "summary.json")


def running_simulation(tmp_path: Path) -> subprocess.Popen[str]:
    """A simulation of very many rounds that has finished the first."""
    command = [sys.executable, "-m", "fl_app.flower", "--supernodes", "2"]
    command += ["task=digits", "num_clients=2", "rounds=10000", "run_name=small"]
    command += [f"output_dir={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round "):
            return process
    raise AssertionError("the run ended before its first round")


def test_ctrl_c_ends_a_simulation_in_order(tmp_path: Path) -> None:
    with running_simulation(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
        assert process.wait(timeout=60) == 1
    summary = summary_in(tmp_path)
    assert (summary["status"], summary["reason"]) == ("stopped", "interrupted")


def test_a_command_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    with running_simulation(tmp_path) as process:
        process.kill()
    assert summary_in(tmp_path)["rounds_completed"] >= 1


def test_a_bare_flwr_run_with_flowers_defaults_works(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = Port()
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(port.number))
    command = ["flwr", "run", ".", "--stream", "--run-config"]
    command += [f'overrides="task=digits rounds=2 run_name=small output_dir={tmp_path}"']
    env = environment(tmp_path / "home")
    # On a tether, which ends the SuperLink too that `flwr run` starts and leaves behind.
    with Program(command, env=env, cwd=project, log=tmp_path / "log") as program:
        while program.running:
            time.sleep(0.2)
        assert f"{tmp_path}/small/summary.json" in program.new_lines()
    port.close()
    summary = summary_in(tmp_path)
    assert (summary["status"], summary["num_clients"]) == ("completed", 2)
