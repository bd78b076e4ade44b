"""What a server says of clients that protect their own examples: the largest ε that any of them told."""

import math

import pytest

from strategies.collectors import Masked, Plain
from strategies.combiners import Mean, Median
from strategies.contract import ContractError
from strategies.pipeline import Pipeline
from strategies.privacy import OwnAccounts
from strategies.samplers import Uniform
from strategies.update import BUFFERS, DELTA, EPSILON, Update
from tests.support.updates import section, update


def accounts(**settings) -> OwnAccounts:
    return OwnAccounts(**{"delta": 1e-5, "accountant": "pld", **settings})


def pipeline(promise: OwnAccounts, **parts) -> Pipeline:
    given = {
        "collector": Plain(metrics=False),
        "combiner": Mean(weighting="uniform"),
        "sampler": Uniform(population=10),
        "privacy": promise,
    }
    return Pipeline(**{**given, **parts})


def told(client: int, epsilon: float) -> Update:
    return update([1.0], client=client, metrics={EPSILON: epsilon})


def test_the_runs_epsilon_is_the_largest_that_any_client_told():
    promise = accounts(budget=8.0)
    pipeline(promise).check()
    assert promise.epsilon == 0.0
    for client, spent in [(3, 1.5), (1, 4.0), (3, 2.0), (2, 0.0)]:
        promise.told(told(client, spent))
    assert promise.epsilon == 4.0
    assert promise.spent == {1: 4.0, 2: 0.0, 3: 2.0}
    assert promise.report() == {
        "unit": "example",
        "epsilon": 4.0,
        "delta": 1e-5,
        "accountant": "pld",
        "adjacency": "add_or_remove_one",
        "protects": "each example, from everybody but the client that has it",
        "mechanism": "dp-sgd",
        "target_epsilon": 8.0,
        "clients": 3,
    }


@pytest.mark.parametrize(
    "one",
    [told(1, 0.5), told(1, -1.0), told(1, math.nan), told(1, math.inf), update([1.0], client=1)],
    ids=["less than before", "negative", "NaN", "infinite", "nothing"],
)
def test_a_client_can_take_nothing_back_and_say_no_nonsense(one):
    promise = accounts()
    promise.told(told(1, 1.0))
    promise.told(one)
    assert promise.spent == {1: 1.0}


def test_what_no_client_that_keeps_to_its_budget_can_have_spent_is_not_counted():
    promise = accounts(budget=2.0)
    promise.told(told(1, 1.0))
    promise.told(told(2, 1e9))
    assert promise.spent == {1: 1.0}
    assert promise.epsilon == 1.0


def test_a_sum_speaks_for_none_of_its_members():
    promise = accounts(budget=8.0)
    sections = {DELTA: section([1.0])}
    promise.told(Update(sections, 2.0, (1, 2), 0, {EPSILON: 3.0}))
    assert promise.spent == {}


def test_where_sums_hide_what_was_spent_it_is_the_budget_that_no_client_passes():
    promise = accounts(budget=8.0)
    pipeline(promise, collector=Masked(metrics=())).check()
    assert promise.epsilon == promise.report()["epsilon"] == 8.0
    with pytest.raises(ContractError, match=r"set client\.target_epsilon"):
        pipeline(accounts(), collector=Masked(metrics=())).check()


def test_noise_that_repeats_promises_nothing():
    promise = accounts(promised=False)
    promise.told(told(1, 1.0))
    assert promise.epsilon is None
    assert promise.report() is None


def test_what_was_told_lasts_through_a_restart():
    promise = accounts()
    for client, spent in [(3, 1.5), (12, 4.0)]:
        promise.told(told(client, spent))
    other = accounts()
    other.load_state_dict(promise.state_dict())
    assert other.spent == {3: 1.5, 12: 4.0}
    other.told(told(3, 1.0))
    assert other.epsilon == 4.0


def test_the_server_neither_charges_nor_noises_and_may_ask_a_second_cohort():
    promise = accounts()
    line = pipeline(promise)
    line.check()
    promise.charge(1)
    one = update([1.0, 2.0])
    assert promise.privatise(one, {}) is one
    assert promise.stages(dict) == ()
    assert promise.epsilon == 0.0
    assert line.attempts == line.admission.max_attempts > 1


@pytest.mark.parametrize("combiner", [Mean(weighting="uniform"), Median(f=0)])
def test_any_rule_may_follow(combiner):
    assert pipeline(accounts(), combiner=combiner).check().private == "dp-sgd"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"collector": Plain()}, "metrics, num-examples would travel in clear"),
        (
            {"collector": Masked(metrics=("train_loss",))},
            r"train_loss would be seen without noise; set collector\.metrics=\[\]",
        ),
    ],
    ids=["in clear", "summed"],
)
def test_nothing_may_tell_of_examples_beside_what_was_trained_under_noise(parts, said):
    with pytest.raises(ContractError, match=said):
        pipeline(accounts(budget=8.0), **parts).check()


def test_running_statistics_of_examples_are_refused():
    with pytest.raises(ContractError, match="use GroupNorm instead of BatchNorm"):
        pipeline(accounts()).check(frozenset({DELTA, BUFFERS}))
