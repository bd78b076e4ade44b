"""Keeps a tree of processes below a memory limit: it watches, sheds by levers in a fixed order, and gives back.

Tiers are normal, warning and critical. From warning on, levers that cost only time are pulled; at critical all that are
allowed, and `check`, which work calls between its chunks, does not return before there is room, or raises
`MemoryLimitError` after everything has been let go. A step that can't be made smaller while it runs is abandoned at
critical, and begun again with less; where the limit itself is passed inside a call that `check` can't reach, the
sampling thread has the call interrupted (`on_overrun`). So the kernel need never kill anybody, as long as memory does
not run away between two samples. When memory has been normal for a while, levers are given back, the last one first.
This file knows no ciphertexts and no models, and nothing of how memory is measured (`footprint`), of settings
(`limits`), or of what levers do (`levers`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal

import psutil

from clients.encrypted.footprint import tree_mb, trim
from clients.encrypted.levers import Lever
from clients.encrypted.limits import (
    MemoryLimit,
    MemoryLimitError,
    StepAbandonedError,
    Tier,
    require,
)

__all__ = [
    "Action", "Governor", "MemoryLimit", "MemoryLimitError", "StepAbandonedError", "Tier", "require"
]  # fmt: skip

log = logging.getLogger(__name__)

_LONGEST_QUIET: Final = 3600.0
"""Seconds; a lever that is pulled again and again is given back no more rarely than this."""


@dataclass(frozen=True)
class Action:
    """What a governor did.

    Attributes:
        at: seconds since the epoch.
        what: `shed`, `restore` or `give up`.
        lever: its name; empty where everything was let go.
        tier: at that moment.
        used_mb: MB in use before it.
        limit_mb: the limit.
    """

    at: float
    what: Literal["shed", "restore", "give up"]
    lever: str
    tier: Tier
    used_mb: float
    limit_mb: float


class Governor:
    """Watches memory while it is entered as a context, and acts on it.

    Any thread may call `check`; levers are pulled by one thread at a time. A worker's heap is its own: a lever that
    takes work from one has it call `trim`.

    Args:
        limit: settings.
        process: root of the tree; by default the calling process.

    Attributes:
        used_mb: MB at the last look.
        peak_mb: the most that was seen.
        tier: of the last look.
        actions: the last thousand.
    """

    def __init__(self, limit: MemoryLimit, process: psutil.Process | None = None) -> None:
        self._limit = limit
        self._process = process or psutil.Process()
        self._levers: list[Lever] = []
        self._let_go: list[Callable[[], object]] = []
        self._interrupts: list[Callable[[], object]] = []
        self._overrun: float | None = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._pulled: list[Lever] = []
        self._given_back: set[str] = set()
        self._quiet = limit.quiet
        self._looked = self._worked = self._acted = self._calm_since = -math.inf
        self._failure: MemoryLimitError | None = None
        self.used_mb = self.peak_mb = 0.0
        self.tier = Tier.NORMAL
        self.actions: deque[Action] = deque(maxlen=1000)

    def __enter__(self) -> Governor:
        with self._lock:
            self._look()
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, name="memory-governor", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def register(self, lever: Lever) -> None:
        """Adds a lever; levers of the same order are pulled in the order in which they came.

        Raises:
            ValueError: one of this name is there.
        """
        with self._lock:
            if any(other.name == lever.name for other in self._levers):
                raise ValueError(f"a lever {lever.name!r} is registered already")
            self._levers.append(lever)
            self._levers.sort(key=lambda each: each.order)

    def on_failure(self, let_go: Callable[[], object]) -> None:
        """Adds what is called before `MemoryLimitError` is raised, the last one first: stop workers, drop arrays."""
        self._let_go.append(let_go)

    def on_overrun(self, interrupt: Callable[[], object]) -> None:
        """Adds what the sampling thread calls when the limit is passed: it must end a call that work waits in.

        Work then calls `check(midway=True)`, which says how to go on.
        """
        self._interrupts.append(interrupt)

    def check(self, midway: bool = False) -> Tier:
        """Called by work between chunks: returns at once where there is room, sheds or waits where there is none.

        A look is taken only where the last is older than `interval`, or was critical.

        Args:
            midway: in a step, whose levers that aren't immediate must not be pulled unless it is abandoned.

        Raises:
            StepAbandonedError: midway, and critical whatever is immediate; one other lever has been pulled.
            MemoryLimitError: critical, all allowed levers pulled and `patience` over; or it was raised before, and this
                is midway, or memory is not normal again.
        """
        waited_until = math.inf
        while True:
            with self._lock:
                if self._failure is not None:
                    if midway or not self._recovered():
                        raise self._failure
                    self._failure = None
                overrun, self._overrun = self._overrun, None
                if midway and overrun is not None:
                    self.used_mb, self.tier = overrun, Tier.CRITICAL
                    raise self._abandoned() if self._shed(within_work=True) else self._give_up()
                if self._nothing_to_do():
                    return self.tier
                pulled = self._step(within_work=not midway)
                self._worked = self._looked
                if self.tier < Tier.CRITICAL:
                    return self.tier
                now = time.monotonic()
                if pulled or now - self._acted < self._limit.settle:
                    waited_until = math.inf
                elif midway and self._shed(within_work=True):
                    raise self._abandoned()
                elif waited_until == math.inf:
                    waited_until = now + self._limit.patience
                if now >= waited_until:
                    if self.used_mb >= self._limit.critical * (self._limit.limit_mb or math.inf):
                        raise self._give_up()
                    # No more is to be had, and this much is below the line.
                    self.tier = Tier.WARNING
                    return self.tier
            time.sleep(min(self._limit.interval, 0.05))

    def report(self) -> Mapping[str, object]:
        """Limit, peak and how often each lever was pulled, for a run's summary."""
        with self._lock:
            shed = [action.lever for action in self.actions if action.what == "shed"]
        return {
            "limit_mb": self._limit.limit_mb,
            "peak_mb": round(self.peak_mb, 1),
            "shed": {name: shed.count(name) for name in dict.fromkeys(shed)},
        }

    def _watch(self) -> None:
        while not self._ended.wait(self._limit.interval):
            try:
                with self._lock:
                    self._step(within_work=False)
                    self._interrupt()
            except Exception:  # a lever that breaks must not end the watch
                log.exception("memory: the governor's thread goes on after an error")

    def _look(self) -> None:
        self.used_mb = tree_mb(self._process)
        self._looked = time.monotonic()
        self.peak_mb = max(self.peak_mb, self.used_mb)
        before, self.tier = self.tier, self._limit.tier(self.used_mb, self.tier)
        if self.tier > Tier.NORMAL or before > Tier.NORMAL:
            self._calm_since = self._looked
        if self.tier != before:
            log.info("memory: %s, from %s", self._figures(), before.name.lower())

    def _step(self, within_work: bool) -> bool:
        """One look and what follows from it; whether a lever was pulled."""
        self._look()
        limit, now = self._limit, self._looked
        if limit.limit_mb is None or self._failure is not None:
            return False
        if self.used_mb >= limit.warning * limit.limit_mb:
            return now - self._acted >= limit.settle and self._shed(within_work)
        if self.tier is Tier.NORMAL and self._quiet_enough():
            self._restore(within_work)
        return False

    def _recovered(self) -> bool:
        """Whether work may begin again after everything was let go."""
        self._look()
        if self.tier > Tier.NORMAL:
            return False
        log.info("memory: %s: work goes on", self._figures())
        self._overrun = None
        return True

    def _abandoned(self) -> StepAbandonedError:
        lever, limit = self.actions[-1].lever, self._limit.limit_mb
        return StepAbandonedError(
            f"the step does not fit into {limit:g} MB: {lever} shed, begin again"
        )

    def _interrupt(self) -> None:
        """In the sampling thread: has work interrupted, once, when the limit is passed."""
        limit = self._limit.limit_mb
        if limit is None or self.used_mb < limit or self._failure is not None:
            return
        if self._overrun is None:
            log.warning("memory: %s: the call under way is interrupted", self._figures())
            self._overrun = self.used_mb
            for interrupt in self._interrupts:
                interrupt()

    def _nothing_to_do(self) -> bool:
        """Whether the last look is good enough for work to go on, without one of its own."""
        # The thread's looks neither pull nor give back a lever that is left to the work.
        waits = self.tier is not Tier.NORMAL or bool(self._pulled)
        since = self._worked if waits else self._looked
        recent = time.monotonic() - since < self._limit.interval
        return recent and self.tier < Tier.CRITICAL

    def _quiet_enough(self) -> bool:
        return time.monotonic() - max(self._calm_since, self._acted) >= self._quiet

    def _shed(self, within_work: bool) -> bool:
        for lever in self._levers:
            if not (within_work or lever.immediate) or not self._may(lever):
                continue
            figures, tier, used = self._figures(), self.tier, self.used_mb
            if lever.shed():
                trim()
                self._pulled.append(lever)
                self._note("shed", lever.name, tier, used)
                self._look()
                log.warning("memory: %s: shed %s; now %.0f MB", figures, lever.name, self.used_mb)
                if lever.name in self._given_back:
                    self._given_back.clear()
                    self._quiet = min(2 * self._quiet, max(self._limit.quiet, _LONGEST_QUIET))
                return True
        return False

    def _may(self, lever: Lever) -> bool:
        if not lever.needs_permission:
            return True
        return lever.name in self._limit.allow and self.tier is Tier.CRITICAL

    def _restore(self, within_work: bool) -> None:
        """Gives the lever that was pulled last back, if what it takes fits below the warning line."""
        if not self._pulled or self._limit.limit_mb is None:
            return
        lever = self._pulled[-1]
        room = self._limit.warning * self._limit.limit_mb - self.used_mb
        if lever.returns_mb >= room or not (within_work or lever.immediate):
            return
        self._pulled.pop()
        figures, tier, used = self._figures(), self.tier, self.used_mb
        if lever.restore():
            self._given_back.add(lever.name)
            self._note("restore", lever.name, tier, used)
            self._look()
            log.info("memory: %s: restored %s; now %.0f MB", figures, lever.name, self.used_mb)

    def _note(
        self, what: Literal["shed", "restore", "give up"], lever: str, tier: Tier, used: float
    ) -> None:
        self._acted = time.monotonic()
        limit = self._limit.limit_mb or math.inf
        self.actions.append(Action(time.time(), what, lever, tier, used, limit))

    def _give_up(self) -> MemoryLimitError:
        limit = self._limit.limit_mb or math.inf
        needed = math.ceil(self.used_mb / self._limit.critical)
        shed = ", ".join(dict.fromkeys(lever.name for lever in self._pulled)) or "nothing"
        asks = [each.name for each in self._levers if each.needs_permission]
        barred = [name for name in asks if name not in self._limit.allow]
        mend = f"raise limit_mb to at least {needed}"
        mend += f", or allow {' or '.join(map(repr, barred))}" if barred else ""
        error = MemoryLimitError(
            f"memory limit of {limit:g} MB: {self.used_mb:.0f} MB are in use, of which at most "
            f"{self._limit.critical:.0%} of the limit may be; shed already: {shed}. Mend: {mend}",
            limit,
            needed,
        )
        self._failure = error
        self._note("give up", "", self.tier, self.used_mb)
        try:
            with ExitStack() as stack:
                for let_go in self._let_go:
                    stack.callback(let_go)
        except Exception:  # the others were called; what counts is the limit
            log.exception("memory: not everything could be let go")
        trim()
        self._look()
        log.error("%s. Work is let go: now %.0f MB", error, self.used_mb)
        return error

    def _figures(self) -> str:
        return f"{self.used_mb:.0f} of {self._limit.limit_mb or math.inf:.0f} MB ({self.tier.name.lower()})"
