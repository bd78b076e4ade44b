"""A deployment to break: real processes on the loopback, a proxy before each SuperNode, a run in a thread.

What a test does here is what happens to real devices: processes are killed as a power cut kills them, with all that
they started; the network is taken away byte by byte. Nothing is timed by guesses: local training says when it has begun
and goes on when it may (`Held`), and a proxy acts on the bytes that pass. All waits have a limit, and one that is
reached says what the run had printed by then.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import psutil

from fl_app.flower.bundle import BUNDLE
from fl_app.flower.deployment import Deployment
from fl_app.flower.processes import FlowerError, Program
from tests.support.proxy import Proxy

RUN = "run"
PHASE = float(os.environ.get("CHAOS_SECONDS", "180"))
"""Seconds that a wait may take: 60 s of heartbeats that are missing, and processes that start on a busy machine."""

_TASK = Path(__file__).with_name("held_digits.py")
SMALL = ["model=linear", "client.lr=0.5", "task.partition=iid", f"run_name={RUN}"]


class Run(threading.Thread):
    """One `flwr run`, and what it has printed so far."""

    def __init__(self, link: Deployment, overrides: list[str]) -> None:
        super().__init__(daemon=True)
        self._link, self._overrides = link, overrides
        self.lines: list[str] = []
        self.code: int | None = None

    def run(self) -> None:
        try:
            self.code = self._link.run(self._overrides, echo=self.lines.append)
        except (FlowerError, OSError) as error:  # the test is over, and the deployment gone
            self.lines.append(f"{type(error).__name__}: {error}")

    def wait_for(self, pattern: str, seconds: float = PHASE) -> None:
        """Until a line matches."""
        self.until(
            lambda: any(re.search(pattern, line) for line in list(self.lines)),
            f"a line like {pattern!r}",
            seconds,
        )

    def until(self, happened: Callable[[], object], what: str, seconds: float = PHASE) -> None:
        """Until something holds; the run must not be over before."""
        deadline = time.monotonic() + seconds
        while not happened():
            told = "\n".join(self.lines)
            assert self.is_alive(), f"the run ended before {what}:\n{told}"
            assert time.monotonic() < deadline, f"no {what} within {seconds:g} s:\n{told}"
            time.sleep(0.05)

    def ended(self, seconds: float = 2 * PHASE) -> int | None:
        """The exit code, once the run is over."""
        self.join(seconds)
        assert not self.is_alive(), f"not over within {seconds:g} s:\n" + "\n".join(self.lines)
        return self.code


class Held:
    """Local training that says where it has begun and waits until it may go on (`held_digits.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._gate = folder / "hold"
        folder.mkdir()

    def hold(self, batch: int = 1) -> None:
        """Whoever trains from now on waits in this batch of its process, counted from 1, or in a later one."""
        for mark in self.folder.glob("at-*"):
            mark.unlink()
        fresh = self.folder / "hold.new"
        fresh.write_text(str(batch))
        fresh.replace(self._gate)

    def go(self) -> None:
        """They go on."""
        self._gate.unlink()

    def at_work(self, program: Program, batch: int = 1) -> bool:
        """Whether a process that this program started waits in its training, and has come to this batch."""
        family = psutil.Process(program.pid).children(recursive=True)
        marks = [self.folder / f"at-{process.pid}" for process in family]
        return any(int(mark.read_text() or 0) >= batch for mark in marks if mark.exists())

    def batches(self) -> list[int]:
        """How many batches each process has begun, in the order in which they began the last one."""
        counts = sorted(self.folder.glob("batches-*"), key=lambda file: file.stat().st_mtime_ns)
        return [file.stat().st_size for file in counts]


class Scene(Deployment):
    """SuperNodes with a proxy and a folder each, and runs that have the same command line every time.

    It is entered where a task of the user's own is found: its folder is the working directory meanwhile.

    Args:
        folder: an empty one; takes the run's folder and the clients'.
        nodes: how many.
        overrides: of the run.
        out: the run's output_dir; None for one in the folder.
        database: whether the SuperLink keeps its state in a file.
        certificates: as a deployment's.
        folders: of clients that keep what is theirs elsewhere than in the folder, by their partition.
        node_environment: environment variables of a SuperNode, by its partition.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int,
        *overrides: str,
        out: Path | None = None,
        database: bool = False,
        certificates: Path | None = None,
        folders: Mapping[int, Path] = MappingProxyType({}),
        node_environment: Callable[[int], Mapping[str, str]] = lambda partition: {},
    ) -> None:
        self.folder = folder
        self.overrides = [
            "task=digits", "task._target_=held_digits.HeldDigits", *SMALL,
            f"num_clients={nodes}", f"output_dir={out or folder / 'out'}", *overrides,
        ]  # fmt: skip
        self.out = out or folder / "out"
        self.held = Held(folder / "marks")
        self.proxies: dict[int, Proxy] = {}
        self._before = Path.cwd()
        shutil.copy(_TASK, folder / _TASK.name)
        # Looking for work less often leaves the machine to those that have some.
        marks = {"CHAOS_MARKS": str(self.held.folder), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}
        super().__init__(
            BUNDLE,
            num_supernodes=nodes,
            node_config=lambda one: f'client-folder="{folders.get(one, folder / f"own-{one}")}"',
            certificates=certificates,
            database=folder / "link.db" if database else None,
            route=self._through_a_proxy,
            link_environment=marks,
            node_environment=lambda one: {**marks, **node_environment(one)},
        )

    def __enter__(self) -> Self:
        os.chdir(self.folder)
        try:
            return super().__enter__()
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._keep_logs()
        for proxy in self.proxies.values():
            proxy.set("forward")  # an orderly farewell takes no time-outs
        super().__exit__(kind, error, trace)
        self._leave()

    def start(self) -> Run:
        """`flwr run`, always with the same command line."""
        run = Run(self, self.overrides)
        run.start()
        return run

    def kill_server_app(self) -> None:
        """Ends the ServerApp as a power cut would; the SuperLink stays."""
        serving = [
            process
            for process in psutil.Process(self.link.pid).children(recursive=True)
            if "flwr-serverapp" in " ".join(process.cmdline())
        ]
        assert len(serving) == 1, serving
        serving[0].kill()

    @property
    def run_folder(self) -> Path:
        return self.out / RUN

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
        return found

    def _through_a_proxy(self, partition: int, link: str) -> str:
        if partition not in self.proxies:
            host, port = link.split(":")
            self.proxies[partition] = Proxy((host, int(port)))
        return self.proxies[partition].address

    def _leave(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        os.chdir(self._before)

    def _keep_logs(self) -> None:
        """Flower's logs, which go with its home, into the test's folder."""
        for log in self.home.rglob("*.log"):
            shutil.copy(log, self.folder / f"{log.parent.name}-{log.name}")


def assert_whole(summary: Mapping[str, Any], rounds: int) -> None:
    """A run that is done, with each round in it once."""
    assert (summary["status"], summary["rounds_completed"]) == ("completed", rounds), summary
    assert [row["round"] for row in summary["history"]] == list(range(1, rounds + 1))
