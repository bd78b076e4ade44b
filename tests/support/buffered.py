"""Buffered runs over scripted nodes: who takes how long is for the test to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flwr.app import Error, Message

from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.pipeline import Pipeline
from strategies.protocols import Accumulator, Combiner, Plan
from strategies.schedulers import Buffered
from strategies.server_models import ServerModel
from strategies.update import DELTA, Update
from strategies.wire import CONFIG
from tests.support.grids import Node, ScriptedGrid, trellis_node
from tests.support.updates import parameters


def adds(*values: float, **keywords) -> Node:
    """An honest node whose update is always the same."""
    return trellis_node(lambda client, number, arrays: {DELTA: values}, **keywords)


def failing(message: Message) -> list[Message]:
    """A node that fails at once."""
    return [Message(Error(2, "out of memory"), reply_to=message)]


def silent(message: Message) -> list[Message]:
    """A node that never answers."""
    return []


def after(seconds: float | Callable[[Message], float], node: Node) -> Node:
    """The same node, whose replies take so long."""

    def answer(message: Message) -> Iterator[tuple[float, Message]]:
        delay = seconds(message) if callable(seconds) else seconds
        for reply in node(message):
            yield delay, reply

    return answer


def by_version(choice: Callable[[int], Node]) -> Node:
    """A node that does as is chosen by the version that it is sent."""
    return lambda message: choice(message.content[CONFIG]["version"])(message)


def watched(combiner: Combiner) -> list[list[Update]]:
    """What a combiner is given from now on, version by version."""
    begin, buffers = combiner.begin, []

    def watching(plan: Plan) -> Accumulator:
        accumulator = begin(plan)
        add, held = accumulator.add, []
        buffers.append(held)

        def noted(update: Update) -> None:
            held.append(update)
            add(update)

        accumulator.add = noted
        return accumulator

    object.__setattr__(combiner, "begin", watching)
    return buffers


class Run:
    """A buffered run from a model of zeros.

    Attributes:
        views: of each version.
        path: the parameters after each version.
    """

    def __init__(
        self,
        nodes: dict[int, Node] | ScriptedGrid,
        pipeline: Pipeline | None = None,
        *,
        versions: int = 1,
        timeout: float = 60.0,
        size: int = 2,
        seed: int = 0,
        **settings: object,
    ) -> None:
        self.grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)
        self.pipeline = pipeline or Pipeline()
        self.scheduler = Buffered(population=len(self.grid.nodes), **settings)
        self.pipeline.scheduler = self.scheduler
        self.pipeline.check(frozenset({DELTA}))
        self.model = ServerModel(parameters(*[0.0] * size), self.pipeline.optimizer)
        self.exchange = Exchange(self.grid)
        self.views: list[RoundView] = []
        self.path = []
        loop = self.scheduler.run(
            self.pipeline, self.model, self.exchange, versions, timeout=timeout, seed=seed
        )
        for view in loop:
            self.views.append(view)
            self.path.append(self.model.parameters.copy())

    def asked(self, key: str = "client") -> list:
        """A setting of each request, in order."""
        return [message.content[CONFIG][key] for message in self.grid.sent]
