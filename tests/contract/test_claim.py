"""A claim, whatever parts fold it: what is seen never widens, and a refusal says who, why and what instead."""

import math
from dataclasses import fields
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.contract import Claim, ContractError, Visibility, check, name_of
from strategies.update import DELTA

VALUES = {
    "visibility": st.sampled_from(Visibility),
    "groups": st.none() | st.integers(1, 100),
    "cohort": st.none() | st.integers(1, 1000),
    "sampling": st.sampled_from(["poisson", "fixed", "uncontrolled"]),
    "rate": st.none() | st.floats(0, 1),
    "participations": st.none() | st.integers(1, 100),
    "separation": st.integers(1, 100),
    "weighting": st.sampled_from(["uniform", "examples"]),
    "summed": st.sampled_from([None, "uniform", "examples"]),
    "members": st.none() | st.integers(1, 1000),
    "honest": st.none() | st.integers(1, 1000),
    "denominator": st.sampled_from(["replies", "cohort"]),
    "sections": st.frozensets(st.sampled_from([DELTA, "control", "buffers"]), min_size=1),
    "bounds": st.dictionaries(st.sampled_from([DELTA, "control", "buffers"]), st.floats(1e-6, 1e6)),
    "sensitivity": st.none() | st.floats(1e-9, 1e6),
    "adaptive": st.booleans(),
    "private": st.none() | st.just("noise shares"),
    "support": st.sampled_from(["shared", "per_version", "per_client"]),
    "clear": st.frozensets(st.sampled_from(["num-examples", "metrics"])),
    "metrics": st.frozensets(st.sampled_from(["train_loss"])),
    "whole": st.booleans(),
    "packed": st.none() | st.just("compression=top_k"),
    "sessions": st.integers(1, 100),
    "staleness": st.none() | st.integers(0, 100),
    "client_half": st.booleans(),
    "root": st.booleans(),
    "watched": st.booleans(),
    "measured": st.booleans(),
    "quorum": st.integers(1, 1000),
    "factors": st.sampled_from([None, "both", "shared_a"]),
    "parts": st.booleans(),
    "replaced": st.booleans(),
    "served": st.sampled_from([None, "each", "shared"]),
    "blind": st.booleans(),
}
changes = st.fixed_dictionaries({}, optional=VALUES)
claims = st.builds(Claim, **VALUES)


class Part:
    """States what it is told to."""

    def __init__(self, label: str, **states: object) -> None:
        self.label, self.states = label, states

    def check(self, claim: Claim) -> Claim:
        return claim.given(self, **self.states)


def refusal(call, *arguments, **keywords) -> ContractError:
    with pytest.raises(ContractError) as caught:
        call(*arguments, **keywords)
    error = caught.value
    assert all((error.first, error.second, error.why, error.instead))
    assert str(error) == (
        f"{error.second} cannot be composed with {error.first}: {error.why}; {error.instead}"
    )
    return error


def test_every_property_of_a_claim_is_tried_here():
    assert set(VALUES) == {item.name for item in fields(Claim)} - {"set_by"}


@given(st.lists(changes, max_size=8))
def test_what_the_server_sees_never_widens_whatever_parts_follow(states):
    parts = [Part(f"part {index}", **state) for index, state in enumerate(states)]
    claim = Claim()
    for part in parts:
        if part.states.get("visibility", claim.visibility) > claim.visibility:
            assert refusal(part.check, claim).second == part.label
            continue
        after = part.check(claim)
        assert after.visibility <= claim.visibility
        claim = after


@given(claims, changes)
def test_a_part_changes_what_it_states_and_is_remembered_for_it(claim, states):
    states.pop("visibility", None)
    after = Part("the part", **states).check(claim)
    for name in VALUES:
        assert getattr(after, name) == states.get(name, getattr(claim, name))
    assert after.set_by == {**claim.set_by, **dict.fromkeys(states, "the part")}


@given(st.lists(changes, max_size=6))
def test_each_property_is_laid_to_the_last_part_that_set_it(states):
    for state in states:
        state.pop("visibility", None)
    parts = [Part(f"part {index}", **state) for index, state in enumerate(states)]
    claim = check(parts)
    for name in VALUES:
        setters = [part.label for part in parts if name in part.states]
        assert claim.source(name) == (setters[-1] if setters else "the pipeline's default")


@given(claims)
def test_a_fold_through_nothing_is_the_claim_itself(claim):
    assert check([], claim) is claim


def test_a_fold_begins_from_a_claim_that_promises_nothing():
    claim = check([])
    assert claim == Claim()
    assert (claim.visibility, claim.sensitivity, claim.cohort) == (Visibility.EACH, None, None)
    assert (claim.sampling, claim.bounds, claim.private) == ("uncontrolled", {}, None)


def test_the_first_of_several_properties_that_anyone_set_names_the_source():
    claim = check([Part("sampler", cohort=5)])
    assert claim.source("groups", "cohort") == "sampler"
    assert claim.source("groups") == "the pipeline's default"


def test_a_claim_has_no_properties_of_ones_own():
    with pytest.raises(TypeError, match="secrecy"):
        Part("part", secrecy=True).check(Claim())
    with pytest.raises(ValueError, match=r"a claim has no property \['secrecy'\]"):
        Claim(set_by={"secrecy": "part"})


@given(claims)
def test_a_joint_bound_is_the_root_sum_of_squares_and_needs_every_section(claim):
    bound = claim.l2_bound()
    if not claim.sections <= set(claim.bounds):
        assert bound is None
        return
    assert bound == pytest.approx(math.hypot(*(claim.bounds[name] for name in claim.sections)))
    assert bound >= max(claim.bounds[name] for name in claim.sections)


def test_widening_what_is_seen_is_refused_in_both_parts_names():
    claim = check([Part("masks", visibility=Visibility.SUM)])
    error = refusal(Part("plain", visibility=Visibility.EACH).check, claim)
    assert (error.first, error.second) == ("masks", "plain")
    assert "the server sees SUM of the updates" in error.why


@given(claims, st.sampled_from(Visibility))
def test_a_part_that_must_see_more_is_refused(claim, least):
    arguments = {"why": "distances need single updates", "instead": "use combiner=mean"}
    if claim.visibility >= least:
        claim.need_visibility("Krum", least, **arguments)
    else:
        error = refusal(claim.need_visibility, "Krum", least, **arguments)
        assert (error.why, error.instead) == tuple(arguments.values())


@given(claims, st.integers(1, 200), st.integers(0, 50))
def test_a_rule_is_refused_when_it_gets_too_few_inputs(claim, least, f):
    inputs = claim.groups if claim.visibility is Visibility.GROUP else claim.cohort
    if inputs is None or inputs >= least:
        claim.need_groups("Krum", least, f=f, rule="Krum")
    else:
        error = refusal(claim.need_groups, "Krum", least, f=f, rule="Krum")
        assert (
            error.why
            == f"Krum with f = {f} needs at least {least} inputs a round and gets {inputs}"
        )


@given(claims)
def test_noise_needs_a_sensitivity_and_gets_it(claim):
    if claim.sensitivity is not None:
        assert claim.need_sensitivity("Gaussian") == claim.sensitivity
    else:
        error = refusal(claim.need_sensitivity, "Gaussian")
        assert "so no noise hides it" in error.why
        assert "combiner=cohort_mean" in error.instead


@given(claims)
def test_the_other_needs_are_refused_exactly_when_they_are_not_met(claim):
    needs = [
        (claim.support == "shared", claim.need_shared_support, ()),
        (not claim.clear, claim.need_nothing_in_clear, ()),
        (claim.client_half, claim.need_client_half, ()),
        (not claim.blind, partial(claim.need_model_sent, why="why", instead="instead"), ()),
    ]
    for met, need, arguments in needs:
        if met:
            need("part", *arguments)
        else:
            assert refusal(need, "part", *arguments).second == "part"


@given(claims, st.frozensets(st.sampled_from([DELTA, "control", "buffers", "other"])))
def test_a_section_that_nobody_sends_is_named(claim, names):
    missing = sorted(names - claim.sections)
    if not missing:
        claim.need_sections("part", names, instead="send it")
    else:
        error = refusal(claim.need_sections, "part", names, instead="send it")
        assert error.why == f"updates have no section {', '.join(missing)}"


def test_what_would_travel_in_clear_is_listed():
    claim = check([Part("plain", clear=frozenset({"num-examples", "metrics"}))])
    error = refusal(claim.need_nothing_in_clear, "masks")
    assert error.why.startswith("metrics, num-examples would travel in clear")
    assert (error.first, error.second) == ("plain", "masks")


def test_parts_are_named_by_their_label_else_their_class():
    class Nameless:
        pass

    assert name_of(Part("a label")) == "a label"
    assert name_of(Nameless()) == "Nameless"
    assert name_of("the sampler") == "the sampler"
