"""Canaries are the last clients; those that are in send their direction, those that are out nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.attacks.attack import Attacker
from strategies.attacks.canary import Canary, direction
from strategies.update import CONTROL, COUNTERS, DELTA, Layout, Section, Update

LAYOUT = Layout(("w",), ((400,),))
HONEST = np.ones(400, np.float32)


def told(canary: Canary, client: int, num_clients: int) -> Update:
    sections = {name: Section(HONEST, LAYOUT) for name in (DELTA, CONTROL, COUNTERS)}
    update = Update(sections, 1.0, (client,), 3)
    return canary.tell(update, Attacker(client, 1, num_clients, 0))


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**31))
def test_the_last_clients_are_canaries_whatever_the_seed(real, canaries, seed):
    attack = Canary(included=(True,) * canaries, norm=1.0)
    assert attack.attackers(real + canaries, seed) == set(range(real, real + canaries))


def test_who_is_in_sends_its_direction_and_who_is_out_zeros():
    canary = Canary(included=(True, False, True), norm=0.5, weight=7.0, key=11)
    for client, index in ((4, 0), (6, 2)):
        update = told(canary, client, 7)
        vector = update.delta.vector
        np.testing.assert_array_equal(np.sign(vector), direction(11, index, 400))
        assert np.linalg.norm(vector) == pytest.approx(0.5, rel=1e-6)
        assert (update.weight, update.members, update.version) == (7.0, (client,), 3)
    out = told(canary, 5, 7)
    assert not out.delta.vector.any()
    assert out.weight == 7.0
    assert not told(canary, 4, 7).sections[CONTROL].vector.any()
    np.testing.assert_array_equal(out.sections[COUNTERS].vector, HONEST)


def test_it_sends_the_same_in_every_round():
    canary = Canary(included=(True,), norm=1.0, key=2)
    update = Update({DELTA: Section(HONEST, LAYOUT)}, 1.0, (3,), 0)
    first, second = (
        canary.tell(update, Attacker(3, number, 4, 0)).delta.vector for number in (1, 2)
    )
    np.testing.assert_array_equal(first, second)


def test_directions_are_nearly_orthogonal():
    """100 directions of 10,000 signs: a cosine beyond 0.07 is seven deviations off; odds under 1e-8 for all 4,950."""
    directions = np.stack([direction(5, index, 10_000) for index in range(100)])
    assert set(np.unique(directions)) == {-1.0, 1.0}
    cosines = directions @ directions.T / 10_000 - np.eye(100)
    assert np.abs(cosines).max() < 0.07
    assert (direction(5, 0, 400) != direction(6, 0, 400)).any()


def test_canaries_alone_are_no_run():
    with pytest.raises(ValueError, match="2 canaries among 2 clients"):
        Canary(included=(True, False), norm=1.0).attackers(2, 0)
    with pytest.raises(ValueError, match=r"Canary\.norm"):
        Canary(included=(True,), norm=0.0)
