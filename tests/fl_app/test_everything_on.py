"""Presets with everything on: what their contract comes to, which liars they bear, and what they refuse."""

import math

import numpy as np
import pytest

from fl_app.assembly import Assembly, composed
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from strategies.contract import Visibility
from strategies.secagg.fixed_point import LARGEST
from strategies.stages.integer_noise import IntegerNoise
from strategies.update import DELTA, Section
from strategies.wire import Refused
from tests.fl_app.test_run import run

PRESET = "experiment=private_robust_secure"
SMALL = [
    PRESET, "num_clients=21", "client.lr=5", "rounds=2", "privacy.target_epsilon=null", "privacy.noise_multiplier=0.03",
]  # fmt: skip
"""Digits among 21 clients, of whom two lie where one is told to, as the preset has them among 100; next to no noise."""
TWO = "attack.fraction=0.1"


# ---- the contract ----


def test_the_preset_holds_what_it_promises_of_each_part():
    pipeline = composed(Assembly(compose([PRESET])), 100).pipeline
    claim, privacy = pipeline.claim, pipeline.privacy
    assert [stage.name for stage in pipeline.stages] == ["clip", "integers"]
    assert (claim.visibility, claim.groups, claim.cohort) == (Visibility.GROUP, 7, 100)
    assert (claim.whole, claim.summed) == (True, "uniform")
    assert (claim.metrics, claim.clear) == (frozenset(), frozenset())
    assert claim.private == "distributed noise"
    # 13 of 14 must be left, and two of them may lie or tell: eleven shares are sure, fifteen may be there.
    assert (claim.honest, claim.members) == (11, 15)
    rule = pipeline.combiner
    assert (rule.tolerance(claim.inputs), rule.least_inputs(claim.inputs)) == (2, 5)
    assert privacy.adjacency == "zero_out"
    # One group's sum is all that a client is in: 11 shares make z times what its vector may change.
    steps = privacy._steps()
    assert steps.shares * steps.variance >= (privacy.z * steps.rounded) ** 2
    assert 0.95 * 24 <= privacy._planned_epsilon() <= 24


def test_every_round_is_charged_for_one_sum_though_seven_are_opened(tmp_path):
    _, summary, lines = run(tmp_path, *SMALL)
    privacy = summary["privacy"]
    assert (privacy["releases"], privacy["adjacency"]) == (2, "zero_out")
    assert (privacy["mechanism"], privacy["noise"]) == ("distributed noise", "discrete_gaussian")
    assert "train" not in summary["history"][0]  # no metric, not even a sum of them
    told = " ".join(lines)
    for promise in (
        "7 groups",
        "members are sure to add their share",
        "2 of 7 may lie, 5 must reply",
    ):
        assert promise in told


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["collector.groups=1"], "their sum only"),
        (["collector.groups=3"], "needs at least 5 inputs a round and gets 3"),
        (["collector.groups=40"], "cannot hide"),
        (["collector.metrics=[train_loss]"], "seen without noise"),
        (["clip=none"], "without a bound is hidden by no noise"),
        (["quarantine=strikes"], "quarantine"),
    ],
    ids=["one sum", "few groups", "many groups", "metrics", "no clip", "quarantine"],
)
def test_a_part_that_does_not_go_with_the_others_is_named(changed, said):
    with pytest.raises(ConfigError, match=said):
        composed(Assembly(compose([PRESET, *changed])), 100)


@pytest.mark.parametrize("attack", ["alie", "ipm", "mimic", "min_max", "min_sum"])
def test_attackers_that_know_what_masks_hide_are_refused(attack):
    with pytest.raises(ConfigError, match="nobody sees under masks"):
        composed(Assembly(compose([PRESET, f"attack={attack}"])), 100)


# ---- liars ----


@pytest.mark.parametrize("attack", ["scaling", "nan", "label_flip"])
def test_two_that_lie_and_run_the_clients_code_are_clipped_and_borne(tmp_path, attack):
    _, summary, _ = run(tmp_path, *SMALL, f"attack={attack}", TWO)
    assert summary["rejections"] == {}
    assert not any(row["void"] for row in summary["history"])
    assert summary["final"]["accuracy"] > 0.6


def modified(monkeypatch, liars: frozenset[int], vector) -> list[str]:
    """Clients whose code puts a vector of its own choice behind its masks; refusals of sums, as they come."""
    encode, decode = IntegerNoise.encode, IntegerNoise.decode
    refused: list[str] = []

    def lying(stage, update, context):
        if context.client not in liars:
            return encode(stage, update, context)
        size = update.delta.layout.size
        forged = np.asarray(vector(size, context.settings), np.float32)
        return update.with_section(DELTA, Section(forged, update.delta.layout))

    def noting(stage, update):
        try:
            return decode(stage, update)
        except Refused as error:
            refused.append(error.reason)
            raise

    monkeypatch.setattr(IntegerNoise, "encode", lying)
    monkeypatch.setattr(IntegerNoise, "decode", noting)
    return refused


def test_two_that_fill_the_ring_are_noticed_and_cost_their_groups_alone(tmp_path, monkeypatch):
    refused = modified(monkeypatch, frozenset({3, 21}), lambda size, _: np.full(size, LARGEST // 3))
    _, summary, _ = run(tmp_path, *SMALL)
    assert set(refused) == {"too_large"}
    assert 2 <= len(refused) <= 4  # one group a round, where both are in it, or two
    assert not any(row["void"] for row in summary["history"])
    assert summary["final"]["accuracy"] > 0.6


def test_a_lie_that_is_as_long_as_an_honest_sum_passes_and_the_rule_bears_it(tmp_path, monkeypatch):
    """All of the length that clips allow a group of three, in one direction, from each of two."""

    def far(size, settings):
        return np.full(size, np.rint(2 * settings["norm"] / math.sqrt(size)))

    refused = modified(monkeypatch, frozenset({3, 21}), far)
    _, summary, _ = run(tmp_path, *SMALL)
    assert refused == []
    assert summary["final"]["accuracy"] > 0.6


@pytest.mark.slow
def test_the_preset_learns_at_its_own_budget_though_two_lie(tmp_path):
    _, summary, _ = run(
        tmp_path,
        PRESET,
        "task=mnist",
        "num_clients=100",
        "attack=sign_flip",
        "attack.fraction=0.02",
    )
    assert summary["privacy"]["epsilon"] <= 24
    assert summary["final"]["accuracy"] > 0.8


# ---- the presets of asynchronous rounds ----


def claimed(*overrides: str, clients: int = 100):
    return composed(Assembly(compose(overrides)), clients)


def test_everything_at_once_keeps_what_each_part_promises():
    claim = claimed("experiment=all").claim
    assert (claim.visibility, claim.groups, claim.sessions) == (Visibility.GROUP, 5, 5)
    assert claim.private == "distributed noise"
    assert (claim.sampling, claim.rate) == ("uncontrolled", None)
    assert claim.support == "per_version"
    assert (claim.members, claim.honest) == (14, 8)
    assert claim.clear == frozenset()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["compression=top_k"], "few coordinates would travel as all of them"),
        (["combiner=median"], "clients send different coordinates"),
        (["sampler=poisson"], "no round whose coins could be thrown"),
        (["scheduler.cohort=2"], "cannot hide"),
        (["scheduler.buffer=8"], "there are 100 in all"),
    ],
    ids=["own coordinates", "by coordinate", "coins", "too few to hide", "too few clients"],
)
def test_what_does_not_go_with_everything_at_once_is_refused_with_its_reason(changed, said):
    with pytest.raises(ConfigError, match=said):
        claimed("experiment=all", *changed)


def test_codings_of_single_updates_are_refused_under_masks():
    with pytest.raises(ConfigError, match="bytes can't be summed under a mask"):
        claimed("collector=masked", "compression=quantize")


def test_the_asynchronous_robust_preset_promises_examples_and_bears_two_of_ten():
    strategy = claimed("experiment=async_compressed_robust", clients=20)
    claim = strategy.claim
    assert (claim.visibility, claim.cohort, claim.staleness) == (Visibility.EACH, 10, 10)
    assert (claim.support, claim.packed) == ("per_client", "sparse")
    assert claim.clear == frozenset()
    assert strategy.pipeline.combiner.promise(10) == (
        "nearest-neighbour mixing, then the trimmed mean: 2 of 10 may lie, 5 must reply"
    )


def test_its_rule_needs_the_mixing_to_work_on_coordinates_of_each_clients_own():
    with pytest.raises(ConfigError, match="clients send different coordinates"):
        claimed("experiment=async_compressed_robust", "combiner=trimmed_mean", clients=20)
