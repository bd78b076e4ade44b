"""Whatever the speeds: each device has its share, cohorts are alike, and rounds are shorter for it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_app.services.checkpoint import dump, read
from strategies.contract import Claim, ContractError
from strategies.privacy import Central, Distributed, Local
from strategies.protocols import Informed, Persistent, Picker
from strategies.samplers import Fair, Uniform, jain_index
from strategies.schedulers import Buffered, Synchronous
from strategies.timings import Timings


def rounds(sampler, speeds, number, there=lambda number: None, timings=None):
    """So many rounds; the cohort of each. Each device takes what `speeds` says of it."""
    if timings is not None:
        sampler.informed(timings)
    cohorts = []
    for round_number in range(1, number + 1):
        clients = there(round_number)
        clients = range(len(speeds)) if clients is None else clients
        cohort = sampler.draw(clients, seed=0, round_number=round_number, attempt=0)
        assert cohort == sorted(set(cohort))
        assert set(cohort) <= set(clients)
        for client in cohort if timings is not None else ():
            timings.observed(client, float(speeds[client]))
        cohorts.append(cohort)
    return cohorts


def counted(cohorts, clients):
    return np.bincount(np.concatenate(cohorts), minlength=clients)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.5, 3.0, 10.0]),
    st.integers(1, 60),
    st.booleans(),
)
def test_each_device_is_asked_within_slack_and_one_of_its_share(
    speeds, fraction, slack, number, changing
):
    timings, sampler = Timings(), Fair(fraction, slack=slack)
    sampler.informed(timings)
    rng, due = np.random.default_rng(0), 0.0
    asked = np.zeros(len(speeds))
    for round_number in range(1, number + 1):
        cohort = sampler.draw(range(len(speeds)), seed=1, round_number=round_number, attempt=0)
        assert len(cohort) == sampler.cohort(len(speeds))
        due += len(cohort) / len(speeds)
        asked[cohort] += 1
        assert np.abs(asked - due).max() <= slack + 1 + 1e-9
        for client in cohort:
            timings.observed(client, rng.lognormal() if changing else speeds[client])


def test_over_a_thousand_rounds_shares_differ_by_four_rounds_in_a_hundred():
    speeds = np.random.default_rng(0).lognormal(sigma=1.0, size=100)
    asked = counted(rounds(Fair(0.1), speeds, 1_000, timings=Timings()), 100)
    assert asked.min() >= 96
    assert asked.max() <= 104
    assert jain_index(asked) > 0.999


def test_devices_that_come_and_go_have_their_share_of_the_rounds_in_which_they_were_there():
    rng = np.random.default_rng(0)
    speeds, often = rng.lognormal(size=100), rng.uniform(0.2, 1.0, 100)
    sampler = Fair(0.1)

    def there(_number):
        return np.flatnonzero(rng.random(100) < often).tolist()

    asked = counted(rounds(sampler, speeds, 1_000, there, Timings()), 100)
    assert jain_index(sampler.shares(range(100))) > 0.995
    assert sampler.shares(range(100)) == pytest.approx(1.0, abs=0.25)
    assert asked.argmin() == pytest.approx(
        often.argmin(), abs=100
    )  # who is seldom there is asked less


def test_rounds_are_shorter_than_those_of_uniform_cohorts():
    """Log-normal speeds, as measured on fleets: a cohort waits for its slowest."""
    speeds = np.random.default_rng(0).lognormal(sigma=1.0, size=100)

    def total(sampler, timings):
        return sum(
            max(speeds[c] for c in cohort)
            for cohort in rounds(sampler, speeds, 300, timings=timings)
        )

    uniform, fair = total(Uniform(0.1), None), total(Fair(0.1), Timings())
    blind = total(Fair(0.1, slack=0.0), Timings())
    assert fair < 0.6 * uniform
    assert blind > 0.9 * uniform


def test_it_goes_on_where_an_earlier_run_stopped(tmp_path):
    speeds = np.random.default_rng(0).lognormal(size=20)
    whole = rounds(Fair(0.2), speeds, 40, timings=Timings())
    first, timings = Fair(0.2), Timings()
    begun = rounds(first, speeds, 25, timings=timings)
    (tmp_path / "s").write_bytes(dump({"sampler": first.state_dict(), "t": timings.state_dict()}))
    stored = read(tmp_path / "s")
    second, later = Fair(0.2), Timings()
    second.load_state_dict(stored["sampler"])
    later.load_state_dict(stored["t"])
    second.informed(later)
    for number in range(26, 41):
        cohort = second.draw(range(20), seed=0, round_number=number, attempt=0)
        for client in cohort:
            later.observed(client, float(speeds[client]))
        begun.append(cohort)
    assert begun == whole


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"credit": np.zeros(2), "share": np.zeros(2)},
        {"credit": np.zeros(2), "share": np.zeros(3), "asked": np.zeros(2)},
        {"credit": np.zeros(2, np.float32), "share": np.zeros(2), "asked": np.zeros(2)},
        {"credit": np.full(2, np.nan), "share": np.zeros(2), "asked": np.zeros(2)},
        {"credit": 1, "share": np.zeros(2), "asked": np.zeros(2)},
    ],
)
def test_what_no_fair_sampler_has_left_is_refused(state):
    with pytest.raises(ValueError, match="fair sampler's"):
        Fair().load_state_dict(state)


def test_it_is_a_picker_that_is_informed_and_lasts():
    sampler = Fair(0.5)
    assert isinstance(sampler, Picker)
    assert isinstance(sampler, Persistent)
    assert isinstance(sampler, Informed)
    assert sampler.pick([], 3, seed=0, round_number=1, attempt=0) == []


def test_a_hundred_thousand_devices_cost_little():
    sampler, timings = Fair(0.01), Timings()
    everyone = range(100_000)
    (cohort,) = rounds(sampler, np.ones(100_000), 1, timings=timings)
    assert len(cohort) == 1_000
    assert len(sampler.draw(everyone, seed=0, round_number=2, attempt=0)) == 1_000


def test_no_promise_rests_on_who_was_fast():
    claim = Fair(0.1, population=100).check(Claim())
    assert (claim.cohort, claim.rate, claim.measured) == (10, None, True)
    promises = Central(noise_multiplier=1.0), Distributed(noise_multiplier=1.0, size=10)
    for promise in promises:
        with pytest.raises(ContractError, match="how long others took"):
            promise.promised(claim)
    local = Local(noise_multiplier=1.0)
    assert local.promised(claim.given("noise", private=local.mechanism)).measured
    with pytest.raises(ContractError, match="cohorts of like speed"):
        Buffered(buffer=2, population=100).check(claim)
    with pytest.raises(ContractError):
        Synchronous(over_selection=0.2).check(Fair(1.0, population=10).check(Claim(rate=1)))


@given(st.lists(st.floats(0, 1e6), max_size=20))
def test_jains_index_is_one_for_equal_shares_and_one_nth_for_one_that_has_all(shares):
    index = jain_index(shares)
    assert 1 / max(len(shares), 1) - 1e-9 <= index <= 1 + 1e-9
    assert jain_index([3.0] * 7) == pytest.approx(1)
    assert jain_index([5.0, 0, 0, 0]) == pytest.approx(0.25)
