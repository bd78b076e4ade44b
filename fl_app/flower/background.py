"""A secured SuperLink and SuperNodes on one machine that outlive the command which started them.

    <folder>/certs/         what `trellis certs all` makes
    <folder>/superlink/     the SuperLink's FLWR_HOME, database and log, and Flower's command line's configuration
    <folder>/node-0/ …      those of each SuperNode
    <folder>/programs.json  which processes were started: id, boot, start within that boot, log
    <folder>/.lock          held by whoever starts or ends programs; .run.lock by whoever waits for a run

A process is taken for one of ours only if its id, boot and start are those that were noted, since the system gives ids
away again. None of the three moves when the clock is set, as a device without a battery for its clock does after each
boot. A program begins only once it is on the list, so that a kill leaves none that the list does not name. What was
started is ended from that list alone, and a second start leaves alone what still runs. Keys, database and what clients
remember stay, so that a federation goes on after a reboot where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil
from filelock import FileLock, Timeout

from fl_app.flower.certificates import Certificates, make_missing
from fl_app.flower.connection import Connection
from fl_app.flower.deployment import secured, superlink_program, supernode_program
from fl_app.flower.processes import FlowerError, Port, end_family, environment, healthy
from fl_app.services.files import remove_leftovers, write_atomically

_READY = 60.0  # seconds for each program; one or two suffice on an idle machine
_JOIN = 120.0  # seconds for a node that was killed: Flower counts it online for 60
_TURN = 1.0  # seconds that another command is waited for
_FORMAT = "trellis-deployment-2"
_TAIL = 20
_GATE = """
import os, sys
if os.read(0, 1):
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.execvp(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class Started:
    """A process as it was noted.

    Attributes:
        name: ``superlink``, ``node-0``, ….
        pid: process id.
        boot: which of the machine's boots it belongs to; empty where the system does not say.
        start: when it was started, to the digit as the system says it: clock ticks since that boot, elsewhere than on
            Linux seconds since the epoch.
        since: the same by the clock of that moment, in seconds since the epoch; for people alone.
        log: file with its output.
    """

    name: str
    pid: int
    boot: str
    start: str
    since: float
    log: str

    @classmethod
    def of(cls, name: str, pid: int, log: Path) -> Self:
        """A process that runs, as it is to be noted.

        Raises:
            psutil.NoSuchProcess: it does not run.
        """
        return cls(name, pid, _boot(), _start(pid), time.time(), str(log))

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"

    def process(self) -> psutil.Process | None:
        """The process, where it still runs.

        Raises:
            FlowerError: whether it does is hidden from this user.
        """
        if self.boot != _boot():
            return None
        try:
            found = psutil.Process(self.pid)
            same = _start(self.pid) == self.start
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.AccessDenied:
            raise FlowerError(self._hidden()) from None
        except psutil.NoSuchProcess:
            # Where other users' processes are hidden (proc's hidepid), they look as if they had ended.
            try:
                os.kill(self.pid, 0)
            except PermissionError:
                raise FlowerError(self._hidden()) from None
            except ProcessLookupError:
                pass
            return None

    def _hidden(self) -> str:
        return f"{self} can't be seen: ask as the user who started it"

    def tail(self) -> str:
        """The last lines of its log."""
        lines = Path(self.log).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL:])


class Background:
    """A deployment in a folder.

    Args:
        folder: that holds all of it; made where it lacks.
        project: directory with the app's pyproject.toml.

    Raises:
        FlowerError: ``project`` holds no Flower app, or the folder's list can't be read.
    """

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder = folder.absolute()
        self.files = Certificates(self.folder / "certs")
        self.connection = Connection(project, self.folder / "superlink")

    @property
    def programs(self) -> list[Started]:
        """What was started, the SuperLink first; some may have ended."""
        try:
            noted = json.loads((self.folder / "programs.json").read_text(encoding="utf-8"))
            if noted["format"] != _FORMAT:
                raise ValueError(f"its format is {noted['format']!r}")
            return [Started(**one) for one in noted["programs"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise FlowerError(f"{self.folder}/programs.json can't be read: {error}") from None

    @property
    def address(self) -> str:
        """Where this machine's programs reach the SuperLink."""
        with (self.connection.home / "config.toml").open("rb") as file:
            return str(tomllib.load(file)["superlink"]["local"]["address"])

    def up(
        self, nodes: int, *, host: str, port: int, node_config: str, say: Callable[[str], None]
    ) -> None:
        """Start what does not run, and wait until all SuperNodes have joined.

        Args:
            nodes: how many SuperNodes.
            host: address to listen on; of any but the loopback, other machines reach the Fleet interface.
            port: of the SuperLink; a SuperLink that runs stays where it is.
            node_config: what each SuperNode is told beside its partition.
            say: receives a line for each program, when it has been started or because it runs already.

        Raises:
            FlowerError: one did not start, and what has started goes on; or another command is at work here.
            ValueError: host or a key is wrong.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            self._start_missing(nodes, host, port, node_config, say)

    def _start_missing(
        self, nodes: int, host: str, port: int, node_config: str, say: Callable[[str], None]
    ) -> None:
        self.connection.home.mkdir(mode=0o700, exist_ok=True)
        names = [f"node-{number}" for number in range(nodes)]
        here = "127.0.0.1" if host in {"0.0.0.0", "localhost"} else host
        make_missing(self.files.folder, [here], names)
        running = {one.name: one for one in self.programs if one.process() is not None}
        wanted = f"[{here}]:{port}" if ":" in here else f"{here}:{port}"
        if (link := running.pop("superlink", None)) is not None:
            address = self.address
            other = "" if address == wanted else f", not at {wanted}: for that, `down` comes first"
            say(f"{link} runs already at {address}{other}")
        else:
            address = wanted
            if healthy(address, None) or healthy(address, self.files.authority):
                raise FlowerError(f"another SuperLink answers at {address}: choose another --port")
            self.connection.write(address, self.files.authority)
            say(f"{self._start_link(host, port, address)} started at {address}")
        for name in names:
            if (node := running.pop(name, None)) is not None:
                say(f"{node} runs already")
                continue
            self.connection.register(self.files.node_public(name), name)
            number = name.removeprefix("node-")
            own = f"partition-id={number} num-partitions={nodes} {node_config}".strip()
            say(f"{self._start_node(name, address, own)} started")
        for node in running.values():
            say(f"{node} runs already, beside the {nodes} asked for")

    def down(self, say: Callable[[str], None]) -> None:
        """End what was started and still runs, SuperNodes first.

        Args:
            say: receives a line for each program, when it has been ended or because it had ended before, or one that
                nothing was started.

        Raises:
            FlowerError: a program could not be ended or seen, and stays on the list; or another command is
                at work here.
        """
        nothing = f"nothing was started from {self.folder}"
        if not self.folder.is_dir():
            say(nothing)
            return
        with self._alone():
            if not self.programs:
                say(nothing)
            left: dict[Started, str] = {}
            for one in reversed(self.programs):
                try:
                    process = one.process()
                    if process is not None:
                        end_family(process)
                        say(f"{one} ended")
                    else:
                        say(f"{one} had ended before")
                except FlowerError as error:
                    left[one] = str(error)
                except (psutil.AccessDenied, psutil.TimeoutExpired):
                    left[one] = f"{one} could not be ended"
            if left:
                self._note([one for one in self.programs if one in left])
                raise FlowerError("; ".join(left.values()) + f". See {self.folder}/programs.json")
            (self.folder / "programs.json").unlink(missing_ok=True)

    def run(self, overrides: Sequence[str], *, echo: Callable[[str], None]) -> int:
        """Run the app on what was started, and wait for the end.

        Args:
            overrides: as `Connection.run` takes them.
            echo: receives every line that the app prints.

        Returns:
            The run's exit code.

        Raises:
            FlowerError: no SuperLink runs here, or another run from this folder goes on: they would share a log,
                and Ctrl-C would stop both.
        """
        link = next((one for one in self.programs if one.name == "superlink"), None)
        if link is None or link.process() is None:
            raise FlowerError("no SuperLink runs here: trellis deploy up")
        try:
            with FileLock(self.folder / ".run.lock", timeout=_TURN, mode=0o600):
                return self.connection.run(overrides, echo=echo)
        except Timeout:
            raise FlowerError(f"another run from {self.folder} goes on: wait for it") from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The folder for this process, against a second one that would overwrite the list."""
        try:
            with FileLock(self.folder / ".lock", timeout=_TURN, mode=0o600):
                remove_leftovers(self.folder)
                yield
        except Timeout:
            raise FlowerError(
                f"another command starts or ends programs in {self.folder}: wait for it"
            ) from None

    def _start_link(self, host: str, port: int, address: str) -> Started:
        command = [*superlink_program(), *secured(self.files), "--isolation", "subprocess"]
        command += ["--host", host, "--port", str(port)]
        command += ["--database", str(self.connection.home / "superlink.db")]
        log = self.connection.home / "flower-superlink.log"
        started = self._start("superlink", command, log, environment(self.connection.home))
        self._wait(started, lambda: healthy(address, self.files.authority), _READY)
        return started

    def _start_node(self, name: str, address: str, node_config: str) -> Started:
        home = self.folder / name
        home.mkdir(mode=0o700, exist_ok=True)
        env = {**environment(self.connection.home), "FLWR_HOME": str(home)}
        log = home / "flower-supernode.log"
        deadline = time.monotonic() + _JOIN
        while True:
            port = Port()
            command = [*supernode_program(), "--superlink", address]
            command += ["--root-certificates", str(self.files.authority)]
            command += ["--auth-supernode-private-key", str(self.files.node_key(name))]
            command += ["--host", "127.0.0.1", "--port", str(port.number)]
            started = self._start(name, [*command, "--node-config", node_config], log, env)
            try:
                self._wait(
                    started, lambda: "SuperNode ID: " in log.read_text("utf-8", "replace"), _READY
                )
                return started
            except FlowerError:
                # One that was killed is refused for as long as the SuperLink believes it online.
                again = "Failed to activate SuperNode" in log.read_text("utf-8", "replace")
                if not again or time.monotonic() > deadline:
                    raise
            finally:
                port.close()
            time.sleep(2.0)

    def _start(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]
    ) -> Started:
        with held(command, log, env) as pid:
            started = Started.of(name, pid, log)
            # What still runs stays on the list, also under the same name: `down` must find it.
            kept = [one for one in self.programs if one.name != name or one.process() is not None]
            self._note([*kept, started])
        return started

    def _note(self, programs: Sequence[Started]) -> None:
        noted = {"format": _FORMAT, "programs": [asdict(one) for one in programs]}
        text = json.dumps(noted, indent=1) + "\n"
        write_atomically(self.folder / "programs.json", text.encode())

    def _wait(self, started: Started, ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = started.process() is None
            if ended or time.monotonic() > deadline:
                what = "ended" if ended else f"was not ready within {seconds:.0f} s"
                raise FlowerError(f"{started.name} {what}. The end of its log:\n{started.tail()}")
            time.sleep(0.1)


@contextmanager
def held(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[int]:
    """A program that begins when the block has ended, as the process whose id the block is given.

    Where the block raises, or this process is killed in it, the program never begins: until it is let go, another waits
    in its process for a byte on a pipe, and ends where the pipe closes without one.

    Args:
        command: program and arguments; it outlives this process.
        log: file that takes its output, emptied first.
        env: its whole environment.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GATE, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=Path.cwd(),
            start_new_session=True,
            bufsize=0,
        )
    gate = process.stdin
    assert gate is not None
    try:
        yield process.pid
    except BaseException:
        gate.close()
        process.wait()
        raise
    with (
        gate,
        contextlib.suppress(BrokenPipeError),
    ):  # it was killed: its end is seen as any other's
        gate.write(b"!")
    # Not waited for: it is to outlive this process, whose end hands it to the system.
    process.returncode = 0


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _start(pid: int) -> str:
    """When a process was started, as its pid's owner keeps it until its end whatever becomes of the clock.

    psutil's time is no such thing on Linux: it adds the ticks to the second of the boot, which moves with the clock.
    """
    if sys.platform != "linux":
        return repr(psutil.Process(pid).create_time())
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    except PermissionError:
        raise psutil.AccessDenied(pid) from None
    # The second field, the program's name, may hold blanks and parentheses; the start is the 22nd.
    return text.rpartition(")")[2].split()[19]
