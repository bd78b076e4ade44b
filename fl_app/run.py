"""One run from beginning to end, on any grid: assemble, resume, train, conclude.

Whatever happens, the run's folder ends with a summary that says so. Back ends differ only in the grid they bring.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flwr.serverapp import Grid
from safetensors.numpy import save

from fl_app.assembly import (
    Assembly,
    composed,
    engine_grid,
    forecast,
    make_evaluator,
    most_reply_arrays,
    most_reply_bytes,
    refuse_attack,
)
from fl_app.cli.console import Console
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import DEFAULT_NUM_CLIENTS, Config
from fl_app.folder import RunFolder
from fl_app.notices import promises, risks
from fl_app.saved import Saved
from fl_app.services.curves import draw_curves
from fl_app.services.files import write_atomically
from fl_app.services.guard import divergence_guard
from fl_app.services.logs import log_to
from fl_app.services.memory import PeakMemory
from fl_app.services.summary import Row, Summary
from strategies.state import mapping_in

log = logging.getLogger(__name__)

Status = Literal["completed", "failed", "stopped"]

INTERRUPTED = "interrupted"
LOG = "run.log"
OpenGrid = Callable[[Assembly, int, float], AbstractContextManager[Grid]]
"""Opens a grid for an assembly, a number of clients and the virtual time to begin at."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: as in the summary.
        reason: why, where it did not complete.
        summary_path: absolute.
    """

    status: Status
    reason: str
    summary_path: Path

    @property
    def exit_code(self) -> int:
        """0 done; 1 failed, or stopped by the user; 3 stopped by a guard."""
        return {"completed": 0, "failed": 1, "stopped": 1 if self.reason == INTERRUPTED else 3}[
            self.status
        ]


def run_engine(config: Config, console: Console) -> RunResult:
    """Runs on the in-process engine.

    Raises:
        ConfigError: parts may not be composed, or the run's folder is not free for this run.
    """
    num_clients = DEFAULT_NUM_CLIENTS if config.num_clients == "auto" else config.num_clients
    return _run(config, num_clients, console, engine_grid, virtual=True)


def serve(config: Config, grid: Grid, console: Console) -> RunResult:
    """Runs on a grid of Flower's, from within a ServerApp.

    Raises:
        ConfigError: as `run_engine`.
    """
    from fl_app.flower.bounded import BoundedGrid  # half of Flower, which the engine does without
    from fl_app.flower.grid import InterruptibleGrid

    refuse_attack(config)
    watched = InterruptibleGrid(grid)
    num_clients = _count_nodes(watched) if config.num_clients == "auto" else config.num_clients

    def open_grid(assembly: Assembly, *_: object) -> AbstractContextManager[Grid]:
        most = most_reply_bytes(assembly), most_reply_arrays(assembly)
        return nullcontext(InterruptibleGrid(BoundedGrid(grid, *most)))

    return _run(config, num_clients, console, open_grid, virtual=False)


def _run(
    config: Config, num_clients: int, console: Console, open_grid: OpenGrid, *, virtual: bool
) -> RunResult:
    folder = RunFolder(config)
    with folder.opened(), log_to(folder.path / LOG, console.note):
        assembly = Assembly(config)
        earlier = folder.earlier(num_clients, assembly.data_hash)
        done = folder.completed()
        if earlier is not None and done >= config.rounds:
            console.note(
                f"nothing to do: {done} of {config.rounds} rounds are there; "
                f"{'' if config.rounds_are_planned else 'more rounds= go on, '}"
                f"resume=never starts anew, another run_name= leaves it"
            )
            result = RunResult("completed", "", folder.summary)
        else:
            with PeakMemory() as memory, closing(assembly):
                run = _Run(assembly, num_clients, console, folder, memory, virtual=virtual)
                result = run.conduct(open_grid)
    console.end(result)
    return result


class _Run:
    """What a run holds while it goes on."""

    def __init__(
        self,
        assembly: Assembly,
        num_clients: int,
        console: Console,
        folder: RunFolder,
        memory: PeakMemory,
        *,
        virtual: bool,
    ) -> None:
        self.assembly, self.num_clients, self.console, self.folder = (
            assembly,
            num_clients,
            console,
            folder,
        )
        self.config = config = assembly.config
        self.strategy = composed(self.assembly, num_clients)
        self._virtual = virtual
        self._memory = memory
        header = {
            "run_id": uuid.uuid4().hex[:12],
            "strategy": config.strategy,
            "task": config.task.name,
            "seed": config.seed,
            "config_hash": config.identity_hash(),
            "num_clients": num_clients,
        }
        pipeline = self.strategy.pipeline
        self.summary = Summary(
            folder.summary,
            header,
            pipeline.admission,
            memory.sample,
            virtual,
            quarantine=pipeline.quarantine,
            breaker=pipeline.breaker,
            clusters=pipeline.clusters,
            privacy=pipeline.privacy,
            timings=pipeline.timings if pipeline.privacy is None else None,
            on_row=self._show,
        )
        self.saved = Saved(assembly, self.strategy, self.summary, folder, num_clients)
        self.strategy.hooks += [
            divergence_guard,  # first: what it stops is neither saved nor told of
            self.summary.record,
            folder.checkpoints,
            self.summary.publish,
        ]

    def conduct(self, open_grid: OpenGrid) -> RunResult:
        """Trains until the last round, a guard's or the user's word, or a failure, and writes down which it was.

        Raises:
            ConfigError: what an earlier process left does not go with this run: its folder stays as it is.
        """
        try:
            self.saved.take_up()
            if (privacy := self.strategy.pipeline.privacy) is not None:
                privacy.report()  # reads what was spent before, checkpoint or none
        except (ValueError, OSError) as error:
            said = f"{error}; name another run_name, or start it anew with resume=never"
            raise ConfigError([Fault("run_name", f"{self.folder.path}: {said}")]) from error
        status: Status = "completed"
        reason = ""
        try:
            self._announce()
            self.summary.write("running", "")
            with open_grid(self.assembly, self.num_clients, self.saved.clock) as grid:
                self._memory.start()
                self._train(grid)
            if self.strategy.stopped is not None:
                status, reason = "stopped", self.strategy.stopped.reason
            elif self.summary.rows and all(row["void"] for row in self.summary.rows):
                last = self.summary.rows[-1].get("void_reason", "")
                status, reason = (
                    "failed",
                    f"no round had enough good updates: see {LOG} for the reasons; the last one's: {last}",
                )
            elif void := [row for row in self.summary.rows if row["void"]]:
                reason = (
                    f"{len(void)} of {len(self.summary.rows)} rounds were void, the last of them {void[-1]['round']}: "
                    f"{void[-1].get('void_reason', '')}"
                )
        except KeyboardInterrupt:
            status, reason = "stopped", INTERRUPTED
        except ConfigError:
            raise
        except Exception as error:  # whatever it is, the summary says that the run failed, and why
            log.exception("the run failed")
            status, reason = "failed", f"{type(error).__name__}: {error}"
        return self._concluded(status, reason)

    def _concluded(self, status: Status, reason: str) -> RunResult:
        """Saves what the run got to, as far as there is room: what is there is whole, if older."""
        whole = status == "completed"
        steps: list[Callable[[], None]] = [
            self.folder.checkpoints.settle,
            lambda: self._leave(whole=whole),
            lambda: self.summary.write(status, reason),
        ]
        for step in steps:
            try:
                step()
            except OSError as error:
                if status != "failed":  # else why is told already
                    told = f"the run's folder can't be written: {error}"
                    status, reason = "failed", f"{reason}; {told}" if reason else told
                if step is steps[-1]:
                    self.console.note(f"the summary is that of an earlier round: {error}")
        return RunResult(status, reason, self.folder.summary)

    def _train(self, grid: Grid) -> None:
        config = self.config
        evaluate = make_evaluator(self.assembly) if config.evaluate.every else None
        arrays = self.assembly.network.arrays()
        self.strategy.start(
            grid,
            arrays,
            num_rounds=config.rounds,
            timeout=config.round_timeout,
            evaluate_fn=evaluate,
        )

    def _announce(self) -> None:
        config, data = self.config, self.assembly.data(self.num_clients)
        facts: dict[str, Any] = {
            "task": f"{config.task.name}, {data.sizes.sum():,} training examples",
            "clients": self.num_clients,
            "partition": config.task.federation.arguments.get("partition", "the task's own"),
            "model": config.model.name,
            **({"training": self.assembly.batching} if self._virtual else {}),
            **promises(self.strategy.pipeline, self.assembly, self.num_clients),
            "folder": self.folder.path,
        }
        self.console.begin(config.strategy, config.rounds, facts)
        if (told := forecast(self.assembly, self.num_clients)) is not None:
            self.console.note(told)
        for risk in risks(self.strategy.pipeline, self.assembly, self.num_clients):
            self.console.note(risk)
        for note in self.saved.notes():
            self.console.note(note)
        if self.folder.checkpoint is None:
            data.plot(self.folder.path / "partition.png")

    def _show(self, row: Row) -> None:
        self.console.round(row, self.config.rounds)

    def _leave(self, *, whole: bool) -> None:
        """The model and the picture, as far as the run got; `whole` says that no step was cut short."""
        model = self.strategy.model
        last = None if whole else self.folder.checkpoints.newest()
        if model is not None and last is not None:
            model.load_state_dict(mapping_in(mapping_in(last.state, "strategy"), "model"))
        if model is not None and (whole or last is not None):
            tensors = model.arrays()
            write_atomically(self.folder.path / "model.safetensors", save(tensors))
        if self.summary.history:
            title = f"{self.config.strategy} on {self.config.task.name}, {self.num_clients} clients"
            draw_curves(self.summary.history, self.folder.path / "curves.png", title)


def _count_nodes(grid: Grid, settle: float = 2.0, patience: float = 300.0) -> int:
    """How many nodes there are, once the number has not changed for `settle` seconds.

    Raises:
        TimeoutError: there is none after `patience` seconds.
    """
    began = changed = time.monotonic()
    count = 0
    while count == 0 or time.monotonic() - changed < settle:
        if time.monotonic() - began > patience:
            raise TimeoutError(f"no SuperNode came within {patience:g} s")
        found = len(list(grid.get_node_ids()))
        if found != count:
            count, changed = found, time.monotonic()
        time.sleep(0.2)
    return count
