"""Rounds that go on when k of n have answered: who is in, when, and what sums bear."""

import itertools
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.admission import Admission
from strategies.collectors import Ckks, Masked, Plain
from strategies.combiners import Mean, Median, MultiKrum
from strategies.contract import ContractError, Visibility
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Local
from strategies.protocols import ClientOwn
from strategies.samplers import Poisson, Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import ServerModel
from strategies.stages import Clip
from strategies.update import DELTA
from strategies.wire import CONFIG
from tests.support.buffered import adds, after, failing, silent
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.masked import folder
from tests.support.updates import parameters


def run(nodes, pipeline=None, rounds=1, *, timeout=60.0, **settings_):
    pipeline = pipeline or Pipeline()
    grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)
    pipeline.scheduler = Synchronous(**settings_)
    pipeline.check(frozenset({DELTA}))
    model = ServerModel(parameters(0, 0), pipeline.optimizer)
    views = list(pipeline.scheduler.run(pipeline, model, Exchange(grid), rounds, timeout=timeout))
    return views, grid, model


def uniform(**keywords) -> Pipeline:
    return Pipeline(combiner=Mean(weighting="uniform"), **keywords)


delays = st.lists(st.integers(1, 40).map(float), min_size=1, max_size=12)


@settings(max_examples=50)
@given(delays, st.floats(0.05, 1), st.sampled_from([0.0, 0.25, 1.0]))
def test_a_round_is_of_those_who_came_until_enough_had_and_a_little_longer(times, enough, grace):
    """By the definition: the k-th reply at t ends the round at t·(1 + grace), or the last one does before."""
    nodes = {k + 1: after(seconds, adds(k + 1, 0)) for k, seconds in enumerate(times)}
    pipeline = uniform()
    (view,), _, model = run(nodes, pipeline, timeout=100.0, enough=enough, grace=grace)
    k = ceil(round(enough * len(times), 9))
    reached = sorted(times)[k - 1]
    end = reached * (1 + grace) if enough < 1 else np.inf
    inside = [c for c, seconds in enumerate(times) if seconds <= reached or seconds < end]
    ended = max(times) if len(inside) == len(times) else end
    assert view.clock == pytest.approx(ended)
    assert pipeline.included == dict.fromkeys(inside, 1)
    assert model.parameters[0] == pytest.approx(
        np.mean([client + 1 for client in inside]), rel=1e-6
    )
    assert (view.sampled, view.failed, view.rejected) == (len(times), 0, 0)


def test_whoever_was_late_has_not_failed_and_is_told_that_it_was_not_included():
    nodes = {1: after(1.0, adds(1, 1)), 2: after(2.0, adds(1, 1)), 3: after(2.5, adds(99, 99))}
    pipeline = uniform()
    views, grid, model = run(nodes, pipeline, rounds=3, enough=0.6)
    assert [view.clock for view in views] == [2, 4, 6]
    np.testing.assert_array_equal(model.parameters, [3, 3])  # 3's replies came in the next rounds
    told = [(m.content[CONFIG]["client"], m.content[CONFIG]["included"]) for m in grid.sent]
    assert told == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 0), (0, 2), (1, 2), (2, 0)]
    assert not pipeline.admission.strikes
    assert not pipeline.admission.refusals
    assert pipeline.timings.failures(2) == 0


def test_errors_and_refusals_are_no_answers():
    nodes = {
        1: failing,
        2: adds(np.nan, 0),
        3: after(3.0, adds(3, 3)),
        4: after(7.0, adds(5, 5)),
        5: silent,
    }
    (view,), _, model = run(nodes, uniform(), enough=0.4)
    assert view.clock == 7
    np.testing.assert_array_equal(model.parameters, [4, 4])
    assert (view.failed, view.rejected) == (1, 1)


def test_a_deadline_still_ends_what_does_not_reach_enough():
    nodes = {1: after(1.0, adds(2, 2)), 2: silent, 3: silent}
    (view,), _, model = run(nodes, uniform(), enough=0.6, deadline=10.0)
    assert (view.clock, view.failed) == (10, 2)
    np.testing.assert_array_equal(model.parameters, [2, 2])


def test_a_long_grace_is_cut_by_the_deadline():
    nodes = {1: after(4.0, adds(2, 2)), 2: silent}
    (view,), _, _ = run(nodes, uniform(), enough=0.5, grace=10.0, deadline=10.0)
    assert (view.clock, view.failed) == (10, 1)


@pytest.mark.parametrize(
    ("pipeline", "least"),
    [
        (uniform(admission=Admission(quorum=7)), 7),
        (Pipeline(combiner=MultiKrum(f=2)), 7),  # 2f + 3
        (Pipeline(combiner=Median(f=3)), 7),  # 2f + 1
        (uniform(), 3),
    ],
    ids=["quorum", "krum", "median", "neither"],
)
def test_the_quorum_and_the_rule_get_what_they_need(pipeline, least):
    nodes = {k: after(float(k), adds(1, 1)) for k in range(1, 11)}
    (view,), _, _ = run(nodes, pipeline, enough=0.3)
    assert (view.clock, view.void) == (least, False)
    assert len(pipeline.included) == least


# ---- several phases ----


class Masks:
    """Clients of a masked collector, each as slow as the test says in each phase."""

    def __init__(self, path, count, seconds, **settings_):
        self.collector = Masked(colluders=0.0, limit=1.0, **settings_)
        self.nodes = {}
        for client in range(count):
            own = ClientOwn(path / str(client), {}, simulated=True)
            half = self.collector.client_half(own)
            honest = trellis_node(
                lambda one, number, arrays: {DELTA: [one / 64, 0.25]},
                half=half,
                metrics={"train_loss": 0.5},
            )
            self.nodes[client + 1] = after(self._delay(client, seconds), honest)

    @staticmethod
    def _delay(client, seconds):
        return lambda message: seconds(client, message.content[CONFIG]["phase"])

    def pipeline(self):
        return Pipeline(collector=self.collector, combiner=Mean(weighting="uniform"))


def test_a_masked_sum_of_enough_clients_is_their_exact_mean(tmp_path):
    """Two of ten are slow in the upload: it is over when eight have come, and so is what follows."""
    masks = Masks(tmp_path, 10, lambda c, phase: 30.0 if c in (3, 7) and phase == 2 else 1.0)
    (view,), _, model = run(masks.nodes, pipeline := masks.pipeline(), timeout=100.0, enough=0.8)
    inside = [client for client in range(10) if client not in (3, 7)]
    assert (view.clock, view.void, view.failed) == (4, False, 0)
    assert pipeline.included == dict.fromkeys(inside, 1)
    np.testing.assert_allclose(model.parameters, [np.mean(inside) / 64, 0.25], atol=1e-6)


@settings(max_examples=12)
@given(st.data())
def test_all_phases_together_leave_out_no_more_than_the_share_whoever_is_slow(data):
    """A client that is slow in a phase costs the round nothing as long as the share allows it; later it is waited for.

    The odds are open: which client is slow where, and in how many phases. No sum may be void.
    """
    slow = {
        (client, phase)
        for client, phase in itertools.product(range(6), range(4))
        if data.draw(st.integers(0, 5)) == 0
    }
    with folder() as path:
        masks = Masks(path, 6, lambda c, phase: 20.0 if (c, phase) in slow else 1.0, dropouts=0.34)
        pipeline = masks.pipeline()
        (view,), _, model = run(masks.nodes, pipeline, timeout=100.0, enough=0.66)
    inside = sorted(pipeline.included)
    assert not view.void
    assert len(inside) >= 4
    np.testing.assert_allclose(model.parameters, [np.mean(inside) / 64, 0.25], atol=1e-6)


def test_groups_are_waited_for_one_by_one(tmp_path):
    """Of four groups of three, each bears one drop-out: three slow ones may be in three groups, or two in one."""
    slow = {0, 4, 8}
    masks = Masks(
        tmp_path,
        12,
        lambda c, phase: 30.0 if c in slow and phase == 2 else 1.0,
        groups=3,
        dropouts=0.3,
        seed=3,
    )
    pipeline = masks.pipeline()
    (view,), _, model = run(masks.nodes, pipeline, timeout=100.0, enough=0.75)
    inside = sorted(pipeline.included)
    assert not view.void
    assert 9 <= len(inside) <= 12
    np.testing.assert_allclose(model.parameters[1], 0.25, atol=1e-6)
    assert view.failed == 0


# ---- the contract ----


def bounded(**keywords) -> Pipeline:
    return Pipeline(
        collector=Plain(metrics=False),
        stages=[Clip(norm=1.0)],
        combiner=Mean(weighting="uniform", denominator="cohort"),
        sampler=Uniform(fraction=0.5, population=20),
        **keywords,
    )


def local() -> Pipeline:
    promise = Local(noise_multiplier=1.0, population=20)
    one = bounded(privacy=promise)
    one.stages = [*one.stages, *promise.stages(Clip(norm=1.0).bounds)]
    return one


class Sums(Plain):
    """Shows the server sums only, and says nothing of drop-outs."""

    def check(self, claim):
        return super().check(claim).given(self, visibility=Visibility.SUM)


def sums(collector) -> Pipeline:
    return Pipeline(
        collector=collector,
        combiner=Mean(weighting="uniform"),
        sampler=Uniform(fraction=0.5, population=20),
    )


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        (
            bounded(privacy=Central(noise_multiplier=1.0, population=20)),
            "takes the place.*privacy=none",
        ),
        (local(), "takes the place.*privacy=none"),
        (sums(Sums()), "does not say how many drop-outs.*scheduler.enough=1"),
        (sums(Masked(dropouts=0.1)), "bear that 0.1.*use scheduler.enough=0.9"),
        (sums(Masked(dropouts=0.1, groups=2)), "bear that 0.1.*use scheduler.enough=0.9"),
    ],
    ids=["central", "local", "sums", "masked", "groups"],
)
def test_what_can_not_do_without_those_who_are_late_is_refused(pipeline, why):
    pipeline.check()  # it is right without
    pipeline.scheduler = Synchronous(enough=0.8)
    with pytest.raises(ContractError, match=f"scheduler.enough.*{why}"):
        pipeline.check()


@pytest.mark.parametrize("collector", [Masked(dropouts=0.2), Masked(dropouts=0.3), Ckks(), Plain()])
def test_sums_that_bear_it_go_with_it(collector):
    pipeline = sums(collector)
    pipeline.scheduler = Synchronous(enough=0.8)
    claim = pipeline.check()
    assert (claim.sampling, claim.rate, claim.cohort) == ("uncontrolled", None, 10)


def test_coins_may_be_thrown_where_no_privacy_rests_on_them():
    pipeline = Pipeline(sampler=Poisson(fraction=0.5, population=20))
    pipeline.scheduler = Synchronous(enough=0.8)
    assert pipeline.check().sampling == "uncontrolled"


def test_two_ways_of_not_waiting_are_refused_together():
    pipeline = Pipeline(sampler=Uniform(fraction=0.5, population=20))
    pipeline.scheduler = Synchronous(enough=0.8, over_selection=0.3)
    with pytest.raises(
        ContractError, match=r"scheduler.enough cannot be composed with scheduler.ov"
    ):
        pipeline.check()


@pytest.mark.parametrize("wrong", [{"enough": 0.0}, {"enough": 1.1}, {"grace": -0.1}])
def test_settings_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"Synchronous.{next(iter(wrong))}"):
        Synchronous(**wrong)
