import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.contract import Claim, ContractError
from strategies.protocols import ClientContext
from strategies.stages import Clip
from strategies.stages.clip import clip, l2_norm
from strategies.update import CONTROL, DELTA, Update
from tests.support.updates import section, update

finite = npst.arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
BIG, TINY = np.float32(3.4e38), np.float32(1e-45)


def exact_norm(vector: np.ndarray) -> float:
    return math.hypot(*map(float, vector))


def context(**settings: float) -> ClientContext:
    return ClientContext(0, 1, settings)


@given(finite, st.floats(1e-6, 1e6))
@example(np.full(40, BIG), 1.0)
@example(np.full(40, -BIG), 1e6)
@example(np.full(40, TINY), 1e-6)
@example(np.array([BIG, TINY], np.float32), 1e-6)
@example(np.array([1.0], np.float32), 1.0)
@example(np.array([np.nextafter(np.float32(1), np.float32(2))]), 1.0)
def test_no_finite_vector_is_longer_than_the_bound_afterwards(values, norm):
    clipped = clip(update(values), norm, [DELTA]).delta
    assert exact_norm(clipped.vector) <= norm
    assert clipped.bound == norm
    assert clipped.vector.dtype == np.float32


@given(finite, st.floats(1e-6, 1e6))
def test_a_clipped_vector_keeps_its_direction_and_nearly_all_of_the_bound(values, norm):
    clipped = clip(update(values), norm, [DELTA]).delta.vector
    length = exact_norm(values)
    if length <= norm:
        assert clipped.tobytes() == values.tobytes()
        return
    expected = values.astype(np.float64) * (norm / length)
    np.testing.assert_allclose(clipped, expected, rtol=1e-6, atol=1e-44)
    assert exact_norm(clipped) >= norm * (1 - 1e-6)


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_vector_of_zeros_stays_zero(size):
    clipped = clip(update(np.zeros(size)), 1e-6, [DELTA]).delta.vector
    np.testing.assert_array_equal(clipped, np.zeros(size))


@given(finite)
@example(np.full(40, BIG))
@example(np.full(40, TINY))
def test_the_norm_neither_overflows_nor_vanishes(values):
    assert l2_norm(values) == pytest.approx(exact_norm(values), rel=1e-12, abs=0)


def test_a_long_vector_has_the_norm_of_all_its_blocks():
    values = np.random.default_rng(0).normal(0, 1, 200_001).astype(np.float32)
    assert l2_norm(values) == pytest.approx(np.linalg.norm(values.astype(np.float64)), rel=1e-12)


def test_a_client_clips_to_the_bound_that_the_server_sent():
    sent = Clip(norm=1.0).configure()
    clipped = Clip(norm=99.0).encode(update([30, 40]), context(**sent))
    np.testing.assert_allclose(clipped.delta.vector, [0.6, 0.8], rtol=1e-6)


def test_the_server_enforces_what_a_client_skipped():
    clipped = Clip(norm=5.0).decode(update([30, 40]))
    np.testing.assert_allclose(clipped.delta.vector, [3, 4], rtol=1e-6)
    assert clipped.delta.bound == 5.0


@given(finite, st.floats(1e-6, 1e6))
def test_the_server_leaves_an_honest_clients_update_as_it_came(values, norm):
    stage = Clip(norm=norm)
    encoded = stage.encode(update(values), context(norm=norm))
    assert stage.decode(encoded).delta.vector.tobytes() == encoded.delta.vector.tobytes()


def test_a_sum_over_several_clients_is_not_clipped():
    total = Update({DELTA: section([30, 40])}, 2.0, (0, 1), 0)
    assert Clip(norm=1.0).decode(total) is total


def test_each_named_section_has_a_bound_of_its_own_and_others_are_left_alone():
    one = update([30, 40], **{CONTROL: [6, 8], "other": [60, 80]})
    clipped = Clip(norm=5.0, sections=(DELTA, CONTROL)).decode(one)
    np.testing.assert_allclose(clipped.delta.vector, [3, 4], rtol=1e-6)
    np.testing.assert_allclose(clipped.sections[CONTROL].vector, [3, 4], rtol=1e-6)
    assert clipped.sections["other"] is one.sections["other"]
    np.testing.assert_array_equal(one.delta.vector, [30, 40])


def test_clipping_gives_the_named_sections_a_bound_in_the_contract():
    claim = Claim(sections=frozenset({DELTA, CONTROL}), bounds={CONTROL: 7.0})
    clipped = Clip(norm=2.0).check(claim)
    assert clipped.bounds == {DELTA: 2.0, CONTROL: 7.0}
    assert clipped.set_by["bounds"] == "Clip"
    assert claim.bounds == {CONTROL: 7.0}


def test_clipping_a_section_that_nobody_sends_is_refused():
    with pytest.raises(ContractError, match="updates have no section control"):
        Clip(sections=(DELTA, CONTROL)).check(Claim())


def test_clipping_where_clients_run_no_half_is_refused():
    with pytest.raises(ContractError, match="does not run a part's client half") as caught:
        Clip().check(Claim(client_half=False, set_by={"client_half": "collector plain"}))
    assert (caught.value.first, caught.value.second) == ("collector plain", "Clip")
