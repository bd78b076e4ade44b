"""A SuperLink and SuperNodes as separate programs, which can be killed and started again one by one.

It is what a real deployment is, on one machine: over the loopback, in clear or with TLS and node authentication, with a
database in memory or in a file. Each SuperNode has a ``FLWR_HOME`` of its own (one home for all would let two
ClientApps unpack the same bundle at once). Whoever wants to disturb the network puts a proxy between by ``route``.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fl_app.flower import own_machine, own_node
from fl_app.flower.certificates import Certificates
from fl_app.flower.link import SuperLink
from fl_app.flower.processes import FlowerError, Port, Program

_JOIN = 60.0  # seconds for all SuperNodes
_REJOIN = 120.0  # seconds for a SuperNode that was killed; Flower counts it online for 60
_AGAIN = 2.0  # seconds between two starts of a SuperNode that is refused
_JOINED = re.compile(r"SuperNode ID: (\d+)")


class Deployment(SuperLink):
    """A SuperLink and SuperNodes that talk over the loopback, as a context manager.

    Each SuperNode has the node configuration ``partition-id`` and ``num-partitions``.

    Args:
        project: directory with the app's pyproject.toml.
        num_supernodes: how many SuperNodes join.
        node_config: what each SuperNode is told besides, by its partition, as in ``key="value"``.
        certificates: folder that `trellis certs all` has filled, with keys ``node-0``, ``node-1``, …: the SuperLink
            then has TLS, and takes only SuperNodes whose keys were registered. None: all is in clear.
        database: file of the SuperLink's state; without one it is gone with the SuperLink.
        route: address that a SuperNode is told, by its partition and the SuperLink's own address.
        link_environment: environment variables of the SuperLink and of the ServerApp that it starts.
        node_environment: those of a SuperNode and its ClientApps, by its partition.

    What is a function or a mapping is asked at each start of a program, the later ones too.

    Attributes:
        nodes: the SuperNodes' programs by partition; the ones that run, or ran last.

    Raises:
        FlowerError: ``project`` holds no Flower app, a key or certificate lacks, or a program did not start.
    """

    def __init__(
        self,
        project: Path,
        *,
        num_supernodes: int = 2,
        node_config: Callable[[int], str] = lambda partition: "",
        certificates: Path | None = None,
        database: Path | None = None,
        route: Callable[[int, str], str] = lambda partition, link: link,
        link_environment: Mapping[str, str] | None = None,
        node_environment: Callable[[int], Mapping[str, str]] = lambda partition: {},
    ) -> None:
        super().__init__(project, simulation=False)
        self.num_supernodes = num_supernodes
        self.node_config = node_config
        self.database = None if database is None else database.absolute()
        self.route = route
        self.link_environment = {} if link_environment is None else link_environment
        self.node_environment = node_environment
        self.nodes: list[Program] = []
        self._ports: list[Port] = []
        self._files = None if certificates is None else Certificates(certificates.absolute())
        if self._files is not None:
            self.authority = self._files.authority
            _complete(self._files, num_supernodes)

    def restart_link(self) -> None:
        """Start the SuperLink again, on the same port and with the same database, and wait until it answers.

        One that still runs is ended before, in order.

        Raises:
            FlowerError: it has no database to start from, or did not start.
        """
        if self.database is None:
            raise FlowerError("a SuperLink can be started again from its database only: give one")
        self.link.close()
        self._start_link()

    def restart_node(self, partition: int, *, seconds: float = _REJOIN) -> None:
        """Start a SuperNode again, with the same key and home, and wait until the SuperLink has taken it.

        One that still runs is ended before, in order. One that was killed is refused as long as the SuperLink believes
        it online, and is started again until it is not, as a service manager would do.

        Args:
            partition: which.
            seconds: to wait at most.

        Raises:
            FlowerError: it was not taken in time.
        """
        self.nodes[partition].close()
        deadline = time.monotonic() + seconds
        while True:
            self.nodes[partition] = node = self._join(partition)
            while node.running and not self.joined(partition) and time.monotonic() < deadline:
                time.sleep(0.1)
            if self.joined(partition) and node.running:
                return
            if time.monotonic() > deadline:
                raise FlowerError(
                    f"SuperNode {partition} was not taken within {seconds:.0f} s. "
                    f"The end of its log:\n{node.log_tail()}"
                )
            node.close()
            time.sleep(_AGAIN)

    def joined(self, partition: int) -> bool:
        """Whether the SuperLink has taken a SuperNode since its last start."""
        return self.node_id(partition) is not None

    def node_id(self, partition: int) -> int | None:
        """Flower's id of a SuperNode; ``None`` until the SuperLink has taken it."""
        log = self.nodes[partition].log.read_text(encoding="utf-8", errors="replace")
        found = _JOINED.search(log)
        return None if found is None else int(found[1])

    def _link_command(self) -> Sequence[str]:
        kept = [] if self.database is None else ["--database", str(self.database)]
        if self._files is None:
            return [*superlink_program(), "--insecure", *kept]
        return [*superlink_program(), *secured(self._files), *kept]

    def _link_extra(self) -> Mapping[str, str]:
        return self.link_environment

    def _started(self) -> None:
        if self._files is not None:
            self._register(self._files)
        for partition in range(self.num_supernodes):
            self.nodes.append(self._join(partition))
        deadline = time.monotonic() + _JOIN
        while (online := sum(map(self.joined, range(self.num_supernodes)))) < self.num_supernodes:
            ended = [node for node in self.nodes if not node.running]
            if ended:
                raise FlowerError(
                    f"a SuperNode ended before it had joined. The end of its log:\n"
                    f"{ended[0].log_tail()}"
                )
            if time.monotonic() > deadline:
                raise FlowerError(
                    f"{online} of {self.num_supernodes} SuperNodes joined within {_JOIN:.0f} s. "
                    f"The end of the first one's log:\n{self.nodes[0].log_tail()}"
                )
            time.sleep(0.1)

    def _register(self, files: Certificates) -> None:
        names = [f"node-{partition}" for partition in range(self.num_supernodes)]
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(lambda name: self.register(files.node_public(name), name), names))

    def _join(self, partition: int) -> Program:
        home = self.home / f"node-{partition}"
        home.mkdir(exist_ok=True)
        if partition == len(self._ports):
            self._ports.append(Port())
        command = [*supernode_program(), "--superlink", self.route(partition, self.port.address)]
        if self._files is None:
            command += ["--insecure"]
        else:
            command += ["--root-certificates", str(self._files.authority)]
            key = self._files.node_key(f"node-{partition}")
            command += ["--auth-supernode-private-key", str(key)]
        command += ["--host", "127.0.0.1", "--port", str(self._ports[partition].number)]
        own = f"partition-id={partition} num-partitions={self.num_supernodes}"
        command += ["--node-config", f"{own} {self.node_config(partition)}".strip()]
        return self._start("flower-supernode", command, home, self.node_environment(partition))

    def _end(self) -> None:
        for node in self.nodes:  # all are told to stop before the first is waited for
            node.let_go()
        for node in self.nodes:
            node.close()
        super()._end()
        for port in self._ports:
            port.close()


def superlink_program() -> list[str]:
    """The SuperLink that takes commands from its own machine only."""
    return [sys.executable, "-m", own_machine.__name__]


def supernode_program() -> list[str]:
    """The SuperNode that ends when it has lost its SuperLink."""
    return [sys.executable, "-m", own_node.__name__]


def secured(files: Certificates) -> list[str]:
    """A SuperLink's options for TLS and node authentication."""
    return [
        "--enable-supernode-auth",
        *("--ssl-ca-certfile", str(files.authority)),
        *("--ssl-certfile", str(files.server)),
        *("--ssl-keyfile", str(files.server_key)),
    ]


def _complete(files: Certificates, num_supernodes: int) -> None:
    """Refuse a folder that lacks something.

    Raises:
        FlowerError: a file is not there.
    """
    needed = [files.authority, files.server, files.server_key]
    for partition in range(num_supernodes):
        name = f"node-{partition}"
        needed += [files.node_key(name), files.node_public(name)]
    lacking = [path for path in needed if not path.is_file()]
    if lacking:
        raise FlowerError(
            f"{lacking[0]} is not there: trellis certs all {files.folder} --nodes {num_supernodes}"
        )
