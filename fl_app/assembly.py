"""From a configuration to objects: the one place that knows which class of one room meets which of another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, MetricRecord
from torch import nn

from clients.client import CODE_HASH, CONFIG_HASH, NUM_CLIENTS, Client
from clients.half_done import HalfDoneFits
from clients.lora.profile import return_freed_memory
from clients.micro_batch import FreeMemory
from clients.poisoning import DataPoisoning
from clients.resident import ModuleMaker, ResidentModel, arrays_of, buffers_of
from clients.retrying import ONCE, Retry
from clients.root import RootTrainer
from clients.store import ClientStore
from clients.tasks import FederatedData, Task, evaluate
from clients.tasks.task import fingerprint
from clients.trainers import SGD, DpSgd
from fl_app.batching import Batching, plan_batching
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import DEFAULT_NUM_CLIENTS, Config, TargetNode
from fl_app.config.targets import build
from fl_app.encryption import FOLDER as COMPUTE_FOLDER
from fl_app.encryption import Serving, compute_client, fitted, is_encrypted, owning
from fl_app.engine import Adversary, resolve_workers
from fl_app.halves import PartMaker, is_split, planned_cut, upper_server
from fl_app.identity import code_hash
from fl_app.node import Node
from fl_app.portions import ClientParts, check_factors, of_goal, planned_ranks
from strategies.admission import Admission
from strategies.attacks import Attack, Omniscient
from strategies.collectors import Ckks, Encrypted, Masked, Plain, Split
from strategies.contract import Claim
from strategies.downlink import Downlink, HeldModels
from strategies.encoding import reshaped
from strategies.pipeline import Pipeline
from strategies.protocols import (
    ClientHalf,
    ClientOwn,
    Collector,
    ConfigValue,
    Promise,
    Sampler,
    Stage,
)
from strategies.schedulers import Scheduler
from strategies.seeds import integer
from strategies.server_models.model import sections_of
from strategies.strategy import PipelineStrategy
from strategies.update import DELTA, Layout
from strategies.wire import pack_model, unpack_model

log = logging.getLogger(__name__)

LEDGER = Path("privacy", "ledger.jsonl")
"""In a run's folder: what has been spent of its privacy budget."""

JOURNAL = "sums"
"""In a run's folder: the sessions and sums of collectors that open one sum a model."""

HALF_DONE = "half-done"
"""Among what clients keep of a run: local training that a process died in."""

RUNS = "runs"
"""In a device's folder: what it keeps of each run, and can do without when the run is over."""

_CKKS_BYTES = 128
"""Of one element in a ciphertext, at most; four vectors of float32 beside the model's buffers are all else."""

Place = Literal["engine", "simulation", "device"]
"""Where clients run: in the engine's workers, in a simulation of Flower's, or each on a machine of its own."""


class Assembly:
    """The objects of one run, each made when it is first asked for.

    Args:
        config: a composed configuration.

    Raises:
        ConfigError: a part refuses its settings, or the attack the task.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.task: Task = build(config.task, directory=config.directory)
        self.trainer: SGD = build(config.client, directory=config.directory)
        self.attack = self._attack()
        self._data: dict[int, FederatedData] = {}
        self._smaller: dict[str, object] = {}

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
        return Adversary(self.attack, self.stages(), self.config.seed, self._model_parts[1])

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

    def module(self) -> nn.Module:
        """The network with its initial weights: the same wherever the run's seed is the same."""
        return self._build(**self._at)

    def _build(self, **known: object) -> nn.Module:
        """The configured model, or of one that is cut the part that `known` says."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer(self.config.seed, "model"))
            module: nn.Module = build(
                self.config.model,
                directory=self.config.directory,
                input_shape=self.task.input_shape,
                num_classes=self.task.num_classes,
                vocab_size=self.task.vocab_size,
                padding_id=self.task.padding_id,
                goals=self.task.goals,
                auxiliary=getattr(self.trainer, "auxiliary_steps", 0) > 0,
                **self._smaller,
                **known,
            )
        return module

    @cached_property
    def _by_goal(self) -> bool:
        """Whether the model has a head for each of the task's goals, so that a client trains its own."""
        names = self._model_parts[1][DELTA].names
        return len(self.task.goals) > 1 and any(of_goal(name) is not None for name in names)

    def _parts(self) -> ClientParts | None:
        """Who is sent and trains what of the model; None where it is the same for all."""
        ranks = None
        if self.config.ranks is not None:
            model = self._build(**self._at, **({"half": "lower"} if self.split else {}))
            ranks = planned_ranks(self.config, self.config.ranks, model, self.task, self.trainer)
        if ranks is None and not self._by_goal:
            return None
        return ClientParts(self.task.goal_of, self._by_goal, ranks)

    @cached_property
    def factors(self) -> Literal["both", "shared_a"] | None:
        """Which factors of its products the model trains, where it has low-rank adapters."""
        return getattr(self.module(), "factors", None)

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
        return self._serving(self.config.run_dir)

    def _serving(self, folder: Path) -> Serving:
        spec = fitted(self.config, self.module(), self.trainer)
        return Serving(self.config, spec, self.trainer, folder / COMPUTE_FOLDER)

    def _fit(self) -> None:
        """Takes a smaller model or mini-batch, where memory leaves no room and the configuration allows it."""
        if not self.encrypted:
            return
        spec = fitted(self.config, module := self.module(), self.trainer)
        if spec.batch < self.trainer.batch_size:
            self.trainer = replace(self.trainer, batch_size=spec.batch)
        if spec.sizes != module.sizes:
            self._smaller = {"hidden": spec.sizes[1:-1]}

    def forecast(self, num_clients: int) -> str | None:
        """What a training on ciphertexts will take, where the server computes."""
        if not self.encrypted or compute_client(self.config) is not None:
            return None
        most = self.data(num_clients).sizes.max()
        return self.serving.forecast(num_clients, ceil(most / self.trainer.batch_size))

    def close(self) -> None:
        """Ends what was started."""
        if "serving" in vars(self):
            self.serving.close()

    @cached_property
    def _at(self) -> dict[str, int]:
        """How many blocks of a model that is cut clients hold, where that has to be measured."""
        if not self.split:
            return {}
        count = self.config.num_clients
        clients = DEFAULT_NUM_CLIENTS if count == "auto" else count
        at = planned_cut(self._build, self.config, self.task, self.trainer, clients)
        return {} if at is None else {"at": at}

    def _clients_module(self) -> nn.Module | ModuleMaker:
        """What clients make their models with."""
        if self.split or self.config.ranks is not None or self._by_goal:
            return PartMaker(
                self._build,
                split=self.split,
                configured=self.config.model.arguments.get("split_point") != "auto",
            )
        return self.module()

    def model_sections(self) -> frozenset[str]:
        """The sections that the model's own arrays make."""
        return frozenset(self._model_parts[0].values())

    @property
    def size(self) -> int:
        """Parameters that travel."""
        return self._model_parts[1][DELTA].size

    @property
    def most_reply_bytes(self) -> int:
        """Bytes of one reply beyond which nobody means well."""
        told = self.config.admission.max_reply_mb
        if told != "auto":
            return int(1e6 * told)
        collector = self.collector()
        if isinstance(collector, Split | Encrypted):  # a turn's activations or ciphertexts
            return int(1e6 * getattr(collector, "most_bytes_mb", 1_000.0))
        return 64_000_000 + self.size * (_CKKS_BYTES if isinstance(collector, Ckks) else 16)

    @property
    def most_reply_arrays(self) -> int:
        """Arrays of one reply beyond which nobody means well: a few vectors, or what one turn takes."""
        collector = self.collector()
        if isinstance(collector, Split | Encrypted):
            return 64
        vectors = isinstance(collector, Masked | Ckks | Plain)
        if vectors and not getattr(collector, "vanilla", False):
            return 16
        return 16 + len(self._model_parts[0])

    @property
    def _summed(self) -> int:
        """Elements of a sum of parameters' changes: fewer where clients send a part of them."""
        node, layout = self.config.compression, self._model_parts[1][DELTA]
        first = () if node is None else self._compression(node)[0]
        return reshaped({DELTA: layout}, first)[DELTA].size

    @cached_property
    def _model_parts(self) -> tuple[dict[str, str], dict[str, Layout]]:
        """The section that each travelling array belongs to, and the sections' layouts."""
        module = self.module()
        travelling = {
            name: array
            for name, array in arrays_of(module).items()
            if any(fnmatchcase(name, pattern) for pattern in self.config.travel)
        }
        return sections_of(travelling, buffers_of(module))

    @cached_property
    def batching(self) -> Batching:
        """How many of the engine's clients are trained at once."""
        setting = self.config.runtime.batch_clients
        return plan_batching(setting, self.trainer, self.module(), self.task)

    def workers(self, num_clients: int) -> int:
        """Processes that train the engine's clients: no more than a round of clients trained at once can keep busy."""
        config = self.config
        if self.encrypted and compute_client(config) is not None:
            return 1  # what a client is in the middle of computing is in one process
        count = resolve_workers(config.runtime.workers)
        if config.runtime.workers != "auto" or self.batching.size == 1:
            return count
        sampler = self.sampler(num_clients)
        cohort = sampler.check(Claim()).cohort or num_clients
        return min(count, ceil(cohort / self.batching.size))

    def sampler(self, num_clients: int) -> Sampler:
        """Who is asked. Coins come of the run's seed only where no privacy rests on them."""
        node = self.config.privacy
        repeatable = node is None or bool(node.arguments.get("reproducible_noise"))
        sampler: Sampler = build(
            self.config.sampler, population=num_clients, reproducible=repeatable
        )
        return sampler

    def _scheduler(self, num_clients: int) -> Scheduler:
        """When who is asked."""
        scheduler: Scheduler = build(self.config.scheduler, population=num_clients)
        paced = getattr(scheduler, "pace", None) is not None
        if paced and not getattr(self.trainer, "paces", False):
            client = self.config.client.name
            told = f"gives clients local steps, and client={client} takes its own: leave it out, or use client=sgd"
            raise ConfigError([Fault("scheduler.pace", told)])
        return scheduler

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

    def collector(self, num_clients: int | None = None) -> Collector:
        """How updates come out of a cohort; both halves. The server's counts on so many clients."""
        collector: Collector = build(
            self.config.collector,
            directory=self.config.directory,
            seed=self._seed_of_draws,
            journal=self.config.run_dir / JOURNAL,
            population=num_clients,
            served=None if num_clients is None else self._served(),
        )
        return collector

    def _served(self) -> Any:
        """The server's half: of a model that is cut, or of a training on ciphertexts."""
        if self.encrypted:
            return None if compute_client(self.config) is not None else self.serving
        if not self.split:
            return None
        return upper_server(self._build, self.config, self.task, self.trainer, self._at)

    def client_half(
        self, place: Place, settings: Mapping[str, ConfigValue] | None = None
    ) -> ClientHalf:
        """The collector's half on the clients of this process.

        Args:
            place: where it runs.
            settings: node config of the SuperNode, where there is one.

        Raises:
            ConfigError: what the client must bring along is missing, keys, say; or the run asks for what a device's
                operator has ruled out.
        """
        collector = self.collector()
        try:
            if place != "device":
                return collector.client_half(
                    ClientOwn(self.config.client_state_dir, {}, simulated=True)
                )
            node = Node(dict(settings or {}))
            half = collector.client_half(ClientOwn(node.folder, node.settings, simulated=False))
            node.admit(collector, half)
            return half
        except ValueError as error:
            raise ConfigError(
                [Fault("collector", str(error), self.config.collector.name)]
            ) from error

    def client(
        self, place: Place = "device", settings: Mapping[str, ConfigValue] | None = None
    ) -> Client:
        """The client half.

        Args:
            place: where it runs; only the engine's clients may be told to lie.
            settings: node config of the SuperNode, where there is one.
        """
        engine = place == "engine"
        half = self.client_half(place, settings)
        node = Node(settings or {}) if place == "device" else None
        if self.config.ranks is not None or (node is not None and node.memory is not None):
            return_freed_memory()  # else a budget does not hold: the heap keeps what a step has freed
        if node is not None:
            try:
                node.admit_trainer(self.trainer)
            except ValueError as error:
                raise ConfigError([Fault("client", str(error), self.config.client.name)]) from error
        folder = self.config.client_state_dir if node is None else node.folder
        own = self._client_folder(node)
        relayed = self.encrypted and compute_client(self.config) is not None
        serving = self._serving(folder) if relayed else None
        promise = self.privacy()
        # A server that noises what it sees is trusted with it, and with why a training failed.
        guarded = promise is not None and not promise.unconditional
        return Client(
            self.task,
            self._clients_module(),
            self.data,
            owning(self.trainer, node, serving),
            stages=self.stages(),
            half=half,
            held=self._held(node),
            store=ClientStore(own, durable=node is not None),
            ledgers=folder,
            seed=self.config.seed,
            hashes=self.hashes,
            attack=self.attack if engine else None,
            together=engine and self.batching.size > 1,
            only=None if node is None else node.client,
            secretive=guarded or (node is not None and node.pinned is not None),
            silent=guarded and self.config.privacy is not None,
            retry=self._retry(waits=not engine),
            pause=None if node is None else node.pause,
            micro_batch=None if node is None else FreeMemory(self.trainer, node.memory),
            half_done=None
            if engine
            else HalfDoneFits(own / HALF_DONE, "/".join(self.hashes.values())),
        )

    def _client_folder(self, node: Node | None) -> Path:
        """Where clients keep what is of this run alone: a device in a folder of its operator's, by the run."""
        if node is None:
            return self.config.client_state_dir
        run = f"{self.config.folder_name[:160]}-{self.config.identity_hash()[:16]}"
        return node.folder / RUNS / run

    def _retry(self, *, waits: bool) -> Retry:
        """How often clients try; the engine's never wait, since its clock is virtual and its processes train others."""
        if self.config.retry is None:
            return ONCE
        retry: Retry = build(self.config.retry)
        return retry if waits else replace(retry, backoff_seconds=0.0)

    def _downlink(self) -> Downlink | None:
        """How the model travels; None where it goes whole."""
        return None if self.config.downlink is None else build(self.config.downlink)

    def _held(self, node: Node | None) -> HeldModels | None:
        """The models that this process's clients hold: a device's in its own folder, all of a machine's in one."""
        folder, downlink = self._client_folder(node) / "held", self._downlink()
        if downlink is None:
            return None
        if node is not None:
            return HeldModels(folder / f"client-{node.client}")
        # The engine asks a client when its reply is due, after others have been sent newer models.
        return HeldModels(folder, keep=2 * downlink.versions)

    def strategy(self, num_clients: int) -> PipelineStrategy:
        """The server half.

        Raises:
            ContractError: parts of the pipeline may not be composed.
        """
        config = self.config
        self._fit()
        privacy = self.privacy(num_clients)
        combiner = build(config.combiner, seed=self._seed_of_draws)
        check_factors(config, combiner, self._model_parts[1][DELTA], self.trainer)
        pipeline = Pipeline(
            collector=self.collector(num_clients),
            stages=self.stages(privacy),
            combiner=combiner,
            optimizer=build(config.server, population=num_clients),
            sampler=self.sampler(num_clients),
            scheduler=self._scheduler(num_clients),
            privacy=privacy,
            admission=Admission(**config.admission.model_dump(exclude={"max_reply_mb"})),
            quarantine=None if config.quarantine is None else build(config.quarantine),
            breaker=None if config.breaker is None else build(config.breaker),
            clusters=None if config.clusters is None else build(config.clusters),
            downlink=self._downlink(),
            client_sections=getattr(self.trainer, "sections", frozenset({DELTA})),
            train_config={**self.hashes, NUM_CLIENTS: num_clients},
            root=self._root_trainer(num_clients),
            parts=self._parts(),
            factors=self.factors,
        )
        return PipelineStrategy(
            pipeline,
            seed=config.seed,
            min_clients=num_clients,
            population=num_clients,
            travel=config.travel,
            buffers=buffers_of(self.module()),
            federated_every=config.evaluate.federated_every,
            evaluate_every=config.evaluate.every,
            hello=self.hashes,
        )

    @property
    def _seed_of_draws(self) -> int | None:
        """Of draws that clients should not foresee: the run's only where all clients are the engine's."""
        return self.config.seed if self.config.backend == "engine" else None

    def _root_trainer(self, num_clients: int) -> RootTrainer | None:
        if not self.config.task.federation.arguments.get("root_examples"):
            return None
        if self.split:
            told = "are of a whole model, and this one is cut: use another combiner, or model=lora"
            raise ConfigError([Fault("task.root_examples", told)])
        if isinstance(self.trainer, DpSgd):
            told = "trains with noise, and the server's root data need none: use another combiner, or client=sgd"
            raise ConfigError([Fault("task.root_examples", told)])
        examples = self.data(num_clients).root()
        return RootTrainer(self.task, self.module, examples, self.trainer, seed=self.config.seed)

    def initial_arrays(self) -> ArrayRecord:
        """The whole initial model."""
        return pack_model(arrays_of(self.module()))

    def evaluator(self) -> Callable[[int, ArrayRecord], MetricRecord]:
        """Central evaluation on the task's test set, and how far an attack has come; holds one model for all rounds."""
        examples, device = self.task.test(), self.trainer.torch_device
        goal = self.attack.goal(self.task) if isinstance(self.attack, DataPoisoning) else None
        batch_size = self.config.evaluate.batch_size
        model: ResidentModel | None = None

        def evaluate_model(round_number: int, arrays: ArrayRecord) -> MetricRecord:
            nonlocal model
            named = unpack_model(arrays)
            model = model or ResidentModel(self.module(), named, device)
            model.load(named)
            found = evaluate(
                model.module, self.task, examples, device=device, batch_size=batch_size
            )
            if goal is not None:
                found[goal.name] = goal.reached(model.module, device, batch_size)
            return MetricRecord(
                {name: value for name, value in found.items() if name != "num_examples"}
            )

        return evaluate_model
