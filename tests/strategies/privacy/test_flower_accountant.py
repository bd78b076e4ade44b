"""Flower's own strategies keep their account by ours, and its accountant and ours agree where both are Rényi's."""

from typing import Any

import numpy as np
import pytest
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import (
    GaussianPrivacyEvent,
    PrivacyAccountant,
    PrivacyConfig,
    RdpAccountant,
)
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.privacy_accounting import NeighboringRelation, SamplingMethod

from strategies.privacy.flower import FlowerAccountant

ADDED, REPLACED = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
EVENT = GaussianPrivacyEvent(1.0, 10, 1000)


def configured(
    sampling: SamplingMethod = SamplingMethod.NO_AMPLIFICATION,
    relation: NeighboringRelation = ADDED,
    budget: float | None = None,
) -> PrivacyConfig:
    return PrivacyConfig(1e-5, 1000, relation, sampling, budget)


@pytest.mark.parametrize(
    ("sampling", "relation"),
    [
        (SamplingMethod.POISSON, ADDED),
        (SamplingMethod.WITHOUT_REPLACEMENT, REPLACED),
        (SamplingMethod.NO_AMPLIFICATION, ADDED),
    ],
)
def test_by_renyi_divergences_it_says_what_flowers_says(
    sampling: SamplingMethod, relation: NeighboringRelation
) -> None:
    config = configured(sampling, relation)
    ours: PrivacyAccountant = FlowerAccountant(config, "rdp")
    theirs = RdpAccountant(config)
    for one in (ours, theirs):
        one.compose(EVENT, 30)
        one.compose(GaussianPrivacyEvent(2.0, 20, 1000))
    assert ours.get_epsilon(1e-6) == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-9)
    assert ours.get_delta(3.0) == pytest.approx(theirs.get_delta(3.0), rel=1e-9)
    assert ours.num_releases == theirs.num_releases == 31
    mine, other = ours.get_privacy_spent(), theirs.get_privacy_spent()
    assert (mine.delta, mine.num_releases) == (other.delta, other.num_releases)
    assert mine.accounting_method == "rdp"
    for limit in (mine.epsilon * 0.99, mine.epsilon * 1.2):
        assert ours.would_exceed(EVENT, limit) == theirs.would_exceed(EVENT, limit)
    assert ours.num_releases == 31
    assert FlowerAccountant(config).get_epsilon(1e-5) == 0.0


def test_by_loss_distributions_it_says_less() -> None:
    config = configured(SamplingMethod.POISSON)
    ours, theirs = FlowerAccountant(config), RdpAccountant(config)
    for one in (ours, theirs):
        one.compose(EVENT, 1000)
    assert ours.get_epsilon(1e-5) == pytest.approx(1.83, rel=0.01)
    assert theirs.get_epsilon(1e-5) == pytest.approx(2.10, rel=0.01)


def test_states_are_taken_up_by_the_same_configuration_only() -> None:
    config = configured()
    accountant = FlowerAccountant(config)
    accountant.compose(EVENT, 3)
    again = FlowerAccountant(config)
    again.load_state_dict(accountant.state_dict())
    assert again.get_privacy_spent() == accountant.get_privacy_spent()
    with pytest.raises(ValueError, match="of the configuration"):
        FlowerAccountant(configured(budget=1.0)).load_state_dict(accountant.state_dict())
    with pytest.raises(ValueError, match="'pld' can't be taken up by 'rdp'"):
        FlowerAccountant(config, "rdp").load_state_dict(accountant.state_dict())


def test_events_of_other_populations_and_missing_budgets_are_refused() -> None:
    accountant = FlowerAccountant(configured())
    with pytest.raises(ValueError, match="500 clients"):
        accountant.compose(GaussianPrivacyEvent(1.0, 10, 500))
    with pytest.raises(ValueError, match="max_epsilon"):
        accountant.would_exceed(EVENT)


# ---- in Flower's strategy ----

ARRAYS = ArrayRecord([np.zeros(4, np.float32)])


class Roster:
    """Flower's `Grid` as far as FedAvg's sampling asks: who is there."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, 11))


def strategy(budget: float) -> DifferentialPrivacyServerSideFixedClipping:
    config = PrivacyConfig(1e-5, 10, ADDED, SamplingMethod.NO_AMPLIFICATION, budget)
    base = FedAvg(fraction_train=1.0, min_train_nodes=10, min_available_nodes=10)
    return DifferentialPrivacyServerSideFixedClipping(
        base, 5.0, 1.0, 10, accountant=FlowerAccountant(config)
    )


def play(one: DifferentialPrivacyServerSideFixedClipping, number: int) -> ArrayRecord | None:
    grid: Any = Roster()
    replies = []
    for message in one.configure_train(number, ARRAYS, ConfigRecord(), grid):
        content = RecordDict(
            {
                "arrays": ArrayRecord([np.ones(4, np.float32)]),
                "metrics": MetricRecord({"num-examples": 1.0}),
            }
        )
        replies.append(Message(content, reply_to=message))
    return one.aggregate_train(number, replies)[0]


def play_until_refused(one: DifferentialPrivacyServerSideFixedClipping) -> int:
    for number in range(1, 100):
        try:
            noised = play(one, number)
        except PrivacyBudgetExhausted:
            return number - 1
        assert noised is not None
        assert not np.allclose(noised.to_numpy_ndarrays()[0], 0.5)
    raise AssertionError("never refused")


def test_flowers_strategy_pays_for_each_round_and_stops_at_the_budget() -> None:
    one = strategy(budget=2.0)
    rounds = play_until_refused(one)
    spent = one.privacy_spent()
    assert spent is not None
    assert spent.num_releases == rounds > 1
    assert spent.epsilon <= 2.0
    further = FlowerAccountant(PrivacyConfig(1e-5, 10, ADDED, SamplingMethod.NO_AMPLIFICATION))
    further.compose(GaussianPrivacyEvent(5.0, 10, 10), rounds + 1)
    assert further.get_epsilon(1e-5) > 2.0
