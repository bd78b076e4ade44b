"""A SuperLink of one's own on the loopback: gone when the work is done."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fl_app.flower.connection import Connection
from fl_app.flower.processes import Port, Program, environment

_READY = 60.0  # seconds; one or two suffice on an idle machine


class SuperLink(Connection):
    """A ``flower-superlink`` that only its starter knows, as a context manager.

    It has a port, a ``FLWR_HOME`` and an in-memory database of its own. That is the difference to
    the SuperLink which a bare ``flwr run`` starts: all checkouts of a user share that one, by a
    fixed port, and it runs on with the code, environment and directory of whoever started it.

    Args:
        project: directory with the app's pyproject.toml.
        simulation: whether SuperNodes are simulated (by Ray) or join over the network.

    Attributes:
        link: the ``flower-superlink`` that runs, or ran last.
        port: where it listens, from start to end the same.

    Raises:
        FlowerError: ``project`` holds no Flower app, or the SuperLink did not start.
    """

    authority: Path | None = None
    """Certificate of the authority that vouches for the SuperLink; ``None`` where it speaks no TLS."""

    port: Port
    link: Program

    def __init__(self, project: Path, *, simulation: bool) -> None:
        super().__init__(project, project)
        self.simulation = simulation
        self._stack = ExitStack()
        self._starts = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            homes = self.project / ".flwr"
            homes.mkdir(exist_ok=True)
            _clear(homes)
            self.home = Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=homes))
            stack.callback(shutil.rmtree, self.home, ignore_errors=True)
            self.port = Port(self.authority)
            stack.callback(self.port.close)
            self.write(self.port.address, self.authority)
            stack.callback(self._end)
            self._start_link()
            self._started()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start_link(self) -> None:
        command = [*self._link_command(), "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", str(self.port.number)]
        command += ["--simulation"] if self.simulation else []
        self.link = self._start("flower-superlink", command, self.home, self._link_extra())
        self.link.wait_for(self.port, seconds=_READY)

    def _link_command(self) -> Sequence[str]:
        """The program and how it is secured."""
        return ["flower-superlink", "--insecure"]

    def _link_extra(self) -> Mapping[str, str]:
        """Environment variables of the SuperLink's, beside the common ones."""
        return {}

    def _started(self) -> None:
        """Start what belongs to the link, once it answers."""

    def _end(self) -> None:
        """End the programs; called also where not all have been started."""
        if hasattr(self, "link"):
            self.link.close()

    def _start(
        self, name: str, command: Sequence[str], home: Path, extra: Mapping[str, str]
    ) -> Program:
        self._starts += 1
        log = home / f"{name}.log"
        if log.exists():  # of the same program, before it was started again
            log.replace(home / f"{name}-{self._starts}.log")
        env = {**environment(self.home), "FLWR_HOME": str(home), **extra}
        return Program(command, env=env, cwd=Path.cwd(), log=log, name=name)

    def _show_logs(self, echo: Callable[[str], None]) -> None:
        for name in ("flwr.log", "flower-superlink.log"):  # kept: the home is about to go
            kept = self.project / ".flwr" / name
            shutil.copyfile(self.home / name, kept)
            echo(f"Flower's log: {kept}")


def _clear(homes: Path) -> None:
    """Remove what runs left behind whose starter was killed."""
    for home in homes.glob("run-*-*"):
        starter = home.name.split("-")[1]
        if not (starter.isdecimal() and psutil.pid_exists(int(starter))):
            shutil.rmtree(home, ignore_errors=True)


def run_flower(
    overrides: Sequence[str],
    *,
    num_supernodes: int,
    project: Path,
    echo: Callable[[str], None],
) -> int:
    """Run the app in Flower's simulation and end all of Flower with it.

    Args:
        overrides: Hydra overrides, one each, for the app's configuration.
        num_supernodes: how many SuperNodes Flower simulates.
        project: directory with the app's pyproject.toml.
        echo: receives every line that the app prints.

    Returns:
        0 completed; 1 failed, or stopped by the user; 3 stopped by a guard.

    Raises:
        FlowerError: there is no app in ``project``, or Flower did not start.
        KeyboardInterrupt: Ctrl-C, and the app did not end by itself when it was asked to; either
            way Flower's programs have ended.
    """
    with SuperLink(project, simulation=True) as link:
        return link.run(overrides, echo=echo, num_supernodes=num_supernodes)
