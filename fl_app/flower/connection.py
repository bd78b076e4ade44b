"""A SuperLink that runs, as Flower's command line reaches it: runs are started, followed, judged by their summary."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fl_app.flower.processes import STOP, FlowerError, Program, environment
from fl_app.flower.stream import Transcript, run_command

_STOP = 15.0  # seconds that a run has to end by itself after Ctrl-C
_POLL = 0.1


class Connection:
    """Flower's command line with a ``FLWR_HOME`` that names one SuperLink.

    Args:
        project: directory with the app's pyproject.toml.
        home: directory that stands in for ``~/.flwr``; the SuperLink's own, so that a run that it holds can be asked
            to stop.

    Raises:
        FlowerError: ``project`` holds no Flower app.
    """

    def __init__(self, project: Path, home: Path) -> None:
        self.project = project.resolve()
        self.home = home
        if not (self.project / "pyproject.toml").is_file():
            raise FlowerError(
                f"{self.project} holds no pyproject.toml, so there is no Flower app to run; "
                "run from a checkout of the project."
            )

    def write(self, address: str, authority: Path | None) -> None:
        """Write which SuperLink it is.

        Args:
            address: host and port.
            authority: absolute path of the certificate that vouches for it; ``None`` where it speaks no TLS.
        """
        trust = (
            "insecure = true"
            if authority is None
            # JSON's strings are TOML's, too.
            else f"root-certificates = {json.dumps(str(authority), ensure_ascii=False)}"
        )
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n'
            f'[superlink.local]\naddress = "{address}"\n{trust}\n',
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
        (self.home / STOP).unlink(missing_ok=True)  # an earlier run's
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
            self._show_logs(echo)
        return 1 if code is None else code

    def _program(self, command: Sequence[str], home: Path, cwd: Path) -> Program:
        return Program(command, env=environment(home), cwd=cwd, log=home / f"{command[0]}.log")

    def _explain(self, transcript: Transcript, echo: Callable[[str], None]) -> None:
        if transcript.run_id is None:
            echo("Flower did not start the run.")
            return
        try:
            run = self.ask("ls", "--run-id", transcript.run_id)["runs"][0]
        except FlowerError as error:
            echo(f"The run left no summary, and its SuperLink does not say why: {error}")
            return
        echo(f"The run left no summary. Flower's status of it: {run['status']}.")
        echo(run["status-details"])

    def _show_logs(self, echo: Callable[[str], None]) -> None:
        for name in ("flwr.log", "flower-superlink.log"):
            echo(f"Flower's log: {self.home / name}")

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Ask Flower's command line a question that it answers in JSON.

        Args:
            arguments: a sub-command of ``flwr`` with its arguments, without ``--format``.

        Raises:
            FlowerError: the command failed, or the folder that names the SuperLink is gone: Flower would start one of
                its own, in the background, and ask that.
        """
        if not (self.home / "config.toml").is_file():
            raise FlowerError(f"{self.home} names no SuperLink: it is gone, or was never started")
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

    def register(self, public: Path, name: str) -> None:
        """Make a SuperNode's public key known to the SuperLink; one that knows it already stays as it is.

        Raises:
            FlowerError: the SuperLink did not take it.
        """
        try:
            self.ask("supernode", "register", str(public), "--name", name)
        except FlowerError as error:
            if "already in use" not in str(error):
                raise


def _follow(program: Program, transcript: Transcript, *, seconds: float = math.inf) -> None:
    deadline = time.monotonic() + seconds
    running = True
    while running and time.monotonic() < deadline:
        running = program.running
        for line in program.new_lines():
            transcript.take(line)
        time.sleep(_POLL if running else 0.0)
