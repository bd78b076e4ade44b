"""Buffered rounds among the slow, the lost and the lying: places are given on, and nobody has two of a buffer."""

import numpy as np
import pytest

from strategies.admission import Admission
from strategies.combiners import Krum, Mean, TrimmedMean
from strategies.exchange import NoClientsError
from strategies.pipeline import Pipeline
from strategies.schedulers import Constant
from strategies.update import DELTA
from strategies.wire import CONFIG
from tests.support.buffered import Run, adds, after, by_version, failing, silent, watched
from tests.support.grids import ScriptedGrid, trellis_node


@pytest.mark.parametrize("seed", range(4))
def test_a_vanished_clients_place_is_given_to_another_at_its_deadline(seed):
    nodes = {1: after(1.0, adds(2, 0)), 2: silent, 3: after(1.0, adds(4, 0))}
    run = Run(nodes, buffer=2, concurrency=2, deadline=10.0, timeout=1000.0, seed=seed)
    (view,) = run.views
    np.testing.assert_array_equal(run.model.parameters, [3, 0])
    assert view.clock <= 11
    assert run.grid.clock.now() < 1000


def test_a_deadline_frees_the_place_of_the_only_one_at_work():
    nodes = {1: silent, 2: silent, 3: silent, 4: after(1.0, adds(4, 0))}
    run = Run(nodes, buffer=1, concurrency=1, deadline=10.0, timeout=1000.0)
    asked = run.asked()
    assert asked[-1] == 3
    assert len(set(asked)) == len(asked)
    assert run.views[0].clock == 10 * (len(asked) - 1) + 1
    assert (run.views[0].sampled, run.views[0].failed) == (len(asked), len(asked) - 1)


def test_a_place_is_not_kept_for_one_that_fails():
    nodes = {1: after(1.0, adds(2, 0)), 2: failing, 3: after(1.0, adds(4, 0))}
    run = Run(nodes, buffer=2, concurrency=2, timeout=1000.0)
    np.testing.assert_array_equal(run.model.parameters, [3, 0])
    assert run.views[0].clock <= 2
    assert run.pipeline.admission.refusals in ({"client_error": 1}, {})


def test_a_vanished_client_is_asked_again_once_the_buffer_is_applied():
    """It may be back; a reply to the first request would be one to no request."""
    nodes = {1: after(4.0, adds(2, 0)), 2: by_version(lambda v: adds(4, 0) if v else silent)}
    nodes |= {3: after(4.0, adds(4, 0))}
    run = Run(nodes, buffer=2, concurrency=3, deadline=3.0 + 2.0, versions=3, timeout=100.0)
    told = [m.content[CONFIG]["version"] for m in run.grid.sent if m.content[CONFIG]["client"] == 1]
    assert told[0] == 0
    assert run.pipeline.admission.refusals == {"timeout": 1}
    assert 1 in run.pipeline.included


def test_a_late_reply_is_never_counted():
    """It comes when its client has been given up, and asked anew."""
    late = by_version(
        lambda version: after(30.0 if version == 0 else 1.0, adds(1000 * (version == 0), 0))
    )
    nodes = {1: late, 2: after(6.0, adds(0, 0)), 3: after(6.0, adds(0, 0))}
    run = Run(nodes, buffer=2, concurrency=3, deadline=8.0, versions=8, timeout=500.0)
    assert run.grid.clock.now() > 30
    np.testing.assert_array_equal(run.model.parameters, 0)
    assert run.pipeline.admission.refusals == {"timeout": 1}


@pytest.mark.parametrize(("quorum", "void"), [(2, False), (3, True)])
def test_when_nobody_is_left_to_ask_the_buffer_is_applied_if_it_meets_the_quorum(quorum, void):
    nodes = {1: adds(2, 0), 2: failing, 3: adds(4, 0), 4: failing}
    run = Run(nodes, Pipeline(admission=Admission(quorum=quorum)), buffer=4, concurrency=4)
    (view,) = run.views
    assert view.void is void
    np.testing.assert_array_equal(run.model.parameters, [0 if void else 3, 0])
    assert ("nobody is left to ask" in view.void_reason) is void
    assert run.model.version == 1


@pytest.mark.parametrize(("quorum", "void"), [(1, False), (2, True)])
def test_a_buffer_that_does_not_fill_in_time_is_applied_if_it_meets_the_quorum(quorum, void):
    nodes = {1: after(5.0, adds(6, 0)), 2: after(100.0, adds(2, 0)), 3: after(110.0, adds(4, 0))}
    pipeline = Pipeline(admission=Admission(quorum=quorum))
    run = Run(
        nodes, pipeline, buffer=3, timeout=30.0, deadline=500.0, versions=4, staleness=Constant()
    )
    assert run.views[0].void is void
    assert run.views[0].clock == 30
    if void:
        assert "1 of 3 came within 30 s" in run.views[0].void_reason
    # Those still at work are waited for, and part of a later version.
    assert run.pipeline.admission.refusals == {}
    assert run.pipeline.included.keys() == {0, 1, 2}


def test_when_all_clients_go_the_run_waits_for_them_and_then_says_so():
    grid = ScriptedGrid({n: after(1.0, adds(1, 1)) for n in (1, 2, 3)})

    def leave(node):
        def answer(message):
            if message.content[CONFIG]["version"] == 1:
                grid.nodes.clear()
            return node(message)

        return answer

    grid.nodes = {name: leave(node) for name, node in grid.nodes.items()}
    with pytest.raises(NoClientsError, match="0 of 1 clients"):
        Run(grid, buffer=2, concurrency=2, versions=5, timeout=20.0)
    assert grid.clock.now() >= 20


def test_one_whose_node_is_gone_is_replaced_at_once():
    grid = ScriptedGrid({n: after(1.0, adds(n, 0)) for n in (1, 2, 3, 4)})
    gone = grid.nodes.pop

    def last(message):
        gone(2, None)
        return after(1.0, adds(1, 0))(message)

    grid.nodes[1] = last
    run = Run(grid, buffer=3, concurrency=4, versions=2, timeout=50.0)
    assert [len(view.staleness) for view in run.views] == [3, 3]
    assert run.pipeline.admission.refusals in ({}, {"client_error": 1})


# ---- the fast and the false ----

HONEST, LIARS = 17, 3


def federation(lie, *, faster=100.0):
    """Liars 0 … 2, so much faster than the honest ones, whose updates are near (1, 1)."""
    rng = np.random.default_rng(7)
    vectors = rng.normal(1, 0.1, (LIARS + HONEST, 2))
    speeds = rng.uniform(5, 20, LIARS + HONEST)

    def node(client):
        vector = lie if client < LIARS else vectors[client]
        seconds = speeds[client] / (faster if client < LIARS else 1)
        return after(seconds, trellis_node(lambda *_: {DELTA: vector}))

    return {client + 1: node(client) for client in range(LIARS + HONEST)}


@pytest.mark.parametrize("rule", [Krum(f=LIARS), TrimmedMean(f=LIARS)], ids=["krum", "trimmed"])
@pytest.mark.parametrize("concurrency", [10, 20])
def test_liars_a_hundred_times_faster_have_a_place_of_each_buffer_and_no_more(rule, concurrency):
    """f = 3 of K = 10 is what a rule bears, however fast the three are."""
    buffers = watched(rule)
    try:
        run = Run(
            federation([1e4, -1e4]),
            Pipeline(combiner=rule),
            versions=10,
            buffer=10,
            concurrency=concurrency,
            staleness=Constant(),
        )
    finally:
        object.__delattr__(rule, "begin")
    counts = [[update.members[0] for update in held] for held in buffers]
    assert all(len(set(members)) == 10 for members in counts)
    assert max(sum(client < LIARS for client in members) for members in counts) == LIARS
    np.testing.assert_allclose(run.model.parameters, [10, 10], atol=4)


def test_under_a_plain_mean_the_same_liars_would_rule():
    run = Run(federation([1e4, -1e4]), versions=10, buffer=10, concurrency=20)
    assert abs(run.model.parameters[0]) > 1e3


def test_wrong_updates_take_no_place_and_their_senders_rest_as_others_do():
    """Each fast client that sends NaN is refused once a buffer, not once a second; Krum counts it as one of its f."""
    run = Run(
        federation([np.nan, 0]),
        Pipeline(combiner=Krum(f=LIARS)),
        versions=5,
        buffer=10,
        concurrency=20,
        staleness=Constant(),
    )
    assert [len(view.staleness) for view in run.views] == [10] * 5
    assert max(view.rejected for view in run.views) <= LIARS
    refused = run.pipeline.admission.refusals["not_finite"]
    assert refused == sum(view.rejected for view in run.views)
    np.testing.assert_allclose(run.model.parameters, [5, 5], atol=2)


def test_an_update_that_came_twice_counts_once():
    """As a hostile node might send it: two replies to one request."""

    def twice(message):
        return [reply for _ in range(2) for reply in after(1.0, adds(8, 0))(message)]

    run = Run({1: twice, 2: after(2.0, adds(0, 0))}, Pipeline(combiner=Mean()), buffer=2)
    np.testing.assert_array_equal(run.model.parameters, [4, 0])


def test_a_liar_that_lets_itself_be_refused_makes_no_room_for_another():
    """Refused replies take no place, so f stays f: of a buffer that falls short the rule makes nothing."""
    nodes = {1: after(1.0, adds(np.inf, 0)), 2: after(1.0, adds(1, 0)), 3: after(1.0, adds(1e3, 0))}
    nodes |= dict.fromkeys((4, 5, 6), silent)
    line = Pipeline(combiner=TrimmedMean(f=1), admission=Admission(on_shortfall="skip"))
    run = Run(nodes, line, buffer=5, concurrency=6, timeout=20.0)
    assert run.views[0].void
    np.testing.assert_array_equal(run.model.parameters, [0, 0])
