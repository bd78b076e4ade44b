"""The account of a run, whatever makes its noise: paid for before a round, written down, taken up, never passed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.collectors import Masked, Plain
from strategies.combiners import Mean
from strategies.contract import Claim, ContractError, Visibility
from strategies.pipeline import Pipeline
from strategies.privacy import BudgetSpentError, Central, Guarantee, Local, ParticipationSpentError
from strategies.privacy.accountants import make_accountant
from strategies.privacy.events import GaussianRelease
from strategies.privacy.guarantee import gaussian_release
from strategies.privacy.ledger import Ledger
from strategies.protocols import Persistent, Promise
from strategies.samplers import Poisson, Uniform
from strategies.stages import Clip
from tests.support.updates import update


def central(**settings) -> Central:
    return Central(**{"noise_multiplier": 1.0, "population": 100, "rounds": 10, **settings})


def checked(privacy: Guarantee, sampler=None, **parts) -> Guarantee:
    clip = Clip()
    Pipeline(
        **{
            "collector": Plain(metrics=False),
            "stages": [clip, *privacy.stages(clip.bounds)],
            "combiner": Mean(weighting="uniform", denominator="cohort"),
            "sampler": sampler or Poisson(fraction=0.1, population=100),
            "privacy": privacy,
            **parts,
        }
    ).check()
    return privacy


# ---- settings ----


@pytest.mark.parametrize(
    ("population", "delta"), [(None, 1e-5), (10, 1e-5), (10_000, 1e-5), (1_000_000, 1e-6**1.1)]
)
def test_delta_is_less_than_one_in_all_clients_and_never_more_than_a_hundred_thousandth(
    population, delta
):
    assert central(population=population).resolved_delta == pytest.approx(delta)
    assert central(population=population, delta=1e-7).resolved_delta == 1e-7


@pytest.mark.parametrize("delta", [0.01, 0.5])
def test_a_delta_that_allows_a_client_to_be_published_is_refused(delta):
    with pytest.raises(ValueError, match=r"one of 100 clients to be published: set it below 1/100"):
        central(population=100, delta=delta)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_epsilon": 0.0},
        {"target_epsilon": -1.0},
        {"target_epsilon": math.nan},
        {"noise_multiplier": 0.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"rounds": 0},
        {"population": 0},
    ],
    ids=str,
)
def test_settings_out_of_their_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        central(**wrong)


@pytest.mark.parametrize("promise", [central(), Local(noise_multiplier=1.0)])
def test_a_guarantee_is_a_promise_with_a_state(promise):
    assert isinstance(promise, Persistent)
    as_promise: Promise = promise
    assert (as_promise.repeats, as_promise.epsilon) == (False, 0.0)


# ---- the noise ----


def test_the_noise_is_known_when_the_pipeline_is_and_not_before():
    privacy = Central(target_epsilon=2.0, population=100, rounds=10)
    assert privacy.report() is None
    with pytest.raises(RuntimeError, match="when the pipeline has been checked"):
        _ = privacy.z
    assert checked(privacy).z > 0
    assert checked(central(target_epsilon=2.0)).z == 1.0


@pytest.mark.parametrize(
    ("accountant", "epsilon"),
    [("pld", 0.5), ("pld", 8.0), ("rdp", 2.0), pytest.param("prv", 2.0, marks=pytest.mark.slow)],
)
def test_noise_that_is_found_uses_the_budget_up_and_less_would_pass_it(accountant, epsilon):
    privacy = Central(target_epsilon=epsilon, population=100, rounds=10, accountant=accountant)
    checked(privacy)
    for z, enough in ((privacy.z, True), (0.98 * privacy.z, False)):
        account = make_accountant(accountant, "add_or_remove_one")
        account.step(GaussianRelease(z, 0.1, "poisson"), 10)
        assert (account.epsilon(privacy.resolved_delta) <= epsilon * (1 + 1e-9)) is enough


def test_a_budget_that_no_noise_keeps_to_is_a_matter_of_the_contract():
    privacy = Central(target_epsilon=1e-9, population=100, rounds=10**6, delta=1e-300)
    with pytest.raises(ContractError, match=r"raise privacy\.target_epsilon or privacy\.delta"):
        checked(privacy)


@given(st.floats(0.1, 10), st.floats(0.01, 1), st.integers(1, 1000))
def test_what_is_claimed_of_sampling_is_what_the_sampler_says(z, rate, cohort):
    poisson = Claim(sampling="poisson", rate=rate, cohort=cohort)
    assert gaussian_release(poisson, z) == GaussianRelease(z, rate, "poisson")
    fixed = Claim(sampling="fixed", rate=rate, cohort=cohort)
    assert gaussian_release(fixed, z) == GaussianRelease(z / 2, rate, "fixed", "replace_one")
    summed = replace(poisson, visibility=Visibility.SUM)  # opened only where enough take part
    for unknown in (Claim(cohort=cohort), Claim(sampling="poisson", cohort=cohort), summed):
        assert gaussian_release(unknown, z) == GaussianRelease(z)


# ---- paying ----


def test_a_charge_is_on_the_disk_when_a_round_begins(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    privacy = checked(central(ledger=path))
    assert not path.exists()
    for number in (1, 2):
        privacy.charge(number)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["round"] for line in lines[1:]] == list(range(1, number + 1))
    assert len(Ledger(path, privacy.state_dict()["header"]).charges) == 2


def test_a_ledger_that_cannot_be_written_costs_the_round_and_nothing_is_released(tmp_path):
    path = tmp_path / "ledger.jsonl"
    privacy = checked(central(ledger=path))
    privacy.charge(1)
    spent = privacy.epsilon
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        privacy.charge(2)
    assert privacy.epsilon == spent
    assert privacy.report()["releases"] == 1


def test_a_round_beyond_the_budget_is_refused_and_leaves_no_charge(tmp_path):
    path = tmp_path / "ledger.jsonl"
    privacy = checked(central(target_epsilon=4.0, ledger=path))
    paid = []

    def pay(number: int) -> None:
        privacy.charge(number)
        paid.append(number)

    with pytest.raises(BudgetSpentError, match=r"would spend ε = .* of 4$"):
        list(map(pay, range(1, 1000)))
    before = path.read_bytes()
    for _ in range(3):
        with pytest.raises(BudgetSpentError):
            privacy.charge(len(paid) + 1)
    assert path.read_bytes() == before
    assert privacy.report()["releases"] == len(paid) > 0
    assert privacy.epsilon <= 4.0
    assert BudgetSpentError.reason == "privacy budget"
    assert issubclass(ParticipationSpentError, BudgetSpentError)


def test_without_a_budget_rounds_are_counted_and_none_is_refused():
    privacy = checked(central())
    for number in range(1, 40):
        privacy.charge(number)
    account = make_accountant("pld", "add_or_remove_one")
    account.step(GaussianRelease(1.0, 0.1, "poisson"), 39)
    assert privacy.epsilon == pytest.approx(account.epsilon(privacy.resolved_delta))


# ---- what lasts ----


@pytest.mark.parametrize(
    "other",
    [
        lambda: checked(central(accountant="rdp")),
        lambda: checked(central(), Uniform(fraction=0.1, population=100)),
        lambda: checked(Local(noise_multiplier=1.0, population=100)),
    ],
    ids=["another accountant", "another relation", "another mechanism"],
)
def test_accounts_are_not_added_up_across_mechanisms(tmp_path, other):
    path = tmp_path / "ledger.jsonl"
    privacy = checked(central(ledger=path))
    privacy.charge(1)
    another = other()
    with pytest.raises(ValueError, match="is of another mechanism"):
        another.load_state_dict(privacy.state_dict())
    another.ledger = path
    with pytest.raises(ValueError, match="is another file: its mechanism is"):
        another.charge(1)


def test_another_noise_multiplier_is_the_same_mechanism_and_both_are_counted():
    first = checked(central(noise_multiplier=2.0))
    first.charge(1)
    second = checked(central(noise_multiplier=1.0))
    second.load_state_dict(first.state_dict())
    second.charge(2)
    account = make_accountant("pld", "add_or_remove_one")
    for z in (2.0, 1.0):
        account.step(GaussianRelease(z, 0.1, "poisson"))
    assert second.epsilon == pytest.approx(account.epsilon(second.resolved_delta))


def test_a_checkpoint_and_a_ledger_of_two_runs_are_refused(tmp_path):
    first = checked(central())
    first.charge(1)
    second = checked(central(noise_multiplier=2.0, ledger=tmp_path / "ledger.jsonl"))
    second.charge(1)
    with pytest.raises(ValueError, match="they are of two runs"):
        second.load_state_dict(first.state_dict())


# ---- what is said ----


def test_the_report_names_the_unit_its_neighbours_and_what_was_spent():
    privacy = checked(central(target_epsilon=5.0))
    privacy.charge(1)
    assert privacy.report() == {
        "unit": "client",
        "epsilon": privacy.epsilon,
        "delta": 1e-5,
        "accountant": "pld",
        "adjacency": "add_or_remove_one",
        "protects": Central.protects,
        "mechanism": "gaussian",
        "noise_multiplier": 1.0,
        "target_epsilon": 5.0,
        "sampling": "poisson sampling, rate 0.1",
        "releases": 1,
    }
    json.dumps(privacy.report(), allow_nan=False)


def test_the_plan_is_told_before_anything_runs():
    privacy = checked(Central(target_epsilon=3.0, population=100, rounds=10))
    said = privacy.describe(10_000)
    account = make_accountant("pld", "add_or_remove_one")
    account.step(GaussianRelease(privacy.z, 0.1, "poisson"))
    one = account.epsilon(1e-5)
    for part in (
        f"z = {privacy.z:.4g}",
        "budget ε = 3",
        "δ = 1e-05 (1/N = 0.01)",
        f"ε = {one:.3g} a round",
        "after 10",
        "cohort 10",
        f"at least {privacy.z * 100 / 10:.3g}",  # z·C·√d over a cohort, beside C
    ):
        assert part in said


def test_what_repeats_says_nothing_of_privacy_and_still_keeps_to_its_budget():
    privacy = checked(central(reproducible_noise=True, target_epsilon=1.0))
    assert (privacy.epsilon, privacy.report()) == (None, None)
    with pytest.raises(BudgetSpentError):
        list(map(privacy.charge, range(1, 100)))


def test_a_server_that_adds_no_noise_gives_the_aggregate_as_it_is():
    privacy = checked(Local(noise_multiplier=1.0, population=100))
    one = update(np.ones(3))
    assert privacy.privatise(one, {}) is one


def test_sums_of_metrics_are_refused_with_the_mend():
    with pytest.raises(ContractError, match=r"set collector\.metrics=\[\]"):
        checked(central(), collector=Masked())
