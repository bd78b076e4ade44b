"""Encrypted training under memory limits: the compute party in a lean process of its own, the owner in this one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from clients.encrypted.footprint import tree_mb
from clients.encrypted.limits import MemoryLimit, MemoryLimitError
from clients.encrypted.party_learner import PartyLearner
from clients.encrypted.plan import plan_of
from clients.encrypted.spec import Spec

BATCHES = 2


@dataclass
class Record:
    """What is the same in each training: ciphertexts, and the errors that an owner answered.

    Attributes:
        hands: the owner, with a mini-batch each.
        errors: by step, and what the owner keeps of them.
    """

    hands: list[Any] = field(default_factory=list)
    errors: dict[int, tuple[Any, Any]] = field(default_factory=dict)


def spec_of(features: int) -> Spec:
    """32 hidden units on so many features, 512 samples a mini-batch."""
    return Spec((features, 32, 10))


def party(connection: Connection, features: int, limit: float | None, folder: str) -> None:
    """The compute party's process: answers turns until there are no more, then tells what it took."""

    from clients.encrypted.party import ComputeParty
    from clients.encrypted.planner import Forecast, Settings, fitting, suited

    memory = MemoryLimit(limit_mb=limit, interval=0.02, settle=0.1)
    settings = Settings(batches=BATCHES, base_mb=tree_mb(psutil.Process()))
    spec = spec_of(features)
    try:
        fitting(spec, settings, memory)
    except MemoryLimitError as error:
        connection.send(str(error))
        return
    connection.send(None)
    plan = plan_of(spec)
    chosen = suited(plan, settings, memory)
    with ComputeParty(
        plan, Path(folder), memory=memory, workers=chosen.workers, cache_mb=chosen.cache_mb
    ) as served:
        while (turn := connection.recv()) is not None:
            weights, arrays = turn
            connection.send(PartyLearner(served, weights).answer(0, arrays))
            del turn, weights, arrays
        forecast = Forecast(plan, chosen)
        report = dict(served.governor.report())
        report |= {"planned_mb": round(forecast.memory_mb), "planned_s": forecast.wall_seconds}
    connection.send(report)


def trained(features: int, limit: float | None, steps: int, record: Record) -> dict[str, Any]:
    """Some steps under a limit: gradients, seconds of the party's turns, and what it tells; or why it was refused."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = spawn.Process(target=party, args=(theirs, features, limit, folder))
        process.start()
        theirs.close()
        told = ours.recv()
        found = {"refused": told} if told else _steps(ours, features, steps, record)
        process.join(60)
        found["exitcode"] = process.exitcode
    return found


def _steps(connection: Connection, features: int, steps: int, record: Record) -> dict[str, Any]:
    from clients.encrypted.plan import plan_of
    from tests.support.party import Hand, weights_of

    plan = plan_of(spec_of(features))
    if not record.hands:
        record.hands = [Hand(plan, 0, seed, samples=512) for seed in range(BATCHES)]
    hands = record.hands
    weights, gradients, seconds = weights_of(plan.spec), [], []
    for step in range(steps):
        learner = _Remote(connection, weights)
        found = _step(learner, hands[step % BATCHES], step, record)
        weights = {name: array - 0.05 * found[name] for name, array in weights.items()}
        gradients.append(found)
        seconds.append(learner.seconds)
    connection.send(None)
    report: dict[str, Any] = connection.recv()
    return {"gradients": gradients, "seconds": seconds, **report}


def _step(learner: Any, hand: Any, step: int, record: Record) -> Any:
    answer = hand.begin(learner)
    if step not in record.errors:
        record.errors[step] = hand.errors(answer), hand._answered
    errors, hand._answered = record.errors[step]
    return hand.gradients(learner.answer(0, hand.hello() | errors))


class _Remote:
    """A learner in another process."""

    def __init__(self, connection: Connection, weights: Any) -> None:
        self._connection, self._weights, self.seconds = connection, weights, 0.0

    def answer(self, client: int, arrays: Any) -> Any:
        """The answer to a turn."""
        begin = time.perf_counter()
        self._connection.send((self._weights, arrays))
        answer = self._connection.recv()
        self.seconds += time.perf_counter() - begin
        return answer


def difference(one: Sequence[Any], other: Sequence[Any]) -> float:
    """The largest between gradients, relative to the largest of its array."""
    return max(
        float(np.abs(first[name] - second[name]).max() / np.abs(second[name]).max())
        for first, second in zip(one, other, strict=True)
        for name in first
    )
