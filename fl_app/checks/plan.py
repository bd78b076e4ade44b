"""What a composed pipeline plans: who is needed for a round, what privacy it comes to, what network and time it takes.

All figures are the pipeline's own: its claim, its promise, the request that it would send. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray
from scipy.stats import binom

from clients.resident import buffers_of
from clients.trainers import DpSgd
from clients.trainers.dp_account import Budget, Round
from fl_app.assembly import Assembly
from fl_app.checks.check import Finding, together
from fl_app.cli.console import human_bytes
from fl_app.notices import DROWNED, contract
from fl_app.services.checkpoint import dump
from strategies.collectors import Ckks, Masked
from strategies.combiners import Robust
from strategies.contract import Claim, Visibility
from strategies.encoding import most_bytes
from strategies.pipeline import Pipeline
from strategies.privacy import Guarantee
from strategies.privacy.accountants import make_accountant
from strategies.protocols import Job
from strategies.server_models import ServerModel
from strategies.sizes import count_bytes
from strategies.update import DELTA
from strategies.wire import unpack_model

_OFTEN_VOID: Final = 0.5
_SELDOM_VOID: Final = 0.01
_LOOSE: Final = 10.0
"""ε past which a promise says little: e^10 is a factor of 22,000 between neighbours."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round.

    Attributes:
        down: of the request that brings the model.
        up: of the reply, at most.
        note: what is not counted, or is only a bound.
    """

    down: int
    up: int
    note: str


@dataclass(frozen=True)
class Planned:
    """A pipeline at its first model.

    Attributes:
        pipeline: composed and checked.
        model: as it begins.
        job: what the first round asks.
    """

    pipeline: Pipeline
    model: ServerModel
    job: Job

    @classmethod
    def of(cls, assembly: Assembly, pipeline: Pipeline) -> Planned:
        """From a pipeline whose strategy has been composed."""
        arrays = unpack_model(assembly.network.arrays())
        model = ServerModel(
            arrays,
            pipeline.optimizer,
            travel=assembly.config.travel,
            buffers=buffers_of(assembly.module()),
        )
        pipeline.check(frozenset(model.layouts) & assembly.network.sections)
        return cls(pipeline, model, pipeline.job(model))

    @property
    def claim(self) -> Claim:
        """What the pipeline's parts have said."""
        return self.pipeline.claim

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, as it is at the beginning."""
        state = {"model": self.model.state_dict(), "pipeline": self.pipeline.state_dict()}
        return len(dump(state))

    def traffic(self) -> Traffic:
        """What goes to one client and comes back in a round."""
        size = self.model.layouts[DELTA].size
        whole = RecordDict(dict(self.job.records))
        down = 0 if self.claim.blind else count_bytes(whole)
        wire, packing = self.job.wire or self.job.layouts, self.job.packing
        up = sum(most_bytes(name, layout, packing) for name, layout in wire.items())
        notes = []
        if isinstance(self.pipeline.collector, Ckks):
            up = self.pipeline.collector.parameters.upload_bytes(size)
            notes.append("ciphertexts up, and once more down for their sum")
        elif isinstance(self.pipeline.collector, Masked):
            notes.append("keys and shares beside it")
        if packing is not None:
            notes.append("up at most")
        if self.pipeline.downlink is not None:
            notes.append("down less once clients hold a model")
        if self.claim.served is not None:
            notes.append("activations at each turn beside it")
        if self.claim.blind:
            notes.append("ciphertexts at each turn in place of the model")
        return Traffic(down, up, ", ".join(notes))


def agreed(claim: Claim) -> Finding:
    """The contract in one line."""
    return Finding("ok", contract(claim))


def nodes(pipeline: Pipeline, num_clients: int, dropout: float) -> Finding:
    """Whether as many clients as are planned suffice, and as many as will be left of them.

    Args:
        pipeline: checked.
        num_clients: in all.
        dropout: probability that one is gone in a round.
    """
    claim = pipeline.claim
    cohort = claim.cohort or num_clients
    needs = dict(_needs(pipeline, cohort // claim.sessions))
    least = max(needs.values())
    asked = cohort // claim.sessions
    told = ", ".join(f"{count} for {name}" for name, count in needs.items())
    said = f"{asked} of {num_clients} clients are asked at a time; a round needs {told}"
    if least > asked:
        mend = "raise num_clients or sampler.fraction, or lower what needs so many"
        return Finding("failed", said, mend)
    if not dropout:
        return Finding("ok", said)
    void = float(binom.cdf(least - 1, asked, 1 - dropout))
    said += f"; with runtime.dropout={dropout:g} a round is void with probability {void:.2g}"
    if void <= _SELDOM_VOID:
        return Finding("ok", said)
    mend = f"raise num_clients or sampler.fraction: {_enough(least, dropout)} asked are void in 1%"
    return Finding("failed" if void > _OFTEN_VOID else "warning", said, mend)


def _needs(pipeline: Pipeline, asked: int) -> Iterator[tuple[str, int]]:
    """Clients of a cohort without which no round can be had, by who needs them."""
    yield "admission.quorum", pipeline.admission.quorum
    collector, combiner = pipeline.collector, pipeline.combiner
    if isinstance(collector, Masked):
        plans = collector.plan(asked)
        yield "a masked sum", sum(max(2, plan.quorum) for plan in plans)
    elif isinstance(collector, Ckks):
        yield "a sum on ciphertexts", collector.quorum
    if isinstance(combiner, Robust) and pipeline.claim.visibility is Visibility.EACH:
        f = combiner.tolerance(pipeline.claim.inputs or asked)
        yield f"{combiner.label} with f = {f}", combiner.least(f)


def _enough(least: int, dropout: float) -> int:
    """Clients to ask so that fewer than `least` are left in one round of a hundred."""
    count = ceil(least / max(1 - dropout, 1e-9))
    while binom.cdf(least - 1, count, 1 - dropout) > _SELDOM_VOID and count < 100_000:
        count += max(1, count // 50)
    return count


def privacy(pipeline: Pipeline, size: int, rounds: int) -> Finding:
    """What the run promises at its end, whether its budget lasts, and whether noise leaves anything to learn.

    Args:
        pipeline: checked.
        size: parameters that travel.
        rounds: planned.
    """
    promise = pipeline.privacy
    if promise is None:
        return Finding("ok", "no differential privacy is promised, and none is paid for")
    found = [Finding("ok", str(promise.describe(size)))]
    report: Any = promise.report() or {}
    if isinstance(promise, Guarantee):
        found += _budget(promise, pipeline.claim, rounds, int(report.get("releases", 0)))
        ratio = promise.drowning(size)
        if ratio > DROWNED:
            found.append(
                Finding(
                    "warning",
                    f"noise is {ratio:.3g} times as long as what it hides",
                    "ask more clients, take a smaller model or fewer rounds, or raise the budget",
                )
            )
    if promise.epsilon is None:
        found.append(
            Finding(
                "warning",
                "nothing is promised: noise comes from the run's seed",
                "set reproducible_noise=false",
            )
        )
    return together(found)


def accounts(trainer: DpSgd, sizes: NDArray[np.int64], rounds: int, rate: float) -> Finding:
    """What clients that keep accounts of their own can take part in.

    Args:
        trainer: theirs.
        sizes: training examples of each.
        rounds: planned.
        rate: share of the clients that a round asks.
    """
    most, least = int(sizes.max()), int(sizes.min())
    if trainer.delta >= 1 / most:
        said = f"client.delta={trainer.delta:g} would allow one of {most} examples to be published"
        return Finding("failed", said, f"set client.delta below 1/{most} = {1 / most:.2g}")
    asked = rounds * rate
    said = f"a client is asked {asked:.3g} times"
    if trainer.target_epsilon is None or trainer.noise_multiplier is not None:
        return Finding("ok", said)
    budget = Budget(
        trainer.accountant, trainer.delta, trainer.target_epsilon, trainer.participations
    )
    noise = [
        budget.noise_for(Round.of(count, trainer.batch_size, trainer.local_epochs))
        for count in (least, most)
    ]
    said += (
        f", and its noise is for {trainer.participations}: z = {noise[0]:.3g} with {least} examples,"
        f" {noise[1]:.3g} with {most}"
    )
    if asked > trainer.participations:
        mend = f"set client.participations={ceil(asked)}"
        return Finding("warning", f"{said}; then it refuses", mend)
    return Finding("ok", said)


def _budget(promise: Guarantee, claim: Claim, rounds: int, spent: int) -> Iterator[Finding]:
    """ε of all planned rounds against the budget, and what of it is gone."""
    planned = _epsilon_after(promise, claim, 1.0)
    if spent:
        yield Finding("ok", f"{spent} charges of an earlier process are on its ledger")
    target = promise.target_epsilon
    if target is not None and planned > target * (1 + 1e-6):
        affordable = _affordable(promise, claim, rounds, target)
        yield Finding(
            "warning",
            f"the budget ε = {target:g} ends the run after {affordable} of {rounds} rounds",
            "raise the noise (privacy.noise_multiplier, null finds it) or privacy.target_epsilon",
        )
    elif planned > _LOOSE:
        yield Finding(
            "warning",
            f"ε = {planned:.3g} promises little",
            "lower privacy.target_epsilon, or raise privacy.noise_multiplier",
        )


def _epsilon_after(promise: Guarantee, claim: Claim, part: float) -> float:
    """ε of this part of the planned rounds."""
    account = make_accountant(promise.accountant, promise.release(claim, promise.z).relation)
    for release, count in promise.releases(claim, promise.z):
        if scaled := int(part * count):
            account.step(release, scaled)
    return account.epsilon(promise.resolved_delta)


def _affordable(promise: Guarantee, claim: Claim, rounds: int, target: float) -> int:
    """Rounds whose ε is within the budget."""
    low, high = 0, rounds
    while low < high:
        middle = (low + high + 1) // 2
        fits = _epsilon_after(promise, claim, middle / rounds + 1e-12) <= target
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def model(assembly: Assembly, planned: Planned, num_clients: int) -> Finding:
    """How large the model is, and what a round of it moves."""
    module = assembly.module()
    everything = sum(parameter.numel() for parameter in module.parameters())
    traffic = planned.traffic()
    asked = planned.claim.cohort or num_clients
    note = f" ({traffic.note})" if traffic.note else ""
    return Finding(
        "ok",
        f"{type(module).__name__}, {everything:,} parameters, {assembly.network.size:,} travel; a round moves"
        f" {human_bytes(asked * traffic.down)} down and {human_bytes(asked * traffic.up)} up{note}",
    )


def client_state_bytes(assembly: Assembly, planned: Planned, num_clients: int) -> int:
    """What clients keep in the run's folder: a state that holds, and one that is proposed."""
    remembers = any(
        getattr(part, "remembers", False) for part in (assembly.trainer, *planned.pipeline.stages)
    )
    return 2 * 4 * assembly.network.size * num_clients if remembers else 0


def duration(
    assembly: Assembly,
    planned: Planned,
    num_clients: int,
    step_seconds: float,
    example_seconds: float,
    workers: int,
) -> Finding:
    """How long the run will take, from measured steps.

    Args:
        assembly: of the run.
        planned: its pipeline.
        num_clients: in all.
        step_seconds: of one step of one client, on one thread.
        example_seconds: of one example of the central evaluation, likewise.
        workers: processes that train at once; as many devices as are asked, where each has its own.
    """
    config, sizes = assembly.config, assembly.data(num_clients).sizes
    epochs = getattr(assembly.trainer, "local_epochs", 1)
    batch = getattr(assembly.trainer, "batch_size", 1)
    steps = epochs * np.ceil(sizes / batch)
    asked = min(planned.claim.cohort or num_clients, num_clients)
    each = asked * float(steps.mean()) * step_seconds
    slowest = float(steps.max()) * step_seconds
    a_round = max(each / max(1, min(workers, asked)), slowest)
    every = config.evaluate.every
    tests = (ceil(config.rounds / every) if every else 0) * len(assembly.task.test())
    total = config.rounds * a_round + tests * example_seconds
    traffic = planned.traffic()
    moved = config.rounds * asked * (traffic.down + traffic.up)
    return Finding(
        "ok",
        f"about {spoken(total)} for {config.rounds} rounds of {spoken(a_round)} ({asked} clients, {workers} at once,"
        f" {spoken(step_seconds)} a step) and their evaluation; {human_bytes(moved)} in all",
    )


def spoken(seconds: float) -> str:
    """`4.2 ms`, `1.4 s`, `12 s`, `3 min`, `5.2 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
