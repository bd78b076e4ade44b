"""The synchronous loop over scripted nodes in virtual time."""

from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from strategies.admission import Admission
from strategies.collectors import Plain
from strategies.collectors.once import Settled
from strategies.combiners import Mean
from strategies.contract import Claim, ContractError, Visibility
from strategies.exchange import Exchange, NoClientsError
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Local
from strategies.protocols import Request
from strategies.samplers import Poisson, Uniform
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


def run(
    nodes,
    pipeline: Pipeline | None = None,
    *,
    rounds: int = 1,
    timeout: float = 60.0,
    seed=0,
    **settings,
):
    """All views of a run from a model of two zeros, and the grid and model afterwards."""
    grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)
    pipeline = pipeline or Pipeline()
    model = ServerModel(parameters(0, 0), pipeline.optimizer)
    exchange = Exchange(grid)
    loop = Synchronous(**settings).run(
        pipeline, model, exchange, rounds, timeout=timeout, seed=seed
    )
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


# ---- more asked than taken, and a deadline ----


def after(seconds: float, node):
    return lambda message: [(seconds, reply) for reply in node(message)]


def tenth(**keywords) -> Pipeline:
    """Ten of a hundred a round."""
    return Pipeline(sampler=Uniform(fraction=0.1, population=100), **keywords)


def fleet() -> dict:
    """A hundred nodes: client k answers k + 1 in each element, after k / 2 seconds."""
    return {k: after(k / 2, adds(k + 1, k + 1)) for k in range(100)}


@pytest.mark.parametrize(
    ("over_selection", "extra"), [(0, 0), (0.1, 1), (0.3, 3), (0.31, 4), (1, 10)]
)
def test_a_cohort_and_as_many_more_as_were_said_are_asked_and_the_first_make_the_round(
    over_selection, extra
):
    pipeline = tenth(combiner=Mean(weighting="uniform"))
    (view,), grid, model = run(fleet(), pipeline, over_selection=over_selection)
    asked = sorted(settings(grid, "client"))
    assert len(set(asked)) == len(asked) == view.sampled == 10 + extra
    first = asked[:10]
    np.testing.assert_allclose(model.parameters, [np.mean(first) + 1] * 2, rtol=1e-6)
    assert view.clock == first[-1] / 2
    assert (view.failed, view.rejected, view.void) == (0, 0, False)
    assert pipeline.included == dict.fromkeys(first, 1)
    assert not pipeline.admission.strikes


def test_whoever_came_too_late_is_told_next_time_that_it_was_not_included():
    pipeline = tenth()
    _, grid, _ = run(fleet(), pipeline, rounds=15, over_selection=0.5)
    included: dict[int, int] = {}
    asked: dict[int, list[int]] = {}
    for message in grid.sent:
        config = message.content[CONFIG]
        client, number = config["client"], config["server-round"]
        asked.setdefault(number, []).append(client)
        assert config["included"] == max((n for n in included.get(client, {0})), default=0)
        if len(asked[number]) == 15:
            for one in sorted(asked[number])[:10]:
                included.setdefault(one, {0}).add(number)
    assert {len(clients) for clients in asked.values()} == {15}
    assert len(asked) == 15


def test_late_replies_are_in_no_later_round_either():
    """Slow ones answer in the middle of the next rounds, with lies that would show."""
    slow = adds(1e6, 1e6)
    nodes = {k: after(7.5, slow) if k % 3 == 0 else after(1.0, adds(1, 1)) for k in range(100)}
    views, _, model = run(nodes, tenth(), rounds=12, over_selection=2)
    np.testing.assert_array_equal(model.parameters, [12, 12])
    assert views[-1].clock == 12
    assert {view.sampled for view in views} == {30}


def test_failures_and_refusals_take_nobodys_place_where_more_are_asked():
    nodes = {k: failing if k % 5 == 0 else adds(2, 2) for k in range(100)}
    nodes |= {k: adds(np.nan, 0) for k in range(1, 100, 10)}
    pipeline = tenth()
    (view,), _, model = run(nodes, pipeline, over_selection=1)
    assert len(pipeline.included) == 10
    assert view.failed + view.rejected > 0
    np.testing.assert_array_equal(model.parameters, [2, 2])


def test_a_round_waits_for_all_where_too_few_of_those_asked_are_good():
    nodes = {k: silent if k < 95 else adds(1, 1) for k in range(100)}
    nodes[0] = nodes[1] = adds(1, 1)
    pipeline = Pipeline(sampler=Uniform(fraction=0.98), admission=Admission(max_attempts=1))
    (view,), *_ = run(nodes, pipeline, over_selection=0.02, timeout=30.0)
    assert view.clock == 30
    assert (view.sampled, view.failed) == (100, 93)


def test_who_is_asked_beyond_a_cohort_is_drawn_uniformly():
    """500 rounds ask 4 of 10, none twice; six deviations are exceeded with odds of 2e-9 a client or pair."""
    asked = []

    class Noted(Plain):
        def open(self, job, cohort):
            asked.append(cohort)
            return Settled([update([0.0, 0.0], client=cohort[0])])

    pipeline = Pipeline(sampler=Uniform(fraction=0.2), collector=Noted())
    run(dict.fromkeys(range(10), silent), pipeline, rounds=500, over_selection=1)
    together = np.zeros((10, 10))
    for clients in asked:
        together[np.ix_(clients, clients)] += 1
    alone, pairs = np.diag(together), together[np.triu_indices(10, 1)]
    for counts, share in ((alone, 0.4), (pairs, 4 * 3 / (10 * 9))):
        assert counts.sum() == 500 * share * len(counts)
        assert np.abs(counts - 500 * share).max() < 6 * np.sqrt(500 * share * (1 - share))


def test_a_round_ends_at_its_deadline_with_who_is_there():
    nodes = {1: after(2.0, adds(4, 4)), 2: after(9.0, adds(8, 8)), 3: silent}
    pipeline = Pipeline()
    views, grid, model = run(nodes, pipeline, rounds=3, deadline=5.0)
    np.testing.assert_array_equal(model.parameters, [12, 12])
    assert [view.clock for view in views] == [5, 10, 15]
    assert {(view.sampled, view.failed) for view in views} == {(3, 2)}
    assert pipeline.included == {0: 3}
    assert {message.metadata.ttl for message in grid.sent} == {5.0}


def test_a_deadline_by_which_nobody_came_begins_the_round_again():
    def slow_at_first(message):
        attempt = message.content[CONFIG]["attempt"]
        return after(9.0 if attempt == 0 else 1.0, adds(3, 3))(message)

    (view,), _, model = run({1: slow_at_first}, deadline=5.0)
    np.testing.assert_array_equal(model.parameters, [3, 3])
    assert (view.clock, view.sampled) == (6, 2)


def test_clients_are_waited_for_as_long_as_the_run_says_and_not_until_a_deadline():
    grid = ScriptedGrid({})
    with pytest.raises(NoClientsError, match="within 60 s"):
        run(grid, deadline=5.0)


class Sums(Plain):
    """Shows the server sums only."""

    def check(self, claim):
        return super().check(claim).given("sums", visibility=Visibility.SUM)


def checked(pipeline: Pipeline) -> Claim:
    pipeline.scheduler = Synchronous(over_selection=0.3)
    return pipeline.check()


def bounded(*stages, **keywords) -> Pipeline:
    return tenth(
        collector=Plain(metrics=False),
        stages=[Clip(norm=1.0), *stages],
        combiner=Mean(weighting="uniform", denominator="cohort"),
        **keywords,
    )


def local() -> Pipeline:
    promise = Local(noise_multiplier=1.0, population=100)
    return bounded(*promise.stages(Clip(norm=1.0).bounds), privacy=promise)


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        (tenth(collector=Sums()), "a sum is of all clients that were asked.*bears drop-outs"),
        (
            bounded(privacy=Central(noise_multiplier=1.0, population=100)),
            "depend on who is fast.*use privacy=none",
        ),
        (local(), "depend on who is fast.*use privacy=none"),
        (Pipeline(sampler=Poisson(fraction=0.1, population=100)), "coins decide.*sampler=uniform"),
        (Pipeline(sampler=Uniform(population=100)), "all clients are asked already"),
    ],
    ids=["sums", "central", "local", "coins", "all"],
)
def test_nothing_that_fixes_who_is_in_a_round_goes_with_asking_more(pipeline, why):
    pipeline.check()  # it is right without
    with pytest.raises(ContractError, match=f"scheduler.over_selection.*{why}"):
        checked(pipeline)


def test_of_the_fastest_no_sampling_is_claimed_and_the_cohort_is_what_is_taken():
    claim = checked(tenth())
    assert (claim.cohort, claim.sampling, claim.rate) == (10, "uncontrolled", None)
    assert tenth().check().sampling == "fixed"


def test_a_sampler_that_can_not_say_who_is_asked_beside_a_cohort_is_refused():
    class Whole:
        def check(self, claim):
            return claim

        def draw(self, clients, *, seed, round_number, attempt):
            return list(clients)[:1]

    with pytest.raises(ContractError, match="it draws whole cohorts"):
        run({1: adds(1, 1)}, Pipeline(sampler=Whole()), over_selection=0.5)


@pytest.mark.parametrize(
    "wrong", [{"over_selection": -0.1}, {"deadline": 0.0}, {"over_selection": np.inf}]
)
def test_settings_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"Synchronous.{next(iter(wrong))}"):
        Synchronous(**wrong)
