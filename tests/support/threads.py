"""A grid whose nodes answer in threads of their own, in real time: for races that no virtual clock has."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Message
from flwr.serverapp import Grid

from fl_app.engine.flwr_internals import set_message_id


class ThreadedGrid(Grid):
    """Nodes 1 … n that share one function, run by a pool of threads.

    Args:
        nodes: how many there are.
        answer: replies to a request, each with the seconds that it takes; none, one or many.
        threads: that run `answer`.

    Attributes:
        pushed: requests so far.
    """

    run = None

    def __init__(
        self,
        nodes: int,
        answer: Callable[[Message], Sequence[tuple[float, Message]]],
        *,
        threads: int = 16,
    ) -> None:
        self._nodes, self._answer = range(1, nodes + 1), answer
        self._pool = ThreadPoolExecutor(threads)
        self._lock = threading.Lock()
        self._mail: dict[str, list[Message]] = {}
        self._numbers = itertools.count(1)
        self.pushed = 0

    def __enter__(self) -> ThreadedGrid:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def set_run(self, run) -> None:
        raise NotImplementedError("a threaded grid has no run")

    def create_message(self, *arguments, **keywords):
        raise NotImplementedError("messages are made by their constructor")

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError("the exchange pushes and pulls")

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            set_message_id(message, f"request-{next(self._numbers)}")
            ids.append(message.metadata.message_id)
            self.pushed += 1
            self._pool.submit(self._work, message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        with self._lock:
            found = [one for number in message_ids for one in self._mail.pop(number, [])]
        yield from found

    def _work(self, message: Message) -> None:
        for seconds, reply in self._answer(message):
            time.sleep(seconds)
            with self._lock:
                self._mail.setdefault(reply.metadata.reply_to_message_id, []).append(reply)
