"""The clients' end of a run: the client of a process, its half of the collector, and where it keeps what it remembers.

Where clients run decides what they may be told by whom: the engine's are the run's own, attackers among them; a device
takes keys, folder and limits from its operator's node config (`fl_app.node`) alone, never from a run. Must not know the
server's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from clients.client import Client
from clients.half_done import HalfDoneFits
from clients.lora.profile import return_freed_memory
from clients.micro_batch import FreeMemory
from clients.retrying import ONCE, Retry
from clients.store import ClientStore
from fl_app.assembly.shared import Assembly
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import Config
from fl_app.config.targets import build
from fl_app.encryption import compute_client, owning
from fl_app.node import Node
from strategies.downlink import HeldModels
from strategies.protocols import ClientHalf, ClientOwn, ConfigValue

HALF_DONE = "half-done"
"""Among what clients keep of a run: local training that a process died in."""

RUNS = "runs"
"""In a device's folder: what it keeps of each run, and can do without when the run is over."""

Place = Literal["engine", "simulation", "device"]
"""Where clients run: in the engine's workers, in a simulation of Flower's, or each on a machine of its own."""


def make_client_half(
    assembly: Assembly, place: Place, settings: Mapping[str, ConfigValue] | None = None
) -> ClientHalf:
    """The collector's half on the clients of this process.

    Args:
        assembly: of the run.
        place: where it runs.
        settings: node config of the SuperNode, where there is one.

    Raises:
        ConfigError: what the client must bring along is missing, keys, say; or the run asks for what a device's
            operator has ruled out.
    """
    config, collector = assembly.config, assembly.collector()
    try:
        if place != "device":
            return collector.client_half(ClientOwn(config.client_state_dir, {}, simulated=True))
        node = Node(dict(settings or {}))
        half = collector.client_half(ClientOwn(node.folder, node.settings, simulated=False))
        node.admit(collector, half)
        return half
    except ValueError as error:
        raise ConfigError([Fault("collector", str(error), config.collector.name)]) from error


def make_client(
    assembly: Assembly,
    place: Place = "device",
    settings: Mapping[str, ConfigValue] | None = None,
) -> Client:
    """The client of a process.

    Args:
        assembly: of the run.
        place: where it runs; only the engine's clients may be told to lie.
        settings: node config of the SuperNode, where there is one.

    Raises:
        ConfigError: as `make_client_half`.
    """
    config, engine = assembly.config, place == "engine"
    half = make_client_half(assembly, place, settings)
    node = _admitted(assembly, settings) if place == "device" else None
    if config.ranks is not None or (node is not None and node.memory is not None):
        return_freed_memory()  # else a budget does not hold: the heap keeps what a step has freed
    folder = config.client_state_dir if node is None else node.folder
    own = _own_folder(config, node)
    relayed = assembly.encrypted and compute_client(config) is not None
    serving = assembly.serving_in(folder) if relayed else None
    promise, hashes = assembly.privacy(), assembly.hashes
    # A server that noises what it sees is trusted with it, and with why a training failed.
    guarded = promise is not None and not promise.unconditional
    return Client(
        assembly.task,
        assembly.network.for_clients(),
        assembly.data,
        owning(assembly.trainer, node, serving),
        stages=assembly.stages(),
        half=half,
        held=_held(assembly, node),
        store=ClientStore(own, durable=node is not None),
        ledgers=folder,
        seed=config.seed,
        hashes=hashes,
        attack=assembly.attack if engine else None,
        together=engine and assembly.batching.size > 1,
        only=None if node is None else node.client,
        secretive=guarded or (node is not None and node.pinned is not None),
        silent=guarded and config.privacy is not None,
        retry=_retry(config, waits=not engine),
        pause=None if node is None else node.pause,
        micro_batch=None if node is None else FreeMemory(assembly.trainer, node.memory),
        half_done=None if engine else HalfDoneFits(own / HALF_DONE, "/".join(hashes.values())),
    )


def _admitted(assembly: Assembly, settings: Mapping[str, ConfigValue] | None) -> Node:
    """What a device's operator says, held against how the run trains."""
    node = Node(settings or {})
    try:
        node.admit_trainer(assembly.trainer)
    except ValueError as error:
        raise ConfigError([Fault("client", str(error), assembly.config.client.name)]) from error
    return node


def _own_folder(config: Config, node: Node | None) -> Path:
    """Where clients keep what is of this run alone: a device in a folder of its operator's, by the run."""
    if node is None:
        return config.client_state_dir
    run = f"{config.folder_name[:160]}-{config.identity_hash()[:16]}"
    return node.folder / RUNS / run


def _retry(config: Config, *, waits: bool) -> Retry:
    """How often clients try; the engine's never wait, since its clock is virtual and its processes train others."""
    if config.retry is None:
        return ONCE
    retry: Retry = build(config.retry)
    return retry if waits else replace(retry, backoff_seconds=0.0)


def _held(assembly: Assembly, node: Node | None) -> HeldModels | None:
    """The models that this process's clients hold: a device's in its own folder, all of a machine's in one."""
    folder, downlink = _own_folder(assembly.config, node) / "held", assembly.downlink()
    if downlink is None:
        return None
    if node is not None:
        return HeldModels(folder / f"client-{node.client}")
    # The engine asks a client when its reply is due, after others have been sent newer models.
    return HeldModels(folder, keep=2 * downlink.versions)
