"""Flower's long-running programs as child processes that cannot be left behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fl_app.flower import bundle, tether

_LOG_TAIL = 20
_SPAWN = (
    20.0  # seconds until a tether has started its program; a fraction of one on an idle machine
)
STOP = "stop"
"""Name of the file in a SuperLink's home that asks its ServerApp to stop."""


class FlowerError(RuntimeError):
    """A Flower program could not be started or did not answer; the message says which and why."""


def environment(home: Path) -> dict[str, str]:
    """Environment for Flower's programs.

    Args:
        home: directory that stands in for ``~/.flwr`` (configuration, installed bundles).

    Returns:
        The caller's environment with: this interpreter's programs first on the path; no
        installation of dependencies per run, no telemetry, no look for updates; a short poll for
        new tasks; loopback addresses never sent to a proxy; the working directory importable, so
        that a task or model of the user's own is found there.
    """
    env = dict(os.environ)
    env.pop(bundle.LAUNCHED_IN, None)  # what was true for this process is not for its children
    env[bundle.STOP_FILE] = str(home / STOP)
    env.update(
        FLWR_HOME=str(home),
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        PYTHONUNBUFFERED="1",
        NO_COLOR="1",
    )
    _put(env, "PATH", str(Path(sys.executable).parent), first=True)
    _put(env, "PYTHONPATH", str(Path.cwd()), first=False)
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1", "localhost"]))
    return env


def _put(env: dict[str, str], name: str, value: str, *, first: bool) -> None:
    known = [env[name]] if env.get(name) else []
    env[name] = os.pathsep.join([value, *known] if first else [*known, value])


def healthy(address: str, authority: Path | None) -> bool:
    """Whether Flower's HTTP server at an address is ready.

    Args:
        address: host and port.
        authority: certificate of the authority that vouches for it; ``None`` where it speaks no TLS.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if authority is not None:
        context = ssl.create_default_context(cafile=str(authority))
        handlers.append(urllib.request.HTTPSHandler(context=context))
    scheme = "http" if authority is None else "https"
    try:
        opener = urllib.request.build_opener(*handlers)
        with opener.open(f"{scheme}://{address}/health", timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException):
        return False


class Port:
    """A free port on the loopback, kept free for one program.

    The socket is bound but does not listen. A server that allows the reuse of addresses, as
    Flower's does, may bind it beside; nobody is given the port by chance meanwhile. So a
    SuperLink that answers there is the one that was started, never another checkout's.

    Args:
        authority: certificate of the authority that vouches for the program, where it speaks TLS.
    """

    def __init__(self, authority: Path | None = None) -> None:
        self._authority = authority
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    @property
    def address(self) -> str:
        """``127.0.0.1:<number>``."""
        return f"127.0.0.1:{self.number}"

    def answers(self) -> bool:
        """Whether Flower's HTTP server at this port is ready."""
        return healthy(self.address, self._authority)

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


def _freeze(root: psutil.Process) -> set[psutil.Process]:
    """Stop a process and all of its descendants, also those that it starts meanwhile."""
    frozen: set[psutil.Process] = set()
    found = {root}
    while found:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        frozen |= found
        try:
            found = set(root.children(recursive=True)) - frozen
        except psutil.Error:
            found = set()
    return frozen


def end_family(root: psutil.Process) -> None:
    """End a process and its descendants: ask the root, wait, ask the rest, kill.

    Raises:
        psutil.AccessDenied: it is another user's.
        psutil.TimeoutExpired: one of them is still there.
    """
    try:
        family = [root, *root.children(recursive=True)]
        root.terminate()
    except psutil.NoSuchProcess:
        return  # it has ended meanwhile, which is what was wanted
    psutil.wait_procs([root], timeout=tether.GRACE)
    left = [process for process in family if _lives(process)]
    for signal_ in ("terminate", "kill"):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, signal_)()
        psutil.wait_procs(left, timeout=tether.PATIENCE)
        left = [process for process in left if _lives(process)]
    if left:
        raise psutil.TimeoutExpired(tether.PATIENCE, root.pid)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Program:
    """A program on a tether: it and all that it starts end with this object or this process.

    Args:
        command: program and arguments.
        env: its whole environment.
        cwd: its working directory.
        log: file that takes its output, emptied first.
        grace: seconds that it has to end when it is asked to.
        name: by which messages call it; the program's own by default.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        grace: float = tether.GRACE,
        name: str = "",
    ) -> None:
        self.name = name or Path(command[0]).name
        self.log = log
        self._grace = grace
        self._offset = 0
        self._process: psutil.Process | None = None
        with log.open("wb") as output:
            self._tether = subprocess.Popen(
                [sys.executable, "-P", tether.__file__, str(grace), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                start_new_session=True,  # a Ctrl-C in the terminal must reach the caller only
            )

    @property
    def running(self) -> bool:
        """Whether the program has not ended."""
        return self._tether.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the program itself, not of its tether.

        Raises:
            FlowerError: it ended before anybody asked.
        """
        return int(self._find().pid)

    def _find(self) -> psutil.Process:
        deadline = time.monotonic() + _SPAWN
        while self._process is None:
            try:  # a tether has one child; what that starts is not the tether's
                children = psutil.Process(self._tether.pid).children()
            except psutil.Error:
                children = []
            if children:
                self._process = children[0]
            elif not self.running or time.monotonic() > deadline:
                raise FlowerError(
                    f"{self.name} does not run. The end of its log:\n{self.log_tail()}"
                )
            else:
                time.sleep(0.02)
        return self._process

    def kill(self) -> None:
        """End the program and all that it started as a power cut would: at once, unasked.

        Returns when none of them runs any more. It does nothing where the program has ended.
        """
        if not self.running:
            return
        root = self._find()
        self._tether.send_signal(signal.SIGSTOP)  # else it asks in order those that are left
        try:
            family = _freeze(root)
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.kill()
            psutil.wait_procs(list(family), timeout=tether.PATIENCE)
        finally:
            self._tether.send_signal(signal.SIGCONT)
        self._tether.wait(timeout=self._grace + 3 * tether.PATIENCE)

    def wait_for(self, port: Port, *, seconds: float) -> None:
        """Wait until the program's HTTP server answers.

        Raises:
            FlowerError: the program ended, or did not answer in time.
        """
        deadline = time.monotonic() + seconds
        while not port.answers():
            if not self.running:
                raise FlowerError(
                    f"{self.name} ended with exit code {self._tether.returncode} before it was "
                    f"ready. The end of its log:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise FlowerError(
                    f"{self.name} did not answer at {port.address} within {seconds:.0f} s. "
                    f"The end of its log:\n{self.log_tail()}"
                )
            time.sleep(0.05)

    def new_lines(self) -> list[str]:
        """Complete lines of output since the last call, without their line ends.

        They are read from the log rather than from a pipe: a caller that is interrupted can go on
        reading, and one that stops reading holds up nobody.
        """
        ended = not self.running  # asked first, so that the last lines are not missed
        with self.log.open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        if not ended:
            data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        lines = data.decode("utf-8", errors="replace").split("\n")
        return lines[:-1] if not lines[-1] else lines

    def log_tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL:])

    def let_go(self) -> None:
        """Tell the tether to end the program, without waiting for it."""
        if self._tether.stdin is not None:
            self._tether.stdin.close()
        # A fork of this process may hold the pipe open too, so the closing alone is not enough.
        if self.running:
            self._tether.terminate()

    def close(self) -> None:
        """End the program and everything it started, and wait until it is gone."""
        self.let_go()
        self._tether.wait(timeout=self._grace + 3 * tether.PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
