"""A Flower grid whose nodes are functions: what a node answers, how often and when is for the test to say."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fl_app.engine.clock import VirtualClock
from fl_app.engine.flwr_internals import set_message_id
from strategies.collectors import PlainClient
from strategies.encoding import encode
from strategies.mod import kinds_of, layouts_of
from strategies.protocols import ClientHalf, Stage
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import ARRAYS, CONFIG, METRICS, NUM_EXAMPLES, TRAINS, unpack_model

Node = Callable[[Message], Iterable[Message | tuple[float, Message]]]
"""Replies to a request: none, one or many, each at once or after so many virtual seconds."""


class ScriptedGrid(Grid):
    """Nodes by node id, a virtual clock, and whatever replies the nodes make, asked for or not.

    Attributes:
        nodes: may change between requests, as nodes come and go.
        sent: every message pushed, in order, where `record` is set.
        strays: delivered with the next pull, whoever asked.
    """

    run = None

    def __init__(self, nodes: Mapping[int, Node], *, record: bool = True) -> None:
        self.nodes = dict(nodes)
        self.clock = VirtualClock()
        self.sent: list[Message] = []
        self.strays: list[Message] = []
        self._record = record
        self._numbers = itertools.count(1)
        self._mail: list[tuple[float, int, Message]] = []

    def set_run(self, run) -> None:
        raise NotImplementedError("a scripted grid has no run")

    def create_message(self, *arguments, **keywords):
        raise NotImplementedError("messages are made by their constructor")

    def send_and_receive(self, messages, *, timeout=None):
        ids = [number for number in self.push_messages(messages) if number]
        self.clock.sleep(timeout or 0.0)
        return self.pull_messages(ids)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        found, self.strays = self.strays, []
        waiting = []
        while self._mail:
            moment, number, message = heapq.heappop(self._mail)
            due = moment <= self.clock.now() and message.metadata.reply_to_message_id in wanted
            if due:
                found.append(message)
            else:
                waiting.append((moment, number, message))
        self._mail = waiting  # popped in order, so it is a heap already
        return found

    def _push(self, message: Message) -> str | None:
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None:
            return None
        set_message_id(message, f"request-{next(self._numbers)}")
        if self._record:
            self.sent.append(message)
        for answer in node(message):
            delay, reply = answer if isinstance(answer, tuple) else (0.0, answer)
            moment = self.clock.now() + delay
            self.clock.expect(moment)
            heapq.heappush(self._mail, (moment, next(self._numbers), reply))
        return message.metadata.message_id


Change = Callable[[int, int, dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""(client, round, arrays) → the vector of each section: what an honest client would send."""


def trellis_node(
    change: Change,
    *,
    examples: float = 1,
    stages: Sequence[Stage] = (),
    metrics: Mapping[str, float] | None = None,
    half: ClientHalf | None = None,
) -> Node:
    """A node that sends updates, by the collector's client half, and evaluates to `metrics`."""
    layouts: dict[str, Layout] = {}
    collector = half or PlainClient()

    def answer(message: Message) -> Iterator[Message]:
        config = message.content.config_records[CONFIG]
        if message.metadata.message_type == "evaluate":
            yield Message(numbers(examples, **(metrics or {})), reply_to=message)
            return
        if not config.get(TRAINS, True):
            yield Message(collector.answer(message.content), reply_to=message)
            return
        ready = collector.prepare(message.content)
        if ready is not None:
            yield Message(ready, reply_to=message)
            return
        arrays = unpack_model(message.content.array_records[ARRAYS])
        if not layouts:  # the same model every round
            layouts.update(layouts_of(arrays, kinds_of(arrays, config["buffers"])))
        client, number = config["client"], config["server-round"]
        sections = {
            name: Section(np.asarray(vector, np.float32), layouts.get(name, layouts[DELTA]))
            for name, vector in change(client, number, arrays).items()
        }
        update = Update(sections, examples, (client,), config["version"], dict(metrics or {}))
        update = encode(update, stages, config, client)
        yield Message(collector.reply(update, message.content), reply_to=message)

    return answer


def vanilla_node(
    fit: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]], *, examples: float = 1
) -> Node:
    """A node of a plain Flower app: weights in, weights out, by Flower's own conversion."""

    def answer(message: Message) -> Iterator[Message]:
        sent = message.content.array_records[ARRAYS]
        content = numbers(examples)
        if message.metadata.message_type == "train":
            trained = fit({name: array.numpy() for name, array in sent.items()})
            content["arrays"] = ArrayRecord({n: to_array(a) for n, a in trained.items()})
        yield Message(content, reply_to=message)

    return answer


def to_array(array: np.ndarray) -> Array:
    """An `Array` as Flower makes it."""
    return Array(np.asarray(array))


def numbers(examples: object, **metrics: object) -> RecordDict:
    """A reply's MetricRecord."""
    return RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: examples, **metrics})})


def hello_node(client: object) -> Node:
    """A node that says which client it is, and answers nothing else."""

    def answer(message: Message) -> Iterator[Message]:
        config = ConfigRecord({} if client is None else {"client": client})
        yield Message(RecordDict({CONFIG: config}), reply_to=message)

    return answer
