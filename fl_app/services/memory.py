"""Peak memory of a process and all its children, sampled from a thread."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """A context within which memory is watched.

    Attributes:
        peak: the largest sum of resident set sizes seen, in bytes. Pages that forked processes share count for each.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.peak = 0
        self._interval = interval
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self.sample()
        return self

    def start(self) -> None:
        """Begins to watch from a thread. Once workers are forked: a process with threads should not be."""
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.sample()

    def sample(self) -> int:
        """Looks once; returns the peak so far."""
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended between the listing and the look
        self.peak = max(self.peak, total)
        return self.peak

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self.sample()
