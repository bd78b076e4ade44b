"""Client code and requests for the engine's tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fl_app.engine import Answer, DeviceModel, EngineGrid, InProcessPool, one_by_one

INSTANT = DeviceModel(latency=0.0, bandwidth_mbps=float("inf"), seconds_per_example=0.0)
"""Devices that take no time."""


def make_grid(
    pool: Any, *, num_clients: int = 10, devices: DeviceModel | None = None, **more: Any
) -> EngineGrid:
    settings: dict[str, Any] = {"seed": 7, "work": lambda client: 10.0 * (client + 1), **more}
    return EngineGrid(pool, num_clients=num_clients, devices=devices or DeviceModel(), **settings)


def request(
    grid: EngineGrid,
    client: int,
    *,
    kind: str = "train",
    round_number: int = 1,
    ttl: float | None = None,
    arrays: ArrayRecord | None = None,
    **config: Any,
) -> Message:
    content = RecordDict(
        {"config": ConfigRecord({"server-round": round_number, "client": client, **config})}
    )
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, grid.roster[client], kind, ttl=ttl, group_id=str(round_number))


def loose_requests(count: int, arrays: ArrayRecord | None = None) -> list[Message]:
    """Requests with ids, as a grid hands them to a pool."""
    seen: list[Message] = []

    class Recorder(InProcessPool):
        def stream(self, chunks: Sequence[Sequence[Message]]) -> Iterator[list[Message]]:
            seen.extend(message for chunk in chunks for message in chunk)
            return super().stream(chunks)

    grid = make_grid(Recorder(echo), num_clients=count, devices=INSTANT)
    grid.send_and_receive([request(grid, client, arrays=arrays) for client in range(count)])
    return seen


def client_of(message: Message) -> int:
    client = message.content.config_records["config"]["client"]
    assert isinstance(client, int)
    return client


def reply_to(message: Message, **metrics: float) -> Message:
    records: dict[str, Any] = {
        "metrics": MetricRecord({"client": client_of(message), **metrics}),
    }
    return Message(RecordDict(records), reply_to=message)


def echo() -> Answer:
    return one_by_one(reply_to)


def handling(handle: Callable[[Message], Message]) -> Callable[[], Answer]:
    return lambda: one_by_one(handle)


def trainer() -> Answer:
    """A resident model, trained on data that the client's id seeds."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10))

    def handle(message: Message) -> Message:
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        with torch.no_grad():
            for parameter, array in zip(model.parameters(), arrays, strict=True):
                parameter.copy_(torch.from_numpy(array))
        torch.manual_seed(client_of(message))
        inputs, targets = torch.randn(300, 64), torch.randint(10, (300,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        update = ArrayRecord([p.detach().numpy() for p in model.parameters()])
        metrics = MetricRecord({"loss": float(loss.detach()), "client": client_of(message)})
        return Message(RecordDict({"update": update, "metrics": metrics}), reply_to=message)

    return one_by_one(handle)


def trainer_arrays() -> ArrayRecord:
    rng = np.random.default_rng(3)
    shapes = [(128, 64), (128,), (10, 128), (10,)]
    return ArrayRecord([rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in shapes])


def payloads(replies: Sequence[Message]) -> list[Any]:
    """Everything in replies that a run can depend on."""
    return [
        (reply.metadata.reply_to_message_id, reply.metadata.src_node_id, reply.metadata.group_id)
        + (
            (reply.error.code, (reply.error.reason or "").partition("\n")[0])
            if reply.has_error()
            else tuple(
                (name, key, value.data if hasattr(value, "data") else value)
                for name, record in reply.content.items()
                for key, value in record.items()
            )
        )
        for reply in replies
    ]


def singly(count: int, arrays: ArrayRecord | None = None) -> list[list[Message]]:
    """Chunks of one request each."""
    return [[message] for message in loose_requests(count, arrays)]


def clients_in(replies: Sequence[Sequence[Message]]) -> list[list[Any]]:
    return [[r.content.metric_records["metrics"]["client"] for r in chunk] for chunk in replies]


def gone(pids: Sequence[int], within: float = 5.0) -> bool:
    """Whether all these processes end in time."""
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


SLOWER_AND_SLOWER = DeviceModel(
    seconds_per_example=0.1, latency=0.0, bandwidth_mbps=float("inf"), detection_seconds=2.5
)
"""With the work of `make_grid`, client c takes c + 1 seconds to train, and no time for anything else."""


def collect(grid: EngineGrid, message_ids: Sequence[str]) -> list[tuple[float, Message]]:
    """All replies with the time at which they came, by the loop that a server runs."""
    outstanding, arrived = set(message_ids), []
    while outstanding:
        for reply in grid.pull_messages(outstanding):
            outstanding.discard(reply.metadata.reply_to_message_id)
            arrived.append((grid.clock.now(), reply))
        if outstanding:
            grid.clock.sleep(math.inf)
    return arrived


class CountingPool(InProcessPool):
    """A pool that remembers which clients it ran, call by call and chunk by chunk."""

    def __init__(self, factory: Callable[[], Answer]) -> None:
        super().__init__(factory)
        self.calls: list[list[list[int]]] = []

    def stream(self, chunks: Sequence[Sequence[Message]]) -> Iterator[list[Message]]:
        self.calls.append([[client_of(message) for message in chunk] for chunk in chunks])
        return super().stream(chunks)

    @property
    def ran(self) -> list[int]:
        return [client for call in self.calls for chunk in call for client in chunk]


def client_in(reply: Message) -> Any:
    return reply.content.metric_records["metrics"]["client"]
