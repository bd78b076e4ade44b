"""What of a run is in a checkpoint, and what a run that is taken up says of it.

A checkpoint is the server's: the model, its optimiser, what the parts remember, and the record so far. Clients keep
their own states on their own disks and are told which of them count (`Pipeline.included`, `Pipeline.kept`); noise and
keys are in no file. What has been spent of a privacy budget is in the ledger too, which no older checkpoint takes back.

Knows neither files nor when to save: these are `fl_app.services.checkpoint`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from fl_app.assembly import Assembly
from fl_app.folder import RunFolder
from fl_app.services.summary import Row, Summary, read_summary
from strategies import plain_json
from strategies.collectors.once import MODELS
from strategies.state import State, mapping_in
from strategies.strategy import PipelineStrategy

MOST_APART: Final = MODELS // 2
"""Rounds between two checkpoints where clients join no second sum on a model: sums of so many models are remembered
that the last two checkpoints can both be gone on from."""


class Saved:
    """The state of a run, for its checkpoints.

    Args:
        assembly: the run's objects.
        strategy: whose state it is.
        summary: the record.
        folder: the run's; its checkpoints are told what to save.
        num_clients: logical clients.

    Attributes:
        clock: seconds of the exchange's clock at which the run begins.
    """

    def __init__(
        self,
        assembly: Assembly,
        strategy: PipelineStrategy,
        summary: Summary,
        folder: RunFolder,
        num_clients: int,
    ) -> None:
        self._assembly, self._strategy, self._summary = assembly, strategy, summary
        self._folder, self._num_clients = folder, num_clients
        self.clock = 0.0
        pipeline, checkpoints = strategy.pipeline, folder.checkpoints
        checkpoints.state = self.state_dict
        if getattr(pipeline.collector, "journal", None) is not None:
            checkpoints.every = min(checkpoints.every or MOST_APART, MOST_APART)
        parts = (assembly.trainer, *pipeline.stages)
        if any(getattr(part, "remembers", False) for part in parts):
            checkpoints.noted = _included
            pipeline.kept = checkpoints.kept.values

    def state_dict(self) -> State:
        """What a checkpoint holds: the strategy's state, and the record so far."""
        adversary = self._assembly.adversary
        return {
            "strategy": self._strategy.state_dict(),
            "run_id": str(self._summary.header["run_id"]),
            # An array, since a file's header has its limits.
            "history": np.frombuffer(json.dumps(self._summary.rows).encode(), np.uint8),
            "clock": self._strategy.clock,
            "num_clients": self._num_clients,
            "config_hash": self._assembly.config.identity_hash(),
            "data_hash": self._assembly.data_hash,
            "wall_seconds": self._summary.wall_seconds,
            **({} if adversary is None else {"adversary": adversary.state_dict()}),
        }

    def take_up(self) -> None:
        """Goes on where the folder's newest checkpoint was written; does nothing where there is none.

        Raises:
            ValueError: it is of other parts than this run's.
        """
        found = self._folder.checkpoint
        if found is None:
            return
        try:
            self._load(found.state)
        except KeyError as error:
            raise ValueError(f"{found.path.name} has no {error}") from error
        self._folder.checkpoints.take_up(found)

    def _load(self, state: State) -> None:
        self._strategy.load_state_dict(mapping_in(state, "strategy"))
        if self._assembly.adversary is not None:
            self._assembly.adversary.load_state_dict(mapping_in(state, "adversary"))
        stored = state["history"]
        if not isinstance(stored, np.ndarray):
            raise ValueError("the state's 'history' should be an array")
        history: list[Row] = plain_json.loads(stored.tobytes())
        self.clock = float(str(state["clock"]))
        self._summary.history = history
        self._summary.earlier_seconds = float(str(state["wall_seconds"]))
        self._summary.header = {**self._summary.header, "run_id": str(state["run_id"])}

    def notes(self) -> Iterator[str]:
        """What whoever starts the run should know of the checkpoint that it goes on from, and of those to come.

        To be asked before the summary is written anew: it tells how far the earlier process came.
        """
        found, checkpoints = self._folder.checkpoint, self._folder.checkpoints
        if found is not None:
            yield f"resumes from {found.path.name}, of round {found.round}, written {ago(found.age)} ago"
            yield f"goes on after round {len(self._summary.history)}{self._spent()}"
            reached = (read_summary(self._folder.summary) or {}).get("rounds_completed")
            if isinstance(reached, int) and reached > found.round:
                yield f"rounds {found.round + 1} to {reached} were not saved, and are run again"
        privacy, every = self._strategy.pipeline.privacy, checkpoints.every
        if privacy is not None and privacy.epsilon is not None and every != 1:
            lost = f"up to {every - 1} rounds" if every else "all rounds"
            yield f"checkpoint.every={every}: if it is killed, {lost} more are run, and charged, again"

    def _spent(self) -> str:
        """What of a privacy budget is gone, and how much of it for rounds that are run again."""
        privacy = self._strategy.pipeline.privacy
        report: dict[str, Any] = {} if privacy is None else dict(privacy.report() or {})
        charges = report.get("releases")
        if not isinstance(charges, int):
            return ""
        again = charges - len(self._summary.history)
        repeated = f", {again} of them for rounds that were cut short" if again > 0 else ""
        return f"; ε = {report['epsilon']:.4g} is spent on {charges} charges{repeated}"


def ago(seconds: float) -> str:
    """A length of time in the unit that says most: 12 s, 34 min, 5 h, 3 days."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{round(seconds / size)} {unit}"
    return f"{round(seconds)} s"


def _included(state: State) -> dict[int, int]:
    """Whose updates the model of a checkpoint holds, and of which rounds."""
    told = mapping_in(mapping_in(mapping_in(state, "strategy"), "pipeline"), "included")
    return {int(client): number for client, number in told.items() if isinstance(number, int)}
