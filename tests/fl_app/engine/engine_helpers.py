"""Client code and requests for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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
        def answer(self, chunks: Sequence[Sequence[Message]]) -> list[list[Message]]:
            seen.extend(message for chunk in chunks for message in chunk)
            return super().answer(chunks)

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
