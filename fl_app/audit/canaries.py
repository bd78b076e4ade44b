"""The audit of what a run promises its clients: one more training, with canaries among the clients.

The run's clients keep their data; m canaries come on top, so that the share of clients that is asked, and with it the ε
of a round, stays (`strategies.attacks.canary`). The auditor sees the released models, of every round or only the last,
and the canaries' directions; not who was asked, not an update, not a reply.

* `final`: the score of a canary is ⟨θ_T − θ_0, u⟩: what anybody with the first and the last model can do.
* `versions`: each round's difference gives x = ⟨θ_t − θ_{t−1}, u⟩, N(0, σ²) for a canary that is out and, for one that
  is in, N(μ, σ²) in the share q of rounds in which it is asked; the score is the log-likelihood ratio, summed over
  rounds (Neyman and Pearson). σ is taken from directions that nobody sends, μ is what a canary moves the mean by, q is
  planned. A wrong μ or q costs power, never validity: scores know no coin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, log1p, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.resident import arrays_of, buffers_of
from clients.tasks import Examples, FederatedData
from fl_app.assembly import Assembly, make_strategy
from fl_app.audit.coins import Guessed, guess, toss
from fl_app.audit.target import Target
from fl_app.audit.training import Progress, train
from fl_app.config.schema import Config
from strategies.attacks.canary import Canary, direction
from strategies.hooks import Hook, RoundView
from strategies.server_models import SGD, ServerModel
from strategies.strategy import PipelineStrategy
from strategies.update import DELTA

UNCLIPPED_NORM = 1.0
"""Of a canary's update where no clip sets one, in the units of the parameters."""

_BEYOND = 100.0
"""Times the first bound of an adaptive clip."""

_DECOYS = 256
"""Directions that nobody sends: σ is right to about 4%."""


@dataclass(frozen=True)
class CanaryAudit:
    """What came of it.

    Attributes:
        canaries: how many.
        included: how many of them were in.
        norm: of what an included one sent.
        clipped: whether the norm is the run's own bound.
        rounds: versions that were seen.
        rate: share of rounds in which a canary is asked, as planned.
        versions: the bound from every version: the audit's figure.
        final: the bound from the first and the last model alone, at the same confidence by itself.
    """

    canaries: int
    included: int
    norm: float
    clipped: bool
    rounds: int
    rate: float
    versions: Guessed
    final: Guessed

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "canaries": self.canaries,
            "included": self.included,
            "norm": self.norm,
            "norm_is_the_clip": self.clipped,
            "rounds": self.rounds,
            "rate": self.rate,
            "versions": self.versions.to_dict(),
            "final": self.final.to_dict(),
        }


def audit_clients(
    target: Target,
    canaries: int,
    *,
    confidence: float,
    progress: Progress,
    entropy: Callable[[int], bytes] = os.urandom,
) -> CanaryAudit:
    """Trains with canaries, and bounds ε for a whole client from below.

    Args:
        target: the run.
        canaries: how many, at least 8.
        confidence: in (0, 1).
        progress: told of each round.
        entropy: of coins and directions.

    Raises:
        ConfigError: the run's parts may not be composed for so many clients.
        AuditError: the training failed.
        ValueError: fewer than 8 canaries.
    """
    if canaries < 8:
        raise ValueError(f"{canaries} canaries: at least 8 are needed")
    config, total = target.trained_anew("canaries"), target.num_clients + canaries
    key, coins = int.from_bytes(entropy(7)), toss(canaries, entropy)
    assembly = WithCanaries(
        config, Canary(included=coins, norm=UNCLIPPED_NORM, key=key), target.num_clients
    )
    claim = make_strategy(assembly, total).claim
    bound = claim.bounds.get(DELTA, _own_clip(config))
    # An adaptive bound moves: what is far beyond it is clipped to it, wherever it is.
    norm = UNCLIPPED_NORM if bound is None else bound * (_BEYOND if claim.adaptive else 1.0)
    weight = float(target.assembly.data(target.num_clients).sizes.mean())
    assembly.attack = Canary(included=coins, norm=norm, weight=weight, key=key)
    watch, strategy = _watched(assembly, canaries, key, progress)
    cohort = float(claim.cohort or total)
    rate = cohort / total if claim.rate is None else claim.rate
    sent = UNCLIPPED_NORM if bound is None else bound
    scores = (watch.likelihood_ratios(_moved(strategy, sent, cohort), rate), watch.total())
    delta = target.delta("client")
    found = [guess(values, coins, delta=delta, confidence=confidence) for values in scores]
    seen = (canaries, sum(coins), sent, bound is not None, len(watch.rows), rate)
    return CanaryAudit(*seen, *found)


def _own_clip(config: Config) -> float | None:
    """The bound that clients clip to; noise that they add themselves leaves none for the server to count on."""
    norm = None if config.clip is None else config.clip.arguments.get("norm")
    return float(norm) if isinstance(norm, float | int) else None


def _watched(
    assembly: WithCanaries, canaries: int, key: int, progress: Progress
) -> tuple[Watch, PipelineStrategy]:
    watches: list[Watch] = []

    def prepare(strategy: PipelineStrategy) -> Sequence[Hook]:
        watches.append(Watch(assembly.initial_vector(strategy), canaries, key))
        return watches

    total = assembly.real_clients + canaries
    strategy = train(assembly, total, progress=progress, prepare=prepare)
    return watches[0], strategy


def _moved(strategy: PipelineStrategy, norm: float, cohort: float) -> float | None:
    """How far an included canary that is asked moves the model along its direction; None where that is no constant."""
    optimizer = strategy.pipeline.optimizer
    if not isinstance(optimizer, SGD) or optimizer.momentum:
        return None
    return optimizer.lr * norm / cohort


class Watch:
    """A hook that keeps each version's difference from the last one, seen along canaries' directions and decoys'.

    Args:
        start: the initial parameters that travel, (d,) float64.
        canaries: how many directions are canaries'.
        key: of the directions.

    Attributes:
        rows: for each version ⟨θ_t − θ_{t−1}, u⟩, (canaries + decoys,) float64, with unit directions.
    """

    def __init__(self, start: NDArray[np.float64], canaries: int, key: int) -> None:
        self._last = start.copy()
        self._canaries, self._key = canaries, key
        self.rows: list[NDArray[np.float64]] = []

    def __call__(self, view: RoundView) -> None:
        """Sees a version. Directions are drawn anew each time: of a large model all of them would not fit in memory."""
        difference = view.model.parameters - self._last
        self._last = view.model.parameters.copy()
        size = len(difference)
        seen = [
            direction(self._key, index, size) @ difference
            for index in range(self._canaries + _DECOYS)
        ]
        self.rows.append(np.array(seen, np.float64) / sqrt(size))

    def total(self) -> NDArray[np.float64]:
        """⟨θ_T − θ_0, u⟩ for each canary, less their mean: about half of them are in."""
        found: NDArray[np.float64] = np.sum(self.rows, axis=0)[: self._canaries]
        found -= found.mean()
        return found

    def likelihood_ratios(self, moved: float | None, rate: float) -> NDArray[np.float64]:
        """For each canary the log-likelihood ratio of in to out, summed over versions that differ from their last one.

        Args:
            moved: μ; where it is None, differences are weighed by their σ, and their mean taken off.
            rate: q, in (0, 1].
        """
        found = np.zeros(self._canaries)
        for row in self.rows:
            seen, sigma = row[: self._canaries], float(np.sqrt(np.mean(row[self._canaries :] ** 2)))
            if sigma == 0:
                continue
            if moved is None:
                found += (seen - seen.mean()) / sigma
                continue
            ratio = (seen - moved / 2) * moved / sigma**2
            found += ratio if rate >= 1 else np.logaddexp(log1p(-rate), log(rate) + ratio)
        return found


class WithCanaries(Assembly):
    """A run's objects with canaries as its last clients.

    Args:
        config: of the training.
        canary: what they send.
        real_clients: how many others there are.
    """

    def __init__(self, config: Config, canary: Canary, real_clients: int) -> None:
        super().__init__(config)
        self.attack = canary
        self.real_clients = real_clients

    def data(self, num_clients: int) -> FederatedData:
        """The run's own cut, and one example for each canary, whose training is thrown away."""
        return _Extended(super().data(self.real_clients), num_clients - self.real_clients)

    def initial_vector(self, strategy: PipelineStrategy) -> NDArray[np.float64]:
        """The parameters that travel, as the run begins, (d,) float64."""
        module = self.module()
        model = ServerModel(
            arrays_of(module),
            strategy.pipeline.optimizer,
            travel=self.config.travel,
            buffers=buffers_of(module),
        )
        return model.parameters


class _Extended(FederatedData):
    """A cut with further clients, which hold one example."""

    def __init__(self, real: FederatedData, more: int) -> None:
        self._real = real
        self.num_clients = real.num_clients + more
        self.sizes = np.concatenate([real.sizes, np.ones(more, np.int64)])
        self.unassigned = real.unassigned

    def train(self, client: int) -> Examples:
        """A real client's own; any example for the others."""
        if client < self._real.num_clients:
            return self._real.train(client)
        return self._real.train(0).take([0])

    def test(self, client: int) -> Examples:
        """A real client's own; none for the others."""
        if client < self._real.num_clients:
            return self._real.test(client)
        return self._real.train(0).take([])

    def root(self) -> Examples:
        """The server's own."""
        return self._real.root()
