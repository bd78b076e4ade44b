"""The server's end of a run: its strategy with all parts of the pipeline, and what is measured of each model.

The only maker of what clients must not be able to foresee or forge: who is asked and when, the root trainer of rules
that want a server's own update, the half of a cut model, the party that computes on ciphertexts. Must not know the
clients' end, their folders or their operators.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from clients.client import NUM_CLIENTS
from clients.poisoning import DataPoisoning
from clients.resident import ResidentModel, buffers_of
from clients.root import RootTrainer
from clients.tasks import evaluate
from clients.trainers import DpSgd
from fl_app.assembly.shared import Assembly
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.targets import build
from fl_app.encryption import compute_client
from fl_app.halves import upper_server
from fl_app.portions import check_factors
from strategies.admission import Admission
from strategies.collectors import Ckks, Encrypted, Masked, Plain, Split
from strategies.pipeline import Pipeline
from strategies.protocols import Sampler
from strategies.schedulers import Scheduler
from strategies.strategy import PipelineStrategy
from strategies.update import DELTA
from strategies.wire import unpack_model

_CKKS_BYTES = 128
"""Of one element in a ciphertext, at most; four vectors of float32 beside the model's buffers are all else."""


def make_strategy(assembly: Assembly, num_clients: int) -> PipelineStrategy:
    """The server half for so many clients.

    Raises:
        ConfigError: a part refuses its settings, or what another is.
        ContractError: parts of the pipeline may not be composed.
    """
    config = assembly.config
    assembly.fit()
    pipeline = _pipeline(assembly, num_clients)
    return PipelineStrategy(
        pipeline,
        seed=config.seed,
        min_clients=num_clients,
        population=num_clients,
        travel=config.travel,
        buffers=buffers_of(assembly.module()),
        federated_every=config.evaluate.federated_every,
        evaluate_every=config.evaluate.every,
        hello=assembly.hashes,
    )


def _pipeline(assembly: Assembly, num_clients: int) -> Pipeline:
    config, network, trainer = assembly.config, assembly.network, assembly.trainer
    privacy = assembly.privacy(num_clients)
    combiner = build(config.combiner, seed=assembly.seed_of_draws)
    check_factors(config, combiner, network.layouts[DELTA], trainer)
    return Pipeline(
        collector=assembly.collector(num_clients, _served(assembly)),
        stages=assembly.stages(privacy),
        combiner=combiner,
        optimizer=build(config.server, population=num_clients),
        sampler=make_sampler(assembly, num_clients),
        scheduler=_scheduler(assembly, num_clients),
        privacy=privacy,
        admission=Admission(**config.admission.model_dump(exclude={"max_reply_mb"})),
        quarantine=None if config.quarantine is None else build(config.quarantine),
        breaker=None if config.breaker is None else build(config.breaker),
        clusters=None if config.clusters is None else build(config.clusters),
        downlink=assembly.downlink(),
        client_sections=getattr(trainer, "sections", frozenset({DELTA})),
        train_config={**assembly.hashes, NUM_CLIENTS: num_clients},
        root=_root_trainer(assembly, num_clients),
        parts=network.parts(),
        factors=network.factors,
    )


def make_sampler(assembly: Assembly, num_clients: int) -> Sampler:
    """Who is asked. Coins come of the run's seed only where no privacy rests on them."""
    node = assembly.config.privacy
    repeatable = node is None or bool(node.arguments.get("reproducible_noise"))
    sampler: Sampler = build(
        assembly.config.sampler, population=num_clients, reproducible=repeatable
    )
    return sampler


def _scheduler(assembly: Assembly, num_clients: int) -> Scheduler:
    """When who is asked."""
    scheduler: Scheduler = build(assembly.config.scheduler, population=num_clients)
    paced = getattr(scheduler, "pace", None) is not None
    if paced and not getattr(assembly.trainer, "paces", False):
        client = assembly.config.client.name
        told = f"gives clients local steps, and client={client} takes its own: leave it out, or use client=sgd"
        raise ConfigError([Fault("scheduler.pace", told)])
    return scheduler


def _served(assembly: Assembly) -> Any:
    """The server's half: of a model that is cut, or of a training on ciphertexts."""
    config, network = assembly.config, assembly.network
    if assembly.encrypted:
        return None if compute_client(config) is not None else assembly.serving
    if not assembly.split:
        return None
    return upper_server(network.build, config, assembly.task, assembly.trainer, network.at)


def _root_trainer(assembly: Assembly, num_clients: int) -> RootTrainer | None:
    config, trainer = assembly.config, assembly.trainer
    if not config.task.federation.arguments.get("root_examples"):
        return None
    if assembly.split:
        told = "are of a whole model, and this one is cut: use another combiner, or model=lora"
        raise ConfigError([Fault("task.root_examples", told)])
    if isinstance(trainer, DpSgd):
        told = "trains with noise, and the server's root data need none: use another combiner, or client=sgd"
        raise ConfigError([Fault("task.root_examples", told)])
    examples = assembly.data(num_clients).root()
    return RootTrainer(assembly.task, assembly.module, examples, trainer, seed=config.seed)


def most_reply_bytes(assembly: Assembly) -> int:
    """Bytes of one reply beyond which nobody means well."""
    told = assembly.config.admission.max_reply_mb
    if told != "auto":
        return int(1e6 * told)
    collector = assembly.collector()
    if isinstance(collector, Split | Encrypted):  # a turn's activations or ciphertexts
        return int(1e6 * getattr(collector, "most_bytes_mb", 1_000.0))
    return 64_000_000 + assembly.network.size * (_CKKS_BYTES if isinstance(collector, Ckks) else 16)


def most_reply_arrays(assembly: Assembly) -> int:
    """Arrays of one reply beyond which nobody means well: what a collector says of its turns, or a few vectors."""
    collector = assembly.collector()
    told = getattr(collector, "most_arrays", None)
    if told is not None:
        return int(told)
    vectors = isinstance(collector, Masked | Ckks | Plain)
    if vectors and not getattr(collector, "vanilla", False):
        return 16
    return 16 + assembly.network.array_count


def forecast(assembly: Assembly, num_clients: int) -> str | None:
    """What a training on ciphertexts will take, where the server computes."""
    if not assembly.encrypted or compute_client(assembly.config) is not None:
        return None
    most = assembly.data(num_clients).sizes.max()
    return assembly.serving.forecast(num_clients, ceil(most / assembly.trainer.batch_size))


def make_evaluator(assembly: Assembly) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Central evaluation on the task's test set, and how far an attack has come; holds one model for all rounds."""
    task, attack = assembly.task, assembly.attack
    examples, device = task.test(), assembly.trainer.torch_device
    goal = attack.goal(task) if isinstance(attack, DataPoisoning) else None
    batch_size = assembly.config.evaluate.batch_size
    model: ResidentModel | None = None

    def evaluate_model(round_number: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal model
        named = unpack_model(arrays)
        model = model or ResidentModel(assembly.module(), named, device)
        model.load(named)
        found = evaluate(model.module, task, examples, device=device, batch_size=batch_size)
        if goal is not None:
            found[goal.name] = goal.reached(model.module, device, batch_size)
        return MetricRecord(
            {name: value for name, value in found.items() if name != "num_examples"}
        )

    return evaluate_model
