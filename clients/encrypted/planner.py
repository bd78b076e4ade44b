"""What a training on ciphertexts will take, said before any of it is done: time, memory, bytes, and room for values.

Counts of operations follow from the plan, and their times are measured here and now (`costs`). Memory is that of the
compute party's tree of processes: what the interpreters take, and what lies in arrays and in SEAL's objects while a
step is computed, worked out from their shapes. An estimate that does not fit below the limit is refused before the
work, with what would fit; where the limit allows it, a smaller mini-batch or fewer hidden units are taken, aloud.

Nothing is computed on anybody's ciphertexts here, and no owner's key is known.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import psutil

from clients.encrypted import costs
from clients.encrypted.footprint import MB, tree_mb
from clients.encrypted.key_frames import evaluation_bytes
from clients.encrypted.limits import MemoryLimit, MemoryLimitError, require
from clients.encrypted.plan import Plan, plan_of
from clients.encrypted.spec import Spec
from clients.encrypted.worker import MOST_KEYS, MOST_STEPS

log = logging.getLogger(__name__)

BATCH, HIDDEN = "batch", "hidden units"
"""What a smaller model or mini-batch is allowed by, in `MemoryLimit.allow`."""
_WORKER_MB = 50.0
"""A worker with its libraries, before it is handed a key."""
_POOL_MB = 6.0
"""What SEAL and the C heap keep for later, in a worker."""
_COLUMNS = 4096
_LEAST_BATCH, _LEAST_HIDDEN = 64, 4


@dataclass(frozen=True)
class Settings:
    """Of a training, besides its plan.

    Attributes:
        workers: processes that compute.
        chunk: leaves of one tree.
        cache_mb: of ciphertexts kept in memory.
        owners: of data.
        batches: mini-batches of each.
        rounds: steps of each.
        base_mb: of the party's own process before it begins; None to look at this one.
        cores: of the machine; None for those that this process may use.
    """

    workers: int = 2
    chunk: int = 512
    cache_mb: float = 64.0
    owners: int = 1
    batches: int = 1
    rounds: int = 1
    base_mb: float | None = None
    cores: int | None = None

    @property
    def least(self) -> Settings:
        """With everything given up that costs only time, as the governor would."""
        return replace(self, workers=1, chunk=min(self.chunk, 16), cache_mb=0.0)


@dataclass(frozen=True)
class Forecast:
    """What a training will take.

    Attributes:
        plan: of a step.
        settings: the others.
    """

    plan: Plan
    settings: Settings

    @cached_property
    def workers(self) -> int:
        """Processes that have something to do."""
        return max(1, min(self.settings.workers, max(self.plan.spec.sizes[1:]) // 2))

    @cached_property
    def work(self) -> tuple[costs.Work, costs.Work]:
        """Of all workers in a step together, and of the first alone."""
        return costs.step(self.plan, self.workers, self.settings.chunk)

    @cached_property
    def cpu_seconds(self) -> float:
        """Of all cores, that a step takes at the party."""
        machine = costs.machine_of(self.plan.ring)
        return sum(work.seconds(machine) for work in self.work)

    @cached_property
    def wall_seconds(self) -> float:
        """That a step takes at the party, on an idle machine."""
        machine = costs.machine_of(self.plan.ring)
        cores = (
            self.settings.cores
            or len(psutil.Process().cpu_affinity() or [0])
            or os.cpu_count()
            or 1
        )
        shared, alone = (work.seconds(machine) for work in self.work)
        return shared / min(self.workers, cores) + alone

    @cached_property
    def owner_seconds(self) -> tuple[float, float]:
        """Of one core of an owner: once a mini-batch, and in each step."""
        machine = costs.machine_of(self.plan.ring)
        once, each = costs.owner(self.plan)
        return once.seconds(machine), each.seconds(machine)

    @property
    def run_seconds(self) -> float:
        """Of a whole training, with owners one after the other."""
        settings, (once, each) = self.settings, self.owner_seconds
        steps = settings.rounds * settings.owners
        return steps * (self.wall_seconds + each) + settings.owners * settings.batches * once

    @property
    def batch_bytes(self) -> int:
        """That an owner sends once for a mini-batch."""
        plan = self.plan
        halves = plan.inputs * plan.ring.levels + plan.packs(plan.spec.sizes[0])
        if plan.spec.loss == "squared":
            halves += plan.spec.sizes[-1] * plan.formats["o"].level
        return 8 * plan.ring.degree * halves

    @property
    def key_bytes(self) -> int:
        """Of an owner's evaluation keys, sent once."""
        return evaluation_bytes(self.plan.ring, self.plan.galois)

    @property
    def step_bytes(self) -> tuple[int, int]:
        """Up and down, in each step."""
        plan, spec = self.plan, self.plan.spec
        row, up, down = 8 * plan.ring.degree, 0, 0
        if spec.loss == "cross_entropy":
            up = row * spec.sizes[-1] * plan.formats["delta"].level
            up += row * plan.packs(spec.sizes[-1]) if spec.layers > 1 else 0
            down = 2 * row * spec.sizes[-1]
        return up, down + 2 * row * costs.trees(plan, self.workers, self.settings.chunk)

    @property
    def disk_bytes(self) -> int:
        """Of the party, with both components of each ciphertext."""
        settings = self.settings
        return settings.owners * (self.key_bytes + 2 * settings.batches * self.batch_bytes)

    @cached_property
    def memory(self) -> dict[str, float]:
        """MB at the peak of the party's tree of processes, by what takes them."""
        settings = self.settings
        base = tree_mb(psutil.Process()) if settings.base_mb is None else settings.base_mb
        stored = 2 * self.batch_bytes / MB
        kept = min(int(settings.cache_mb / stored), settings.batches * settings.owners)
        # A mini-batch that came in is first expanded; workers then begin, while what was sent is still there.
        expanded = 2 * self._half(self.plan.inputs, self.plan.ring.levels) / MB
        values = 4 * self._half(max(self.plan.spec.sizes[1:]), self.plan.ring.levels) / MB
        working = self.workers * self._working / MB + values
        return {
            "this process": base,
            "a mini-batch that comes in": self.batch_bytes / MB,
            "cached mini-batches": kept * stored,
            f"{self.workers} workers": self.workers * (_WORKER_MB + _POOL_MB),
            "their keys": self.workers * min(settings.owners, MOST_KEYS) * 2 * self.key_bytes / MB,
            "steps that wait": self.workers * self._waiting / MB,
            "a step": max(working, expanded),
        }

    @property
    def memory_mb(self) -> float:
        """The sum."""
        return sum(self.memory.values())

    def _half(self, units: int, level: int) -> int:
        """Bytes of one component."""
        return 8 * units * level * self.plan.ring.degree

    def _own(self, layer: int) -> int:
        return ceil(self.plan.spec.sizes[layer + 1] / self.workers)

    @property
    def _waiting(self) -> int:
        """Bytes of a worker's activations and slopes, of steps that wait for their owners."""
        formats = self.plan.formats
        levels = (
            formats[f"z{i}"].level + formats[f"h{i}"].level
            for i in range(self.plan.spec.layers - 1)
        )
        one = sum(2 * self._half(self._own(i), level) for i, level in enumerate(levels))
        return one * min(self.settings.owners, MOST_STEPS)

    @property
    def _working(self) -> int:
        """Bytes of a worker at the peak of a step."""
        plan = self.plan
        inputs, level = plan.inputs, plan.ring.levels
        rows = self._own(0) * (2 if plan.paired else 1)
        # Columns as they are read, and of half of them a limb, its mask and its doubles; sums, and what comes out.
        layer = inputs * _COLUMNS * 8 * 5 + 4 * rows * _COLUMNS * 8
        layer += 2 * self._half(rows, level)
        packs = plan.packs(plan.spec.sizes[0])
        tree = 2 * (16 + packs * 3 + 2 * self._own(0)) * self._half(1, 1)
        values = 2 * 2 * self._half(max(plan.spec.sizes[1:]), level)
        # Keys are read, framed and expanded before a step.
        return max(layer + values, tree + values, 4 * self.key_bytes)

    def rows(self) -> Iterator[tuple[str, str]]:
        """What it is, and how much."""
        plan, settings, ring = self.plan, self.settings, self.plan.ring
        sizes = "-".join(map(str, plan.spec.sizes))
        yield "model", f"{sizes}, {plan.spec.activation}, {plan.spec.loss.replace('_', ' ')}"
        yield (
            "mini-batch",
            f"{plan.spec.batch} samples, {plan.copies} copies of each, {plan.inputs} ciphertexts",
        )
        yield (
            "ring",
            f"N = {ring.degree}, primes of {list(ring.bits)} bits: {sum(ring.bits)}, 128-bit secure",
        )
        for name, form in plan.formats.items():
            yield (
                f"  {name}",
                f"level {form.level}, scale 2^{form.scale:.0f}, {form.room:.0f} bits above 1",
            )
        shared, alone = self.work
        for (kind, level), number in sorted((shared.operations + alone.operations).items()):
            yield f"  {kind} at level {level}", f"{number} a step"
        flops = sum(product.flops(ring) for product in shared.products)
        yield "linear layers", f"{flops / 1e9:.2f} GFLOP a step"
        once, each = self.owner_seconds
        yield (
            "party, a step",
            f"{self.cpu_seconds:.2f} s of CPU, {self.wall_seconds:.2f} s on {self.workers} workers",
        )
        yield "owner", f"{once:.2f} s a mini-batch once, {each:.2f} s a step"
        told = f"{settings.rounds} rounds, {settings.owners} owners"
        yield (
            "run",
            f"{told}: {self.run_seconds:.0f} s or more, without evaluation, on idle processors",
        )
        for name, figure in self.memory.items():
            yield f"  {name}", f"{figure:.0f} MB"
        yield "memory", f"{self.memory_mb:.0f} MB at the peak"
        up, down = self.step_bytes
        yield (
            "sent once",
            f"{self.key_bytes / 1e6:.1f} MB of keys, {self.batch_bytes / 1e6:.1f} MB a mini-batch",
        )
        yield "sent in a step", f"{up / 1e6:.2f} MB up, {down / 1e6:.2f} MB down"
        yield "disk", f"{self.disk_bytes / 1e6:.0f} MB"

    def text(self, *, brief: bool = False) -> str:
        """As a plain table; a brief one has neither values, nor operations, nor memory by item."""
        rows = [row for row in self.rows() if not (brief and row[0].startswith(" "))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {told}" for name, told in rows)


def fitting(spec: Spec, settings: Settings, limit: MemoryLimit) -> Spec:
    """The spec itself where a training of it fits below the limit, or the largest that does and is allowed.

    What costs only time counts as given up: the governor does that when it must.

    Args:
        spec: what should be trained.
        settings: of the training.
        limit: whose `allow` names `batch` or `hidden units` where these may be made smaller.

    Raises:
        MemoryLimitError: nothing that is allowed fits; it says what would.
    """
    if settings.base_mb is None:
        settings = replace(settings, base_mb=tree_mb(psutil.Process()))
    needed = _least_mb(spec, settings)
    if _fits(needed, limit):
        return spec
    for smaller in _smaller(spec, limit.allow):
        if _fits(_least_mb(smaller, settings), limit):
            log.warning(
                "MEMORY: a training of %s in mini-batches of %d takes at least %.0f MB of a limit of %.0f: %s in"
                " mini-batches of %d are trained instead",
                list(spec.sizes), spec.batch, needed, limit.limit_mb, list(smaller.sizes), smaller.batch,
            )  # fmt: skip
            return smaller
    require(limit.limit_mb, needed, _would_fit(spec, settings, limit), limit.critical)
    raise AssertionError("it fits after all")


def suited(plan: Plan, settings: Settings, limit: MemoryLimit) -> Settings:
    """Settings with which a training begins below its limit, as many workers as it has room for.

    The governor would come to the same, but by a step that overruns and is begun again.
    """
    chosen = settings
    while not _fits(Forecast(plan, chosen).memory_mb, limit):
        if chosen.cache_mb:
            chosen = replace(chosen, cache_mb=0.0)
        elif chosen.workers > 1:
            chosen = replace(chosen, workers=chosen.workers // 2)
        else:
            return chosen
        log.info("memory: begins with %d workers, cache %.0f MB", chosen.workers, chosen.cache_mb)
    return chosen


def _least_mb(spec: Spec, settings: Settings) -> float:
    return Forecast(plan_of(spec), settings.least).memory_mb


def _fits(needed_mb: float, limit: MemoryLimit) -> bool:
    try:
        require(limit.limit_mb, needed_mb, "", limit.critical)
    except MemoryLimitError:
        return False
    return True


def _smaller(spec: Spec, allow: tuple[str, ...]) -> Iterator[Spec]:
    """Smaller mini-batches, then fewer hidden units, then both, the largest first."""
    batches = [spec.batch]
    while BATCH in allow and batches[-1] > _LEAST_BATCH:
        batches.append(batches[-1] // 2)
    hidden = [spec.sizes]
    while HIDDEN in allow and max(hidden[-1][1:-1], default=0) > _LEAST_HIDDEN:
        first, *between, last = hidden[-1]
        hidden.append((first, *(max(units // 2, _LEAST_HIDDEN) for units in between), last))
    for sizes in hidden:
        for batch in batches:
            if (sizes, batch) != (spec.sizes, spec.batch):
                yield replace(spec, sizes=sizes, batch=batch)


def _would_fit(spec: Spec, settings: Settings, limit: MemoryLimit) -> str:
    for smaller in _smaller(spec, (BATCH, HIDDEN)):
        if _fits(_least_mb(smaller, settings), limit):
            asked = [name for name in (BATCH, HIDDEN) if name not in limit.allow]
            return (
                f"Sizes {list(smaller.sizes)} in mini-batches of {smaller.batch} would fit: choose them, or have"
                f" memory.allow name {' and '.join(map(repr, asked))}."
            )
    return "Nothing smaller that is worth training would fit."
