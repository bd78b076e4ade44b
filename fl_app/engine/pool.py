"""Where client code runs: in this process, or in several worker processes, with the same results."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self

import numpy as np
import torch
from flwr.app import Message

from fl_app.engine.answering import Answer, answer_chunk

Factory = Callable[[], Answer]
"""Builds the client code, with its resident model; called once in each process that runs clients."""


class ClientPool(Protocol):
    """Something that answers chunks of requests."""

    def start(self) -> None:
        """Builds the client code, so that its faults show now; a second call does nothing.

        Call it before threads are started and before CUDA is touched: workers are forked here.
        """
        ...

    def stream(self, chunks: Sequence[Sequence[Message]]) -> Iterator[list[Message]]:
        """One reply for each request of each chunk, in the order of the chunks and of the requests, as they come.

        Client code that fails gives error replies, never an exception. Chunks may run at the same time, so no two
        of one call should hold requests to one client. A few are worked at ahead of what is taken, no more, so that
        replies don't pile up; another stream may begin when this one has ended or is closed.
        """
        ...

    def close(self) -> None:
        """Ends whatever was started, at once; a second call does nothing."""
        ...


class InProcessPool:
    """Runs client code in this process, on one thread, and leaves no trace in its global state.

    One thread, as in every worker of a `ProcessPool`, since the order in which torch adds numbers depends on the
    number of threads.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._answer: Answer | None = None
        self._closed = False

    def start(self) -> None:
        """Builds the client code; whatever the factory raises passes through."""
        self._ready()

    def stream(self, chunks: Sequence[Sequence[Message]]) -> Iterator[list[Message]]:
        """See `ClientPool.stream`."""
        for chunk in chunks:
            answer = self._ready()
            with _own_global_state():
                replies = answer_chunk(answer, chunk)
            yield replies

    def close(self) -> None:
        """Lets go of the client code."""
        self._closed, self._answer = True, None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> Answer:
        if self._closed:
            raise RuntimeError("the pool is closed")
        if self._answer is None:
            with _own_global_state():
                self._answer = self._factory()
        return self._answer


@contextmanager
def _own_global_state() -> Iterator[None]:
    """One torch thread inside; thread count and global random states are put back afterwards.

    A worker process has a global state of its own. So that server code which draws from a global generator sees the
    same numbers for any number of workers, client code gets none of this process's here either.
    """
    threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - saved, not used
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
