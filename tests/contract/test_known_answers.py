"""The known answers of docs/architecture.md, section 3, as far as the present parts can give them.

A part that is not built yet (top-k) stands here as the few lines of its contract.
"""

from dataclasses import replace

import pytest

from strategies import presets
from strategies.admission import Admission
from strategies.collectors import Masked, Plain
from strategies.combiners import (
    Bucketing,
    Bulyan,
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBounding,
    TrimmedMean,
)
from strategies.contract import Claim, ContractError, Visibility, check
from strategies.detection import Quarantine
from strategies.pipeline import Pipeline
from strategies.privacy import Central
from strategies.samplers import Poisson, Spaced, Uniform
from strategies.server_models import SGD, Scaffold
from strategies.stages import Clip
from strategies.update import BUFFERS, CONTROL, COUNTERS, DELTA

BOTH = frozenset({DELTA, CONTROL})


BARE = Plain(metrics=False)
CENTRAL = Central(noise_multiplier=1.0)


def masked(groups: int = 1, **settings: object) -> Masked:
    """Sums of vectors and nothing beside; no group is too small to hide its members."""
    return Masked(groups=groups, metrics=(), **settings)


class TopK:
    def check(self, claim: Claim) -> Claim:
        claim.need_client_half(self)
        return claim.given(self, support="per_client", bounds={})


SAMPLER = Uniform(fraction=0.1, population=200)
ALL = Uniform(population=200)
UNIFORM = Mean(weighting="uniform", denominator="cohort")


def fold(*parts, sections: frozenset[str] = frozenset({DELTA})) -> Claim:
    return check(parts, Claim(sections=sections))


def clash(*parts, sections: frozenset[str] = frozenset({DELTA})) -> tuple[str, str]:
    with pytest.raises(ContractError) as caught:
        fold(*parts, sections=sections)
    assert caught.value.why
    assert caught.value.instead
    return caught.value.first, caught.value.second


COINS = Poisson(fraction=0.1, population=200)
"""Each client with its own coin: one more or less changes the cohort by one."""


def test_the_sensitivity_of_the_uniform_mean_is_c_over_the_planned_cohort():
    assert fold(COINS, masked(), Clip(norm=0.5), UNIFORM).sensitivity == 0.5 / 20


def test_a_cohort_of_fixed_size_can_only_replace_a_client_which_costs_twice_as_much():
    assert fold(SAMPLER, masked(), Clip(norm=0.5), UNIFORM).sensitivity == 2 * 0.5 / 20


def test_a_section_that_is_reduced_by_its_maximum_has_no_sensitivity_clipped_or_not():
    both = Clip(norm=0.5, sections=(DELTA, COUNTERS))
    sections = frozenset({DELTA, COUNTERS})
    assert fold(COINS, BARE, both, UNIFORM, sections=sections).sensitivity is None


def test_every_section_must_be_clipped_for_a_sensitivity():
    parts = (SAMPLER, masked(), Clip(norm=3.0), UNIFORM)
    assert fold(*parts, sections=BOTH).sensitivity is None
    both = Clip(norm=3.0, sections=(DELTA, CONTROL))
    clipped = fold(SAMPLER, masked(), both, UNIFORM, sections=BOTH)
    assert clipped.sensitivity == pytest.approx(2 * 3.0 * 2**0.5 / 20)


@pytest.mark.parametrize(
    ("parts", "first"),
    [
        ((SAMPLER, masked(), UNIFORM), "Mean"),
        ((SAMPLER, masked(max_weight=1000), Clip(), Mean()), "Mean"),
        ((Uniform(), masked(), Clip(), UNIFORM), "Mean"),
        ((SAMPLER, BARE, Clip(), TopK(), UNIFORM), "Mean"),
    ],
    ids=["nothing clipped", "weighted by examples", "no planned cohort", "a stage lost the bound"],
)
def test_central_noise_after_a_rule_without_sensitivity_is_refused(parts, first):
    assert clash(*parts, CENTRAL) == (first, "privacy=central")


def test_central_noise_is_scaled_to_the_sensitivity():
    """Twice over a cohort of fixed size, whose neighbours are twice as far apart: so z is halved in the account."""
    for sampler, z in ((COINS, 3.0), (SAMPLER, 1.5)):
        mechanism = Central(noise_multiplier=3.0)
        fold(sampler, BARE, Clip(norm=2.0), UNIFORM, mechanism)
        assert mechanism.deviations({DELTA: 2.0})[DELTA] == pytest.approx(3.0 * 2.0 / 20, rel=1e-5)
        assert mechanism.next_release().noise_multiplier == z


def test_krum_has_no_sensitivity_so_noise_after_it_is_refused():
    parts = (SAMPLER, masked(groups=6), Clip(), Krum(f=1))
    assert clash(*parts, CENTRAL) == ("Krum", "privacy=central")


ROBUST = [
    Krum(), MultiKrum(), Bulyan(), Median(), TrimmedMean(), GeometricMedian(), CenteredClipping(), NormBounding(),
    FLTrust(), NearestNeighborMixing(), NearestNeighborMixing(rule=CenteredClipping(tau=1)), Bucketing(),
]  # fmt: skip


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: type(rule).__name__)
def test_what_robust_rules_state_and_what_they_refuse(rule):
    rooted = Claim(root=True)
    claim = check((SAMPLER, Plain(), Clip(), rule), rooted)
    assert (claim.weighting, claim.sensitivity) == ("uniform", None)
    with pytest.raises(ContractError, match="the server sees their sum only"):
        check((SAMPLER, masked(), rule), rooted)
    with pytest.raises(ContractError, match="one client can move the combined vector"):
        check((ALL, masked(groups=20), Clip(), rule, CENTRAL), rooted)
    with pytest.raises(ContractError, match="nothing fixes the cohort's size"):
        check((Uniform(), Plain(), rule), rooted)
    check((Uniform(), Plain(), replace(rule, f=1)), rooted)


@pytest.mark.parametrize("rule", [CenteredClipping, NormBounding])
def test_a_mean_of_clipped_updates_has_the_sensitivity_of_its_bound(rule):
    bound = {"tau" if rule is CenteredClipping else "bound": 0.5}
    fixed = rule(**bound, denominator="cohort")
    assert fold(COINS, Plain(), fixed).sensitivity == 0.5 / 20
    assert fold(SAMPLER, Plain(), fixed).sensitivity == 2 * 0.5 / 20
    assert fold(SAMPLER, Plain(), rule(**bound)).sensitivity is None
    assert fold(SAMPLER, Plain(), rule(denominator="cohort")).sensitivity is None
    counted = frozenset({DELTA, COUNTERS})
    assert fold(SAMPLER, Plain(), fixed, sections=counted).sensitivity is None
    # One client moves the whole of its group's clipped sum.
    assert fold(SAMPLER, masked(groups=5), fixed).sensitivity is None


def test_zeros_lie_as_far_from_a_centre_as_it_is_long():
    """Where neighbours differ in an update's being there or zeros, centred clipping is moved by two bounds."""
    spaced = Spaced(participations=2, separation=2, population=100, fraction=0.2)
    clipped = CenteredClipping(tau=0.5, denominator="cohort")
    assert fold(spaced, Plain(), clipped).sensitivity == 2 * 0.5 / 20
    bounded = NormBounding(bound=0.5, denominator="cohort")
    assert fold(spaced, Plain(), bounded).sensitivity == 0.5 / 20


@pytest.mark.parametrize("rule", [CenteredClipping, NormBounding])
def test_a_fixed_denominator_is_no_reason_for_a_void_round(rule):
    """Whether there is an output at all would depend on one client, which no sensitivity says."""
    assert rule(f=3, denominator="cohort").least_inputs(20) == 1
    assert rule(f=3).least_inputs(20) == 7
    with pytest.raises(ValueError, match="no sensitivity, and no cohort to be divided by"):
        Bucketing(rule=rule(denominator="cohort"))


def test_fltrust_has_no_control_variate_to_hold_clients_against():
    rooted = Claim(root=True, sections=BOTH)
    for rule in (FLTrust(), NearestNeighborMixing(rule=FLTrust())):
        with pytest.raises(ContractError, match="no section control to hold the clients' against"):
            check((SAMPLER, Plain(), rule), rooted)


def test_several_steps_of_centred_clipping_have_no_sensitivity():
    steps = CenteredClipping(tau=0.5, denominator="cohort", iterations=2)
    assert fold(SAMPLER, Plain(), steps).sensitivity is None


def test_fltrust_needs_root_data():
    assert clash(SAMPLER, Plain(), FLTrust()) == ("the pipeline's default", "FLTrust")
    wrapped = NearestNeighborMixing(rule=FLTrust())
    assert clash(SAMPLER, Plain(), wrapped)[1] == "nearest-neighbour mixing"


@pytest.mark.parametrize(
    ("rule", "enough"),
    [
        (Krum(f=2), 7), (MultiKrum(f=2), 7), (MultiKrum(f=2, keep=8), 10), (Bulyan(f=2), 11), (Median(f=2), 5),
        (TrimmedMean(f=2), 5), (GeometricMedian(f=2), 5), (CenteredClipping(f=2), 5), (NormBounding(f=2), 5),
        (NearestNeighborMixing(f=2), 5), (NearestNeighborMixing(f=2, rule=Krum()), 7), (Bucketing(f=2), 9),
        (Bucketing(f=2, size=3, rule=Krum()), 19),
    ],
    ids=repr,
)  # fmt: skip
def test_each_rules_condition_holds_to_the_client(rule, enough):
    fold(Uniform(population=enough), Plain(), rule)
    assert clash(Uniform(population=enough - 1), Plain(), rule) == ("Uniform", rule.label)
    fold(ALL, masked(groups=enough), rule)
    clash(ALL, masked(groups=enough - 1), rule)


def test_robust_rules_work_on_single_updates_and_on_group_sums_and_never_on_one_sum():
    fold(SAMPLER, Plain(), Krum(f=8))
    fold(ALL, masked(groups=7), Krum(f=2))
    assert clash(SAMPLER, masked(), Krum()) == ("collector masked", "Krum")


def test_krums_condition_is_on_groups_where_groups_are_all_that_is_seen():
    assert clash(SAMPLER, masked(groups=6), Krum(f=2)) == ("collector masked", "Krum")
    assert clash(SAMPLER, Plain(), Krum(f=9)) == ("Uniform", "Krum")


def test_coordinate_wise_rules_need_clients_to_speak_of_the_same_coordinates():
    for rule in (Median(), TrimmedMean(), Bulyan(), Bucketing()):
        assert clash(SAMPLER, Plain(), TopK(), rule) == ("TopK", rule.label)
    # Behind the mixing any two rows have most updates in common, so most coordinates.
    fold(SAMPLER, Plain(), TopK(), NearestNeighborMixing(rule=TrimmedMean()))
    fold(SAMPLER, Plain(), TopK(), Krum())
    fold(SAMPLER, Plain(), TopK(), Mean())


def test_under_masks_and_noise_nothing_travels_in_clear():
    assert clash(SAMPLER, Plain(), Clip(), UNIFORM, CENTRAL) == (
        "collector plain",
        "privacy=central",
    )
    for section in (BUFFERS, COUNTERS):
        sections = frozenset({DELTA, section})
        clipped = Clip(sections=(DELTA, section))
        for parts in ((masked(), clipped, UNIFORM), (BARE, clipped, UNIFORM, CENTRAL)):
            with pytest.raises(ContractError, match="use GroupNorm instead of BatchNorm"):
                fold(COINS, *parts, sections=sections)


def test_under_a_central_epsilon_no_unreleased_update_decides_who_is_asked():
    fold(SAMPLER, BARE, Clip(), UNIFORM, CENTRAL)
    parts = (SAMPLER, BARE, Clip(), Quarantine(), UNIFORM, CENTRAL)
    assert clash(*parts) == ("quarantine", "privacy=central")
    with pytest.raises(ContractError, match="use quarantine=none under a central ε"):
        fold(*parts)


def test_a_sum_of_several_names_nobody():
    assert clash(ALL, masked(groups=10), Quarantine()) == ("collector masked", "quarantine")
    assert clash(SAMPLER, masked(), Quarantine()) == ("collector masked", "quarantine")
    assert Pipeline(sampler=SAMPLER, quarantine=Quarantine()).check().watched
    assert not Pipeline(sampler=SAMPLER).check().watched
    assert refused(sampler=Uniform(population=4), quarantine=Quarantine()) == (
        "Uniform",
        "quarantine",
    )


def test_what_masks_have_hidden_no_later_part_can_see_again():
    assert clash(SAMPLER, masked(), Plain()) == ("collector masked", "collector plain")


@pytest.mark.parametrize("part", [Clip(), TopK(), masked()], ids=["clip", "top-k", "masks"])
def test_vanilla_clients_have_no_half_of_any_part(part):
    parts = (SAMPLER, Plain(vanilla=True), part)
    assert clash(*parts) == ("collector plain", getattr(part, "label", type(part).__name__))


def refused(**parts: object) -> tuple[str, str]:
    with pytest.raises(ContractError) as caught:
        Pipeline(**parts).check()
    return caught.value.first, caught.value.second


SCAFFOLD = {"optimizer": Scaffold(), "combiner": Mean(weighting="uniform"), "client_sections": BOTH}


def test_scaffold_composes_with_its_own_clients_and_a_uniform_mean():
    assert Pipeline(**SCAFFOLD).check().sections == BOTH
    assert presets.scaffold(population=5).claim.weighting == "uniform"


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"client_sections": frozenset({DELTA})}, "the clients' trainer"),
        ({"combiner": Mean()}, "Mean"),
        ({"combiner": UNIFORM}, "Mean"),
        ({"collector": Plain(vanilla=True)}, "collector plain"),
    ],
    ids=["clients without control", "weighted by examples", "fixed denominator", "vanilla clients"],
)
def test_scaffold_is_refused_with_anything_else(change, first):
    assert refused(**{**SCAFFOLD, **change}) == (first, "SCAFFOLD's server")


def test_scaffolds_clients_are_refused_by_a_server_that_does_not_read_their_control():
    assert refused(**{**SCAFFOLD, "optimizer": SGD()}) == ("the clients' trainer", "server SGD")


def test_a_quorum_above_the_cohort_is_refused():
    admission = Admission(quorum=21)
    assert refused(sampler=SAMPLER, admission=admission) == ("Uniform", "admission")
    Pipeline(sampler=SAMPLER, admission=replace_quorum(admission, 20)).check()
    Pipeline(sampler=Uniform(), admission=admission).check()


def replace_quorum(admission: Admission, quorum: int) -> Admission:
    return replace(admission, quorum=quorum)


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]
)
def test_the_named_strategies_show_each_update_and_promise_no_sensitivity(name):
    claim = getattr(presets, name)().claim
    assert claim.visibility is Visibility.EACH
    assert claim.sensitivity is None
    assert not claim.client_half
