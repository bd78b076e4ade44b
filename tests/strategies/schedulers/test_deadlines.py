"""`deadline=auto`: a phase waits a multiple of what most of its clients took before, and at most the run's limit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.admission import Admission
from strategies.collectors import Masked, Plain
from strategies.combiners import Mean
from strategies.contract import ContractError
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Distributed, Ftrl, Local
from strategies.protocols import ClientOwn
from strategies.samplers import Spaced, Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import ServerModel
from strategies.stages import Clip
from strategies.timings import Timings
from strategies.update import DELTA
from strategies.wire import CONFIG, TRAINS
from tests.support.buffered import adds, after, silent
from tests.support.grids import ScriptedGrid
from tests.support.updates import parameters


def run(nodes, pipeline=None, rounds=1, *, timeout=60.0, **settings_):
    pipeline = pipeline or Pipeline(combiner=Mean(weighting="uniform"))
    grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)
    pipeline.scheduler = Synchronous(deadline="auto", **settings_)
    pipeline.check(frozenset({DELTA}))
    model = ServerModel(parameters(0, 0), pipeline.optimizer)
    views = list(pipeline.scheduler.run(pipeline, model, Exchange(grid), rounds, timeout=timeout))
    return views, grid, pipeline


def from_round(number, late, early):
    """A node that does as `late` from this round on."""
    return lambda message: (late if message.content[CONFIG]["server-round"] >= number else early)(
        message
    )


def lasted(views):
    """Seconds of each round."""
    return np.diff([0.0, *(view.clock for view in views)]).tolist()


def test_a_client_that_dies_costs_one_deadline_a_round_and_not_the_runs_limit():
    nodes = {k: after(1.0 + k / 10, adds(1, 1)) for k in range(10)}
    nodes[3] = from_round(2, silent, nodes[3])
    views, grid, _ = run(nodes, rounds=6, timeout=600.0)
    # The 9th of ten takes 1.8 s, then 1.9 s, as the one that is gone is expected to take twice as long. Its
    # own time, by one reply of 1.3 s, is 3.9 s: four times that when it has failed four times.
    assert lasted(views) == pytest.approx([1.9, 3.6, *[3.8] * 3, 15.6])
    assert [view.failed for view in views] == [0, *[1] * 5]
    ttls = [message.metadata.ttl for message in grid.sent]
    assert ttls == pytest.approx([600.0] * 10 + [3.6] * 10 + [3.8] * 30 + [15.6] * 10)


def test_a_quick_client_that_dies_is_not_waited_for_as_a_slow_one_is():
    """After ten replies each a quarter of its mean is added for it: 1.25 s, when the others have long answered."""
    nodes = {k: after(1.0 + k, adds(1, 1)) for k in range(10)}
    nodes[0] = from_round(11, silent, nodes[0])
    views, _, _ = run(nodes, rounds=16, timeout=600.0)
    # As long as the slowest of those that are there takes, also when it is given four times its own time.
    assert lasted(views) == pytest.approx([10.0] * 16)
    assert [view.failed for view in views] == [*[0] * 10, *[1] * 6]


def test_a_slow_client_that_dies_has_its_own_time_and_twice_as_long_each_time_then_as_at_first():
    nodes = {k: after(1.0, adds(1, 1)) for k in range(9)} | {9: after(1.6, adds(1, 1))}
    nodes[9] = from_round(9, silent, nodes[9])
    views, _, _ = run(nodes, rounds=16, timeout=600.0, patience=100.0)
    assert lasted(views)[:8] == pytest.approx([1.6] * 8)
    # With four failures behind it it has four times as long.
    assert lasted(views)[8:] == pytest.approx([2.0, 4.0, 8.0, 2.0, 8.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("times", [2, 5, 9])
def test_one_that_has_become_slower_is_heard_of_again(times):
    """Up to ten times what it was within nine rounds, however quick the others are."""
    nodes = {k: after(1.0, adds(1, 1)) for k in range(2)}
    nodes[2] = from_round(9, after(1.0 * times, adds(1, 1)), after(1.0, adds(1, 1)))
    views, _, _ = run(nodes, rounds=20, timeout=600.0)
    failed = [view.failed for view in views]
    assert failed[:8] == [0] * 8
    assert sum(failed) <= 9
    assert failed[-2:] == [0, 0]


@pytest.mark.parametrize("slow", [5, 10], ids=["half", "all"])
def test_a_deadline_follows_clients_that_slow_down_without_a_second_attempt(slow):
    nodes = {
        k: from_round(4, after(6.0, adds(1, 1)), after(1.0, adds(1, 1)))
        if k < slow
        else after(1.0, adds(1, 1))
        for k in range(10)
    }
    skips = Pipeline(admission=Admission(on_shortfall="skip"))
    views, _, _ = run(nodes, skips, rounds=9, timeout=600.0)
    assert [view.failed for view in views[:4]] == [0, 0, 0, slow]
    assert [view.failed for view in views[6:]] == [0, 0, 0]
    assert max(lasted(views)) < 20


@pytest.mark.parametrize(("since", "times"), [(4, 12), (12, 6)])
def test_a_group_that_is_many_times_slower_is_heard_of_again_whatever_the_others_take(since, times):
    """Half of them: no multiple of what the quick half takes is long enough for them."""
    slower = from_round(since, after(1.0 * times, adds(1, 1)), after(1.0, adds(1, 1)))
    nodes = {k: slower if k < 5 else after(1.0, adds(1, 1)) for k in range(10)}
    skips = Pipeline(admission=Admission(on_shortfall="skip"))
    views, _, _ = run(nodes, skips, rounds=since + 12, timeout=600.0)
    failed = [view.failed for view in views]
    assert failed[:since] == [0] * (since - 1) + [5]
    assert failed[-3:] == [0, 0, 0]
    assert max(lasted(views)) < 20


def test_phases_that_train_nothing_are_not_cut_at_the_time_of_training(tmp_path):
    """Training takes 1 s and each other phase 1.5 s: nobody has failed."""
    collector, nodes = Masked(dropouts=0.3), {}
    for client in range(5):
        half = collector.client_half(ClientOwn(tmp_path / str(client), {}, simulated=True))
        delay = lambda message: 1.0 if message.content[CONFIG].get(TRAINS, True) else 1.5  # noqa: E731
        nodes[client + 1] = after(delay, adds(0.1, 0.1, half=half))
    pipeline = Pipeline(collector=collector, combiner=Mean(weighting="uniform"))
    views, _, _ = run(nodes, pipeline, rounds=8, timeout=600.0)
    assert [view.failed for view in views] == [0] * 8


def test_one_that_was_never_there_is_waited_for_once():
    nodes = {k: after(1.0, adds(1, 1)) for k in range(9)} | {9: silent}
    views, _, _ = run(nodes, rounds=3, timeout=600.0)
    assert lasted(views) == pytest.approx([600, 2, 2])


@settings(max_examples=40)
@given(
    st.lists(st.floats(0.5, 50), min_size=1, max_size=12),
    st.floats(1, 5),
    st.floats(0.1, 1),
    st.floats(1, 200),
)
def test_the_deadline_is_the_multiple_of_the_quantile_and_at_most_the_runs(
    times, patience, q, most
):
    nodes = {k + 1: after(seconds, adds(1, 1)) for k, seconds in enumerate(times)}
    once = Pipeline(admission=Admission(on_shortfall="skip"))
    views, grid, _ = run(nodes, once, 2, timeout=100.0, patience=patience, quantile=q)
    place = int(np.ceil(np.round(q * len(times), 9))) - 1
    expected = min(100.0, patience * sorted(times)[place])
    second = [m.metadata.ttl for m in grid.sent if m.content[CONFIG]["server-round"] == 2]
    assert second == pytest.approx([expected] * len(times))
    late = sum(seconds >= expected for seconds in times)
    assert views[1].failed == late


def test_clients_that_were_never_heard_of_have_the_runs_limit():
    """Ten of a hundred a round: as long as two of them are new, nothing is shortened."""
    nodes = {k: after(1.0 if k % 10 else 50.0, adds(1, 1)) for k in range(100)}
    pipeline = Pipeline(sampler=Uniform(fraction=0.1, population=100))
    _, grid, _ = run(nodes, pipeline, rounds=40, timeout=600.0)
    rounds: dict[int, list] = {}
    for message in grid.sent:
        rounds.setdefault(message.content[CONFIG]["server-round"], []).append(message)
    known: set[int] = set()
    shortened = 0
    for messages in rounds.values():
        clients = {message.content[CONFIG]["client"] for message in messages}
        new = len(clients - known)
        ttls = {message.metadata.ttl for message in messages}
        if new > 1:
            assert ttls == {600.0}
        shortened += ttls != {600.0}
        known |= clients
    assert shortened > 10


def test_each_phase_of_a_sum_has_it(tmp_path):
    """One of five is gone from the upload of round 2 on: each later phase is over at once, as all others are quick."""
    collector, nodes = Masked(dropouts=0.3), {}
    for client in range(5):
        half = collector.client_half(ClientOwn(tmp_path / str(client), {}, simulated=True))
        honest = adds(0.1, 0.1, half=half)

        def delay(message, client=client):
            config = message.content[CONFIG]
            if client == 4 and config["server-round"] == 2 and config["phase"] == 2:
                return 500.0
            return 3.0 if config.get(TRAINS, True) else 1.0

        nodes[client + 1] = after(delay, honest)
    pipeline = Pipeline(collector=collector, combiner=Mean(weighting="uniform"))
    views, _, _ = run(nodes, pipeline, rounds=2, timeout=600.0)
    assert lasted(views) == pytest.approx([6, 1 + 1 + 6 + 1])
    assert (views[1].void, views[1].failed, views[1].rejected) == (False, 1, 0)
    assert pipeline.included[4] == 1


def test_a_resumed_run_waits_as_long_as_one_that_was_not_stopped():
    def nodes():
        return {k: after(1.0 + k, adds(k, 1)) for k in range(5)} | {
            9: from_round(3, silent, after(2.0, adds(1, 1)))
        }

    whole, _, one = run(nodes(), rounds=6, timeout=600.0)
    first, _, stopped = run(nodes(), rounds=3, timeout=600.0)
    second = Pipeline(combiner=Mean(weighting="uniform"))
    second.load_state_dict(stopped.state_dict())
    second.scheduler = Synchronous(deadline="auto")
    second.check(frozenset({DELTA}))
    model = ServerModel(parameters(0, 0), second.optimizer)
    model.load_state_dict({**first[-1].model.state_dict()})
    grid = ScriptedGrid(nodes())
    views = list(second.scheduler.run(second, model, Exchange(grid), 6, timeout=600.0))
    assert lasted(first) + lasted(views) == pytest.approx(lasted(whole))
    np.testing.assert_array_equal(model.parameters, whole[-1].model.parameters)
    assert second.timings.seconds(3) == one.timings.seconds(3)


def test_a_round_that_fell_short_is_tried_again_with_the_runs_limit():
    """All are three times as slow as they were, for once."""
    nodes = {k: from_round(2, after(30.0, adds(1, 1)), after(10.0, adds(1, 1))) for k in range(4)}
    views, grid, _ = run(nodes, rounds=3, timeout=600.0)
    assert [view.void for view in views] == [False] * 3
    # The mean of 10 and 30 s is 20 s, so that they have 40 s then.
    assert lasted(views) == pytest.approx([10, 20 + 30, 30])
    ttls = [message.metadata.ttl for message in grid.sent[::4]]
    assert ttls == pytest.approx([600, 20, 600, 40])


def test_replies_in_no_time_leave_the_runs_limit():
    views, grid, _ = run({1: adds(1, 1), 2: adds(1, 1)}, rounds=2)
    assert {message.metadata.ttl for message in grid.sent} == {60.0}
    assert not any(view.void for view in views)


# ---- the contract ----


def private(promise, sampler=None) -> Pipeline:
    clip = Clip(norm=1.0)
    return Pipeline(
        collector=Plain(metrics=False),
        stages=[clip, *promise.stages(clip.bounds)],
        combiner=Mean(weighting="uniform", denominator="cohort"),
        sampler=sampler or Uniform(fraction=0.5, population=20),
        privacy=promise,
    )


def distributed() -> Pipeline:
    one = private(Distributed(noise_multiplier=1.0, population=20, size=2))
    one.collector = Masked(whole=True, metrics=(), dropouts=0.3)
    return one


@pytest.mark.parametrize(
    "pipeline",
    [
        private(Central(noise_multiplier=1.0, population=20)),
        private(
            Ftrl(noise_multiplier=1.0, population=20, rounds=4),
            Spaced(participations=2, separation=2, fraction=0.5, population=20),
        ),
        distributed(),
    ],
    ids=["central", "ftrl", "distributed"],
)
def test_noise_that_is_for_one_clients_share_does_not_go_with_others_times(pipeline):
    """One client's time moves the deadline of all, so that it takes others out: more than the noise is made for."""
    pipeline.check()
    pipeline.scheduler = Synchronous(deadline=30.0)
    pipeline.check()
    pipeline.scheduler = Synchronous(deadline="auto")
    with pytest.raises(
        ContractError, match=r"scheduler.deadline=auto: .*scheduler.deadline in sec"
    ):
        pipeline.check()


def test_noise_that_each_client_adds_for_itself_does():
    """What it sends is private by itself, whoever else is in."""
    pipeline = private(Local(noise_multiplier=1.0, population=20))
    pipeline.scheduler = Synchronous(deadline="auto")
    assert pipeline.check().measured


def test_sums_and_rules_do():
    for collector in (Masked(), Plain()):
        pipeline = Pipeline(
            collector=collector,
            combiner=Mean(weighting="uniform"),
            sampler=Uniform(fraction=0.5, population=20),
            scheduler=Synchronous(deadline="auto"),
        )
        claim = pipeline.check()
        assert (claim.measured, claim.sampling) == (True, "fixed")


def test_a_deadline_is_a_number_or_auto():
    with pytest.raises(ValueError, match=r"Synchronous.deadline = 'soon': choose one of 'auto'"):
        Synchronous(deadline="soon")
    with pytest.raises(ValueError, match=r"Synchronous.patience = 0.5"):
        Synchronous(patience=0.5)
    assert Timings().quantile(0.9, [1]) is None
