"""Runs on ciphertexts: which parts go together, and who computes.

The compute party is made here from the run's configuration and handed to the collector, or to the client that computes
in the server's place. It is begun by the first turn that comes: the engine's workers are forked before that.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from clients.encrypted.keys import OwnerKeys
from clients.encrypted.limits import MemoryLimit, MemoryLimitError
from clients.encrypted.network import PolynomialNet
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from clients.encrypted.plan import Plan, plan_of
from clients.encrypted.planner import Forecast, Settings, fitting, suited
from clients.encrypted.sizes import turn_bytes
from clients.encrypted.spec import Spec
from clients.encrypted.trainer import EncryptedTrainer
from clients.encrypted.turn import SPEC, spec_of
from clients.trainers import SGD
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import Config
from fl_app.config.targets import build, locate
from fl_app.engine import resolve_workers
from fl_app.node import Node
from fl_app.services.files import write_atomically
from strategies import plain_json
from strategies.ckks import KeyFileError
from strategies.collectors import Encrypted
from strategies.collectors.turns import Learner
from strategies.protocols import ConfigValue

log = logging.getLogger(__name__)

FITTED: Final = "fitted.json"
"""In a run's folder: mini-batch and hidden units that were taken, since memory has no room for the configured ones."""
FOLDER: Final = "compute"
"""In a run's folder, or in that of the client that computes: public keys and ciphertexts of owners."""


def is_encrypted(config: Config) -> bool:
    """Whether a run trains on ciphertexts.

    Raises:
        ConfigError: a part of it is for ciphertexts, and another is not; or some parameters would not be trained.
    """
    found = {
        "client": _is(config.client.target, EncryptedTrainer),
        "collector": _is(config.collector.target, Encrypted),
    }
    if not any(found.values()):
        return False
    found["model"] = _is(config.model.target, PolynomialNet)
    others = sorted(group for group, encrypted in found.items() if not encrypted)
    if others:
        chosen = ", ".join(f"{group}={getattr(config, group).name}" for group in others)
        told = (
            f"owners train on ciphertexts, and {chosen} does not: strategy=encrypted chooses model, client and"
            " collector together"
        )
        raise ConfigError([Fault(others[0], told)])
    if (mode := config.client.arguments["mode"]) != config.collector.arguments["mode"]:
        told = f"is {mode}, and the collector's {config.collector.arguments['mode']}: set collector.mode alone"
        raise ConfigError([Fault("client.mode", told)])
    party = compute_client(config)
    if party is not None and config.num_clients != "auto" and party >= config.num_clients:
        told = (
            f"client {party} is none of num_clients={config.num_clients}, which are counted from 0"
        )
        raise ConfigError([Fault("collector.compute_client", told)])
    if tuple(config.travel) != ("*",):
        told = (
            "the whole model is trained on ciphertexts, all of its parameters: leave travel=['*']"
        )
        raise ConfigError([Fault("travel", told)])
    return True


def _is(target: str, kind: type) -> bool:
    found: Any = locate(target)
    return isinstance(found, type) and issubclass(found, kind)


def compute_client(config: Config) -> int | None:
    """The client that computes in the server's place, where one does."""
    found: int | None = config.collector.arguments.get("compute_client")
    return found


def planned(config: Config, owners: int = 1, batches: int = 1) -> Settings:
    """What a run tells the planner."""
    compute = config.compute
    workers = resolve_workers(compute.workers)
    return Settings(workers, compute.chunk, compute.cache_mb, owners, batches, config.rounds)


def limit_of(config: Config) -> MemoryLimit:
    """What memory the compute party may take."""
    limit: MemoryLimit = MemoryLimit() if config.memory is None else build(config.memory)
    return limit


def spec_in(config: Config, module: nn.Module, trainer: SGD) -> Spec:
    """What is configured to be trained.

    Raises:
        ConfigError: the model can't be trained on ciphertexts.
    """
    assert isinstance(trainer, EncryptedTrainer)  # is_encrypted has looked
    try:
        spec = spec_of(module, trainer.batch_size, config.collector.arguments["mode"])
        plan_of(spec)
    except ValueError as error:
        raise ConfigError([Fault("model", str(error), config.model.name)]) from error
    return spec


def _check_key(config: Config, spec: Spec, trainer: SGD) -> None:
    """Looks at the key that all clients of this machine share, before anything is begun.

    Raises:
        ConfigError: it can't be used.
    """
    key = trainer.key if isinstance(trainer, EncryptedTrainer) else None
    if key is None or config.backend != "engine":
        return
    try:
        OwnerKeys.load_for(key, plan_of(spec).ring)
    except KeyFileError as error:
        raise ConfigError([Fault("client.key", str(error))]) from error


def fitted(config: Config, module: nn.Module, trainer: SGD) -> Spec:
    """What is trained below the memory limit: what is configured, or where `memory.allow` says so, what is smaller.

    A run that is resumed goes on with what it took before.

    Raises:
        ConfigError: the model can't be trained on ciphertexts; or nothing that is allowed fits.
    """
    spec = spec_in(config, module, trainer)
    _check_key(config, spec, trainer)
    limit = limit_of(config)
    if limit.limit_mb is None or compute_client(config) is not None:
        return spec
    if (earlier := _earlier(config, spec)) is not None:
        return earlier
    try:
        found = fitting(spec, planned(config), limit)
    except MemoryLimitError as error:
        raise ConfigError([Fault("memory.limit_mb", str(error))]) from error
    if found != spec and config.backend == "flower":
        told = (
            f"client.batch_size={found.batch} model.hidden={list(found.sizes[1:-1])} would fit: devices read their"
            " own configuration, so set them there"
        )
        raise ConfigError([Fault("memory.limit_mb", told)])
    if config.run_dir.is_dir():
        told = json.dumps({"batch": found.batch, "hidden": found.sizes[1:-1]})
        write_atomically(config.run_dir / FITTED, told.encode())
    return found


def _earlier(config: Config, spec: Spec) -> Spec | None:
    """What a run that is resumed has taken: measured again, it could be something else."""
    if config.resume == "never":
        return None
    try:
        told = plain_json.loads((config.run_dir / FITTED).read_text())
        sizes = (spec.sizes[0], *map(int, told["hidden"]), spec.sizes[-1])
        return replace(spec, sizes=sizes, batch=int(told["batch"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Serving:
    """The compute party, as collectors and clients are handed it.

    Args:
        config: of the run.
        spec: what is trained.
        trainer: the owners'.
        folder: where keys and ciphertexts stay.
    """

    def __init__(self, config: Config, spec: Spec, trainer: SGD, folder: Path) -> None:
        assert isinstance(trainer, EncryptedTrainer)  # is_encrypted has looked
        self.plan: Plan = plan_of(spec)
        self._config, self._folder, self._flooding = config, folder, trainer.flooding
        self._party: ComputeParty | None = None

    def forecast(self, owners: int, batches: int) -> str:
        """What the run will take, in lines; all of it is logged. Operations are timed for it, half a second or so."""
        found = Forecast(self.plan, planned(self._config, owners, batches))
        log.info("what this run is planned to take:\n%s", found.text())
        return found.text(brief=True) + "\n(levels, scales, operations and memory by item: run.log)"

    @property
    def client(self) -> int | None:
        """The client that computes in the server's place."""
        return compute_client(self._config)

    def describe(self) -> str:
        """The model and its ring."""
        spec, ring = self.plan.spec, self.plan.ring
        sizes = "-".join(map(str, spec.sizes))
        told = "no noise on decrypted gradients: they tell of the keys"
        if self._flooding is not None:
            told = self._flooding.describe()
        kind = f"{spec.activation}, " if spec.layers > 1 else ""
        return (
            f"{sizes}, {kind}{spec.loss.replace('_', ' ')}, {spec.batch} samples a mini-batch, CKKS of"
            f" degree {ring.degree} and {sum(ring.bits)} bits; {told}"
        )

    def settings(self) -> Mapping[str, ConfigValue]:
        """By which owners know that they mean the same."""
        return {SPEC: self.plan.spec.digest}

    def turn_bytes(self) -> int:
        """Of an owner's longest turn, by the plan."""
        return turn_bytes(self.plan)

    def begin(self, sent: Mapping[str, NDArray[np.generic]]) -> Learner:
        """Steps with one version of the model."""
        return PartyLearner(self.party, sent)

    @property
    def party(self) -> ComputeParty:
        """At work: begun, where it was not."""
        if self._party is None:
            settings, limit = self._config.compute, limit_of(self._config)
            chosen = suited(self.plan, planned(self._config), limit)
            party = ComputeParty(
                self.plan,
                self._folder,
                workers=chosen.workers,
                memory=limit,
                cache_mb=chosen.cache_mb,
                chunk=chosen.chunk,
                disk_mb=settings.disk_mb,
                owner_disk_mb=settings.owner_disk_mb,
            )
            self._party = party.__enter__()
            weakref.finalize(self, party.close)
        return self._party

    def close(self) -> None:
        """Ends the workers; what is on the disk stays."""
        party, self._party = self._party, None
        if party is not None:
            log.info("the compute party's memory: %s", json.dumps(party.governor.report()))
            party.close()


def risks(trainer: SGD, spec: Spec, num_clients: int) -> Iterator[str]:
    """What a run on ciphertexts does not protect from, and what its noise costs."""
    assert isinstance(trainer, EncryptedTrainer)  # is_encrypted has looked
    if trainer.key is not None and num_clients > 1:
        yield (
            f"{num_clients} owners share the key {trainer.key}: each can decrypt what the others encrypt"
            " (docs/encrypted_trust.md)"
        )
    if spec.layers > 2 and trainer.flooding is not None:
        yield (
            "with two hidden layers the noise on decrypted gradients is about as large as they are, since bounds of the"
            " error are loose there (docs/encrypted_trust.md)"
        )


def owning(trainer: SGD, node: Node | None, serving: Serving | None) -> SGD:
    """The trainer of this process's clients: with the key that a device's operator names, and what computes."""
    if not isinstance(trainer, EncryptedTrainer):
        return trainer
    key = trainer.key if node is None else node.owner_key
    return replace(
        trainer, key=key, party=serving, computes=None if serving is None else serving.client
    )
