"""What all scenes have: keys that are made once, and a look for processes that were left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fl_app.cli.main import main


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every process that a test starts has ended when the test has, killed parents or not."""
    monkeypatch.setenv("CHAOS_SCENE", str(tmp_path))
    yield
    deadline = time.monotonic() + 30
    while left := [process for process in psutil.process_iter() if _is_of(process, tmp_path)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and process.environ().get("CHAOS_SCENE") == str(folder)
    except psutil.Error:
        return False


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a SuperLink's certificate, and the keys of four nodes."""
    folder = tmp_path_factory.mktemp("certs")
    assert main(["certs", "all", str(folder), "--nodes", "4"]) == 0
    return folder
