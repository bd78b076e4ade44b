"""`PipelineStrategy.start`: whole runs over scripted nodes."""

import copy
import logging

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from strategies import ContractError, Pipeline, PipelineStrategy, Visibility
from strategies.admission import Admission
from strategies.collectors import Plain
from strategies.combiners import Mean
from strategies.exchange import NoClientsError
from strategies.hooks import RoundView, Stop
from strategies.samplers import Uniform
from strategies.server_models import SGD, Adagrad, Adam, Scaffold, Yogi
from strategies.stages import Clip
from strategies.update import CONTROL, DELTA
from strategies.wire import ARRAYS, CONFIG, pack_model, unpack_model
from tests.support.grids import ScriptedGrid, trellis_node, vanilla_node

INITIAL = {
    "head.w": np.array([[1.0, 2.0]], np.float32),
    "norm.running_mean": np.array([0.5], np.float32),
    "norm.num_batches_tracked": np.array(3, np.int64),
    "frozen.w": np.array([9.0], np.float64),
}


def learns(client: int, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A client's change: depends on client, round and the model that it was sent."""
    rng = np.random.default_rng([client, number])
    weights = arrays["head.w"].ravel()
    return {
        "delta": np.float32(rng.normal(0, 1, weights.size) - 0.1 * weights),
        "buffers": np.float32(rng.normal(0, 0.1, 1)),
        "counters": np.float32([number]),
    }


def grid_of(clients: int = 3, change=learns, metrics=None) -> ScriptedGrid:
    nodes = {
        100 + client: trellis_node(change, examples=1.0 + client, metrics=metrics)
        for client in range(clients)
    }
    return ScriptedGrid(nodes)


def strategy(**keywords) -> PipelineStrategy:
    keywords = {"travel": ("head.*", "norm.*"), "federated_every": 0} | keywords
    return PipelineStrategy(keywords.pop("pipeline", Pipeline()), **keywords)


def arrays_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    return unpack_model(record)


def same_bits(found: ArrayRecord, expected: ArrayRecord) -> bool:
    return {n: a.data for n, a in found.items()} == {n: a.data for n, a in expected.items()}


def test_a_run_returns_the_whole_model_in_its_first_order_and_dtypes():
    result = strategy().start(grid_of(), pack_model(INITIAL), num_rounds=4)
    found = arrays_of(result.arrays)
    assert list(found) == list(INITIAL)
    assert [array.dtype for array in found.values()] == [a.dtype for a in INITIAL.values()]
    assert [array.shape for array in found.values()] == [a.shape for a in INITIAL.values()]
    assert found["frozen.w"] == 9.0
    assert found["norm.num_batches_tracked"] == 3 + 1 + 2 + 3 + 4
    assert not np.array_equal(found["head.w"], INITIAL["head.w"])


def test_two_runs_with_one_seed_are_the_same_bit_for_bit():
    def run(seed):
        one = strategy(pipeline=Pipeline(sampler=Uniform(fraction=0.4)), seed=seed)
        return one.start(grid_of(8), pack_model(INITIAL), num_rounds=5).arrays

    assert same_bits(run(1), run(1))
    assert not same_bits(run(1), run(2))


def test_central_evaluation_is_called_for_the_initial_model_every_so_often_and_at_the_end():
    called = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        called.append(number)
        assert list(arrays) == list(INITIAL)
        return MetricRecord({"accuracy": number / 10, "per_class": [0.1, 0.2]})

    one = strategy(evaluate_every=3)
    result = one.start(grid_of(), pack_model(INITIAL), num_rounds=7, evaluate_fn=evaluate)
    assert called == [0, 3, 6, 7]
    assert {n: dict(r)["accuracy"] for n, r in result.evaluate_metrics_serverapp.items()} == {
        0: 0.0,
        3: 0.3,
        6: 0.6,
        7: 0.7,
    }


def test_an_evaluation_that_gives_nothing_is_no_metric():
    result = strategy().start(
        grid_of(), pack_model(INITIAL), num_rounds=1, evaluate_fn=lambda number, arrays: None
    )
    assert result.evaluate_metrics_serverapp == {}


def test_federated_evaluation_is_a_mean_over_every_client_by_examples():
    grid = grid_of(2, metrics={"accuracy": 0.5})
    grid.nodes[200] = trellis_node(learns, examples=6, metrics={"accuracy": 1.0})
    result = strategy(federated_every=2).start(
        grid, pack_model(INITIAL), num_rounds=4, evaluate_config=ConfigRecord({"batch-size": 7})
    )
    assert list(result.evaluate_metrics_clientapp) == [2, 4]
    mean = result.evaluate_metrics_clientapp[2]["accuracy"]
    assert mean == pytest.approx((1 * 0.5 + 2 * 0.5 + 6 * 1.0) / 9)
    asked = [m for m in grid.sent if m.metadata.message_type == "evaluate"]
    assert len(asked) == 6
    assert asked[0].content[CONFIG]["batch-size"] == 7
    assert list(asked[0].content[ARRAYS]) == list(INITIAL)[:3]


@pytest.mark.parametrize("examples", [0, -5, float("nan"), float("inf"), 1e18, 10**400])
def test_a_client_cannot_decide_the_federated_evaluation_by_its_number_of_examples(examples):
    liar = trellis_node(learns, examples=1, metrics={"accuracy": 0.0})

    def lies(message):
        for reply in liar(message):
            if message.metadata.message_type == "evaluate":
                reply.content["metrics"]["num-examples"] = examples
            yield reply

    grid = grid_of(2, metrics={"accuracy": 0.75})
    grid.nodes[200] = lies
    result = strategy(federated_every=1).start(grid, pack_model(INITIAL), num_rounds=1)
    assert dict(result.evaluate_metrics_clientapp[1]) == {"accuracy": 0.75}


def test_training_metrics_are_kept_by_round():
    result = strategy().start(grid_of(metrics={"loss": 0.5}), pack_model(INITIAL), num_rounds=2)
    assert {n: dict(r) for n, r in result.train_metrics_clientapp.items()} == {
        1: {"loss": 0.5},
        2: {"loss": 0.5},
    }


def test_settings_go_down_with_every_training_request():
    pipeline = Pipeline(train_config={"proximal-mu": 0.1, "lr": 1.0})
    grid = grid_of()
    strategy(pipeline=pipeline).start(
        grid, pack_model(INITIAL), num_rounds=1, train_config=ConfigRecord({"lr": 0.5, "x": [1]})
    )
    config = grid.sent[0].content[CONFIG]
    assert (config["lr"], config["proximal-mu"], config["x"]) == (0.5, 0.1, [1])


def test_a_hook_sees_every_round_and_may_end_the_run():
    seen: list[RoundView] = []

    def watch(view: RoundView) -> None:
        seen.append(view)

    def budget(view: RoundView) -> Stop | None:
        return Stop("the budget is spent") if view.round == 3 else None

    one = strategy(hooks=[watch, budget])
    result = one.start(
        grid_of(),
        pack_model(INITIAL),
        num_rounds=9,
        evaluate_fn=lambda number, arrays: MetricRecord({"loss": 1.0}),
    )
    assert [view.round for view in seen] == [1, 2, 3]
    assert one.stopped == Stop("the budget is spent")
    assert one.model.version == 3
    assert seen[-1].evaluation == {"loss": 1.0}
    assert same_bits(result.arrays, pack_model(one.model.arrays()))


def test_a_run_to_its_end_was_stopped_by_nobody():
    one = strategy(hooks=[lambda view: None])
    one.start(grid_of(), pack_model(INITIAL), num_rounds=1)
    assert one.stopped is None


OPTIMIZERS = {
    "sgd": lambda: SGD(lr=0.5),
    "momentum": lambda: SGD(momentum=0.9),
    "adagrad": Adagrad,
    "adam": Adam,
    "yogi": Yogi,
    "scaffold": lambda: Scaffold(population=4),
}


def pipeline_of(name: str) -> Pipeline:
    sections = frozenset({DELTA, CONTROL}) if name == "scaffold" else frozenset({DELTA})
    return Pipeline(
        sampler=Uniform(fraction=0.5),
        combiner=Mean(weighting="uniform"),
        optimizer=OPTIMIZERS[name](),
        client_sections=sections,
    )


def with_control(client: int, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    sections = learns(client, number, arrays)
    return {**sections, CONTROL: sections["delta"] * np.float32(0.3)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_from_its_state_bit_for_bit(name):
    change = with_control if name == "scaffold" else learns

    def run(one: PipelineStrategy, grid: ScriptedGrid, until: int) -> ArrayRecord:
        return one.start(grid, pack_model(INITIAL), num_rounds=until).arrays

    whole = run(strategy(pipeline=pipeline_of(name)), grid_of(4, change), 8)
    first = strategy(pipeline=pipeline_of(name))
    run(first, grid_of(4, change), 3)
    state = copy.deepcopy(first.state_dict())
    second, grid = strategy(pipeline=pipeline_of(name)), grid_of(4, change)
    second.load_state_dict(state)
    resumed = run(second, grid, 8)
    assert same_bits(resumed, whole)
    assert grid.sent[0].content[CONFIG]["server-round"] == 4
    assert grid.sent[0].content[CONFIG]["included"] in (0, 1, 2, 3)
    assert {m.content[CONFIG]["included"] for m in grid.sent} - {0}


def test_a_resumed_run_does_not_evaluate_the_initial_model_again():
    first, second, called = strategy(), strategy(), []
    first.start(grid_of(), pack_model(INITIAL), num_rounds=2)
    second.load_state_dict(first.state_dict())
    second.start(
        grid_of(),
        pack_model(INITIAL),
        num_rounds=3,
        evaluate_fn=lambda number, arrays: called.append(number),
    )
    assert called == [3]


def test_a_finished_run_that_is_started_again_returns_its_model():
    first, second, grid = strategy(), strategy(), grid_of()
    result = first.start(grid_of(), pack_model(INITIAL), num_rounds=2)
    second.load_state_dict(first.state_dict())
    assert same_bits(second.start(grid, pack_model(INITIAL), num_rounds=2).arrays, result.arrays)
    assert grid.sent == []


def test_strikes_and_refusals_live_through_a_restart():
    first, second = strategy(), strategy()
    nodes = grid_of()
    nodes.nodes[200] = trellis_node(lambda *_: {**learns(0, 1, INITIAL), "delta": [np.nan, 0]})
    first.start(nodes, pack_model(INITIAL), num_rounds=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.pipeline.admission.strikes == {3: 2}
    assert second.pipeline.admission.refusals == {"not_finite": 2}


def test_there_is_no_state_before_there_is_a_model():
    with pytest.raises(RuntimeError, match="no round has begun: call `start`"):
        strategy().state_dict()


def test_a_state_of_another_pipeline_is_refused():
    first, second = strategy(), strategy(pipeline=Pipeline(optimizer=Adam()))
    first.start(grid_of(), pack_model(INITIAL), num_rounds=1)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="the state is that of 'server SGD'"):
        second.start(grid_of(), pack_model(INITIAL), num_rounds=2)
    with pytest.raises(ValueError, match="'pipeline' should be a mapping"):
        second.load_state_dict({})


def test_a_run_waits_for_its_clients_and_says_when_they_do_not_come():
    with pytest.raises(NoClientsError, match="2 of 3 clients came within 10 s"):
        strategy(min_clients=3).start(grid_of(2), pack_model(INITIAL), timeout=10.0)


def test_the_contract_is_checked_when_the_strategy_is_built():
    with pytest.raises(ContractError):
        PipelineStrategy(Pipeline(collector=Plain(vanilla=True), stages=[Clip()]))
    claim = PipelineStrategy(Pipeline()).claim
    assert claim.visibility is Visibility.EACH


def test_a_summary_names_the_parts(caplog):
    with caplog.at_level(logging.INFO, logger="strategies"):
        strategy(pipeline=Pipeline(stages=[Clip()], admission=Admission(quorum=2))).summary()
    assert "stages clip" in caplog.text
    assert "Mean(weighting='examples', denominator='replies')" in caplog.text


def test_vanilla_clients_train_the_same_model_as_those_that_send_updates():
    def fit(arrays):
        return {name: array + np.asarray(1, array.dtype) for name, array in arrays.items()}

    grid = ScriptedGrid({1: vanilla_node(fit), 2: vanilla_node(fit, examples=5)})
    pipeline = Pipeline(collector=Plain(vanilla=True))
    result = strategy(pipeline=pipeline).start(grid, pack_model(INITIAL), num_rounds=2)
    found = arrays_of(result.arrays)
    np.testing.assert_array_equal(found["head.w"], INITIAL["head.w"] + 2)
    np.testing.assert_array_equal(found["norm.running_mean"], [2.5])
    assert found["norm.num_batches_tracked"] == 5
    assert found["frozen.w"] == 9
