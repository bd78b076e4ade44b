"""Ten thousand rounds among hostile clients: nothing is raised, and the model never knows that they were there."""

import logging
from collections import Counter
from functools import cache

import numpy as np
import pytest

from strategies import Pipeline, PipelineStrategy
from strategies.admission import Admission
from strategies.collectors import Plain
from strategies.protocols import Plan
from strategies.server_models import SGD, ServerModel
from strategies.stages import Clip
from strategies.update import COUNTERS, DELTA
from strategies.wire import pack, pack_model
from tests.support.grids import ScriptedGrid, trellis_node, vanilla_node
from tests.support.hostile import ATTACKS, hostile_node
from tests.support.updates import parameters, update

HONEST, HOSTILE = 2, 1
INITIAL = {**parameters(0.5, -0.5, 0.25), "n": np.array(0, np.int64)}


@pytest.fixture(autouse=True)
def _quiet():
    """A line for each of the refusals would be most of the work."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def change(client: int, number: int, arrays: object = None) -> dict[str, np.ndarray]:
    phase = np.float32(number * 0.37 + client)
    return {DELTA: np.sin(phase + np.arange(3, dtype=np.float32)), COUNTERS: np.float32([1])}


def honest_nodes() -> dict:
    return {client: trellis_node(change, examples=3.0 + client) for client in range(HONEST)}


def with_hostile(seed: int) -> ScriptedGrid:
    """Honest clients 0 and 1 with the lowest node ids, hostile clients after them."""
    honest = trellis_node(change, examples=5.0, metrics={"loss": 1.0})
    nodes = honest_nodes()
    for client in range(HONEST, HONEST + HOSTILE):
        nodes[client] = hostile_node(honest, np.random.default_rng([seed, client]))
    return ScriptedGrid(nodes, record=False)


def run(grid: ScriptedGrid, pipeline: Pipeline, rounds: int) -> ServerModel:
    one = PipelineStrategy(pipeline, federated_every=0)
    one.start(grid, pack_model(INITIAL), num_rounds=rounds, timeout=60.0)
    return one.model


@cache
def by_hand(rounds: int) -> ServerModel:
    """What the honest clients alone make of the model, without a grid."""
    pipeline = Pipeline()
    model = ServerModel(INITIAL, SGD())
    for number in range(1, rounds + 1):
        accumulator = pipeline.combiner.begin(Plan(model.layouts, HONEST, HONEST))
        for client in range(HONEST):
            vectors = change(client, number)
            accumulator.add(
                update(
                    vectors[DELTA],
                    weight=3.0 + client,
                    client=client,
                    **{COUNTERS: vectors[COUNTERS]},
                )
            )
        model.apply(accumulator.result())
    return model


# Four times 2,500, and 500 in `make test`.
@pytest.mark.parametrize(
    ("seed", "rounds"),
    [(9, 500), *(pytest.param(seed, 2500, marks=pytest.mark.slow) for seed in (0, 1, 2, 3))],
)
def test_ten_thousand_rounds_of_hostile_replies_leave_no_trace(seed, rounds):
    pipeline = Pipeline(admission=Admission(quorum=HONEST))
    model = run(with_hostile(seed), pipeline, rounds)
    assert model.version == rounds
    assert np.isfinite(model.parameters).all()
    assert model.parameters.tobytes() == by_hand(rounds).parameters.tobytes()
    assert model.view()["n"] == rounds
    assert set(pipeline.included) == set(range(HONEST))
    counted = pipeline.admission
    assert counted.strikes == dict.fromkeys(range(HONEST, HONEST + HOSTILE), rounds)
    assert counted.refusals.total() == HOSTILE * rounds
    assert set(counted.refusals) == {
        "client_error", "timeout", "missing", "impostor", "round", "version", "shape", "dtype",
        "malformed", "num_examples", "not_finite", "too_large",
    }  # fmt: skip


def test_the_run_without_hostile_clients_is_the_same_bit_for_bit():
    alone = run(ScriptedGrid(honest_nodes()), Pipeline(), 50)
    among = run(with_hostile(9), Pipeline(), 50)
    assert among.parameters.tobytes() == alone.parameters.tobytes()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_each_way_of_lying_is_refused_for_a_reason_of_its_own(attack):
    rng, reasons = np.random.default_rng(1), Counter()
    honest = trellis_node(change)

    def node(message):
        (reply,) = honest(message)
        content = attack(reply.content, rng)
        reply.content = reply.content if content is None else content
        return [reply]

    pipeline = Pipeline(admission=Admission(on_shortfall="skip"))
    model = run(ScriptedGrid({0: node, 1: node}), pipeline, 40)
    reasons = pipeline.admission.refusals
    assert reasons.total() == 80
    np.testing.assert_array_equal(model.parameters, ServerModel(INITIAL, SGD()).parameters)


def lies_within_limits(rng: np.random.Generator):
    """What admission can't tell from honest work: any finite values, weights and metrics."""

    def lie(client: int, number: int, arrays: object) -> dict[str, np.ndarray]:
        scale = 10.0 ** rng.uniform(-45, 10)
        return {
            DELTA: np.float32(np.clip(rng.normal(0, scale, 3), -1e10, 1e10)),
            COUNTERS: np.float32([np.clip(rng.normal(0, scale), -1e10, 1e10)]),
        }

    metrics = {"loss": 1.7e308, "accuracy": float("nan"), "\x00": -1e308, "inf": float("inf")}
    return trellis_node(lie, examples=1e6, metrics=metrics)


@pytest.mark.parametrize("stages", [[], [Clip(norm=1.0)]], ids=["as it comes", "clipped"])
def test_lies_within_the_limits_leave_a_finite_model_and_finite_metrics(stages):
    nodes = {client: trellis_node(change, stages=stages) for client in range(HONEST)}
    nodes |= {2: lies_within_limits(np.random.default_rng(0)), 3: with_hostile(3).nodes[2]}
    one = PipelineStrategy(Pipeline(stages=stages), federated_every=50)
    result = one.start(ScriptedGrid(nodes, record=False), pack_model(INITIAL), num_rounds=150)
    assert np.isfinite(one.model.parameters).all()
    assert one.model.view()["n"] >= 150
    if stages:
        # Each client moves the model by no more than C = 1 a round.
        assert np.linalg.norm(one.model.parameters - INITIAL["w"]) <= 150 + 1
    for history in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
        for record in history.values():
            assert all(np.isfinite(value) for value in record.values())


def test_hostile_weights_of_vanilla_clients_leave_no_trace():
    rng = np.random.default_rng(4)
    honest = vanilla_node(
        lambda arrays: {"w": arrays["w"] + np.float32([1, 0, -1]), "n": arrays["n"] + 1}
    )

    def hostile(message):
        (reply,) = honest(message)
        arrays = reply.content["arrays"]
        name = ["w", "n"][rng.integers(2)]
        value = arrays[name].numpy()
        way = rng.integers(6)
        if way == 0:
            arrays[name] = pack(np.full_like(value, np.nan, np.float32))
        elif way == 1:
            arrays[name] = pack(np.append(value, value))
        elif way == 2:
            del arrays[name]
        elif way == 3:
            arrays["w"] = pack(np.float32([3e38, np.nan, 0]))
        elif way == 4:
            arrays[name] = pack(value.astype(np.complex64))
        else:
            reply.content["metrics"]["num-examples"] = -7
        return [reply]

    def vanilla(nodes: dict) -> ServerModel:
        return run(ScriptedGrid(nodes, record=False), Pipeline(collector=Plain(vanilla=True)), 100)

    alone, among = vanilla({0: honest, 1: honest}), vanilla({0: honest, 1: honest, 2: hostile})
    assert among.parameters.tobytes() == alone.parameters.tobytes()
    assert among.view()["n"] == alone.view()["n"] == 100
