"""No vector leaves the ring or float32, the release is the same in every round, and noise is what z says."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from strategies.privacy.lattice import renyi
from strategies.privacy.steps import Steps
from strategies.update import CLIP_BIT, CONTROL, DELTA

noises = st.sampled_from(["discrete_gaussian", "skellam"])
relations = st.sampled_from(["add_or_remove_one", "replace_one"])


def steps(**changes) -> Steps:
    plain = {
        "noise": "discrete_gaussian",
        "noise_multiplier": 1.0,
        "shares": 60,
        "members": 100,
        "dimensions": {DELTA: 10_000},
    }
    return Steps(**{**plain, **changes})


@st.composite
def possible(draw) -> Steps:
    members = draw(st.integers(1, 5_000))
    try:
        return steps(
            noise=draw(noises),
            noise_multiplier=draw(st.floats(0.1, 20)),
            shares=draw(st.integers(1, members)),
            members=members,
            dimensions={DELTA: draw(st.integers(1, 10**8)), CLIP_BIT: 1},
            relation=draw(relations),
        )
    except ValueError:
        assume(False)
        raise


@given(possible())
def test_a_vector_and_its_noise_are_within_what_the_ring_and_float32_hold(numbers):
    """In the docstring's formulas: the tail beyond what is left is below 2·exp(−200)."""
    left = numbers.most - numbers.rounded
    exponent = (
        left**2 / (2 * numbers.variance)
        if numbers.noise == "discrete_gaussian"
        else left**2 / (2 * numbers.variance + 2 * left / 3)
    )
    assert exponent >= 200 * (1 - 1e-9)
    assert numbers.most < 2**24
    assert numbers.most * numbers.members < 2**31


@given(possible())
def test_no_step_is_given_away(numbers):
    """With a norm a thousandth longer something would not hold."""
    longer = 1.001 * numbers.rounded + 20 * 1.001 * math.sqrt(numbers.variance)
    longer += 134 if numbers.noise == "skellam" else 0
    assert longer > numbers.most


@given(possible(), st.floats(1e-8, 1e8), st.floats(1e-8, 1e8))
def test_the_release_is_the_same_whatever_the_clip(numbers, early, late):
    """Scales follow the bound, so that the joint norm in steps does not."""
    for bound in (early, late):
        bounds = {DELTA: bound, CLIP_BIT: 0.5}
        scales = numbers.scales(bounds)
        joint = math.hypot(*(scales[name] * bounds[name] for name in bounds))
        assert joint == pytest.approx(numbers.norm, rel=1e-9)
    release = numbers.release()
    assert release.l2 == pytest.approx(
        numbers.rounded * (2 if numbers.relation == "replace_one" else 1)
    )
    assert math.sqrt(release.shares * release.variance) == pytest.approx(
        numbers.noise_multiplier * release.l2
    )
    assert release.dimension == numbers.dimensions[DELTA] + 1


@given(possible())
def test_it_costs_what_the_gaussian_of_z_costs_but_for_little(numbers):
    for order, found in zip([2, 8, 32], renyi(numbers.release(), [2, 8, 32]), strict=True):
        plain = order / (2 * numbers.noise_multiplier**2)
        assert plain * (1 - 1e-9) <= found <= plain * 1.1


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("members", [100, 1_000])
def test_the_bits_sum_has_noise_of_a_twentieth_of_the_members(members, relation):
    numbers = steps(members=members, dimensions={DELTA: 1_000, CLIP_BIT: 1}, relation=relation)
    scales = numbers.scales({DELTA: 3.0, CLIP_BIT: 0.5})
    noise = math.sqrt(numbers.variance * numbers.shares)
    assert noise / scales[CLIP_BIT] == pytest.approx(members / 20, rel=1e-3)
    change = 2 if relation == "replace_one" else 1
    z_delta = (1 - (change * 0.5 * 20 / members) ** 2) ** -0.5  # (z⁻² − (Δ_b/σ_b)²)^−1/2
    assert noise / (scales[DELTA] * change * 3.0) == pytest.approx(z_delta, rel=1e-3)


def test_a_bit_among_few_members_takes_a_quarter_and_no_more():
    numbers = steps(members=6, shares=4, dimensions={DELTA: 100, CLIP_BIT: 1})
    scales = numbers.scales({DELTA: 1.0, CLIP_BIT: 0.5})
    assert scales[CLIP_BIT] * 0.5 == pytest.approx(numbers.norm / 2)


def test_sections_of_parameters_have_one_scale():
    numbers = steps(dimensions={DELTA: 100, CONTROL: 100})
    scales = numbers.scales({DELTA: 3.0, CONTROL: 4.0})
    assert scales[DELTA] == scales[CONTROL] == pytest.approx(numbers.norm / 5)


def test_a_bit_by_itself_has_all():
    numbers = steps(dimensions={CLIP_BIT: 1})
    assert numbers.scales({CLIP_BIT: 0.5}) == {CLIP_BIT: pytest.approx(2 * numbers.norm)}


def test_a_replaced_unit_takes_twice_the_noise():
    one, two = steps(), steps(relation="replace_one")
    assert two.l2 == 2 * two.rounded
    ratio = math.sqrt(two.variance) / two.norm / (math.sqrt(one.variance) / one.norm)
    assert ratio == pytest.approx(2, rel=1e-3)


def test_sampling_is_claimed_where_it_is_asked_for_only():
    assert steps().release().sampling == "none"
    sampled = steps().release(0.1, "poisson")
    assert (sampled.rate, sampled.sampling) == (0.1, "poisson")
    assert replace(sampled, rate=1.0, sampling="none") == steps().release()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: steps(shares=101), "101 shares of 100 members"),
        (lambda: steps(noise_multiplier=0.0), "noise_multiplier"),
        (lambda: steps(noise="laplace"), "choose one of"),
        (lambda: steps(dimensions={}), "at least 1 entries"),
        (lambda: steps(members=2**30, shares=1), "too few steps"),
        (lambda: steps(members=10_000, shares=1, noise_multiplier=1_000.0), "too few steps"),
        (lambda: steps(members=100_000, dimensions={DELTA: 10**10}), "smaller model"),
        (lambda: steps(noise="skellam", members=2**25, shares=2**25), "too few steps"),
        (lambda: steps().scales({DELTA: 0.0}), "bounds"),
        (lambda: steps().scales({DELTA: math.inf}), "bounds"),
        (lambda: steps().scales({}), "bounds"),
        (lambda: steps().scales({DELTA: 1.0, CLIP_BIT: 0.5}), "bounds"),
    ],
)
def test_what_leaves_no_room_or_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
