"""Integer noise through real masks: the sum is the integers' to the bit, and its noise is what z says.

Statistical tests alarm falsely once in 10⁶ or less.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.contract import Claim, ContractError, Visibility
from strategies.privacy.rounding import rounded_l2
from strategies.privacy.steps import Steps
from strategies.protocols import ClientContext
from strategies.secagg.fixed_point import FixedPoint
from strategies.stages import Clip
from strategies.stages.integer_noise import IntegerNoise, rotation_seed
from strategies.update import BUFFERS, CLIP_BIT, DELTA, Update
from strategies.wire import Refused
from tests.support.masked import cohort
from tests.support.updates import section, update

NOISES = pytest.mark.parametrize("noise", ["discrete_gaussian", "skellam"])
RING = 2**31 - 1


def numbers(size: int, **changes) -> Steps:
    plain = {
        "noise": "discrete_gaussian",
        "noise_multiplier": 1.0,
        "shares": 4,
        "members": 6,
        "dimensions": {DELTA: size},
    }
    return Steps(**{**plain, **changes})


def stage(steps: Steps, bounds: Mapping[str, float] | None = None, **options) -> IntegerNoise:
    held = {DELTA: 2.0} if bounds is None else bounds
    return IntegerNoise(lambda: steps, lambda: held, **options)


def encoded(part: IntegerNoise, one: Update, **settings) -> Update:
    return part.encode(one, ClientContext(0, 1, {**part.configure(), **settings}))


def clipped(values: object, bound: float = 2.0, **changes) -> Update:
    """One client's update behind a clip."""
    one = Clip(norm=bound).encode(update(values), ClientContext(0, 1, {"norm": bound}))
    return replace(one, **changes)


def averaged(parts: list[Update]) -> Update:
    """What a sum's server makes of its members."""
    sections = {
        name: replace(item, vector=np.mean([p.sections[name].vector for p in parts], 0, np.float64).astype(np.float32))
        for name, item in parts[0].sections.items()
    }  # fmt: skip
    return Update(sections, float(len(parts)), tuple(range(len(parts))), parts[0].version)


def of_rows(rows: np.ndarray) -> list[Update]:
    return [clipped(row) for row in rows]


@settings(max_examples=20)
@given(
    size=st.integers(1, 300),
    members=st.integers(1, 400),
    z=st.floats(0.3, 5),
    noise=st.sampled_from(["discrete_gaussian", "skellam"]),
)
def test_a_clients_vector_is_of_whole_numbers_that_fit(size, members, z, noise):
    steps = numbers(size, members=members, shares=members, noise=noise, noise_multiplier=z)
    found = encoded(stage(steps), clipped(np.full(size, 9.0))).delta
    assert found.vector.dtype == np.float32
    assert np.all(found.vector == np.rint(found.vector))
    assert np.abs(found.vector).max() <= steps.most
    assert found.bound is None


@pytest.mark.parametrize("members", [3, 10, 127, 128, 129, 1_000, 65_537])
def test_the_masked_rings_step_is_one_where_its_limit_is_that_of_its_members(members):
    point = FixedPoint(float(RING // members), members)
    assert point.scale == 1.0
    assert point.step == 1.0
    most = numbers(3, members=members, shares=members).most
    whole = np.array([0, 1, -1, most, -most, most - 1], np.float32)
    out = np.empty(len(whole), np.uint32)
    assert point.encode(whole, out, rounding="stochastic") == 0
    np.testing.assert_array_equal(out.view(np.int32), whole.astype(np.int64))
    assert most * members <= RING


@NOISES
@pytest.mark.parametrize("gone", [(), (1,), (0, 5)])
def test_the_sum_through_real_masks_is_the_integers_sum_to_the_bit(noise, gone):
    """Six real members, two of whom may be lost: four shares at least."""
    size, members = 2_000, 6
    steps = numbers(size, noise=noise)
    part, rows = stage(steps), np.random.default_rng(5).normal(0, 0.02, (members, size))
    sent = [encoded(part, one).delta.vector for one in of_rows(rows)]
    options = {"limit": float(RING // members), "metrics": {}, "dropouts": 0.34}
    with cohort(members, vectors=dict(enumerate(sent)), **options) as clients:
        outcome = clients.run(lost={"upload": gone})
        terms = clients.terms(outcome)
        left = [one for one in range(members) if one not in gone]
        assert outcome.update.members == tuple(left)
        assert len(left) >= steps.shares
        total = np.sum([sent[one].astype(np.int64) for one in left], axis=0)
        np.testing.assert_array_equal(outcome.ring[:size].view(np.int32), total)
        assert terms.limit == RING // members
        assert outcome.update.metrics["saturated"] == 0.0
        _check_noise(part.decode(outcome.update), rows[left], steps, len(left))


def _check_noise(decoded: Update, rows: np.ndarray, steps: Steps, members: int) -> None:
    """The mean's error has variance σ²/(members·scale²) + rounding: 5 standard errors of a variance."""
    scale = steps.norm / 2.0
    error = decoded.delta.vector - rows.mean(0)
    expected = (steps.variance + 1 / 6) / members / scale**2
    assert abs(error.mean()) < 5 * math.sqrt(expected / len(error))
    assert (error**2).mean() == pytest.approx(expected, rel=5 * math.sqrt(2 / len(error)))


@NOISES
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_the_least_sum_has_the_noise_that_z_says(noise, relation):
    """20,000 elements: with `shares` members, σ of the sum is z·C or z·2C in units; 5 standard errors."""
    size, z = 20_000, 0.7
    steps = numbers(size, noise=noise, noise_multiplier=z, members=5, shares=4, relation=relation)
    part, rows = stage(steps), np.random.default_rng(2).normal(0, 0.005, (4, size))
    decoded = part.decode(averaged([encoded(part, one) for one in of_rows(rows)]))
    error = 4 * (decoded.delta.vector - rows.mean(0))
    change = 4.0 if relation == "replace_one" else 2.0
    assert error.std() == pytest.approx(z * change, rel=5 / math.sqrt(2 * size) + 1e-3)


def test_without_noise_the_mean_comes_back():
    """z = 10⁻⁶: what rotation, rounding and float32 leave is a few millionths of the bound."""
    size = 5_000
    steps = numbers(size, noise_multiplier=1e-6)
    part, rows = stage(steps), np.random.default_rng(1).normal(0, 0.02, (6, size))
    ones = [replace(one, version=7) for one in of_rows(rows)]
    decoded = part.decode(averaged([encoded(part, one) for one in ones]))
    np.testing.assert_allclose(decoded.delta.vector, rows.mean(0), atol=2e-6)


def test_clipped_vectors_of_any_shape_are_within_the_accounted_change():
    """Before noise: here of a variance that vanishes, so that what is sent is what was rounded."""
    for values in ([100.0] * 64, [100.0] + [0.0] * 63, np.arange(-32.0, 32.0)):
        steps = numbers(64)
        found = encoded(stage(steps), clipped(values), variance=1e-30).delta.vector
        assert np.linalg.norm(found.astype(np.float64)) <= steps.rounded
        assert np.linalg.norm(found.astype(np.float64)) > 0.99 * steps.norm


def test_the_bit_and_the_change_are_one_vector_of_one_release():
    steps = numbers(300, members=400, shares=300, dimensions={DELTA: 300, CLIP_BIT: 1})
    bounds = {DELTA: 2.0, CLIP_BIT: 0.5}
    part = stage(steps, bounds)
    one = clipped(np.ones(300))
    one = one.with_section(CLIP_BIT, section([-0.5], bound=0.5))
    sent = encoded(part, one, variance=1e-30)
    joint = np.concatenate([item.vector for item in sent.sections.values()]).astype(np.float64)
    assert 0.99 * steps.norm < np.linalg.norm(joint) <= steps.rounded
    decoded = part.decode(averaged([sent, sent]))
    np.testing.assert_allclose(decoded.delta.vector, one.delta.vector, atol=1e-5)
    assert decoded.sections[CLIP_BIT].vector[0] == pytest.approx(-0.5, rel=1e-3)


def test_the_scale_follows_the_clip_and_what_is_accounted_does_not():
    steps, bounds = numbers(50), {DELTA: 2.0}
    part = stage(steps, bounds)
    before = part.configure()
    bounds[DELTA] = 0.25
    after = part.configure()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"scale.delta"}
    assert after["scale.delta"] == pytest.approx(8 * before["scale.delta"])
    decoded = part.decode(averaged([encoded(part, clipped(np.ones(50), 0.25), variance=1e-30)]))
    assert np.linalg.norm(decoded.delta.vector) == pytest.approx(0.25, rel=1e-3)


def test_each_version_is_turned_its_own_way_and_any_server_turns_it_back():
    steps, values = numbers(64), np.eye(64)[3]
    early, late = (
        encoded(stage(steps), clipped(values, version=version), variance=1e-30)
        for version in (4, 5)
    )
    assert np.sign(early.delta.vector).tolist() != np.sign(late.delta.vector).tolist()
    for sent in (early, late):
        decoded = stage(steps).decode(averaged([sent]))
        np.testing.assert_allclose(decoded.delta.vector, values, atol=1e-5)
    assert rotation_seed(1, 4) != rotation_seed(2, 4)


def test_what_is_sent_tells_neither_weight_nor_metrics():
    one = clipped(np.ones(10), weight=77.0, metrics={"train_loss": 3.0})
    sent = encoded(stage(numbers(10)), one)
    assert (sent.weight, dict(sent.metrics)) == (1.0, {})


def test_two_calls_share_no_noise():
    part, one = stage(numbers(100)), clipped(np.ones(100))
    first, second = encoded(part, one), encoded(part, one)
    assert not np.array_equal(first.delta.vector, second.delta.vector)


def test_a_study_may_repeat_its_noise():
    def entropy(context):
        return lambda count: bytes([context.client]) * count

    part, one = stage(numbers(100), entropy=entropy), clipped(np.ones(100))
    np.testing.assert_array_equal(encoded(part, one).delta.vector, encoded(part, one).delta.vector)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale.delta": 2.0 * numbers(10).norm},
        {"scale.delta": 1},
        {"scale.delta": math.nan},
        {"norm": 1.0},
        {"dimension": 11},
        {"noise": "none"},
        {"most": 100},
        {"variance": 1e20},
    ],
    ids=str,
)
def test_a_client_refuses_what_no_honest_server_sends(wrong):
    with pytest.raises(Refused) as caught:
        encoded(stage(numbers(10)), clipped(np.ones(10)), **wrong)
    assert caught.value.reason == "terms"


def test_a_client_refuses_an_update_without_a_bound():
    with pytest.raises(Refused, match="no bound"):
        encoded(stage(numbers(10)), update(np.ones(10)))


def test_a_client_keeps_to_the_least_noise_that_it_adds():
    """Of four shares at z = 1 each has half of the norm as its standard deviation."""
    steps, one = numbers(10), clipped(np.ones(10))
    assert steps.variance == pytest.approx((rounded_l2(steps.norm, 10) / 2) ** 2)
    encoded(stage(steps, least=0.499), one)
    with pytest.raises(Refused, match="less than is added here"):
        encoded(stage(steps, least=0.501), one)


def claim(**changes) -> Claim:
    plain = {"visibility": Visibility.SUM, "summed": "uniform", "bounds": {DELTA: 2.0}}
    return Claim(**{**plain, **changes})


@pytest.mark.parametrize("visibility", [Visibility.SUM, Visibility.GROUP])
def test_sums_are_private_afterwards_and_bounded_no_more(visibility):
    found = stage(numbers(10)).check(claim(visibility=visibility))
    assert (found.private, found.bounds) == ("distributed noise", {})
    assert found.set_by["private"] == "privacy=distributed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"visibility": Visibility.EACH}, "hides little, and the server sees each update"),
        ({"bounds": {}}, "without a bound is hidden by no noise"),
        ({"sections": frozenset({DELTA, CLIP_BIT})}, "without a bound"),
        ({"sections": frozenset({DELTA, BUFFERS})}, "GroupNorm"),
        ({"summed": "examples"}, "whole no more; set collector.max_weight=null"),
        ({"support": "per_client"}, "different coordinates"),
        ({"client_half": False}, "does not run a part's client half"),
    ],
)
def test_what_shared_noise_does_not_hide_is_refused(changes, words):
    with pytest.raises(ContractError, match=words):
        stage(numbers(10)).check(claim(**changes))


@NOISES
@settings(max_examples=15)
@given(
    size=st.integers(1, 200),
    members=st.integers(1, 30),
    z=st.sampled_from([1e-6, 1e-3, 0.5, 4.0]),
    alike=st.booleans(),
)
def test_honest_sums_are_never_too_long(noise, size, members, z, alike):
    """Once in 2⁴⁰: all members pull one way, or each its own, under much noise or next to none."""
    steps = numbers(size, members=30, shares=members, noise=noise, noise_multiplier=z)
    part, rng = stage(steps), np.random.default_rng(size)
    rows = np.ones((members, size)) if alike else rng.normal(0, 9, (members, size))
    part.decode(averaged([encoded(part, one) for one in of_rows(rows)]))


@pytest.mark.parametrize(
    "lie", [RING // 6, -(2**27), 2**25], ids=["the ring's limit", "less", "a tenth"]
)
def test_a_sum_that_honest_members_cannot_make_is_refused(lie):
    """One of six has skipped its clip; the sum is all that anybody sees of it."""
    steps = numbers(1_000)
    part = stage(steps)
    sent = [
        encoded(part, one) for one in of_rows(np.random.default_rng(3).normal(0, 1, (6, 1_000)))
    ]
    part.decode(averaged(sent))
    vector = np.full(1_000, lie, np.float32)
    sent[2] = sent[2].with_section(DELTA, section(vector))
    with pytest.raises(
        Refused, match=r"6 honest members make .* one has skipped its clip"
    ) as caught:
        part.decode(averaged(sent))
    assert caught.value.reason == "too_large"


def test_the_longest_honest_sum_is_close_to_what_noise_makes_it():
    """970 elements: what is a quarter longer than its noise is noticed, and the members' own part is small."""
    steps = numbers(970, members=15, shares=11, noise_multiplier=100.0)
    noise = math.sqrt(15 * steps.variance * 970)
    signal = 15 * steps.rounded
    assert 1.0 < (steps.longest(15) - signal) / noise < 1.22
