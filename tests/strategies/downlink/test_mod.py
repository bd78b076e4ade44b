"""Down-link compression in plain Flower apps: `pipeline_mod(held=…)`, weights in and weights out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from strategies import PipelineStrategy, pipeline_mod
from strategies.collectors import Masked, Plain
from strategies.combiners import Mean
from strategies.contract import ContractError
from strategies.downlink import Downlink, HeldModels
from strategies.downlink.messages import HELD, is_change
from strategies.pipeline import Pipeline
from strategies.secagg import MaskedClient
from strategies.sizes import count_bytes
from strategies.update import BUFFERS, COUNTERS, DELTA
from strategies.wire import ARRAYS, CONFIG, pack_model, unpack_model
from tests.support.grids import Node, ScriptedGrid, numbers
from tests.support.masked import folder

RNG = np.random.default_rng(0)
START = {
    "w": RNG.normal(0, 0.1, (40, 30)).astype(np.float32),
    "b": np.zeros(30, np.float32),
    "norm.running_mean": np.zeros(30, np.float32),
    "steps": np.array(0, np.int64),
}


def change(client: int, name: str, number: int) -> np.ndarray:
    rng = np.random.default_rng([client, number, len(name)])
    shape = START[name].shape
    if name == "steps":
        return np.array(1, np.int64)
    return rng.uniform(-0.01, 0.01, shape).astype(np.float32)


def node(client: int, mod, seen: list[dict[str, np.ndarray]]) -> Node:
    """A train function that adds its own change to the weights, and looks at what it was sent."""
    context = Context(1, 100 + client, {"partition-id": client}, RecordDict(), {})

    def train(message: Message, context: Context) -> Message:
        sent = unpack_model(message.content.array_records[ARRAYS])
        seen.append(sent)
        number = int(message.content[CONFIG]["server-round"])
        metrics = MetricRecord({"num-examples": 4, "loss": 0.5})
        weights = {name: array + change(client, name, number) for name, array in sent.items()}
        content = RecordDict({ARRAYS: pack_model(weights), "metrics": metrics})
        return Message(content, reply_to=message)

    def answer(message: Message) -> Iterator[Message]:
        yield mod(message, context, train)

    return answer


def run(
    path: Path, downlink: Downlink, forget: int = -1
) -> tuple[ArrayRecord, list[dict[str, np.ndarray]], ScriptedGrid]:
    """Four rounds of five clients with folders of their own; client `forget` loses its models before each request."""
    seen: list[dict[str, np.ndarray]] = []

    def mod_of(client: int):
        def mod(message, context, call_next):
            place = path / f"held-{client}"
            if client == forget:
                shutil.rmtree(place, ignore_errors=True)
            # A new one each time, as for a process a message.
            return pipeline_mod(held=HeldModels(place))(message, context, call_next)

        return mod

    grid = ScriptedGrid({100 + client: node(client, mod_of(client), seen) for client in range(5)})
    strategy = PipelineStrategy(Pipeline(downlink=downlink), federated_every=0)
    result = strategy.start(grid, pack_model(START), num_rounds=4, timeout=10)
    return result.arrays, seen, grid


def test_a_run_of_plain_apps_trains_on_one_rounded_model_and_keeps_its_own(tmp_path):
    arrays, seen, grid = run(tmp_path, Downlink(bits=8))
    changes = [is_change(message.content) for message in grid.sent]
    assert changes == [False] * 5 + [True] * 15
    assert not any(HELD in one for one in seen)
    for number in range(4):
        alike = seen[5 * number : 5 * number + 5]
        assert all(
            one[name].tobytes() == alike[0][name].tobytes() for one in alike for name in START
        )
    for name in ("w", "b", "norm.running_mean"):  # the server's own is as fine as ever
        exact = START[name].astype(float) + sum(
            np.mean([change(client, name, number) for client in range(5)], axis=0)
            for number in range(1, 5)
        )
        np.testing.assert_allclose(arrays[name].numpy(), exact, atol=2e-6)
    assert int(arrays["steps"].numpy()) == 4


def test_a_client_that_forgets_all_changes_nothing_but_bytes(tmp_path):
    kept, _, first = run(tmp_path / "a", Downlink())
    lost, _, second = run(tmp_path / "b", Downlink(), forget=2)
    assert dict(kept) == dict(lost)
    assert len(second.sent) == len(first.sent) + 3
    assert sum(not is_change(message.content) for message in second.sent) == 5 + 3


def test_masked_clients_find_the_model_that_their_keys_are_for():
    start = {name: START[name] for name in ("w", "b")}
    with folder() as path:
        seen: list[dict[str, np.ndarray]] = []
        nodes = {}
        for client in range(5):
            held, half = HeldModels(path / f"{client}"), MaskedClient(path / "keys")
            nodes[100 + client] = node(client, pipeline_mod(half=half, held=held), seen)
        grid = ScriptedGrid(nodes)
        pipeline = Pipeline(
            collector=Masked(), combiner=Mean(weighting="uniform"), downlink=Downlink()
        )
        strategy = PipelineStrategy(pipeline, federated_every=0)
        result = strategy.start(grid, pack_model(start), num_rounds=3, timeout=10)
    trained = [m for m in grid.sent if m.content[CONFIG].get("trains", True)]
    assert [is_change(message.content) for message in trained] == [False] * 5 + [True] * 10
    for name, array in start.items():
        total = sum(
            np.mean([change(client, name, number) for client in range(5)], axis=0)
            for number in range(1, 4)
        )
        np.testing.assert_allclose(result.arrays[name].numpy(), array + total, atol=1e-5)


def test_evaluation_asks_for_the_model_that_clients_train_on(tmp_path):
    """And the training that follows needs nothing but its name."""
    kinds: list[tuple[str, int]] = []

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate":
            assert ARRAYS in message.content
            return Message(numbers(3, accuracy=0.5), reply_to=message)
        sent = unpack_model(message.content.array_records[ARRAYS])
        number = int(message.content[CONFIG]["server-round"])
        weights = {name: array + change(0, name, number) for name, array in sent.items()}
        reply = RecordDict({ARRAYS: pack_model(weights), "metrics": numbers(3)["metrics"]})
        return Message(reply, reply_to=message)

    def evaluating(message: Message) -> Iterator[Message]:
        kinds.append((message.metadata.message_type, count_bytes(message.content)))
        context = Context(1, 1, {}, RecordDict(), {})
        yield pipeline_mod(held=HeldModels(tmp_path))(message, context, app)

    strategy = PipelineStrategy(Pipeline(downlink=Downlink()), min_clients=1)
    grid = ScriptedGrid({100: evaluating})
    result = strategy.start(grid, pack_model(START), num_rounds=3, timeout=10)
    assert dict(result.evaluate_metrics_clientapp[3]) == {"accuracy": 0.5}
    assert [kind for kind, _ in kinds] == ["train", "evaluate"] * 3
    (_, whole), (_, changed), *others = kinds
    assert changed < whole / 2
    assert all(size < 800 for kind, size in others if kind == "train")


def test_clients_without_the_mod_are_refused_with_the_mend():
    with pytest.raises(ContractError, match="pipeline_mod"):
        PipelineStrategy(Pipeline(collector=Plain(vanilla=True), downlink=Downlink()))


def test_the_state_of_a_run_holds_what_clients_hold(tmp_path):
    """A server that goes on after round 2 sends what one that never stopped would."""
    whole, _, grid = run(tmp_path / "a", Downlink())
    first = Pipeline(downlink=Downlink())
    seen: list[dict[str, np.ndarray]] = []
    nodes = {
        100 + c: node(c, pipeline_mod(held=HeldModels(tmp_path / f"b{c}")), seen) for c in range(5)
    }
    started = PipelineStrategy(first, federated_every=0)
    started.start(ScriptedGrid(nodes), pack_model(START), num_rounds=2, timeout=10)
    second = PipelineStrategy(Pipeline(downlink=Downlink()), federated_every=0)
    second.load_state_dict(started.state_dict())
    again = ScriptedGrid(nodes)
    result = second.start(again, pack_model(START), num_rounds=4, timeout=10)
    assert dict(result.arrays) == dict(whole)
    assert all(is_change(message.content) for message in again.sent)
    assert [count_bytes(m.content) for m in again.sent] == [
        count_bytes(m.content) for m in grid.sent[10:]
    ]


def test_buffers_and_counters_are_sections_as_ever():
    strategy = PipelineStrategy(Pipeline(downlink=Downlink()), federated_every=0)
    model = strategy._begin(pack_model(START))
    assert set(strategy.pipeline.job(model).layouts) == {DELTA, BUFFERS, COUNTERS}
