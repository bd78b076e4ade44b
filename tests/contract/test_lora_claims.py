"""What adapters and parts of a model refuse, in which name, against whom, and with which mend."""

from dataclasses import replace

import pytest

from strategies.collectors import Masked, Plain
from strategies.combiners import (
    Bucketing,
    Bulyan,
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    LoraFedEx,
    LoraMean,
    LoraPartitioned,
    LoraStack,
    LoraSvd,
    LoraZeroPad,
    MajorityVote,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBounding,
    TrimmedMean,
)
from strategies.contract import Claim, ContractError, check, name_of
from strategies.privacy import Central
from strategies.samplers import Poisson, Uniform
from strategies.schedulers import Buffered
from strategies.server_models import SGD, Adagrad, Adam, Yogi
from strategies.stages import Clip
from strategies.update import CONTROL, DELTA

MODEL, RANKS = "the model's adapters", "the clients' ranks"
BOTH = Claim(factors="both", root=True, set_by={"factors": MODEL})
UNEQUAL = replace(BOTH, parts=True, set_by={"factors": MODEL, "parts": RANKS})
SHARED = replace(BOTH, factors="shared_a")
SHARED_UNEQUAL = replace(UNEQUAL, factors="shared_a")
SAMPLER, COINS = Uniform(population=9), Poisson(fraction=0.5, population=18)
MASKED, BARE = Masked(max_weight=1000), Plain(metrics=False)
OVER_COHORT = LoraMean(weighting="uniform", denominator="cohort")
PRODUCTS = [LoraZeroPad(), LoraSvd(), LoraPartitioned(), LoraStack(), LoraFedEx()]
BY_COORDINATE = [Median(), TrimmedMean(), MajorityVote()]
BY_DISTANCE = [
    Krum(), MultiKrum(), GeometricMedian(), CenteredClipping(), NormBounding(), FLTrust(), NearestNeighborMixing(),
    Bucketing(), Bulyan(),
]  # fmt: skip
products = pytest.mark.parametrize("rule", PRODUCTS, ids=lambda rule: type(rule).__name__)


def clash(claim: Claim, *parts) -> tuple[str, str, str]:
    """Who promised, who refuses, and the mend."""
    with pytest.raises(ContractError) as caught:
        check(parts, claim)
    assert caught.value.why
    return caught.value.first, caught.value.second, caught.value.instead


@pytest.mark.parametrize("rule", [LoraMean(), *PRODUCTS], ids=lambda rule: type(rule).__name__)
def test_a_model_without_adapters_has_nothing_for_these_rules(rule):
    first, second, instead = clash(replace(BOTH, factors=None), SAMPLER, Plain(), rule)
    assert (first, second) == (MODEL, type(rule).__name__)
    assert instead.startswith("use combiner=mean")


def test_a_plain_mean_dilutes_what_few_train():
    for claim in (UNEQUAL, SHARED_UNEQUAL):
        first, second, instead = clash(claim, SAMPLER, Plain(), Mean())
        assert (first, second) == (RANKS, "Mean")
        assert "combiner=lora_mean" in instead
    check((SAMPLER, Plain(), Mean()), BOTH)


def test_a_sum_does_not_tell_who_trained_what():
    for claim in (UNEQUAL, SHARED_UNEQUAL):
        first, second, instead = clash(claim, SAMPLER, MASKED, LoraMean())
        assert (first, second) == (name_of(MASKED), "LoraMean")
        assert "collector=plain" in instead
    for claim in (BOTH, SHARED):
        check((SAMPLER, MASKED, LoraMean()), claim)
    first, second, instead = clash(BOTH, SAMPLER, MASKED, LoraMean(by_head=True))
    assert (first, second) == (name_of(MASKED), "LoraMean")
    assert "by_head=false" in instead


@products
def test_products_need_each_clients_own_factors(rule):
    for claim in (BOTH, UNEQUAL):
        first, second, instead = clash(claim, SAMPLER, MASKED, rule)
        assert (first, second) == (name_of(MASKED), type(rule).__name__)
        assert "share_a=true" in instead
        assert check((SAMPLER, Plain(), rule), claim).replaced


@products
def test_products_have_no_use_for_a_shared_a(rule):
    first, second, instead = clash(SHARED, SAMPLER, Plain(), rule)
    assert (first, second) == (MODEL, type(rule).__name__)
    assert instead == "use combiner=lora_mean"


@products
def test_products_start_from_the_present_model(rule):
    scheduler = Buffered(buffer=3)
    first, second, instead = clash(BOTH, SAMPLER, scheduler, Plain(), rule)
    assert (first, second) == ("scheduler=buffered", type(rule).__name__)
    assert "scheduler=synchronous" in instead
    assert check((SAMPLER, scheduler, Plain(), LoraMean()), UNEQUAL).staleness is not None


@products
def test_only_a_step_of_one_goes_to_the_point(rule):
    for optimizer in (SGD(lr=0.5), SGD(momentum=0.9), Adam(), Adagrad(), Yogi()):
        first, second, instead = clash(BOTH, SAMPLER, Plain(), rule, optimizer)
        assert (first, second) == (type(rule).__name__, optimizer.label)
        assert instead == "use server=sgd with server.lr=1 and server.momentum=0"
    check((SAMPLER, Plain(), rule, SGD()), BOTH)
    check((SAMPLER, Plain(), LoraMean(), Adam()), UNEQUAL)


@products
def test_products_have_no_sensitivity_whatever_is_clipped(rule):
    uniform = replace(rule, weighting="uniform")
    first, second, _ = clash(BOTH, COINS, BARE, Clip(), uniform, Central(noise_multiplier=1.0))
    assert (first, second) == (type(rule).__name__, "privacy=central")


def test_the_mean_over_the_cohort_has_the_sensitivity_of_the_clip():
    for claim in (BOTH, SHARED, SHARED_UNEQUAL):
        found = check((COINS, BARE, Clip(norm=0.5), OVER_COHORT), claim)
        assert found.sensitivity == 0.5 / 9
        assert found.denominator == "cohort"
        check((COINS, BARE, Clip(), OVER_COHORT, Central(noise_multiplier=1.0), Adam()), claim)
        masked = Masked(metrics=())
        check((COINS, masked, Clip(), OVER_COHORT, Central(noise_multiplier=1.0)), claim)


def test_over_the_cohort_factors_of_unequal_ranks_would_shrink_twice():
    first, second, instead = clash(UNEQUAL, COINS, BARE, Clip(), OVER_COHORT)
    assert (first, second) == (RANKS, "LoraMean")
    assert "share_a=true" in instead


def test_means_over_those_who_reply_or_by_task_have_no_sensitivity():
    for rule in (LoraMean(weighting="uniform"), LoraMean(weighting="uniform", by_head=True)):
        for claim in (BOTH, UNEQUAL):
            assert check((COINS, BARE, Clip(), rule), claim).sensitivity is None


@pytest.mark.parametrize("rule", [LoraMean(), *PRODUCTS], ids=lambda rule: type(rule).__name__)
def test_who_tells_no_weight_can_be_weighted_alike_only(rule):
    first, second, instead = clash(BOTH, SAMPLER, BARE, rule)
    assert (first, second) == (name_of(BARE), type(rule).__name__)
    assert instead == "set combiner.weighting=uniform"
    check((SAMPLER, BARE, replace(rule, weighting="uniform")), BOTH)


@pytest.mark.parametrize("rule", [LoraMean(), *PRODUCTS], ids=lambda rule: type(rule).__name__)
def test_a_control_variate_has_no_parts_and_no_product(rule):
    both = replace(UNEQUAL, sections=frozenset({DELTA, CONTROL}))
    _, second, instead = clash(both, SAMPLER, Plain(), rule)
    assert second == type(rule).__name__
    assert "client=sgd" in instead


@pytest.mark.parametrize("rule", BY_COORDINATE + BY_DISTANCE, ids=lambda rule: type(rule).__name__)
def test_zeros_of_those_who_have_nothing_are_not_judged(rule):
    for claim in (UNEQUAL, SHARED_UNEQUAL, replace(UNEQUAL, factors=None)):
        first, second, instead = clash(claim, SAMPLER, Plain(), rule)
        assert (first, second) == (RANKS, rule.label)
        assert "combiner=lora_mean" in instead


@pytest.mark.parametrize("rule", BY_DISTANCE, ids=lambda rule: type(rule).__name__)
def test_distances_need_a_shared_a(rule):
    first, second, instead = clash(BOTH, SAMPLER, Plain(), rule)
    assert (first, second) == (MODEL, rule.label)
    assert "model.share_a=true" in instead
    check((SAMPLER, Plain(), rule), SHARED)


@pytest.mark.parametrize("rule", BY_COORDINATE, ids=lambda rule: type(rule).__name__)
def test_what_works_by_coordinate_takes_both_factors(rule):
    check((SAMPLER, Plain(), rule), BOTH)
