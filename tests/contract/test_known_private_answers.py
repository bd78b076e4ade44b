"""The known answers of docs/architecture.md, section 3, on privacy: where noise goes on, and what it may go on."""

import pytest

from strategies.collectors import Masked
from strategies.combiners import Mean, NormBounding
from strategies.contract import Claim, ContractError, check
from strategies.pipeline import Pipeline
from strategies.privacy import Distributed, Ftrl, Guarantee, Local
from strategies.samplers import Spaced, Uniform
from strategies.server_models import SGD
from strategies.stages import AdaptiveClip, Clip
from strategies.strategy import PipelineStrategy
from tests.contract.test_known_answers import (
    BARE,
    CENTRAL,
    COINS,
    ROBUST,
    SAMPLER,
    UNIFORM,
    clash,
    fold,
    masked,
    refused,
)

APART = Spaced(participations=4, separation=10, fraction=0.1, population=200)
FTRL = Ftrl(noise_multiplier=1.0, rounds=40)


def named(promise: Guarantee) -> str:
    return promise.label


@pytest.mark.parametrize("promise", [CENTRAL, FTRL, Local(noise_multiplier=1.0)], ids=named)
def test_sums_of_the_clients_metrics_are_seen_by_no_private_server(promise):
    collector = Masked(metrics=("train_loss",))
    behind = (Clip(), *promise.stages(Clip().bounds), UNIFORM)
    sampler = APART if promise is FTRL else COINS
    assert clash(sampler, collector, *behind, promise) == ("collector masked", promise.label)
    fold(sampler, masked(), *behind, promise)


def test_shared_noise_counts_on_masks_that_take_whole_numbers_as_they_are():
    assert shared(collector=BARE) == ("collector plain", "privacy=distributed")
    assert shared(collector=masked(max_weight=1000)) == ("collector masked", "privacy=distributed")
    assert shared(collector=masked()) == ("collector masked", "privacy=distributed")
    assert shared(sampler=Uniform()) == ("Uniform", "privacy=distributed")
    assert shared(stages=()) == ("the pipeline's default", "privacy=distributed")
    claim = shared()
    assert (claim.private, claim.whole) == ("distributed noise", True)


def shared(**parts: object) -> tuple[str, str] | Claim:
    """A pipeline with shared noise: what holds of it, or who refuses whom."""
    promise, clip = Distributed(noise_multiplier=1.0, size=100), Clip()
    stages = [clip, *promise.stages(clip.bounds)]
    given = {"sampler": COINS, "collector": masked(whole=True), "stages": stages} | parts
    try:
        return Pipeline(**given, combiner=UNIFORM, privacy=promise).check()
    except ContractError as error:
        return error.first, error.second


def test_integers_without_noise_of_integers_are_nothing():
    """Updates are fractions: a sum of whole numbers would be 0."""
    assert refused(collector=masked(whole=True), combiner=Mean(weighting="uniform")) == (
        "collector masked",
        "a pipeline without privacy=distributed",
    )


@pytest.mark.parametrize(
    "inner",
    [Local(noise_multiplier=1.0), Distributed(noise_multiplier=1.0, size=100)],
    ids=named,
)
def test_noise_is_paid_for_once(inner):
    """What members of a sum, or clients, have noised leaves the server nothing to hide, and no bound to hide it by."""
    collector = BARE if isinstance(inner, Local) else masked(whole=True)
    parts = (COINS, collector, Clip(), *inner.stages(Clip().bounds), UNIFORM)
    assert fold(*parts, inner).private == inner.mechanism
    assert clash(*parts, CENTRAL)[1] == "privacy=central"
    rule = NormBounding(bound=1.0, denominator="cohort")
    if isinstance(inner, Local):  # a rule with a bound of its own has a sensitivity all the same
        with pytest.raises(ContractError, match="noise would be paid for twice"):
            fold(*parts[:-1], rule, CENTRAL)


def test_correlated_noise_needs_clients_that_come_seldom_and_a_clip_that_stays():
    fold(APART, BARE, Clip(), UNIFORM, FTRL)
    for sampler in (COINS, SAMPLER):
        with pytest.raises(ContractError, match=r"use sampler=spaced"):
            fold(sampler, BARE, Clip(), UNIFORM, FTRL)
    with pytest.raises(ContractError, match="which a moving bound forbids; use clip=fixed"):
        fold(APART, BARE, AdaptiveClip(), UNIFORM, FTRL)
    wide = Ftrl(noise_multiplier=1.0, rounds=40, bands=11)
    with pytest.raises(ContractError, match=r"set privacy\.bands=10 at most"):
        fold(APART, BARE, Clip(), UNIFORM, wide)


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: type(rule).__name__)
def test_any_rule_may_follow_local_noise_and_none_without_sensitivity_may_come_before_central(rule):
    rooted, local = Claim(root=True), Local(noise_multiplier=1.0)
    parts = (SAMPLER, BARE, Clip(), *local.stages(Clip().bounds), rule)
    assert check((*parts, local), rooted).private == "local gaussian"
    with pytest.raises(ContractError, match="one client can move the combined vector"):
        check((SAMPLER, BARE, Clip(), rule, CENTRAL), rooted)


@pytest.mark.parametrize(
    "promise",
    [
        CENTRAL,
        FTRL,
        Local(noise_multiplier=1.0),
        Distributed(noise_multiplier=1.0, size=100),
    ],
    ids=named,
)
def test_no_private_clients_are_asked_how_the_model_does_on_their_examples(promise):
    clip = Clip()
    pipeline = Pipeline(
        sampler=APART if promise is FTRL else COINS,
        collector=masked(whole=True) if isinstance(promise, Distributed) else BARE,
        stages=[clip, *promise.stages(clip.bounds)],
        combiner=UNIFORM,
        privacy=promise,
        optimizer=SGD(),
    )
    PipelineStrategy(pipeline, federated_every=0)
    with pytest.raises(ContractError, match=r"set evaluate\.federated_every=0"):
        PipelineStrategy(pipeline, federated_every=1)
