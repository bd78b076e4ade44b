"""Go or no-go: what is looked at before an expensive run, with the run's own objects.

They are assembled over a folder of their own that is thrown away, with copies of the few small files that a resumed run
reads at once, so that nothing is written into the run's folder. What is found out by training is tried in processes of
their own. This file is the order of the checks and what each needs; what they look at is in the files beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from clients.tasks import Examples
from clients.trainers import DpSgd
from fl_app.assembly import LEDGER, Assembly, composed, count_workers, forecast, refuse_attack
from fl_app.checks import data, place, plan, training
from fl_app.checks.check import Check, Finding, together
from fl_app.checks.steps import Workload, no_overfitting
from fl_app.config.faults import ConfigError
from fl_app.config.schema import DEFAULT_NUM_CLIENTS, Config
from fl_app.encryption import FITTED, is_encrypted
from fl_app.engine import resolve_workers
from fl_app.halves import CUT
from fl_app.notices import risks
from strategies.combiners import Robust
from strategies.strategy import PipelineStrategy


@contextmanager
def prepared(config: Config) -> Iterator[list[Check]]:
    """The checks of a run; what they need on the disk is gone with the context."""
    with TemporaryDirectory(prefix="trellis-preflight-") as scratch:
        flight = _Preflight(config, Path(scratch))
        with closing(flight):
            yield flight.checks()


class _Preflight:
    """The objects of a run that is not begun.

    Args:
        config: of the run.
        scratch: a folder in place of the run's.
    """

    def __init__(self, config: Config, scratch: Path) -> None:
        self.config = config
        self.clients = DEFAULT_NUM_CLIENTS if config.num_clients == "auto" else config.num_clients
        self.apart = config.model_copy(update={"output_dir": scratch})
        self.steps: training.Steps | None = None
        _copy_small_files(config, self.apart)

    def close(self) -> None:
        """Ends what checks have started."""
        if "assembly" in vars(self):
            self.assembly.close()

    @cached_property
    def assembly(self) -> Assembly:
        return Assembly(self.apart)

    @cached_property
    def strategy(self) -> PipelineStrategy:
        return composed(self.assembly, self.clients)

    @cached_property
    def planned(self) -> plan.Planned:
        return plan.Planned.of(self.assembly, self.strategy.pipeline)

    @cached_property
    def workload(self) -> Workload:
        assembly = self.assembly
        return Workload.of(assembly.task, assembly.module(), assembly.trainer, self.config.travel)

    def checks(self) -> list[Check]:
        """In their order: what others need comes first, what takes long comes last."""
        checks = [
            Check("configuration", self._configuration),
            Check("folder", lambda: place.writable(self.config)),
            Check("labels", lambda: data.labels(self.assembly.task), ("configuration",)),
            Check("inputs", lambda: data.inputs(self.assembly.task), ("labels",)),
            Check("test set", lambda: data.leaks(self.assembly.task), ("labels",)),
            Check("clients", self._clients, ("labels",)),
            Check("contract", self._contract, ("configuration",)),
            Check("nodes", self._nodes, ("contract",)),
            Check("privacy", self._privacy, ("contract", "clients")),
            Check("model", self._model, ("contract", "labels")),
            Check("room", self._room, ("folder", "model")),
            Check("earlier run", self._earlier, ("folder", "labels")),
            Check("step", self._step, ("model", "clients", "inputs")),
            Check("memory", self._memory, ("step",)),
            Check("learns", self._learns, ("step",)),
            Check("time", self._time, ("step",)),
        ]
        if self._encrypted:
            checks.insert(-4, Check("ciphertexts", self._ciphertexts, ("model", "clients")))
        return checks

    @property
    def _encrypted(self) -> bool:
        """Whether the configuration means ciphertexts; one that contradicts itself is refused by its own check."""
        try:
            return is_encrypted(self.config)
        except ConfigError:
            return False

    def _configuration(self) -> Finding:
        config, task = self.config, self.assembly.task
        if config.backend == "flower":
            refuse_attack(config)
        return Finding(
            "ok",
            f"strategy {config.strategy}, task {config.task.name}, model {config.model.name}, {self.clients} clients,"
            f" {config.rounds} rounds, configuration {config.identity_hash()[:12]}; {type(task).__name__} loads",
        )

    def _contract(self) -> Finding:
        found = [plan.agreed(self.strategy.claim)]
        told = risks(self.strategy.pipeline, self.assembly, self.clients)
        # That noise is large is said where privacy is looked at.
        found += [Finding("warning", said) for said in told if not said.startswith("noise is")]
        return together(found)

    def _clients(self) -> Finding:
        batch = getattr(self.assembly.trainer, "batch_size", 1)
        return data.clients(self.assembly.data(self.clients), batch)

    def _nodes(self) -> Finding:
        return plan.nodes(self.strategy.pipeline, self.clients, self.config.runtime.dropout)

    def _privacy(self) -> Finding:
        found = plan.privacy(self.strategy.pipeline, self.assembly.network.size, self.config.rounds)
        trainer = self.assembly.trainer
        if not isinstance(trainer, DpSgd) or trainer.reproducible_noise:
            return found
        sizes, rate = self.assembly.data(self.clients).sizes, self._asked / self.clients
        return together([found, plan.accounts(trainer, sizes, self.config.rounds, rate)])

    def _model(self) -> Finding:
        return plan.model(self.assembly, self.planned, self.clients)

    def _room(self) -> Finding:
        kept = plan.client_state_bytes(self.assembly, self.planned, self.clients)
        return place.room(self.config.run_dir, self.planned.checkpoint_bytes(), kept)

    def _earlier(self) -> Finding:
        return place.earlier(self.config, self.clients, self.assembly.data_hash)

    def _ciphertexts(self) -> Finding:
        told = forecast(self.assembly, self.clients)
        if told is None:
            said = "a client computes, on a machine whose memory and time are not known here"
            return Finding("skipped", said)
        return Finding("ok", told.rpartition("\n(")[0] or told)  # without a hint at a log

    def _step(self) -> Finding:
        finding, self.steps = training.batch(
            self.workload, self._largest(), self.config.evaluate.batch_size
        )
        return finding

    def _largest(self) -> list[Examples]:
        """Training examples of the largest clients, as many as a worker trains at once."""
        federated = self.assembly.data(self.clients)
        at_once = 1
        if self.config.backend == "engine":
            share = ceil(self._asked / self._workers)
            at_once = max(1, min(self.assembly.batching.size, share))
        order = np.argsort(-federated.sizes, kind="stable")[:at_once]
        return [federated.train(int(client)) for client in order]

    @property
    def _asked(self) -> int:
        return min(self.strategy.claim.cohort or self.clients, self.clients)

    @property
    def _workers(self) -> int:
        if self.config.backend == "engine":
            return min(count_workers(self.assembly, self.clients), self._asked)
        return min(resolve_workers("auto"), self._asked)

    def _memory(self) -> Finding:
        if self._encrypted:
            return Finding("skipped", "what ciphertexts take is said above")
        assert self.steps is not None  # or the step would have failed
        size = self.assembly.network.size
        # A robust rule holds all updates of a round; a mean, the model and its moments.
        held = self._asked if isinstance(self.strategy.pipeline.combiner, Robust) else 4
        imports = psutil.Process().memory_info().rss if self.config.backend == "flower" else 0
        batch = min(self.workload.trainer.batch_size, max(map(len, self._largest())))
        return training.memory(self.steps, batch, self._workers, 8 * size * held, imports)

    def _learns(self) -> Finding:
        if (why_not := no_overfitting(self.assembly.trainer)) is not None:
            return Finding("skipped", why_not)
        return training.learns(self.workload, self.config.seed)

    def _time(self) -> Finding:
        if self._encrypted:
            return Finding("skipped", "what ciphertexts take is said above")
        assert self.steps is not None
        return plan.duration(
            self.assembly,
            self.planned,
            self.clients,
            self.steps.seconds,
            self.steps.example_seconds,
            self._workers,
        )


def _copy_small_files(config: Config, apart: Config) -> None:
    """What a run that goes on reads before it begins: its account, and what of it was measured once."""
    if config.resume == "never":
        return
    for name in (LEDGER, Path(FITTED), Path(CUT)):
        source, target = config.run_dir / name, apart.run_dir / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
