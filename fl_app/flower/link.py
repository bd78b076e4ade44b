"""A SuperLink of one's own on the loopback: simulated or deployed, gone when the work is done."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from fl_app.flower.processes import STOP, FlowerError, Port, Program, environment
from fl_app.flower.stream import Transcript, run_command

_READY = 60.0  # seconds; one or two suffice on an idle machine
_JOIN = 60.0  # seconds for all SuperNodes
_STOP = 15.0  # seconds that a run has to end by itself after Ctrl-C
_POLL = 0.1


class SuperLink:
    """A ``flower-superlink`` that only its starter knows, as a context manager.

    It has a port, a ``FLWR_HOME`` and an in-memory database of its own. That is the difference to
    the SuperLink which a bare ``flwr run`` starts: all checkouts of a user share that one, by a
    fixed port, and it runs on with the code, environment and directory of whoever started it.

    Args:
        project: directory with the app's pyproject.toml.
        simulation: whether SuperNodes are simulated (by Ray) or join over the network.

    Raises:
        FlowerError: ``project`` holds no Flower app, or the SuperLink did not start.
    """

    def __init__(self, project: Path, *, simulation: bool) -> None:
        self.project = project.resolve()
        self.simulation = simulation
        self._stack = ExitStack()
        if not (self.project / "pyproject.toml").is_file():
            raise FlowerError(
                f"{self.project} holds no pyproject.toml, so there is no Flower app to run; "
                "run from a checkout of the project."
            )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            homes = self.project / ".flwr"
            homes.mkdir(exist_ok=True)
            _clear(homes)
            self.home = Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=homes))
            stack.callback(shutil.rmtree, self.home, ignore_errors=True)
            self.port = Port()
            stack.callback(self.port.close)
            self._write_connection()
            command = ["flower-superlink", "--insecure", "--isolation", "subprocess"]
            command += ["--host", "127.0.0.1", "--port", str(self.port.number)]
            command += ["--simulation"] if self.simulation else []
            link = stack.enter_context(self._program(command, self.home, Path.cwd()))
            link.wait_for(self.port, seconds=_READY)
            self._started(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _started(self, stack: ExitStack) -> None:
        """Start what belongs to the link, once it answers; ``stack`` ends it again."""

    def _write_connection(self) -> None:
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n'
            f'[superlink.local]\naddress = "{self.port.address}"\ninsecure = true\n',
            encoding="utf-8",
        )

    def run(
        self,
        overrides: Sequence[str],
        *,
        echo: Callable[[str], None],
        num_supernodes: int | None = None,
    ) -> int:
        """Run the project's app with ``flwr run . --stream`` and wait until it has ended.

        Args:
            overrides: Hydra overrides, one each, for the app's configuration.
            echo: receives every line that the app prints, and where Flower's logs are if it failed.
            num_supernodes: number of simulated SuperNodes; ``None`` leaves it to Flower.

        Returns:
            Exit code by the run's summary.json: 0 completed; 1 failed, or stopped by the user; 3
            stopped by a guard. A run that leaves none has failed, whatever Flower makes of it.

        Raises:
            KeyboardInterrupt: Ctrl-C, and the app did not end by itself when it was asked to.
        """
        command = run_command(overrides, num_supernodes)
        transcript = Transcript(echo)
        interrupted = False
        with self._program(command, self.home, self.project) as program:
            try:
                _follow(program, transcript)
            except KeyboardInterrupt:
                interrupted = True
                echo("stopping")
                (self.home / STOP).touch()
                _follow(program, transcript, seconds=_STOP)
                if transcript.summary is None:
                    raise
        code = transcript.exit_code()
        if code is None:
            self._explain(transcript, echo)
        if code in (None, 1) and not interrupted:
            self._keep_logs(echo)
        return 1 if code is None else code

    def _program(self, command: Sequence[str], home: Path, cwd: Path) -> Program:
        return Program(command, env=environment(home), cwd=cwd, log=home / f"{command[0]}.log")

    def _explain(self, transcript: Transcript, echo: Callable[[str], None]) -> None:
        if transcript.run_id is None:
            echo("Flower did not start the run.")
            return
        run = self.ask("ls", "--run-id", transcript.run_id)["runs"][0]
        echo(f"The run left no summary. Flower's status of it: {run['status']}.")
        echo(run["status-details"])

    def _keep_logs(self, echo: Callable[[str], None]) -> None:
        for name in ("flwr.log", "flower-superlink.log"):
            kept = self.project / ".flwr" / name
            shutil.copyfile(self.home / name, kept)
            echo(f"Flower's log: {kept}")

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Ask Flower's command line a question that it answers in JSON.

        Args:
            arguments: a sub-command of ``flwr`` with its arguments, without ``--format``.

        Raises:
            FlowerError: the command failed.
        """
        answer = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            env=environment(self.home),
            cwd=self.project,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        try:
            found: dict[str, Any] = json.loads(answer.stdout)
        except json.JSONDecodeError:
            found = {}
        if not found.get("success"):
            raise FlowerError(
                f"`flwr {' '.join(arguments)}` failed: {answer.stdout}{answer.stderr}".rstrip()
            )
        return found


class Deployment(SuperLink):
    """A SuperLink and SuperNodes as separate programs that talk over the loopback.

    It is what a real deployment is, on one machine and without TLS: each SuperNode has a
    ``FLWR_HOME`` of its own (one home for all would let two ClientApps unpack the same bundle at
    once) and the node configuration ``partition-id`` and ``num-partitions``.

    Args:
        project: directory with the app's pyproject.toml.
        num_supernodes: how many SuperNodes join.
        node_config: what each SuperNode is told besides, by its partition, as in ``key="value"``.

    Raises:
        FlowerError: a program did not start or did not join.
    """

    def __init__(
        self,
        project: Path,
        *,
        num_supernodes: int = 2,
        node_config: Callable[[int], str] = lambda partition: "",
    ) -> None:
        super().__init__(project, simulation=False)
        self.num_supernodes = num_supernodes
        self.node_config = node_config

    def _started(self, stack: ExitStack) -> None:
        nodes = [self._join(stack, partition) for partition in range(self.num_supernodes)]
        for node in nodes:  # all are told to stop before the first is waited for
            stack.callback(node.let_go)
        deadline = time.monotonic() + _JOIN
        while (online := self._online()) < self.num_supernodes:
            ended = [node for node in nodes if not node.running]
            if ended:
                raise FlowerError(
                    f"a SuperNode ended before it had joined. The end of its log:\n"
                    f"{ended[0].log_tail()}"
                )
            if time.monotonic() > deadline:
                raise FlowerError(
                    f"{online} of {self.num_supernodes} SuperNodes joined within {_JOIN:.0f} s. "
                    f"The end of the first one's log:\n{nodes[0].log_tail()}"
                )
            time.sleep(0.2)

    def _join(self, stack: ExitStack, partition: int) -> Program:
        home = self.home / f"node-{partition}"
        home.mkdir()
        port = Port()
        stack.callback(port.close)
        command = ["flower-supernode", "--insecure", "--superlink", self.port.address]
        command += ["--host", "127.0.0.1", "--port", str(port.number), "--node-config"]
        own = f"partition-id={partition} num-partitions={self.num_supernodes}"
        command += [f"{own} {self.node_config(partition)}".strip()]
        return stack.enter_context(self._program(command, home, Path.cwd()))

    def _online(self) -> int:
        nodes = self.ask("supernode", "list")["nodes"]
        return sum(node["status"] == "online" for node in nodes)


def _follow(program: Program, transcript: Transcript, *, seconds: float = math.inf) -> None:
    deadline = time.monotonic() + seconds
    running = True
    while running and time.monotonic() < deadline:
        running = program.running
        for line in program.new_lines():
            transcript.take(line)
        time.sleep(_POLL if running else 0.0)


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
