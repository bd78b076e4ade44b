"""Flower's round-by-round face: `configure_train` and its three companions, driven as Flower's own loop does."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from strategies import Pipeline, PipelineStrategy
from strategies.admission import Admission
from strategies.collectors import Ckks, Masked, Plain
from strategies.collectors.once import Settled
from strategies.combiners import Mean
from strategies.samplers import Uniform
from strategies.server_models import Adam
from strategies.update import DELTA, Section, Update
from strategies.wire import ARRAYS, CONFIG, pack_model, unpack_model
from tests.strategies.schedulers.test_synchronous import TwoPhases
from tests.strategies.test_strategy import INITIAL, grid_of, learns, same_bits, strategy
from tests.support.grids import ScriptedGrid, numbers, trellis_node


def drive(one: PipelineStrategy, grid: ScriptedGrid, rounds: int, first: int = 1):
    """Flower's own loop over a strategy's methods; arrays and metrics of the last round."""
    arrays, metrics = pack_model(INITIAL), None
    for number in range(first, first + rounds):
        messages = one.configure_train(number, arrays, ConfigRecord(), grid)
        replies = grid.send_and_receive(messages, timeout=10)
        trained, metrics = one.aggregate_train(number, replies)
        arrays = trained if trained is not None else arrays
    return arrays, metrics


def failing(message: Message) -> list[Message]:
    return [Message(Error(2, "out of memory"), reply_to=message)]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_round_by_round_gives_the_same_model_as_the_whole_run(fraction):
    def fresh() -> PipelineStrategy:
        return strategy(
            pipeline=Pipeline(sampler=Uniform(fraction=fraction), optimizer=Adam()), seed=3
        )

    whole = fresh().start(grid_of(6, metrics={"loss": 2.0}), pack_model(INITIAL), num_rounds=5)
    arrays, metrics = drive(fresh(), grid_of(6, metrics={"loss": 2.0}), 5)
    assert same_bits(arrays, whole.arrays)
    assert dict(metrics) == dict(whole.train_metrics_clientapp[5]) == {"loss": 2.0}


def test_requests_go_to_the_nodes_of_the_cohort():
    one, grid = strategy(), grid_of(2)
    messages = list(one.configure_train(1, pack_model(INITIAL), ConfigRecord({"lr": 0.5}), grid))
    assert [message.metadata.dst_node_id for message in messages] == [100, 101]
    assert {message.metadata.message_type for message in messages} == {"train"}
    assert {message.metadata.group_id for message in messages} == {"1"}
    assert messages[1].content[CONFIG]["client"] == 1
    assert messages[0].content[CONFIG]["lr"] == 0.5


def test_settings_may_change_from_round_to_round():
    one, grid, arrays = strategy(), grid_of(1), pack_model(INITIAL)
    seen = []
    for number, config in enumerate([{"lr": 0.5, "sizes": [1, 2]}, {"lr": 0.25}, {}], 1):
        messages = list(one.configure_train(number, arrays, ConfigRecord(config), grid))
        sent = messages[0].content[CONFIG]
        seen.append((sent["lr"], sent["sizes"]))
        one.aggregate_train(number, grid.send_and_receive(messages, timeout=1))
    assert seen == [(0.5, [1, 2]), (0.25, [1, 2]), (0.25, [1, 2])]


def test_a_round_out_of_order_is_refused():
    one, grid = strategy(), grid_of()
    with pytest.raises(ValueError, match="round 1 comes next, not 2: use `start` to run rounds"):
        one.configure_train(2, pack_model(INITIAL), ConfigRecord(), grid)


def test_aggregating_before_a_round_was_configured_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match="call `start`, or `configure_train` first"):
        strategy().aggregate_train(1, [])


def test_below_quorum_nothing_is_returned_and_the_round_counts(caplog):
    one, grid = strategy(pipeline=Pipeline(admission=Admission(quorum=3))), grid_of(2)
    grid.nodes[300] = failing
    arrays, metrics = drive(one, grid, 1)
    assert metrics is None
    assert same_bits(arrays, pack_model(INITIAL))
    assert one.model.version == 1
    assert "round 1 is void: 2 good updates came" in caplog.text
    drive(one, grid, 1, first=2)
    assert one.model.version == 2


def test_bad_replies_are_refused_and_silence_is_counted():
    one, grid = strategy(), grid_of(1)
    grid.nodes |= {
        200: failing,
        201: lambda message: [],
        202: trellis_node(lambda *_: {**learns(0, 1, INITIAL), "delta": [np.inf, 0]}),
        203: lambda message: [Message(numbers(1), reply_to=message)],
    }
    arrays, _ = drive(one, grid, 1)
    honest, _ = drive(strategy(), grid_of(1), 1)
    assert same_bits(arrays, honest)
    assert one.pipeline.admission.refusals == {
        "client_error": 1,
        "timeout": 1,
        "not_finite": 1,
        "missing": 1,
    }
    assert one.pipeline.included == {0: 1}


def test_a_node_that_was_not_asked_and_one_that_answers_twice_change_nothing(caplog):
    one, grid = strategy(), grid_of(2)
    messages = list(one.configure_train(1, pack_model(INITIAL), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages, timeout=1))
    stranger = Message(RecordDict(), 999, "train")
    replies += [*replies, Message(numbers(1), reply_to=stranger)]
    arrays, _ = one.aggregate_train(1, replies)
    honest, _ = drive(strategy(), grid_of(2), 1)
    assert same_bits(arrays, honest)
    assert one.pipeline.admission.refusals == {"duplicate": 2}
    assert "node 999 answered and was not asked" in caplog.text


def test_evaluation_goes_to_everyone_and_comes_back_as_a_mean():
    one, grid = strategy(federated_every=2), grid_of(1, metrics={"accuracy": 0.0})
    grid.nodes[200] = trellis_node(learns, examples=3, metrics={"accuracy": 1.0})
    grid.nodes[201] = failing
    arrays = pack_model(INITIAL)
    assert one.configure_evaluate(1, arrays, ConfigRecord(), grid) == []
    messages = list(one.configure_evaluate(2, arrays, ConfigRecord({"batch-size": 7}), grid))
    assert [m.metadata.message_type for m in messages] == ["evaluate"] * 3
    assert messages[0].content[CONFIG]["batch-size"] == 7
    assert messages[0].content[ARRAYS] is arrays
    replies = grid.send_and_receive(messages, timeout=1)
    assert dict(one.aggregate_evaluate(2, replies)) == {"accuracy": 0.75}


def test_an_evaluation_that_nobody_could_do_is_none():
    nobody = Message(RecordDict(), 1, "evaluate")
    replies = [Message(Error(2, "x"), reply_to=nobody), Message(RecordDict(), reply_to=nobody)]
    assert strategy().aggregate_evaluate(1, replies) is None
    assert strategy().aggregate_evaluate(1, []) is None


@pytest.mark.parametrize("examples", [-1, 1e18, float("nan"), 10**400])
def test_an_evaluation_on_an_absurd_number_of_examples_is_left_out(examples):
    request = Message(RecordDict(), 1, "evaluate")
    replies = [
        Message(numbers(2, accuracy=0.5), reply_to=request),
        Message(numbers(examples, accuracy=0.0), reply_to=request),
        Message(numbers(2, accuracy=10**400), reply_to=request),
        Message(RecordDict({"a": MetricRecord(), "b": MetricRecord()}), reply_to=request),
    ]
    assert dict(strategy().aggregate_evaluate(1, replies)) == {"accuracy": 0.5}


def test_a_collector_of_several_phases_runs_by_start_only():
    one, grid = strategy(pipeline=Pipeline(collector=TwoPhases())), grid_of(1)
    grid.nodes = {100: lambda message: [Message(numbers(1), reply_to=message)]}
    with pytest.raises(RuntimeError, match="several phases runs by `start` only"):
        one.configure_train(1, pack_model(INITIAL), ConfigRecord(), grid)


@pytest.mark.parametrize(
    ("collector", "phases"), [(Masked(), 4), (Masked(malicious=True), 5), (Ckks(), 2)]
)
def test_no_client_makes_keys_for_a_round_that_cannot_be_run_by_hand(collector, phases, tmp_path):
    weighting = "uniform" if collector.max_weight is None else "examples"
    pipeline = Pipeline(collector=collector, combiner=Mean(weighting=weighting))
    one, grid = strategy(pipeline=pipeline, travel=("head.*",)), grid_of(5)
    with pytest.raises(RuntimeError, match=f"has {phases} phases a round"):
        one.configure_train(1, pack_model(INITIAL), ConfigRecord(), grid)
    assert not grid.sent
    assert one.model is None


def test_a_session_that_asks_nobody_is_not_dropped():
    class Known(Plain):
        def open(self, job, cohort):
            layout = job.layouts[DELTA]
            there = Section(np.ones(layout.size, np.float32), layout)
            return Settled([Update({DELTA: there}, 1.0, (1,), 0, {})])

    pipeline = Pipeline(collector=Known(), admission=Admission(quorum=1))
    one, grid = strategy(pipeline=pipeline, travel=("head.*",)), grid_of(1)
    messages = list(one.configure_train(1, pack_model(INITIAL), ConfigRecord(), grid))
    assert not messages
    arrays, _ = one.aggregate_train(1, [])
    np.testing.assert_array_equal(unpack_model(arrays)["head.w"], INITIAL["head.w"] + 1)
