"""A device whose clock is wrong: minutes behind it takes part; ahead, or hours behind, it is refused, and told why.

Flower's SuperNodes sign each request with their own time, with and without node authentication; its SuperLink takes
times from 305 s behind to 5 s ahead of its own. The clock is wrong for one process and those that it starts, by a small
library before the C library: what Python, OpenSSL and the others ask is answered wrongly, as on a real device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fl_app.flower.processes import FlowerError
from tests.chaos.scene import Scene, assert_whole

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.timeout(900),
]

HOURS = 8 * 3600
SHIM = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        at->tv_sec += atol(getenv("CHAOS_CLOCK"));
    return failed;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""

Wrong = Callable[[int], Mapping[str, str]]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Wrong:
    """Environment of a process whose clock is off by so many seconds."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("a C compiler and Linux are needed to give one process another clock")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, folder / "shim.c"], check=True
    )

    def off(seconds: int) -> Mapping[str, str]:
        return {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(seconds)}

    return off


def test_a_device_that_is_minutes_behind_takes_part(tmp_path: Path, wrong: Wrong) -> None:
    def of(partition: int) -> Mapping[str, str]:
        return wrong(-200) if partition == 1 else {}

    with Scene(tmp_path, 2, "rounds=2", node_environment=of) as scene:
        assert scene.start().ended() == 0
        assert_whole(scene.summary, 2)
        rows = scene.summary["history"]
        assert [(row["clients_sampled"], row["clients_failed"]) for row in rows] == [(2, 0), (2, 0)]


@pytest.mark.parametrize("authenticated", [True, False], ids=["authenticated", "in-clear"])
def test_a_device_whose_clock_flower_refuses_is_told_so_by_the_doctor(
    tmp_path: Path, wrong: Wrong, certificates: Path, authenticated: bool
) -> None:
    folder = certificates if authenticated else None
    with Scene(tmp_path, 1, certificates=folder) as scene:
        for seconds in (HOURS, -HOURS, 30):
            scene.node_environment = lambda partition, off=seconds: wrong(off)
            with pytest.raises(FlowerError):
                scene.restart_node(0, seconds=20)
            command = [sys.executable, "-m", "fl_app.cli", "doctor"]
            command += ["--superlink", scene.port.address]
            command += ["--ca", str(certificates / "ca.pem")] if authenticated else []
            env = {**os.environ, "PYTHONPATH": str(scene.project), **wrong(seconds)}
            told = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=300, check=False
            )
            assert told.returncode == 1, told.stdout + told.stderr
            assert "set this machine's clock" in told.stdout or "set the clock" in told.stdout
