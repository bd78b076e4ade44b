"""What may watch a run: hooks see each new model and may end the run; they never change the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from strategies.server_models import ServerModel


@dataclass(frozen=True)
class RoundView:
    """One model version and how it came about.

    Attributes:
        round: the version's number, from 1.
        model: the server's model, to be read only and only while the hook runs.
        seconds: wall time from sampling to the new model, without evaluation and hooks.
        clock: the exchange's clock after the round, in seconds.
        upload_bytes: of the replies of this round.
        download_bytes: of its requests.
        sampled: clients asked, over all attempts.
        failed: of those, how many answered with an error or not at all.
        rejected: how many good replies were refused at the door.
        void: fewer good updates came than the quorum, so the model stayed.
        void_reason: why, where it is.
        flagged: clients whose updates were suspicious, by logical id; None where nobody is watched.
        epsilon: of differential privacy, spent so far; None where nothing is promised.
        staleness: model versions that each update's client was behind, where updates need not be of the present one.
        train_metrics: means over the updates that were taken, weighted by examples.
        evaluation: central evaluation of this version; empty where there was none.
        federated: evaluation on the clients' own test parts, weighted by examples; empty where there was none.
    """

    round: int
    model: ServerModel
    seconds: float
    clock: float
    upload_bytes: int
    download_bytes: int
    sampled: int
    failed: int
    rejected: int
    void: bool
    void_reason: str = ""
    flagged: tuple[int, ...] | None = None
    epsilon: float | None = None
    staleness: tuple[int, ...] = ()
    train_metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    federated: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """A hook's wish to end the run after this round, with the reason."""

    reason: str


class Hook(Protocol):
    """Called after each round, in order."""

    def __call__(self, view: RoundView) -> Stop | None:
        """Looks at a round; returns a `Stop` to end the run."""
        ...
