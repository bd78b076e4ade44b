"""What privacy rests on in buffered rounds: who is how far apart, what is paid when, and what may not show."""

import itertools
from collections import defaultdict
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.admission import Admission
from strategies.collectors import Masked, Plain
from strategies.combiners import CenteredClipping, Mean, NormBounding
from strategies.contract import ContractError
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Ftrl, ParticipationSpentError
from strategies.samplers import Poisson, Spaced, Uniform
from strategies.schedulers import Buffered, Compass
from strategies.server_models import Scaffold
from strategies.stages import AdaptiveClip, Clip
from strategies.update import DELTA
from strategies.wire import CONFIG
from tests.support.buffered import Run, adds, after, by_version, failing, silent, watched
from tests.support.grids import trellis_node


def private(
    *, clients: int, separation: int = 3, participations: int = 4, rounds: int = 30, **parts
) -> Pipeline:
    """DP-FTRL with hardly any noise, so that what is beneath it shows."""
    given = {
        "collector": Plain(metrics=False),
        "stages": [Clip(norm=8.0)],
        "combiner": Mean(weighting="uniform", denominator="cohort"),
        "sampler": Spaced(participations, separation),
        "privacy": Ftrl(
            noise_multiplier=1e-9, population=clients, rounds=rounds, reproducible_noise=True
        ),
    }
    return Pipeline(**{**given, **parts})


@settings(max_examples=40)
@given(st.data())
def test_no_client_is_in_rows_nearer_than_b_nor_in_more_than_k(data):
    """On the rows in which updates are applied, whatever the delays, drop-outs and versions of the model."""
    k, b = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    times = data.draw(st.integers(1, 3))
    clients = k * b + data.draw(st.integers(0, 6))
    busy = data.draw(st.integers(1, clients))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    delays = rng.choice([0.5, 1.0, 3.0, 20.0, 90.0], (clients, 200))

    def node(client):
        turn = itertools.count()
        honest = adds(1, 0, stages=[Clip()])

        def answer(message):
            number = next(turn)
            if rng.random() < 0.1:
                return [] if rng.random() < 0.5 else failing(message)
            return after(delays[client][number], honest)(message)

        return answer

    line = private(clients=clients, separation=b, participations=times)
    buffers = watched(line.combiner)
    with suppress(ParticipationSpentError):
        Run(
            {client + 1: node(client) for client in range(clients)},
            line,
            versions=8,
            timeout=50.0,
            buffer=k,
            concurrency=busy,
            deadline=30.0,
            max_staleness=4,
        )
    rows = defaultdict(list)
    for row, held in enumerate(buffers, 1):
        for update in held:
            rows[update.members[0]].append(row)
    for taken in rows.values():
        assert len(taken) <= times
        assert all(later - earlier >= b for earlier, later in itertools.pairwise(taken))


def test_a_version_is_paid_for_before_anybody_is_asked_for_it():
    line = private(clients=12)
    spent = defaultdict(set)

    def node(message):
        spent[message.content[CONFIG]["version"]].add(line.privacy.epsilon)
        return after(1.0, adds(1, 0, stages=[Clip()]))(message)

    run = Run(dict.fromkeys(range(1, 13), node), line, versions=3, buffer=3, concurrency=3)
    for view in run.views:
        assert spent[view.round - 1] == {view.epsilon}


def test_the_denominator_is_the_planned_buffer_whoever_is_refused():
    """Two of a buffer of four send NaN: the sum of the others is divided by four."""
    wrong = trellis_node(lambda *_: {DELTA: [np.nan, 0]}, stages=[Clip()])
    nodes = {n: after(n, adds(4, 0, stages=[Clip()]) if n > 2 else wrong) for n in range(1, 17)}
    run = Run(nodes, private(clients=16), buffer=4, concurrency=12, seed=2)
    (view,) = run.views
    count = len(view.staleness)
    assert count + view.rejected == 4
    np.testing.assert_allclose(run.model.parameters, [count, 0], atol=1e-5)


@pytest.mark.parametrize("good", [[4, 0], [np.nan, 0], [0, 0]], ids=["good", "wrong", "zeros"])
def test_when_a_step_is_made_does_not_depend_on_what_clients_send(good):
    """A reply that is refused takes a place as one of zeros does: the schedule is the same."""

    def run_of(vector):
        def node(n):
            change = trellis_node(
                lambda client, *_: {DELTA: vector if client % 3 else [1, 0]}, stages=[Clip()]
            )
            return after(lambda m: 1.0 + (n * 7 % 5) + m.content[CONFIG]["version"] % 2, change)

        nodes = {n: node(n) for n in range(1, 25)}
        return Run(nodes, private(clients=24), versions=5, buffer=4, concurrency=8)

    run, other = run_of(good), run_of([1, 0])
    assert [view.clock for view in run.views] == [view.clock for view in other.views]
    assert run.asked() == other.asked()
    assert run.asked("version") == other.asked("version")


def test_of_nobody_noise_is_released_and_no_version_is_void():
    run = Run(
        dict.fromkeys(range(1, 13), by_version(lambda v: failing if v == 0 else silent)),
        private(clients=12),
        versions=2,
        buffer=3,
        concurrency=3,
        timeout=5.0,
    )
    assert [view.void for view in run.views] == [False, False]
    assert [view.staleness for view in run.views] == [(), ()]


def refusal(**parts) -> ContractError:
    given = {"scheduler": Buffered(buffer=3, population=20), **parts}
    with pytest.raises(ContractError) as refused:
        Pipeline(**given).check(frozenset({DELTA}))
    return refused.value


COHORT_MEAN = Mean(weighting="uniform", denominator="cohort")


@pytest.mark.parametrize(
    ("parts", "mend"),
    [
        ({"sampler": Poisson(0.2, population=20)}, "sampler=spaced"),
        ({"optimizer": Scaffold(), "client_sections": frozenset({DELTA, "control"})}, "server=sgd"),
        ({"stages": [AdaptiveClip()], "combiner": Mean(weighting="uniform")}, "clip=fixed"),
        (
            {
                "collector": Plain(metrics=False),
                "stages": [Clip(norm=1.0)],
                "combiner": COHORT_MEAN,
                "privacy": Ftrl(noise_multiplier=1.0, population=20),
                "sampler": Uniform(0.5, population=20),
            },
            "sampler=spaced",
        ),
        ({"sampler": Spaced(3, 7)}, "raise num_clients"),
        ({"scheduler": Buffered(buffer=21, population=20)}, "raise num_clients"),
        ({"scheduler": Buffered(buffer=3, concurrency=21, population=20)}, "raise num_clients"),
        (
            {
                "scheduler": Buffered(buffer=2, cohort=5, concurrency=4, population=20),
                "collector": Masked(),
                "combiner": Mean(weighting="uniform"),
            },
            "raise scheduler.concurrency",
        ),
        ({"admission": Admission(quorum=4)}, "lower admission.quorum"),
    ],
    ids=[
        "poisson",
        "scaffold",
        "adaptive clip",
        "ftrl of any",
        "separation",
        "buffer",
        "busy",
        "cohort",
        "quorum",
    ],
)
def test_what_is_unsound_is_refused_and_the_mend_named(parts, mend):
    assert mend in refusal(**parts).instead


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="set buffer = 1"):
        Buffered(mixing=0.5)
    with pytest.raises(ValueError, match="train alike"):
        Buffered(pace=Compass(), cohort=2)


def test_central_noise_takes_what_the_buffer_bounds_and_no_chance():
    """Independent noise each version, without amplification: nobody's coins are thrown."""
    line = private(
        clients=20, privacy=Central(noise_multiplier=1.0, population=20), sampler=Uniform()
    )
    line.scheduler = Buffered(buffer=4, population=20)
    claim = line.check(frozenset({DELTA}))
    assert (claim.sampling, claim.rate, claim.cohort) == ("uncontrolled", None, 4)
    assert claim.sensitivity == pytest.approx(8.0 / 4)


def test_local_steps_by_measured_speed_are_refused_under_a_promise():
    line = private(clients=12, scheduler=Buffered(buffer=2, population=12, pace=Compass()))
    with pytest.raises(ContractError, match="depend on the time that others took"):
        line.check(frozenset({DELTA}))


def test_whoever_the_sampler_may_not_ask_yet_is_not_counted_towards_a_cohort():
    """What is picked counts as asked, so nobody is picked for a cohort that does not come about."""
    sampler = Spaced(participations=3, separation=4, population=5)
    line = Pipeline(sampler=sampler)
    first = sampler.pick(range(5), 3, seed=0, round_number=1, attempt=1)
    assert line.askable(range(5), 2) == [client for client in range(5) if client not in first]
    assert line.askable(range(5), 5) == [0, 1, 2, 3, 4]
    assert Pipeline(sampler=Uniform()).askable(range(5), 2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "given", [{"buffer": 4, "damp": True, "concurrency": 8}, {"buffer": 1, "mixing": 0.5, "concurrency": 6}],
    ids=["damped", "mixed"],
)  # fmt: skip
def test_how_long_a_step_is_does_not_tell_whether_a_reply_was_refused(given):
    """Old replies of NaN are as ones of zeros: their age counts, whatever becomes of them."""

    def path(vector, seed):
        def change(client, *_):
            return {DELTA: vector if client % 5 == 4 else [4, 0]}

        nodes = {
            n: after(2.6 if n % 5 == 0 else 1.0, trellis_node(change, stages=[Clip()]))
            for n in range(1, 25)
        }
        line = private(clients=24, participations=20, separation=1)
        return Run(nodes, line, versions=12, seed=seed, **given)

    refused = 0
    for seed in range(6):
        wrong, zeros = path([np.nan, 0], seed), path([0, 0], seed)
        refused += sum(view.rejected for view in wrong.views)
        np.testing.assert_allclose(wrong.path, zeros.path, atol=1e-5)
        assert wrong.asked() == zeros.asked()
    assert refused


@pytest.mark.parametrize(
    "rule",
    [
        CenteredClipping(f=1, tau=1.0, denominator="cohort"),
        NormBounding(f=1, bound=1.0, denominator="cohort"),
    ],
    ids=["centred clipping", "norm bounding"],
)
def test_rules_whose_whole_outcome_ages_scale_have_no_sensitivity(rule):
    """One client's age is in the mean of the discounts: its being there moves what all the others made."""
    line = private(clients=24, scheduler=Buffered(buffer=4, population=24), combiner=rule)
    with pytest.raises(
        ContractError, match="one client can move the combined vector by any amount"
    ):
        line.check(frozenset({DELTA}))
    mean = Mean(weighting="uniform", denominator="cohort")
    line = private(clients=24, scheduler=Buffered(buffer=4, population=24), combiner=mean)
    assert line.check(frozenset({DELTA})).sensitivity == 8 / 4
