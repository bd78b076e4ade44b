"""What both ends of a run share: task, trainer, data, model, stages, promise and collector, made when first asked for.

Both ends make these of the same configuration, so that a transformation's two halves agree, and each tells the other
the hashes of its code and configuration. Where an end needs more (the server's account and its half of a model, a
device's folder), it says so: must not know what clients keep, nor how the server puts its parts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from clients.client import CODE_HASH, CONFIG_HASH
from clients.poisoning import DataPoisoning
from clients.tasks import FederatedData, Task
from clients.tasks.task import fingerprint
from clients.trainers import SGD, DpSgd
from fl_app.assembly.network import Network
from fl_app.batching import Batching, plan_batching
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.nodes import TargetNode
from fl_app.config.schema import Config
from fl_app.config.targets import build
from fl_app.encryption import FOLDER as COMPUTE_FOLDER
from fl_app.encryption import Serving, fitted, is_encrypted
from fl_app.engine import Adversary
from fl_app.halves import is_split
from fl_app.identity import code_hash
from strategies.attacks import Attack, Omniscient
from strategies.downlink import Downlink
from strategies.encoding import reshaped
from strategies.protocols import Collector, Promise, Stage
from strategies.update import DELTA

LEDGER = Path("privacy", "ledger.jsonl")
"""In a run's folder: what has been spent of its privacy budget."""

JOURNAL = "sums"
"""In a run's folder: the sessions and sums of collectors that open one sum a model."""


class Assembly:
    """The objects of one run that both its ends need.

    Args:
        config: a composed configuration.

    Attributes:
        config: the same.
        task: data, loss and metrics.
        trainer: of the clients.
        attack: what lying clients send, None where all are honest.

    Raises:
        ConfigError: a part refuses its settings, or the attack the task.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.task: Task = build(config.task, directory=config.directory)
        self.trainer: SGD = build(config.client, directory=config.directory)
        self.attack = self._attack()
        self._data: dict[int, FederatedData] = {}

    def _attack(self) -> Attack | None:
        node = self.config.attack
        if node is None:
            return None
        attack: Attack = build(node, directory=self.config.directory)
        if isinstance(attack, DataPoisoning):
            try:
                attack.check(self.task)
            except ValueError as error:
                raise ConfigError([Fault("attack", str(error), node.name)]) from error
        return attack

    @cached_property
    def adversary(self) -> Adversary | None:
        """The mind behind the run's attackers, where these know what the honest send."""
        if not isinstance(self.attack, Omniscient):
            return None
        return Adversary(self.attack, self.stages(), self.config.seed, self.network.layouts)

    @property
    def hashes(self) -> dict[str, str]:
        """What both ends must share."""
        return {CODE_HASH: code_hash(), CONFIG_HASH: self.config.identity_hash()}

    @cached_property
    def data_hash(self) -> str:
        """What tells the task's data from others at the same place."""
        return fingerprint(self.task)

    def data(self, num_clients: int) -> FederatedData:
        """The task's training data cut among this many clients."""
        if num_clients not in self._data:
            self._data[num_clients] = build(
                self.config.task.federation,
                task=self.task,
                num_clients=num_clients,
                seed=self.config.seed,
            )
        return self._data[num_clients]

    @cached_property
    def network(self) -> Network:
        """The model, whole and in parts."""
        return Network(self.config, self.task, self.trainer, split=self.split)

    def module(self) -> nn.Module:
        """The network with its initial weights: the same wherever the run's seed is the same."""
        return self.network.module()

    @cached_property
    def split(self) -> bool:
        """Whether the model is cut between clients and server.

        Raises:
            ConfigError: some parts are for models that are cut and others are not.
        """
        cut = is_split(self.config)
        if cut and isinstance(self.attack, Omniscient):
            told = "makes lies of whole updates, and clients send a half: use another, such as attack=sign_flip"
            raise ConfigError([Fault("attack", told, self.config.attack.name)])  # type: ignore[union-attr]
        return cut

    @cached_property
    def encrypted(self) -> bool:
        """Whether the run trains on ciphertexts.

        Raises:
            ConfigError: some parts are for ciphertexts and others are not.
        """
        return is_encrypted(self.config)

    @cached_property
    def serving(self) -> Serving:
        """Who computes on ciphertexts, where that is the server."""
        return self.serving_in(self.config.run_dir)

    def serving_in(self, folder: Path) -> Serving:
        """Who computes on ciphertexts, and keeps what belongs to it below a folder."""
        spec = fitted(self.config, self.module(), self.trainer)
        return Serving(self.config, spec, self.trainer, folder / COMPUTE_FOLDER)

    def fit(self) -> None:
        """Takes a smaller model or mini-batch, where memory leaves no room and the configuration allows it."""
        if not self.encrypted:
            return
        module: Any = self.module()
        spec = fitted(self.config, module, self.trainer)
        if spec.batch < self.trainer.batch_size:
            self.trainer = replace(self.trainer, batch_size=spec.batch)
        if spec.sizes != module.sizes:
            self.network.shrink(spec.sizes[1:-1])

    def close(self) -> None:
        """Ends what was started."""
        if "serving" in vars(self):
            self.serving.close()

    @cached_property
    def batching(self) -> Batching:
        """How many of the engine's clients are trained at once."""
        setting = self.config.runtime.batch_clients
        return plan_batching(setting, self.trainer, self.module(), self.task)

    def stages(self, privacy: Promise | None = None) -> list[Stage]:
        """The transformations of an update, in the order in which clients apply them.

        Args:
            privacy: the server's promise, where it has one; clients have one of their own.
        """
        promise = self.privacy() if privacy is None else privacy
        compression, clip = self.config.compression, self.config.clip
        first, last = ((), ()) if compression is None else self._compression(compression)
        clips = [] if clip is None else [build(clip)]
        bounds = getattr(clips[0], "bounds", dict) if clips else dict
        noise = [] if promise is None else promise.stages(bounds)
        return [*first, *clips, *noise, *last]

    def _compression(self, node: TargetNode) -> tuple[Sequence[Stage], Sequence[Stage]]:
        """Stages before the clip, which bounds what they leave, and behind all else."""
        first, last = build(node, seed=self.config.seed).stages()
        return first, last

    def privacy(self, num_clients: int | None = None) -> Promise | None:
        """What is promised of it; the server's, for so many clients, with an account in the run's folder."""
        config = self.config
        if config.privacy is not None and isinstance(self.trainer, DpSgd):
            told = "is a promise of its own beside client=dp_sgd's, and a run makes one: choose one of them"
            raise ConfigError([Fault("privacy", told, config.privacy.name)])
        if config.privacy is None:
            own = getattr(self.trainer, "promise", None)
            return None if own is None else own()
        promise: Promise = build(
            config.privacy,
            population=num_clients,
            rounds=config.rounds,
            ledger=None if num_clients is None else config.run_dir / LEDGER,
            seed=config.seed,
            size=None if num_clients is None else self._summed,
        )
        return promise

    @property
    def _summed(self) -> int:
        """Elements of a sum of parameters' changes: fewer where clients send a part of them."""
        node, layout = self.config.compression, self.network.layouts[DELTA]
        first = () if node is None else self._compression(node)[0]
        return reshaped({DELTA: layout}, first)[DELTA].size

    def collector(self, num_clients: int | None = None, served: object = None) -> Collector:
        """How updates come out of a cohort; both halves.

        Args:
            num_clients: that the server's counts on.
            served: the server's half of what clients train over it with.
        """
        collector: Collector = build(
            self.config.collector,
            directory=self.config.directory,
            seed=self.seed_of_draws,
            journal=self.config.run_dir / JOURNAL,
            population=num_clients,
            served=served,
        )
        return collector

    def downlink(self) -> Downlink | None:
        """How the model travels; None where it goes whole."""
        return None if self.config.downlink is None else build(self.config.downlink)

    @property
    def seed_of_draws(self) -> int | None:
        """Of draws that clients should not foresee: the run's only where all clients are the engine's."""
        return self.config.seed if self.config.backend == "engine" else None
