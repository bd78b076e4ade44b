"""What an update's age leaves of its influence."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.schedulers import Constant, Hinge, Polynomial, Staleness

AGES = st.integers(0, 10_000)


@given(AGES, st.floats(0, 4))
def test_polynomial_weights_are_the_papers(age, alpha):
    assert Polynomial(alpha).checked(age) == pytest.approx((age + 1) ** -alpha, rel=1e-12)


@given(AGES, st.floats(0, 10), st.integers(0, 20))
def test_hinge_weights_are_the_papers(age, a, b):
    expected = 1.0 if age <= b else 1 / (a * (age - b) + 1)
    assert Hinge(slope=a, grace=b).checked(age) == pytest.approx(expected, rel=1e-12)


@given(AGES)
def test_a_constant_weight_is_one(age):
    assert Constant().checked(age) == 1


@given(
    st.one_of(
        st.builds(Polynomial, alpha=st.floats(0, 10)),
        st.builds(Hinge, slope=st.floats(0, 10), grace=st.integers(0, 10)),
        st.builds(Constant),
    ),
    AGES,
)
def test_weights_start_at_one_and_never_grow(staleness, age):
    assert staleness.checked(0) == 1
    assert 0 <= staleness.checked(age + 1) <= staleness.checked(age) <= 1


def test_by_default_a_fresh_update_counts_more_than_twice_one_of_five_versions():
    assert Polynomial().checked(0) >= 2 * Polynomial().checked(5)


@dataclass(frozen=True)
class Exactly(Staleness):
    """A function of a user's own."""

    value: float

    def weight(self, staleness):
        return self.value


@pytest.mark.parametrize("value", [-1e-9, 1 + 1e-9, float("nan"), float("inf"), -float("inf")])
def test_a_weight_outside_of_0_and_1_is_refused(value):
    with pytest.raises(ValueError, match=r"Exactly weighs a staleness of 3 by .*not in \[0, 1\]"):
        Exactly(value).checked(3)


@pytest.mark.parametrize("value", [0, 0.25, 1])
def test_a_function_of_ones_own_is_taken(value):
    assert Exactly(value).checked(7) == value


@pytest.mark.parametrize(
    "make", [lambda: Polynomial(-0.1), lambda: Hinge(slope=-1), lambda: Hinge(grace=-1)]
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must be|at least|≥|>="):
        make()
