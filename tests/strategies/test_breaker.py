"""The circuit breaker against one by hand, event by event; in rounds, in buffers, and under a promise."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from strategies.breaker import CircuitBreaker
from strategies.collectors import Plain
from strategies.combiners import Mean, MultiKrum
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import Central
from strategies.samplers import Poisson, Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import ServerModel
from strategies.stages import Clip
from strategies.update import DELTA
from strategies.wire import CONFIG
from tests.support.buffered import Run, adds, after, failing, silent
from tests.support.grids import ScriptedGrid
from tests.support.updates import parameters

CLIENTS = range(6)


class Reference:
    """One client's circuit, by the words of the docstring: closed, open for so many rounds, then tried once."""

    def __init__(self, failures, rest, most):
        self.failures, self.rest, self.most = failures, rest, most
        self.in_a_row: list[int] = []  # rounds
        self.length, self.back = 0, 0

    def rests(self, number):
        return number < self.back

    def fails(self, number):
        """Whether the circuit is opened."""
        if self.in_a_row[-1:] == [number]:
            return False
        self.in_a_row.append(number)
        if len(self.in_a_row) < self.failures and not self.length:
            return False
        self.length = min(self.most, self.length * 2) if self.length else self.rest
        self.back = number + 1 + self.length
        return True

    def answers(self):
        self.__init__(self.failures, self.rest, self.most)


class Machine(RuleBasedStateMachine):
    """Rounds in which each client that is asked answers, fails, or is not heard of; the breaker may be restarted."""

    @initialize(failures=st.integers(1, 3), rest=st.integers(1, 4), doublings=st.integers(0, 3))
    def begin(self, failures, rest, doublings):
        self.settings = {"failures": failures, "rest": rest, "most_rest": rest * 2**doublings + 1}
        self.breaker = CircuitBreaker(**self.settings)
        most = self.settings["most_rest"]
        self.reference = {client: Reference(failures, rest, most) for client in CLIENTS}
        self.number, self.trips = 0, 0

    @rule(outcomes=st.lists(st.sampled_from("afn"), min_size=6, max_size=6), keep=st.integers(0, 6))
    def a_round(self, outcomes, keep):
        self.number += 1
        asked = self.breaker.allowed(CLIENTS, self.number, keep)
        resting = [c for c in CLIENTS if self.reference[c].rests(self.number)]
        missing = max(0, min(len(resting), keep - (len(CLIENTS) - len(resting))))
        # who has failed last, and so rests since the latest round, comes last
        back = sorted(resting, key=lambda c: (self.reference[c].in_a_row[-1], c))[:missing]
        assert asked == [c for c in CLIENTS if c not in resting or c in back]
        assert len(asked) >= min(keep, len(CLIENTS))
        for client, outcome in zip(CLIENTS, outcomes, strict=True):
            assert self.breaker.rests(client) == (client not in asked)
            if client in asked and outcome == "a":
                self.breaker.answered(client)
                self.reference[client].answers()
            elif client in asked and outcome == "f":
                self.breaker.failed(client)
                self.breaker.failed(client)  # a second attempt at the round
                self.trips += self.reference[client].fails(self.number)

    @rule()
    def restart(self):
        state = self.breaker.state_dict()
        self.breaker = CircuitBreaker(**self.settings)
        self.breaker.load_state_dict(state)

    @invariant()
    def says_which_are_open(self):
        if hasattr(self, "breaker"):
            tripped = [client for client in CLIENTS if self.reference[client].length]
            assert self.breaker.report() == {"open": tripped, "trips": self.trips}


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestBreaker = Machine.TestCase


def test_a_dead_client_is_asked_ever_more_rarely():
    breaker, asked = CircuitBreaker(), []
    for number in range(1, 400):
        if breaker.allowed([7], number):
            asked.append(number)
            breaker.failed(7)
    # three failures, then after rests of 5, 10, 20, 40, 80, 80, … rounds
    assert asked == [1, 2, 3, 9, 20, 41, 82, 163, 244, 325]


def test_what_opens_and_closes_is_said_once(caplog):
    breaker = CircuitBreaker(failures=2, rest=2)
    for number in range(1, 6):
        if breaker.allowed([3], number):
            breaker.failed(3) if number < 5 else breaker.answered(3)
    told = [record.message for record in caplog.records]
    assert told == [
        "client 3 has failed 2 rounds in a row and is not asked from round 3 to 4",
        "client 3 answers again and is asked as before",
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"client": None}, "'client' should be a vector of int64"),
        ({"failures": np.zeros(2)}, "'failures' should be a vector"),
        ({"client": np.array([1, 1])}, "different clients"),
        ({"last": np.array([1])}, "different clients"),
        ({"rest": np.array([1, -1])}, "at least 0"),
        ({"trips": "many"}, "'trips' should be a whole number"),
    ],
)
def test_a_state_that_none_can_have_left_is_refused(wrong, said):
    breaker = CircuitBreaker(failures=1)
    for client in (1, 2):
        breaker.failed(client)
    with pytest.raises(ValueError, match=said):
        CircuitBreaker().load_state_dict({**breaker.state_dict(), **wrong})


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"rest": 0}, {"rest": 6, "most_rest": 5}])
def test_settings_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"CircuitBreaker|breaker\.rest"):
        CircuitBreaker(**wrong)


# ---- in rounds ----


def run(nodes, pipeline, rounds, *, timeout=10.0, **settings_):
    grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)
    pipeline.scheduler = Synchronous(**settings_)
    pipeline.check(frozenset({DELTA}))
    model = ServerModel(parameters(0, 0), pipeline.optimizer)
    views = list(pipeline.scheduler.run(pipeline, model, Exchange(grid), rounds, timeout=timeout))
    return views, grid, model


def asked(grid):
    """Clients by round."""
    found: dict[int, list[int]] = {}
    for message in grid.sent:
        config = message.content[CONFIG]
        found.setdefault(config["server-round"], []).append(config["client"])
    return found


def broken(**keywords) -> Pipeline:
    return Pipeline(combiner=Mean(weighting="uniform"), breaker=CircuitBreaker(), **keywords)


def test_a_dead_client_costs_seven_of_a_hundred_rounds_their_timeout():
    """Without the breaker each of the 100 rounds waits 10 s for it."""
    nodes = {k: after(1.0, adds(1, 1)) for k in range(4)} | {4: silent}
    pipeline = broken()
    views, grid, _ = run(nodes, pipeline, 100)
    waited = [number for number, clients in asked(grid).items() if 4 in clients]
    assert waited == [1, 2, 3, 9, 20, 41, 82]
    assert views[-1].clock == 7 * 10 + 93
    assert pipeline.breaker.report() == {"open": [4], "trips": 5}
    assert pipeline.timings.failures(4) == 7


def test_one_that_comes_back_is_asked_as_before():
    def node(message):
        number = message.content[CONFIG]["server-round"]
        return failing(message) if number < 5 else adds(1, 1)(message)

    pipeline = broken()
    _, grid, _ = run({0: adds(1, 1), 1: node}, pipeline, 15)
    assert [n for n, clients in asked(grid).items() if 1 in clients] == [1, 2, 3, *range(9, 16)]
    assert pipeline.breaker.report() == {"open": [], "trips": 1}


def test_what_came_and_was_wrong_is_the_quarantines():
    pipeline = broken()
    run({0: adds(1, 1), 1: adds(np.nan, 1)}, pipeline, 8)
    assert pipeline.breaker.report() == {"open": [], "trips": 0}
    assert pipeline.admission.refusals == {"not_finite": 8}


def test_the_rule_gets_its_inputs_and_who_rested_longest_comes_back():
    """MultiKrum with f = 1 needs five: of seven clients three fail, so that one at rest is called back."""
    nodes = {k: adds(1, 1) for k in range(4)} | dict.fromkeys(range(4, 7), failing)
    pipeline = Pipeline(combiner=MultiKrum(f=1), breaker=CircuitBreaker())
    views, grid, _ = run(nodes, pipeline, 6)
    by_round = asked(grid)
    assert set(by_round[3]) == set(range(7))
    assert all(len(set(clients)) >= 5 for clients in by_round.values())
    assert all(view.void for view in views)


def test_clients_beyond_a_cohort_are_not_those_at_rest():
    nodes = {k: after(1.0, adds(1, 1)) for k in range(12)} | {12: failing}
    pipeline = broken(sampler=Uniform(fraction=0.5, population=13))
    _, grid, _ = run(nodes, pipeline, 40, over_selection=0.8)
    breaker, clients = CircuitBreaker(), asked(grid)
    for number in range(1, 41):
        breaker.allowed([12], number)
        assert not (breaker.rests(12) and 12 in clients[number])
        if 12 in clients[number]:
            breaker.failed(12)
    assert breaker.report() == pipeline.breaker.report()
    assert breaker.trips


def test_a_resumed_run_asks_whom_one_that_was_not_stopped_asks():
    nodes = {k: adds(1, 1) for k in range(9)} | {9: failing}
    _, whole, _ = run(nodes, broken(sampler=Uniform(fraction=0.5, population=10)), 30)
    first, second = (broken(sampler=Uniform(fraction=0.5, population=10)) for _ in range(2))
    _, early, model = run(nodes, first, 12)
    second.load_state_dict(first.state_dict())
    second.scheduler = Synchronous()
    second.check(frozenset({DELTA}))
    late = ScriptedGrid(nodes)
    list(second.scheduler.run(second, model, Exchange(late), 30))
    assert {**asked(early), **asked(late)} == asked(whole)


# ---- in buffers ----


def test_a_buffer_is_filled_by_those_who_answer():
    nodes = {k: after(1.0, adds(1, 1)) for k in range(1, 7)} | {7: failing, 8: silent}
    pipeline = Pipeline(breaker=CircuitBreaker())
    done = Run(nodes, pipeline, versions=30, buffer=4, concurrency=8, timeout=20.0, deadline=5.0)
    without = Run(
        dict(nodes), Pipeline(), versions=30, buffer=4, concurrency=8, timeout=20.0, deadline=5.0
    )
    assert 6 in pipeline.breaker.open
    assert done.asked().count(6) < without.asked().count(6) / 2
    assert not any(view.void for view in done.views)


def test_a_buffer_that_takes_all_asks_those_at_rest_too():
    """A step is of four, and four are there: without the one that fails none would ever fill."""
    nodes = {k: after(1.0, adds(1, 1)) for k in range(1, 4)} | {4: failing}
    pipeline = Pipeline(breaker=CircuitBreaker())
    done = Run(nodes, pipeline, versions=10, buffer=4, concurrency=4, timeout=20.0)
    assert done.asked().count(3) >= 10


# ---- under a promise ----


def promised(sampler) -> Pipeline:
    return Pipeline(
        collector=Plain(metrics=False),
        stages=[Clip(norm=1.0)],
        combiner=Mean(weighting="uniform", denominator="cohort"),
        sampler=sampler,
        privacy=Central(noise_multiplier=1.0, population=20),
        breaker=CircuitBreaker(),
    )


@pytest.mark.parametrize(
    "sampler",
    [Uniform(fraction=0.5, population=20), Poisson(fraction=0.5, population=20)],
    ids=["fixed", "coins"],
)
def test_nobody_takes_the_place_of_a_client_at_rest_where_noise_rests_on_the_draw(sampler):
    """The draw is among all twenty; who rests is then missing from it, and nobody is called back."""
    pipeline = promised(sampler)
    pipeline.check()
    for client in range(10, 20):
        for number in (1, 2, 3):
            pipeline.breaker.allowed([client], number)
            pipeline.breaker.failed(client)
    drawn = [pipeline.draw(range(20), seed=0, round_number=4, attempt=0) for _ in range(400)]
    assert all(set(clients) <= set(range(10)) for clients in drawn)
    # Each of ten is in with odds of 1/2: 6 deviations of 400 throws are exceeded with odds of 2e-9 each.
    counts = np.bincount(np.concatenate(drawn).astype(int), minlength=10)
    assert np.abs(counts - 200).max() < 6 * 10
    assert pipeline.draw(range(10, 20), seed=0, round_number=4, attempt=1) == []


def test_a_server_that_is_cut_off_spends_no_rounds_on_nobody_once_it_is_back():
    """A central promise releases noise for a round of which nothing came: that is no round in which all have failed."""
    nodes = dict.fromkeys(range(20), silent)
    pipeline = promised(Uniform(fraction=1.0, population=20))
    views, _, _ = run(nodes, pipeline, 6)
    assert [view.sampled for view in views] == [20] * 6
    assert pipeline.breaker.open == []


def test_without_one_the_cohort_is_whole():
    pipeline = broken(sampler=Uniform(fraction=0.5, population=20))
    pipeline.check()
    for client in range(10, 20):
        for number in (1, 2, 3):
            pipeline.breaker.allowed([client], number)
            pipeline.breaker.failed(client)
    drawn = pipeline.draw(range(20), seed=0, round_number=4, attempt=0)
    assert set(drawn) <= set(range(10))
    again = [pipeline.draw(range(20), seed=s, round_number=4, attempt=1) for s in range(9)]
    assert any(
        set(clients) - set(range(10)) for clients in again
    )  # the first fell short without them


def test_a_breaker_changes_no_claim():
    """Whoever rests, what is claimed of the run is what is claimed without."""
    sampler = Uniform(fraction=0.5, population=20)
    with_one, without = promised(sampler), promised(sampler)
    without.breaker = None
    assert with_one.check() == without.check()


def test_a_server_that_is_cut_off_finds_no_circuit_open_when_it_is_back():
    pipeline = Pipeline(breaker=CircuitBreaker(failures=2))
    for number in range(1, 6):
        pipeline.breaker.allowed(range(4), number)
        for client in range(4):
            pipeline.timings.failed(client)
        pipeline.over(range(4), heard=False)
    assert pipeline.breaker.open == []
    for number in range(6, 8):
        pipeline.breaker.allowed(range(4), number)
        for client in range(3):
            pipeline.timings.failed(client)
        pipeline.answered(3, 1.0)
        pipeline.over(range(4), heard=True)  # who has answered after all is none that failed
    assert pipeline.breaker.open == [0, 1, 2]
