"""Secure aggregation in a plain Flower app: the mod with the masked client half, weights in and weights out."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from strategies import PipelineStrategy, pipeline_mod
from strategies.admission import Admission
from strategies.collectors import Masked
from strategies.combiners import Mean
from strategies.contents import FIXED_POINT_ERROR, SATURATED
from strategies.pipeline import Pipeline
from strategies.secagg import MaskedClient
from strategies.wire import ARRAYS, Refused, config_of
from tests.support.grids import Node, ScriptedGrid
from tests.support.masked import folder, step_of

CLIENTS = 10
START = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}
Lost = Callable[[int, str, int], bool]
"""(client, step, round) → whether no reply comes."""


def change_of(client: int, name: str) -> np.ndarray:
    rng = np.random.default_rng([client, len(name)])
    return rng.uniform(-0.5, 0.5, START[name].shape).astype(np.float32)


def vanilla_app(client: int, half: MaskedClient | None) -> ClientApp:
    """A train function that knows nothing of masks: it adds its own change to the weights."""
    app = ClientApp(mods=[pipeline_mod(half=half)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent = {name: array.numpy() for name, array in message.content[ARRAYS].items()}
        weights = {name: Array(array + change_of(client, name)) for name, array in sent.items()}
        metrics = MetricRecord({"num-examples": client + 1, "train_loss": 0.25})
        content = RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def node(path: Path, client: int, lost: Lost) -> Node:
    app = vanilla_app(client, MaskedClient(path))
    context = Context(1, 100 + client, {"partition-id": client}, RecordDict(), {})

    def answer(message: Message) -> Iterator[Message]:
        number = int(config_of(message.content)["server-round"])
        if lost(client, step_of(message.content), number):
            return
        try:
            yield app(message, context)
        except Refused as refused:  # as Flower's runtime does with what an app raises
            yield Message(Error(2, str(refused)), reply_to=message)

    return answer


def run(
    path: Path, rounds: int, lost: Lost = lambda *_: False, max_weight: int | None = None
) -> tuple[ArrayRecord, dict[int, MetricRecord], ScriptedGrid]:
    pipeline = Pipeline(
        collector=Masked(max_weight=max_weight),
        combiner=Mean(weighting="examples" if max_weight else "uniform"),
        admission=Admission(max_attempts=2),
    )
    grid = ScriptedGrid({100 + one: node(path, one, lost) for one in range(CLIENTS)})
    strategy = PipelineStrategy(pipeline, federated_every=0)
    arrays = ArrayRecord({name: Array(array) for name, array in START.items()})
    result = strategy.start(grid, arrays, num_rounds=rounds, timeout=10)
    return result.arrays, dict(result.train_metrics_clientapp), grid


def mean(clients, name: str, weights=None) -> np.ndarray:
    return np.average([change_of(one, name) for one in clients], axis=0, weights=weights)


def test_the_model_is_that_of_a_plain_mean():
    with folder() as path:
        arrays, metrics, grid = run(path, 3)
        for name in START:
            np.testing.assert_allclose(
                arrays[name].numpy(), 3 * mean(range(CLIENTS), name), atol=1e-6
            )
        assert set(metrics[3]) == {"train_loss", SATURATED, FIXED_POINT_ERROR}
        assert metrics[3]["train_loss"] == pytest.approx(0.25, rel=1e-5)
        assert 0 < metrics[3][FIXED_POINT_ERROR] < 1e-7
        assert len(grid.sent) == 3 * 4 * CLIENTS


def test_clients_weigh_by_their_examples_up_to_the_largest_weight():
    with folder() as path:
        arrays, _, _ = run(path, 1, max_weight=8)
        weights = [min(8, one + 1) for one in range(CLIENTS)]
        np.testing.assert_allclose(
            arrays["w"].numpy(), mean(range(CLIENTS), "w", weights), atol=1e-6
        )


@pytest.mark.parametrize("step", ["keys", "shares", "upload", "unmask"])
def test_clients_that_are_lost_in_one_step_are_left_out(step):
    """A drop-out of one round is back in the next."""
    with folder() as path:
        arrays, _, _ = run(
            path, 2, lambda client, now, number: number == 1 and now == step and client < 3
        )
        first = range(CLIENTS) if step == "unmask" else range(3, CLIENTS)
        for name in START:
            expected = mean(first, name) + mean(range(CLIENTS), name)
            np.testing.assert_allclose(arrays[name].numpy(), expected, atol=1e-6)


def test_a_round_that_is_void_while_it_opens_is_tried_again(caplog):
    """Too few answer the last request once; all are asked again, by new keys, and join. No key is logged."""
    caplog.set_level(logging.DEBUG)
    left = {"calls": 7}

    def lost(client: int, step: str, number: int) -> bool:
        if step != "unmask" or not left["calls"]:
            return False
        left["calls"] -= 1
        return True

    with folder() as path:
        arrays, _, grid = run(path, 1, lost)
        np.testing.assert_allclose(arrays["w"].numpy(), mean(range(CLIENTS), "w"), atol=1e-6)
        assert len(grid.sent) == 2 * 4 * CLIENTS
        assert "after the phase unmask 3 shares came of a secret of client" in caplog.text
        sent = {
            value.hex()
            for message in grid.sent
            for record in message.content.config_records.values()
            for value in record.values()
            if isinstance(value, bytes) and value
        }
        assert sent
        assert not any(value in caplog.text for value in sent)


def test_the_app_needs_the_half_that_the_server_has(caplog):
    with folder() as path:
        _, _, grid = run(path, 1)
        app, context = vanilla_app(0, None), Context(1, 1, {}, RecordDict(), {})
        reply = app(grid.sent[0], context)
    # Its own log has the reason, the server a word.
    assert reply.error.reason.startswith("phase: this client takes no part")
    assert "the server's collector is another" in caplog.text
