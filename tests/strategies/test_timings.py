"""How long clients take: the moving mean against one by hand, quantiles against their definition, and what is fed."""

import math
import time
from statistics import fmean

import numpy as np
import pytest
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st

from strategies.collectors import Masked
from strategies.combiners import Mean
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.protocols import ClientOwn, Informed
from strategies.samplers import Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import ServerModel
from strategies.timings import Timings
from strategies.wire import CONFIG, TRAINS
from tests.support.buffered import Run, adds, after, failing, silent
from tests.support.grids import ScriptedGrid
from tests.support.updates import parameters

seconds = st.floats(0, 1e6, allow_subnormal=False)
ids = st.integers(0, 2**63 - 1)


def reference(times: list[float]) -> tuple[float, float]:
    """Mean and mean deviation, by the words of the docstring: the first four alike, later ones a quarter."""
    mean, spread = times[0], 0.0
    for number, time_ in enumerate(times[1:], 2):
        gain = 1 / number if number < 4 else 1 / 4
        spread = (1 - gain) * spread + gain * abs(time_ - mean)
        mean = (1 - gain) * mean + gain * time_
    return mean, spread


@given(st.lists(seconds, min_size=1, max_size=30), ids)
def test_mean_and_spread_are_those_of_the_recurrence(times, client):
    timings = Timings()
    for one in times:
        timings.observed(client, one)
    mean, spread = reference(times)
    assert timings.seconds(client) == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert timings.spread(client) == pytest.approx(spread, rel=1e-9, abs=1e-9)
    if len(times) <= 4:
        assert timings.seconds(client) == pytest.approx(fmean(times), rel=1e-9, abs=1e-9)
    assert min(times) - 1e-6 <= timings.seconds(client) <= max(times) + 1e-6


@given(st.lists(st.tuples(st.sampled_from(["asked", "observed", "failed"]), ids), max_size=200))
def test_counts_are_those_of_each_client_alone(events):
    timings = Timings()
    for kind, client in events:
        match kind:
            case "asked":
                timings.asked([client])
            case "observed":
                timings.observed(client, 1.5)
            case "failed":
                timings.failed(client)
    for client in {client for _, client in events}:
        own = [kind for kind, one in events if one == client]
        after_success = own[::-1].index("observed") if "observed" in own else len(own)
        assert timings.failures(client) == own[len(own) - after_success :].count("failed")
        assert timings.times_asked(client) == own.count("asked")
        assert (timings.seconds(client) is None) == ("observed" not in own)
    assert len(timings) == len({client for _, client in events})


@given(
    st.dictionaries(st.integers(0, 30), seconds, max_size=20),
    st.dictionaries(st.integers(0, 30), st.integers(1, 40)),
    st.lists(st.integers(0, 30), unique=True, min_size=1),
    st.floats(0.01, 1),
)
def test_a_quantile_is_the_time_by_which_such_a_share_is_there(known, failed, clients, q):
    timings = Timings()
    for client, one in known.items():
        timings.observed(client, one)
    for client, count in failed.items():
        for _ in range(count):
            timings.failed(client)
    expected = {client: one * 2 ** failed.get(client, 0) for client, one in known.items()}
    lost = {client for client, count in failed.items() if count >= 3 or client not in known}
    counted = [client for client in clients if client not in lost]
    found = timings.quantile(q, clients)
    there = sum(expected.get(client, np.inf) <= (found or 0) for client in counted)
    if found is not None:
        assert found in {expected[client] for client in counted if client in known}
        assert there >= q * len(counted) - 1e-6
        earlier = sum(expected.get(client, np.inf) < found for client in counted)
        assert earlier < q * len(counted)
    else:
        measured = sum(client in known for client in counted)
        assert not counted or measured < q * len(counted)


@given(st.lists(seconds, min_size=1, max_size=12), st.integers(0, 33))
def test_a_limit_is_four_deviations_or_a_margin_and_doubles_until_a_client_is_lost(times, failures):
    timings = Timings()
    for one in times:
        timings.observed(5, one)
    for _ in range(failures):
        timings.failed(5)
    mean, spread = reference(times)
    once = mean + max(4 * spread, mean * max(2 / len(times), 0.25))
    factor = {1: 2, 2: 4, 4: 4, 8: 8, 16: 16}.get(failures, 1)
    limit = once * factor if once else np.inf  # of one that takes no time nothing is known
    assert timings.limits([5, 6]) == pytest.approx([limit, np.inf], rel=1e-9, abs=1e-9)
    on_trial = once * factor if failures in (4, 8, 16) else 0.0
    assert timings.trial([5, 6]) == pytest.approx(on_trial, rel=1e-9, abs=1e-9)


def test_of_replies_whose_times_scatter_few_are_later_than_the_limit():
    """Normal times, σ a third of the mean: under 2% of the replies after the fourth, of 200 clients with 40 each."""
    rng, late = np.random.default_rng(3), 0
    timings = Timings()
    for number in range(40):
        for client, one in enumerate(np.abs(rng.normal(3.0, 1.0, 200))):
            late += number >= 4 and one > timings.limits([client])[0]
            timings.observed(client, float(one))
    assert late / (200 * 36) < 0.02


def test_after_a_failure_a_reply_counts_half():
    timings = Timings()
    for _ in range(10):
        timings.observed(1, 1.0)
    timings.failed(1)
    timings.observed(1, 3.0)
    assert timings.seconds(1) == pytest.approx(2.0)
    timings.observed(1, 3.0)
    assert timings.seconds(1) == pytest.approx(2.25)


def test_a_few_who_were_measured_do_not_speak_for_the_rest():
    timings = Timings()
    timings.observed(0, 1.0)
    assert timings.quantile(0.9, range(10)) is None
    for client in range(9):
        timings.observed(client, 1.0)
    assert timings.quantile(0.9, range(10)) == 1.0
    assert timings.quantile(0.95, range(10)) is None
    timings.failed(9)  # asked, and never heard of
    assert timings.quantile(1.0, range(10)) == 1.0
    assert Timings().quantile(0.9, []) is None


@given(st.lists(st.tuples(ids, seconds), max_size=100))
def test_a_state_goes_on_as_if_nothing_had_been(events):
    whole, first, second = Timings(), Timings(), Timings()
    half = len(events) // 2
    for place, (client, one) in enumerate(events):
        for timings in (whole, first if place < half else second):
            if place == half and timings is second:
                second.load_state_dict(first.state_dict())
            timings.asked([client])
            timings.observed(client, one)
            timings.failed(client)
    state, again = whole.state_dict(), (second if events else first).state_dict()
    assert state.keys() == again.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(array, again[name])


good = Timings()
good.observed(3, 2.0)
good.observed(8, 1.0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clients": None}, "'clients' should be an array of int64, \\(n\\)"),
        ({"clients": np.array([3.0, 8.0])}, "'clients' should be an array of int64"),
        ({"clients": np.array([3, 3])}, "some different clients"),
        ({"clients": np.array([3])}, "some different clients"),
        ({"times": np.zeros(2)}, "'times' should be an array of float64, \\(n, 2\\)"),
        ({"times": np.array([[1.0, -1.0], [1.0, 0.0]])}, "at least 0"),
        ({"times": np.array([[np.nan, 0.0], [1.0, 0.0]])}, "at least 0"),
        ({"counts": np.zeros((2, 2), np.int64)}, "'counts' should be an array of int64"),
        ({"counts": np.full((2, 3), -1)}, "at least 0"),
    ],
)
def test_a_state_that_none_can_have_left_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Timings().load_state_dict({**good.state_dict(), **wrong})


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_no_time_is_negative_or_without_end(wrong):
    with pytest.raises(ValueError, match="client 7 took"):
        Timings().observed(7, wrong)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.1, math.nan])
def test_a_quantile_is_of_a_share(wrong):
    with pytest.raises(ValueError, match="q ="):
        Timings().quantile(wrong, [1])


def test_a_hundred_thousand_clients_are_cheap():
    """Bounds twenty times what an idle machine takes, so that only another order of growth misses them."""
    timings, began = Timings(), time.process_time()
    for client in range(100_000):
        timings.observed(client, client % 977)
    filled = time.process_time()
    timings.load_state_dict(timings.state_dict())
    kept = time.process_time()
    assert timings.quantile(0.9, range(1_000)) == 876  # ids 0 … 976 once, 0 … 22 twice
    assert filled - began < 10
    assert kept - filled < 1
    assert sum(array.nbytes for array in timings.state_dict().values()) == 100_000 * 6 * 8


# ---- what is fed ----


def run(nodes, pipeline, rounds=1, timeout=60.0, **settings):
    grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)
    pipeline.scheduler = Synchronous(**settings)
    pipeline.check()
    model = ServerModel(parameters(0, 0), pipeline.optimizer)
    views = list(pipeline.scheduler.run(pipeline, model, Exchange(grid), rounds, timeout=timeout))
    return views, grid, model


def test_a_round_tells_what_each_client_took_and_who_failed():
    pipeline = Pipeline()
    nodes = {
        1: after(2.0, adds(1, 1)),
        2: after(5.0, adds(1, 1)),
        3: after(1.0, failing),
        4: silent,
    }
    run(nodes, pipeline, rounds=2)
    timings = pipeline.timings
    assert [timings.seconds(client) for client in range(4)] == [2.0, 5.0, None, None]
    assert [timings.failures(client) for client in range(4)] == [0, 0, 2, 2]
    assert [timings.times_asked(client) for client in range(4)] == [2, 2, 2, 2]


def test_a_reply_that_is_refused_took_its_time_too_and_is_no_failure():
    pipeline = Pipeline()
    run({1: after(2.0, adds(np.nan, 1)), 2: after(1.0, adds(1, 1))}, pipeline)
    assert (pipeline.timings.seconds(0), pipeline.timings.failures(0)) == (2.0, 0)


def test_of_several_phases_the_one_that_trains_is_measured(tmp_path):
    """Each phase of the masked protocol takes 1 s, and the one that trains 4 s."""
    collector = Masked()
    nodes = {}
    for client in range(5):
        half = collector.client_half(ClientOwn(tmp_path / str(client), {}, simulated=True))
        nodes[client + 1] = after(
            lambda message: 4.0 if message.content[CONFIG].get(TRAINS, True) else 1.0,
            adds(0.1, 0.1, half=half),
        )
    pipeline = Pipeline(collector=collector, combiner=Mean(weighting="uniform"))
    views, *_ = run(nodes, pipeline)
    assert views[0].clock == 7.0
    assert [pipeline.timings.seconds(client) for client in range(5)] == [4.0] * 5
    assert [pipeline.timings.times_asked(client) for client in range(5)] == [1] * 5


def test_a_buffered_run_tells_them_too():
    done = Run(
        {1: after(1.0, adds(1, 1)), 2: after(3.0, adds(1, 1)), 3: after(0.5, failing), 4: silent},
        versions=6,
        buffer=1,
        timeout=4.0,
    )
    timings = done.pipeline.timings
    assert [timings.seconds(client) for client in range(4)] == [1.0, 3.0, None, None]
    assert timings.failures(2) > 0
    assert timings.failures(3) > 0
    asked = [timings.times_asked(client) for client in range(4)]
    assert asked == [done.asked().count(client) for client in range(4)]


def test_they_last_with_the_pipelines_state_and_an_older_one_has_none():
    first, second = Pipeline(), Pipeline()
    run({1: after(2.0, adds(1, 1)), 2: silent}, first)
    state = first.state_dict()
    second.load_state_dict(state)
    assert (second.timings.seconds(0), second.timings.failures(1)) == (2.0, 1)
    third = Pipeline()
    third.load_state_dict({name: part for name, part in state.items() if name != "timings"})
    assert len(third.timings) == 0


def test_a_sampler_that_asks_for_them_is_given_the_pipelines_own():
    class Curious(Uniform):
        def informed(self, timings):
            object.__setattr__(self, "timings", timings)

    sampler = Curious()
    assert isinstance(sampler, Informed)
    assert not isinstance(Uniform(), Informed)
    pipeline = Pipeline(sampler=sampler)
    run({1: after(2.0, adds(1, 1))}, pipeline)
    assert sampler.timings is pipeline.timings
    assert sampler.timings.seconds(0) == 2.0


def test_an_error_says_nothing_of_how_long_training_takes():
    pipeline = Pipeline()
    run({1: lambda m: [(3.0, Message(Error(2, "full"), reply_to=m))], 2: adds(1, 1)}, pipeline)
    assert pipeline.timings.seconds(0) is None
