"""A secured SuperLink and SuperNodes on one machine that outlive the command which started them.

    <folder>/certs/         what `trellis certs all` makes
    <folder>/superlink/     the SuperLink's FLWR_HOME, database and log, and Flower's command line's configuration
    <folder>/node-0/ …      those of each SuperNode
    <folder>/programs.json  which processes were started: id, start time, log

A process is taken for one of ours only if its id and its start time are those that were noted, since the system gives
ids away again. What was started is ended from that list alone, and a second start leaves alone what still runs. Keys,
database and what clients remember stay, so that a federation goes on after a reboot where it was.
"""

from __future__ import annotations

import json
import subprocess
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from fl_app.flower.certificates import Certificates, make_missing
from fl_app.flower.connection import Connection
from fl_app.flower.deployment import secured, superlink_program, supernode_program
from fl_app.flower.processes import FlowerError, Port, environment, healthy
from fl_app.flower.tether import GRACE, PATIENCE

_READY = 60.0  # seconds for each program; one or two suffice on an idle machine
_JOIN = 120.0  # seconds for a node that was killed: Flower counts it online for 60
_FORMAT = "trellis-deployment-1"
_TAIL = 20


@dataclass(frozen=True)
class Started:
    """A process as it was noted.

    Attributes:
        name: ``superlink``, ``node-0``, ….
        pid: process id.
        started: when, in seconds since the epoch, by the system's own account.
        log: file with its output.
    """

    name: str
    pid: int
    started: float
    log: str

    def process(self) -> psutil.Process | None:
        """The process, where it still runs."""
        try:
            found = psutil.Process(self.pid)
            # The system counts from its boot, which it takes for another second when its clock is set.
            same = abs(found.create_time() - self.started) < 2.0
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None

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
            say: receives a line for each program that was started.

        Raises:
            FlowerError: one did not start; what has started goes on.
            ValueError: host or a key is wrong.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.connection.home.mkdir(mode=0o700, exist_ok=True)
        names = [f"node-{number}" for number in range(nodes)]
        here = "127.0.0.1" if host in {"0.0.0.0", "localhost"} else host
        make_missing(self.files.folder, [here], names)
        running = {one.name for one in self.programs if one.process() is not None}
        if "superlink" in running:
            address = self.address
        else:
            address = f"[{here}]:{port}" if ":" in here else f"{here}:{port}"
            if healthy(address, None) or healthy(address, self.files.authority):
                raise FlowerError(f"another SuperLink answers at {address}: choose another --port")
            self.connection.write(address, self.files.authority)
            self._start_link(host, port, address)
            say(f"superlink at {address}")
        for name in names:
            if name not in running:
                self.connection.register(self.files.node_public(name), name)
                number = name.removeprefix("node-")
                own = f"partition-id={number} num-partitions={nodes} {node_config}".strip()
                self._start_node(name, address, own)
                say(name)

    def down(self, say: Callable[[str], None]) -> None:
        """End what was started and still runs, SuperNodes first.

        Args:
            say: receives a line for each program that was ended.
        """
        programs = self.programs
        for one in reversed(programs):
            process = one.process()
            if process is not None:
                _end(process)
                say(f"{one.name} (process {one.pid}) ended")
        (self.folder / "programs.json").unlink(missing_ok=True)

    def _start_link(self, host: str, port: int, address: str) -> None:
        command = [*superlink_program(), *secured(self.files), "--isolation", "subprocess"]
        command += ["--host", host, "--port", str(port)]
        command += ["--database", str(self.connection.home / "superlink.db")]
        log = self.connection.home / "flower-superlink.log"
        started = self._start("superlink", command, log, environment(self.connection.home))
        self._wait(started, lambda: healthy(address, self.files.authority), _READY)

    def _start_node(self, name: str, address: str, node_config: str) -> None:
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
                return
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
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=Path.cwd(),
                start_new_session=True,
            )
        # Not waited for: it is to outlive this process, whose end hands it to the system.
        process.returncode = 0
        started = Started(name, process.pid, psutil.Process(process.pid).create_time(), str(log))
        kept = [one for one in self.programs if one.name != name]
        noted = [asdict(one) for one in [*kept, started]]
        part = self.folder / "programs.json.part"
        text = json.dumps({"format": _FORMAT, "programs": noted}, indent=1)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.folder / "programs.json")
        return started

    def _wait(self, started: Started, ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = started.process() is None
            if ended or time.monotonic() > deadline:
                what = "ended" if ended else f"was not ready within {seconds:.0f} s"
                raise FlowerError(f"{started.name} {what}. The end of its log:\n{started.tail()}")
            time.sleep(0.1)


def _end(root: psutil.Process) -> None:
    """End a process and its descendants: ask the root, wait, ask the rest, kill."""
    family = [root, *root.children(recursive=True)]
    root.terminate()
    psutil.wait_procs([root], timeout=GRACE)
    left = [process for process in family if process.is_running()]
    for signal_ in ("terminate", "kill"):
        for process in left:
            try:
                getattr(process, signal_)()
            except psutil.Error:
                continue  # it has ended meanwhile, which is what was wanted
        _, left = psutil.wait_procs(left, timeout=PATIENCE)
