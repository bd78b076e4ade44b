"""The synchronous loop over scripted nodes in virtual time."""

from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from strategies.admission import Admission
from strategies.collectors import Plain
from strategies.collectors.once import Settled
from strategies.combiners import Mean
from strategies.exchange import Exchange, NoClientsError
from strategies.pipeline import Pipeline
from strategies.protocols import Request
from strategies.samplers import Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import SGD, ServerModel
from strategies.stages import Clip
from strategies.wire import CONFIG, Refused
from tests.support.grids import ScriptedGrid, numbers, trellis_node
from tests.support.updates import parameters, update


def adds(*values: float, **keywords):
    """An honest node whose update is always the same."""
    return trellis_node(lambda client, number, arrays: {"delta": values}, **keywords)


def failing(message: Message) -> list[Message]:
    return [Message(Error(2, "out of memory"), reply_to=message)]


def silent(message: Message) -> list[Message]:
    return []


def run(nodes, pipeline: Pipeline | None = None, *, rounds: int = 1, timeout: float = 60.0, seed=0):
    """All views of a run from a model of two zeros, and the grid and model afterwards."""
    grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)
    pipeline = pipeline or Pipeline()
    model = ServerModel(parameters(0, 0), pipeline.optimizer)
    exchange = Exchange(grid)
    loop = Synchronous().run(pipeline, model, exchange, rounds, timeout=timeout, seed=seed)
    views = list(loop)
    return views, grid, model


def settings(grid: ScriptedGrid, key: str) -> list:
    return [message.content[CONFIG][key] for message in grid.sent]


def test_a_round_of_fedavg_adds_the_mean_weighted_by_examples():
    (view,), _, model = run({1: adds(1, 0, examples=1), 2: adds(5, 4, examples=3)})
    np.testing.assert_array_equal(model.parameters, [4, 3])
    assert (view.round, view.sampled, view.failed, view.rejected, view.void) == (1, 2, 0, 0, False)
    assert view.model is model


def test_rounds_go_on_until_the_version_is_reached():
    views, grid, model = run({1: adds(1, 2)}, rounds=3)
    assert [view.round for view in views] == [1, 2, 3]
    assert settings(grid, "server-round") == [1, 2, 3]
    assert settings(grid, "version") == [0, 1, 2]
    np.testing.assert_array_equal(model.parameters, [3, 6])


def test_a_run_that_has_reached_its_version_asks_nobody():
    views, grid, _ = run({1: adds(1, 2)}, rounds=0)
    assert views == []
    assert grid.sent == []


def test_training_metrics_are_means_by_examples():
    nodes = {
        1: adds(0, 0, examples=1, metrics={"loss": 1.0}),
        2: adds(0, 0, examples=3, metrics={"loss": 5.0, "steps": 7}),
    }
    (view,), *_ = run(nodes)
    assert view.train_metrics == {"loss": 4.0, "steps": 7.0}


def test_bytes_are_those_of_each_round():
    views, *_ = run({1: adds(1, 1), 2: adds(1, 1)}, rounds=2)
    assert views[0].upload_bytes == pytest.approx(views[1].upload_bytes, abs=20)
    assert views[0].upload_bytes > 2 * (128 + 8)
    assert views[0].download_bytes > 2 * (128 + 8)


def test_failures_and_refusals_are_counted_apart():
    liar = trellis_node(lambda client, number, arrays: {"delta": [np.nan, 0]})
    nodes = {1: adds(2, 4), 2: failing, 3: silent, 4: liar}
    pipeline = Pipeline()
    (view,), grid, model = run(nodes, pipeline, timeout=30.0)
    assert (view.sampled, view.failed, view.rejected) == (4, 2, 1)
    assert pipeline.admission.refusals == {"client_error": 1, "timeout": 1, "not_finite": 1}
    assert pipeline.admission.strikes == {1: 1, 2: 1, 3: 1}
    np.testing.assert_array_equal(model.parameters, [2, 4])
    assert grid.clock.now() == view.clock == 30


def test_a_round_ends_with_its_last_reply_and_does_not_wait_for_the_deadline():
    def slow(message):
        return [(9.0, reply) for reply in adds(1, 1)(message)]

    (view,), *_ = run({1: slow, 2: adds(1, 1)}, timeout=3600.0)
    assert view.clock == 9


def test_requests_live_as_long_as_the_round():
    _, grid, _ = run({1: adds(1, 1)}, timeout=45.0)
    assert grid.sent[0].metadata.ttl == 45.0


def works_from(attempt: int, node):
    return lambda message: (node if message.content[CONFIG]["attempt"] >= attempt else failing)(
        message
    )


def test_too_few_good_updates_repeat_the_round_with_the_same_model():
    nodes = {1: adds(8, 8), 2: works_from(1, adds(2, 4))}
    pipeline = Pipeline(admission=Admission(quorum=2))
    (view,), grid, model = run(nodes, pipeline)
    np.testing.assert_array_equal(model.parameters, [5, 6])
    assert (view.round, view.sampled, view.failed, view.void) == (1, 4, 1, False)
    assert settings(grid, "attempt") == [0, 0, 1, 1]
    assert set(settings(grid, "version")) == {0}


def test_a_repeated_round_draws_another_cohort():
    nodes = dict.fromkeys(range(1, 101), failing)
    pipeline = Pipeline(sampler=Uniform(fraction=0.05), admission=Admission(max_attempts=2))
    _, grid, _ = run(nodes, pipeline)
    asked = settings(grid, "client")
    assert len(asked) == 10
    assert set(asked[:5]) != set(asked[5:])


@pytest.mark.parametrize(
    ("admission", "attempts"),
    [
        (Admission(quorum=2, max_attempts=4), 4),
        (Admission(quorum=2, max_attempts=4, on_shortfall="skip"), 1),
        (Admission(quorum=2, max_attempts=1), 1),
    ],
    ids=["repeat", "skip", "one attempt"],
)
def test_a_round_below_quorum_is_void_at_last_and_leaves_the_model(admission, attempts, caplog):
    pipeline = Pipeline(optimizer=SGD(momentum=0.9), admission=admission)
    (view,), grid, model = run({1: adds(1, 1), 2: failing}, pipeline)
    assert view.void
    assert len(grid.sent) == 2 * attempts
    assert (view.sampled, view.failed) == (2 * attempts, attempts)
    assert model.version == 1
    np.testing.assert_array_equal(model.parameters, [0, 0])
    assert pipeline.included == {}
    assert caplog.text.count("1 of 2 clients sent a good update, the quorum is 2") == attempts
    assert "round 1 is void: the model stays as it was" in caplog.text


def test_after_a_void_round_the_next_one_goes_on():
    def from_round_two(message):
        return (adds(3, 3) if message.content[CONFIG]["server-round"] > 1 else failing)(message)

    views, grid, model = run({1: from_round_two}, rounds=2)
    assert [view.void for view in views] == [True, False]
    np.testing.assert_array_equal(model.parameters, [3, 3])
    assert settings(grid, "version") == [0, 0, 0, 1]


def test_a_round_waits_for_clients_and_says_when_nobody_comes():
    with pytest.raises(NoClientsError, match="0 of 1 clients"):
        run({})


def test_clients_are_told_in_which_round_they_were_last_included():
    def every_other_round(message):
        return (adds(1, 1) if message.content[CONFIG]["server-round"] % 2 else failing)(message)

    pipeline = Pipeline()
    _, grid, _ = run({1: adds(1, 1), 2: every_other_round}, pipeline, rounds=4)
    told = [(m.content[CONFIG]["client"], m.content[CONFIG]["included"]) for m in grid.sent]
    assert told == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 1), (0, 3), (1, 3)]
    assert pipeline.included == {0: 4, 1: 3}


def test_a_late_reply_to_an_earlier_attempt_is_not_taken_for_the_present_one():
    def late(message):
        delay = 100.0 if message.content[CONFIG]["attempt"] == 0 else 0.0
        return [(delay, reply) for reply in adds(100 - delay, 0)(message)]

    grid = ScriptedGrid({1: late, 2: works_from(1, adds(0, 0))})
    pipeline = Pipeline(admission=Admission(quorum=2))
    (view,), _, model = run(grid, pipeline, timeout=30.0)
    np.testing.assert_array_equal(model.parameters, [50, 0])
    assert (view.sampled, view.failed) == (4, 2)


def test_what_a_client_skipped_of_a_stage_the_server_does():
    pipeline = Pipeline(stages=[Clip(norm=5.0)], combiner=Mean(weighting="uniform"))
    nodes = {1: adds(30, 40, stages=[Clip()]), 2: adds(3, 4), 3: adds(-3e9, -4e9)}
    _, grid, model = run(nodes, pipeline)
    np.testing.assert_allclose(model.parameters, [1, 4 / 3], rtol=1e-6)
    assert set(settings(grid, "clip.norm")) == {5.0}


def test_a_stage_may_refuse_what_no_honest_client_can_have_made():
    @dataclass(frozen=True)
    class Positive:
        name = "positive"

        def check(self, claim):
            return claim

        def configure(self):
            return {}

        def encode(self, update, context):
            return update

        def decode(self, update):
            if (update.delta.vector < 0).any():
                raise Refused("negative", "this stage makes only positive numbers")
            return update

    pipeline = Pipeline(stages=[Positive()])
    (view,), _, model = run({1: adds(1, 1), 2: adds(-1, 1)}, pipeline)
    assert (view.rejected, pipeline.admission.refusals) == (1, {"negative": 1})
    np.testing.assert_array_equal(model.parameters, [1, 1])


def test_the_same_seed_asks_the_same_clients_whatever_their_node_ids():
    def asked(node_ids, seed):
        pipeline = Pipeline(sampler=Uniform(fraction=0.3))
        grid = ScriptedGrid({node: adds(1, 1) for node in node_ids})
        run(grid, pipeline, rounds=5, seed=seed)
        return settings(grid, "client")

    assert asked(range(10, 20), 1) == asked(range(500, 700, 20), 1)
    assert asked(range(10, 20), 1) != asked(range(10, 20), 2)


class TwoPhases(Plain):
    """Asks each client for a word first, and for its update when the word has come."""

    phases = 2

    def open(self, job, cohort):
        session = super().open(job, cohort)
        start, receive = session.start, session.receive
        later = {request.client: request for request in start()}

        def ask():
            empty = {
                client: RecordDict({CONFIG: ConfigRecord({"attempt": 0, "phase": 0})})
                for client in cohort
            }
            return [
                Request(client, "query", content, job.round) for client, content in empty.items()
            ]

        def answer(reply):
            if reply.request.kind == "train" or reply.content is None:
                return receive(reply)
            return [later[reply.request.client]]

        session.start, session.receive = ask, answer
        return session


def test_clients_that_nobody_asked_are_not_counted_as_sampled():
    """A sum that is there already asks nobody."""

    class Known(Plain):
        def open(self, job, cohort):
            return Settled([update([1.0, 2.0], client=1)])

    (view,), grid, model = run({1: adds(9, 9), 2: adds(9, 9)}, Pipeline(collector=Known()))
    np.testing.assert_array_equal(model.parameters, [1, 2])
    assert (view.sampled, view.failed, len(grid.sent)) == (0, 0, 0)


def test_a_session_may_ask_again_before_it_has_an_update():
    def node(message):
        if message.metadata.message_type == "query":
            return [(5.0, Message(numbers(1), reply_to=message))]
        return adds(1, 2)(message)

    (view,), grid, model = run({1: node, 2: node, 3: failing}, Pipeline(collector=TwoPhases()))
    np.testing.assert_array_equal(model.parameters, [1, 2])
    assert [message.metadata.message_type for message in grid.sent] == ["query"] * 3 + ["train"] * 2
    assert (view.failed, view.clock) == (1, 5)
