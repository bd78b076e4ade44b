"""Buffered rounds over scripted nodes in virtual time: whose updates make a step, and by how much."""

import heapq
import itertools
from math import fsum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.combiners import Mean, Median, MultiKrum
from strategies.pipeline import Pipeline
from strategies.schedulers import Constant, Hinge, Polynomial
from strategies.server_models import SGD, Adam
from strategies.update import DELTA
from strategies.wire import CONFIG
from tests.support.buffered import Run, adds, after, watched
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.robust_rules import krum_order
from tests.support.updates import update

SIZE = 3


def towards(target, sent):
    """A client's change: half of the way from the model that it was sent to its own optimum, float32."""
    return (np.asarray(target, np.float32) - np.asarray(sent, np.float32)) * np.float32(0.5)


class Schedule:
    """Clients with their optima, weights and delays, each delay in turn."""

    def __init__(self, seed: int, clients: int, most: int) -> None:
        rng = np.random.default_rng(seed)
        self.targets = rng.normal(0, 3, (clients, SIZE)).astype(np.float32)
        self.examples = rng.integers(1, 50, clients)
        self.delays = rng.integers(1, most + 1, (clients, 400)).astype(float)

    def nodes(self):
        return {client + 1: self._node(client) for client in range(len(self.targets))}

    def _node(self, client):
        turn = itertools.count()
        honest = trellis_node(
            lambda client, number, arrays: {DELTA: towards(self.targets[client], arrays["w"])},
            examples=int(self.examples[client]),
        )
        return after(lambda message: self.delays[client][next(turn)], honest)

    def algorithm_1(self, k, versions, s, *, rate=1.0, mixing=None):
        """FedBuff's Algorithm 1 by hand, all clients busy, each in a buffer once: models and stalenesses by version.

        With `mixing` and k = 1, FedAsync's: x ← (1 − α·s)·x + α·s·x_client.
        """
        x, version, order = np.zeros(SIZE), 0, itertools.count()
        turn, on_the_way, buffer, resting = dict.fromkeys(range(len(self.targets)), 0), [], [], []
        path, ages = [], []

        def ask(now, clients):
            for client in sorted(clients):
                due = now + self.delays[client][turn[client]]
                turn[client] += 1
                sent = x.astype(np.float32)
                heapq.heappush(on_the_way, (due, next(order), client, version, sent))

        ask(0.0, turn)
        while version < versions:
            now, _, client, born, sent = heapq.heappop(on_the_way)
            change = towards(self.targets[client], sent).astype(np.float64)
            buffer.append((int(self.examples[client]), version - born, change, sent))
            resting.append(client)
            if len(buffer) < k:
                continue
            if mixing is None:
                total = sum(w * s(age) * change for w, age, change, _ in buffer)
                x = x + rate * total / sum(w for w, *_ in buffer)
            else:
                ((_, age, change, sent),) = buffer
                share = mixing * s(age)
                x = (1 - share) * x + share * (sent + change)
            path.append(x)
            ages.append(tuple(age for _, age, *_ in buffer))
            version += 1
            ask(now, resting)
            buffer, resting = [], []
        return path, ages


WEIGHTS = [Constant(), Polynomial(), Polynomial(2.0), Hinge(slope=0.5, grace=1)]
SCHEDULES = st.builds(
    Schedule, st.integers(0, 2**32 - 1), st.integers(2, 12), st.sampled_from([1, 3, 30, 1000])
)


@settings(max_examples=25)
@given(SCHEDULES, st.data())
def test_steps_are_those_of_algorithm_1_of_fedbuff(schedule, data):
    """The mean divides by the weight of the buffer, which staleness does not lessen."""
    clients = len(schedule.targets)
    k, s = data.draw(st.integers(1, clients)), data.draw(st.sampled_from(WEIGHTS))
    rate = data.draw(st.sampled_from([1.0, 0.3]))
    path, ages = schedule.algorithm_1(k, 8, s.weight, rate=rate)
    run = Run(
        schedule.nodes(),
        Pipeline(optimizer=SGD(lr=rate)),
        versions=8,
        timeout=1e6,
        size=SIZE,
        buffer=k,
        concurrency=clients,
        staleness=s,
        max_staleness=1000,
    )
    assert [view.staleness for view in run.views] == ages
    np.testing.assert_allclose(run.path, path, rtol=1e-5, atol=1e-5)
    assert [view.round for view in run.views] == list(range(1, 9))


@settings(max_examples=25)
@given(SCHEDULES, st.sampled_from(WEIGHTS), st.sampled_from([0.1, 0.6, 1.0]))
def test_mixing_is_fedasyncs(schedule, s, alpha):
    """x ← (1 − α·s(τ))·x + α·s(τ)·x_client."""
    path, ages = schedule.algorithm_1(1, 12, s.weight, mixing=alpha)
    run = Run(
        schedule.nodes(),
        versions=12,
        timeout=1e6,
        size=SIZE,
        buffer=1,
        concurrency=len(schedule.targets),
        staleness=s,
        max_staleness=1000,
        mixing=alpha,
    )
    assert [view.staleness for view in run.views] == ages
    np.testing.assert_allclose(run.path, path, rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(SCHEDULES, st.data())
def test_never_are_more_clients_busy_nor_a_client_in_a_buffer_twice(schedule, data):
    clients = len(schedule.targets)
    k, busy = data.draw(st.integers(1, clients)), data.draw(st.integers(1, clients))
    at_work, most, moments = set(), [0], []

    def counted(node):
        def answer(message):
            client = message.content[CONFIG]["client"]
            now = grid.clock.now()
            at_work.difference_update([one for one in at_work if one[1] <= now])
            assert client not in {one for one, _ in at_work}
            for delay, reply in node(message):
                at_work.add((client, now + delay))
                yield delay, reply
            most[0] = max(most[0], len(at_work))
            moments.append(now)

        return answer

    grid = ScriptedGrid({name: counted(node) for name, node in schedule.nodes().items()})
    mean = Mean()
    buffers = watched(mean)
    Run(
        grid,
        Pipeline(combiner=mean),
        versions=6,
        timeout=1e6,
        size=SIZE,
        buffer=k,
        concurrency=busy,
        max_staleness=1000,
    )
    members = [[client for update in held for client in update.members] for held in buffers]
    assert [len(held) for held in members] == [k] * 6
    assert all(len(set(held)) == k for held in members)
    assert most[0] <= busy


# ---- rules, and the server's step ----

MANY = Schedule(3, 12, 40)
SETTINGS = {"versions": 12, "timeout": 1e6, "size": SIZE, "buffer": 7, "concurrency": 12}


def test_multi_krum_weighs_what_it_has_chosen_and_chooses_among_updates_as_they_are():
    rule = MultiKrum(f=2)
    buffers = watched(rule)
    run = Run(MANY.nodes(), Pipeline(combiner=rule), **SETTINGS)
    before = np.zeros(SIZE)
    for held, after_step, view in zip(buffers, run.path, run.views, strict=True):
        ages = dict(zip((one.members for one in held), view.staleness, strict=True))
        held.sort(key=lambda update: update.members)
        rows = np.stack([update.delta.vector for update in held])
        chosen = krum_order(rows, 2)[:5]
        step = sum((1 + ages[held[i].members]) ** -0.5 * rows[i] for i in chosen) / 5
        np.testing.assert_allclose(after_step - before, step, rtol=1e-4, atol=1e-6)
        before = after_step
    assert len({age for view in run.views for age in view.staleness}) > 2


def test_other_rules_are_scaled_by_the_mean_of_the_weights():
    rule = Median()
    buffers = watched(rule)
    run = Run(MANY.nodes(), Pipeline(combiner=rule), **SETTINGS)
    before = np.zeros(SIZE)
    for held, after_step, view in zip(buffers, run.path, run.views, strict=True):
        rows = np.stack([update.delta.vector for update in held])
        scale = fsum((1 + age) ** -0.5 for age in view.staleness) / len(held)
        np.testing.assert_allclose(
            after_step - before, scale * np.median(rows, axis=0), rtol=1e-4, atol=1e-6
        )
        before = after_step


@pytest.mark.parametrize("make", [lambda: SGD(lr=0.7, momentum=0.9), lambda: Adam(lr=0.1)])
def test_damping_divides_the_step_and_the_moments_see_the_aggregate_as_it_is(make):
    mean = Mean()
    buffers = watched(mean)
    run = Run(MANY.nodes(), Pipeline(combiner=mean, optimizer=make()), damp=True, **SETTINGS)
    reference, x = make(), np.zeros(SIZE)
    reference.begin(SIZE)
    for held, after_step, view in zip(buffers, run.path, run.views, strict=True):
        total = sum(u.weight * u.discount * u.delta.vector.astype(np.float64) for u in held)
        aggregate = update((total / sum(u.weight for u in held)).astype(np.float32))
        moved = x.copy()
        reference.step(moved, aggregate)
        x = x + (moved - x) / (1 + np.mean(view.staleness))
        np.testing.assert_allclose(after_step, x, rtol=1e-4, atol=1e-5)
        x = after_step
    ours = run.pipeline.optimizer.state_dict()
    for name, slot in reference.state_dict().items():
        if name != "kind":
            np.testing.assert_allclose(ours[name], slot, rtol=1e-4, atol=1e-6)
    assert max(np.mean(view.staleness) for view in run.views) >= 1


# ---- how old an update may be ----


def one_slow(seconds, *, most, versions):
    """One client that takes so long on its first update, and one version a second without it."""

    def patience(message):
        return seconds if message.content[CONFIG]["version"] == 0 else 1.0

    nodes = {1: after(patience, adds(100, 0))} | {n: after(1.0, adds(0, 1)) for n in (2, 3)}
    return Run(
        nodes, versions=versions, buffer=2, concurrency=3, max_staleness=most, staleness=Constant()
    )


def test_an_update_of_the_largest_age_is_taken():
    run = one_slow(3.5, most=3, versions=4)
    assert [max(view.staleness) for view in run.views] == [0, 0, 0, 3]
    assert run.pipeline.admission.refusals == {}
    assert run.model.parameters[0] == 50


def test_an_older_one_is_refused_and_counted_and_its_client_is_slow_and_no_liar():
    run = one_slow(3.5, most=2, versions=6)
    assert (run.pipeline.admission.refusals, run.pipeline.admission.strikes) == ({"stale": 1}, {})
    assert [view.rejected for view in run.views] == [0, 0, 0, 1, 0, 0]
    assert [view.failed for view in run.views] == [0] * 6
    # It is given the present model when it is next asked, which is when the buffer has been applied.
    told = [m.content[CONFIG]["version"] for m in run.grid.sent if m.content[CONFIG]["client"] == 0]
    assert told[:2] == [0, 4]


def test_a_refused_update_takes_no_place_of_the_buffer():
    run = one_slow(3.5, most=2, versions=4)
    assert [len(view.staleness) for view in run.views] == [2] * 4


def test_with_no_staleness_allowed_only_present_ones_are_taken():
    run = Run(MANY.nodes(), max_staleness=0, **(SETTINGS | {"buffer": 3}))
    assert {age for view in run.views for age in view.staleness} == {0}
    assert run.pipeline.admission.refusals["stale"] > 0
