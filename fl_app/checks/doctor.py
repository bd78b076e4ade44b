"""A node looked over before it joins: which checks there are, in which order, and what each needs.

What is found out by training is tried in a process of its own. What the checks look at is in the files beside this one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
from flwr.supercore.utils import get_flwr_home

from clients.power import LEAST_BATTERY, SystemPower
from fl_app.assembly import Assembly
from fl_app.checks import credentials, machine, training
from fl_app.checks.check import Check, Finding
from fl_app.checks.device import Device
from fl_app.checks.link import Link
from fl_app.checks.steps import Workload
from fl_app.config.schema import Config
from strategies.protocols import ConfigValue


@dataclass(frozen=True)
class Patient:
    """What is known of a node.

    Attributes:
        config: of the run that it is to take part in.
        settings: its node config; None where it has none to look at.
        link: the SuperLink; None where none is named.
        ca: file of the authority that it trusts.
        key: file of its private key.
        port: that its SuperNode will use.
    """

    config: Config
    settings: Mapping[str, ConfigValue] | None = None
    link: Link | None = None
    ca: Path | None = None
    key: Path | None = None
    port: int = 9094


@contextmanager
def examination(patient: Patient) -> Iterator[list[Check]]:
    """The checks of a node; what they need on the disk is gone with the context."""
    with tempfile.TemporaryDirectory(prefix="trellis-doctor-") as scratch:
        yield _Doctor(patient, Path(scratch)).checks()


class _Doctor:
    def __init__(self, patient: Patient, scratch: Path) -> None:
        self._patient = patient
        self._apart = patient.config.model_copy(update={"output_dir": scratch})
        self._needed: int | None = None

    @cached_property
    def _assembly(self) -> Assembly:
        return Assembly(self._apart)

    @cached_property
    def _device(self) -> Device:
        return Device(self._assembly, self._patient.settings or {"partition-id": 0})

    def checks(self) -> list[Check]:
        """In their order: the machine, its link, then what the run asks of it, and memory, which that decides."""
        return [
            Check("versions", machine.versions),
            Check("processors", machine.processors),
            Check("disk", self._disk),
            Check("open files", machine.descriptors),
            Check("port", lambda: machine.port(self._patient.port)),
            Check("leftovers", machine.leftovers),
            *self._credentials(),
            *self._way(),
            Check("task", self._task),
            Check("node config", self._node_config, ("task",)),
            Check("battery", self._battery, ("node config",)),
            Check("data", lambda: self._device.data(), ("task", "node config")),
            Check("training step", self._step, ("data",)),
            Check("memory", lambda: machine.memory(self._needed)),
        ]

    def _credentials(self) -> Iterator[Check]:
        patient = self._patient
        if (ca := patient.ca) is not None:
            yield Check("authority", lambda: credentials.authority(ca))
        if (key := patient.key) is not None:
            yield Check("node key", lambda: credentials.node_key(key))

    def _way(self) -> Iterator[Check]:
        link = self._patient.link
        if link is None:
            said = "no --superlink is named: reachability, TLS and clock are not looked at"
            yield Check("superlink", lambda: Finding("skipped", said))
            return
        yield Check("superlink", link.tcp)
        trusted = ("authority",) if self._patient.ca is not None else ()
        yield Check("tls", link.tls, ("superlink", *trusted))
        yield Check("health", link.health, ("tls",))
        yield Check("clock", link.clock, ("health",))

    def _disk(self) -> Finding:
        places = {"FLWR_HOME": get_flwr_home(), "temporary files": Path(tempfile.gettempdir())}
        if self._patient.settings is not None:
            with suppress(ValueError):  # the node config's own check says what is wrong with it
                places = {"client state": self._device.node.folder, **places}
        return machine.disks(places)

    def _task(self) -> Finding:
        config, task = self._patient.config, self._assembly.task
        return Finding(
            "ok",
            f"{config.task.name} loads: {len(task.train()):,} to train on, model {config.model.name}, client"
            f" {config.client.name}",
        )

    def _node_config(self) -> Finding:
        if self._patient.settings is None:
            return Finding(
                "ok", "none is named: looked at as client 0 (--node-config 'partition-id=0')"
            )
        return self._device.config()

    def _battery(self) -> Finding:
        if self._patient.settings is None:
            return machine.battery(SystemPower())
        guard = self._device.node.pause
        least = LEAST_BATTERY if guard is None else guard.least
        return machine.battery(self._device.node.power, least)

    def _step(self) -> Finding:
        assembly = self._assembly
        workload = Workload.of(
            assembly.task, assembly.module(), assembly.trainer, self._apart.travel
        )
        tests = self._apart.evaluate.batch_size
        finding, took = training.batch(workload, [self._device.own], tests)
        if took is not None:
            # A ClientApp is a process of its own: with imports and data, as this one, and what the step took.
            self._needed = took.bytes + psutil.Process().memory_info().rss
        return finding
