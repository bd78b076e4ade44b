"""A node's own settings and data: is its node config what it means, may it take part in the run, has it examples.

The node config is read as `flower-supernode` reads it. What a device's operator pins is held against the run here, as
it will be when the first request comes. Nothing here knows of the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Final

import click
from flwr.common.config import parse_config_args

from clients.tasks import Examples
from fl_app.assembly import Assembly, make_client_half
from fl_app.checks import data
from fl_app.checks.check import Finding, together
from fl_app.config.faults import nearest
from fl_app.config.schema import DEFAULT_NUM_CLIENTS
from fl_app.node import KNOWN, PARTITION, Node
from strategies.protocols import ConfigValue

_PARTITIONS: Final = "num-partitions"
_PAIR: Final = re.compile(r"\S+?=(?:'[^']*'|\"[^\"]*\"|\S+)")
"""What Flower takes of a node config; it drops the rest without a word."""
_ALIKE: Final = 0.8


class NodeConfigError(ValueError):
    """A node config that Flower can't read."""


def parsed(text: str) -> dict[str, ConfigValue]:
    """The settings in a `--node-config`: `key=value` pairs of TOML, or a file that ends in .toml.

    Raises:
        NodeConfigError: it can't be read, or a part of it is no pair.
    """
    try:
        found: dict[str, ConfigValue] = parse_config_args([text])
    except (click.ClickException, OSError, ValueError) as error:
        raise NodeConfigError(f"--node-config {text!r}: {error}") from error
    rest = [] if text.endswith(".toml") else _PAIR.sub(" ", text).split()
    if rest:
        raise NodeConfigError(f"--node-config: {rest[0]!r} is no key=value; texts are in quotes")
    return found


class Device:
    """This node, as one client of a run.

    Args:
        assembly: of the run.
        settings: the node config.
    """

    def __init__(self, assembly: Assembly, settings: Mapping[str, ConfigValue]) -> None:
        self._assembly, self._settings = assembly, settings

    @cached_property
    def node(self) -> Node:
        """Its settings, checked; raises `ValueError`."""
        return Node(self._settings)

    @property
    def clients(self) -> int:
        """How many there are in all: as the node config says, or the run."""
        told = self._settings.get(_PARTITIONS)
        count = self._assembly.config.num_clients
        if isinstance(told, int) and not isinstance(told, bool) and told > 0:
            return told
        return DEFAULT_NUM_CLIENTS if count == "auto" else count

    def config(self) -> Finding:
        """Whether the node config says what its operator means, and lets the run happen."""
        known = KNOWN | {PARTITION, _PARTITIONS}
        strangers = sorted(key for key in self._settings if key not in known)
        guesses = {key: nearest(key, known, cutoff=_ALIKE) for key in strangers}
        slips = [f"{key} (did you mean {guess}?)" for key, guess in guesses.items() if guess]
        try:
            node = self.node
            told = [f"client {node.client} of {self.clients}, state in {node.folder}"]
            told += [f"{node.owner_key} is its key"] if node.owner_key else []
            told += [f"{node.pinned} pins what it sends"] if node.pinned else []
            if node.owner_key is not None and not node.owner_key.is_file():
                mend = "make one: trellis keys encrypted, or mend encrypted-key"
                return Finding("failed", f"there is no key {node.owner_key}", mend)
            _ = node.pause, node.memory, node.tells_profile  # raise where they are no such values
            make_client_half(self._assembly, "device", self._settings)
            node.admit_trainer(self._assembly.trainer)
        except ValueError as error:
            hint = (
                f"mend {', '.join(slips)}"
                if slips
                else "mend the node config, or ask for another run"
            )
            return Finding("failed", _told(error), hint)
        if node.client >= self.clients:
            said = f"client {node.client} is none of {self.clients}, which are counted from 0"
            return Finding("failed", said, f"mend {PARTITION}, or num_clients")
        if slips:
            mend = f"mend the name, or leave it: it is read by nobody ({', '.join(slips)})"
            return Finding("warning", "; ".join(told), mend)
        return Finding("ok", "; ".join(told))

    def data(self) -> Finding:
        """Whether the task's data load, are sane, and leave this node a part."""
        assembly = self._assembly
        found = [data.labels(assembly.task), data.inputs(assembly.task)]
        own = self.own
        held = int(assembly.data(self.clients).label_counts()[self.node.client].astype(bool).sum())
        if not len(own):
            mend = "mend partition-id or num-partitions, or how the task's data are cut"
            found.append(Finding("failed", "this node's own part is empty", mend))
        else:
            found.append(Finding("ok", f"its own part has {len(own):,} examples of {held} classes"))
        return together(found)

    @property
    def own(self) -> Examples:
        """What this node trains on."""
        return self._assembly.data(self.clients).train(self.node.client)


def _told(error: ValueError) -> str:
    faults = getattr(error, "faults", None)
    return "; ".join(fault.message for fault in faults) if faults else str(error)
