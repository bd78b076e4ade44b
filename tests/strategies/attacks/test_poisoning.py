"""Attackers are a fixed share of the clients and send what their attack says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.attacks import Attack, Gaussian, NotANumber, Scaling, SignFlip, Zero
from strategies.update import CONTROL, COUNTERS, DELTA, Layout, Section, Update

LAYOUT = Layout(("w",), ((5,),))
HONEST = np.arange(-2, 3, dtype=np.float32)


def poisoned(attack: Attack, section: str = DELTA) -> np.ndarray:
    honest = HONEST.copy()
    update = Update(
        {DELTA: Section(honest, LAYOUT), CONTROL: Section(honest, LAYOUT)}, 7.0, (3,), 1
    )
    lie = attack.poison(update, np.random.default_rng(0))
    np.testing.assert_array_equal(honest, HONEST)
    assert (lie.weight, lie.members, lie.version) == (7.0, (3,), 1)
    return lie.sections[section].vector


@pytest.mark.parametrize("section", [DELTA, CONTROL])
def test_each_attack_sends_what_it_says_in_every_section(section):
    np.testing.assert_array_equal(poisoned(SignFlip(scale=2), section), -2 * HONEST)
    np.testing.assert_array_equal(poisoned(Scaling(factor=10), section), 10 * HONEST)
    np.testing.assert_array_equal(poisoned(Zero(), section), 0 * HONEST)
    assert np.isnan(poisoned(NotANumber(), section)).all()
    assert np.isposinf(poisoned(NotANumber(infinite=True), section)).all()


def test_counters_stay_as_they_are():
    sections = {DELTA: Section(HONEST, LAYOUT), COUNTERS: Section(HONEST, LAYOUT)}
    lie = Scaling().poison(Update(sections, 1.0, (0,), 0), np.random.default_rng(0))
    np.testing.assert_array_equal(lie.sections[COUNTERS].vector, HONEST)


def test_an_attack_that_says_nothing_is_told_so():
    with pytest.raises(TypeError, match="Attack does not say"):
        poisoned(Attack())


def test_gaussian_noise_has_the_deviation_asked_for():
    """20,000 normal draws: the standard deviation is off by 4% with odds under 1e-8."""
    layout = Layout(("w",), ((20_000,),))
    update = Update({DELTA: Section(np.zeros(20_000, np.float32), layout)}, 1.0, (0,), 0)
    lie = Gaussian(sigma=0.3).poison(update, np.random.default_rng(1)).delta.vector
    assert lie.std() == pytest.approx(0.3, rel=0.04)


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 2**31))
def test_attackers_are_the_share_asked_for_and_the_same_all_run(num_clients, fraction, seed):
    attack = SignFlip(fraction=fraction)
    chosen = attack.attackers(num_clients, seed)
    assert len(chosen) == round(fraction * num_clients)
    assert chosen <= set(range(num_clients))
    assert chosen == attack.attackers(num_clients, seed)
