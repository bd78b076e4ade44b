"""Disks that are full, for real: small file systems of their own, filled to the last byte.

The server's: the run fails and says why, what is there stays whole, and with room the same command goes on. A client's:
it takes no part, and the round goes on.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import RunResult, run_engine
from tests.chaos.scene import Scene, assert_whole

pytestmark = pytest.mark.chaos

MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    if os.geteuid() != 0:
        pytest.skip("file systems are root's to mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={2 * MEGABYTE}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    continue
            except OSError:
                continue
    return filler


def run(disk: Path, rounds: int) -> tuple[RunResult, str]:
    said = io.StringIO()
    overrides = [
        "task=digits", "model=linear", "task.partition=iid", "num_clients=3", "runtime.workers=1",
        f"rounds={rounds}", f"output_dir={disk}", "run_name=run",
    ]  # fmt: skip
    return run_engine(compose(overrides), PlainConsole(said)), said.getvalue()


def test_a_run_on_a_full_disk_fails_with_its_reason_and_goes_on_when_there_is_room(
    disk: Path,
) -> None:
    run(disk, rounds=1)
    before = json.loads((disk / "run" / "summary.json").read_text())
    filler = fill(disk)
    result, said = run(disk, rounds=3)
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "No space left on device" in result.reason
    assert "No space left on device" in said
    kept = json.loads((disk / "run" / "summary.json").read_text())
    assert kept["history"] == before["history"]

    filler.unlink()
    result, said = run(disk, rounds=3)
    assert result.exit_code == 0
    assert_whole(json.loads((disk / "run" / "summary.json").read_text()), 3)
    # Nothing of the vain attempts is left lying about.
    assert not list((disk / "run").rglob("*.part"))


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
@pytest.mark.timeout(900)
def test_a_deployed_run_on_a_full_disk_is_resumed_when_there_is_room(
    tmp_path: Path, disk: Path
) -> None:
    with Scene(tmp_path, 2, "rounds=3", out=disk) as scene:
        run = scene.start()
        run.wait_for("^round 1/")
        scene.held.hold()
        run.until(lambda: all(map(scene.held.at_work, scene.nodes)), "training on both")
        filler = fill(disk)
        scene.held.go()
        assert run.ended() == 1
        assert any("No space left on device" in line for line in run.lines), run.lines
        assert len(scene.summary["history"]) == 1

        filler.unlink()
        assert scene.start().ended() == 0
        assert_whole(scene.summary, 3)


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
@pytest.mark.timeout(900)
def test_a_client_whose_own_disk_is_full_is_done_without(tmp_path: Path, disk: Path) -> None:
    fill(disk)
    secure = ["rounds=2", "strategy=secure", "collector.limit=4"]
    with Scene(tmp_path, 4, *secure, folders={3: disk}) as scene:
        run = scene.start()
        assert run.ended() == 0
        assert_whole(scene.summary, 2)
        for row in scene.summary["history"]:
            assert (row["clients_failed"], row["void"]) == (1, False)
        log = (scene.run_folder / "run.log").read_text()
        assert "No space left on device" in log
        assert str(disk) not in log  # the server is told no path of the device's
