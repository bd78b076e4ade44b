"""Colluders pull together within a group, apart between groups, with updates of an honest length."""

import numpy as np
import pytest

from strategies.attacks import Attacker, Collusion
from strategies.update import CONTROL, COUNTERS, DELTA
from tests.support.updates import update

RNG = np.random.default_rng(6)
SIZE = 4_000
CLIENTS = 10


def sent(attack: Collusion, client: int, round_number: int = 1, seed: int = 5) -> np.ndarray:
    honest = update(RNG.normal(size=SIZE) * (1 + client), client=client)
    attacker = Attacker(client, round_number, CLIENTS, seed)
    lie = attack.tell(honest, attacker).delta.vector.astype(float)
    # Noise in 4,000 dimensions is orthogonal to the direction but for some 2%.
    expected = attack.scale * np.linalg.norm(honest.delta.vector) * np.hypot(1, attack.jitter)
    assert np.linalg.norm(lie) == pytest.approx(expected, rel=0.03)
    return lie / np.linalg.norm(lie)


def test_members_of_a_group_send_one_direction_in_every_round():
    attack = Collusion(fraction=0.6, groups=2, jitter=0.2)
    members = sorted(attack.attackers(CLIENTS, 5))
    groups = [attack.group(Attacker(client, 1, CLIENTS, 5)) for client in members]
    assert groups == [0, 1, 0, 1, 0, 1]
    for first, second in [(0, 2), (1, 3), (0, 4)]:
        cosine = sent(attack, members[first]) @ sent(attack, members[second], round_number=7)
        assert cosine == pytest.approx(1 / (1 + 0.2**2), abs=0.02)
    assert abs(sent(attack, members[0]) @ sent(attack, members[1])) < 0.1


def test_noise_is_new_in_each_round_and_absent_at_zero():
    noisy, exact = Collusion(fraction=0.6), Collusion(fraction=0.6, jitter=0.0)
    client = min(exact.attackers(CLIENTS, 5))
    assert not np.allclose(sent(noisy, client, 1), sent(noisy, client, 2), atol=1e-6)
    np.testing.assert_allclose(sent(exact, client, 1), sent(exact, client, 2), atol=1e-6)


def test_scale_is_the_length_over_the_honest_one_and_another_seed_another_aim():
    attack = Collusion(fraction=1.0, scale=7.0, jitter=0.0)
    assert abs(sent(attack, 3, seed=1) @ sent(attack, 3, seed=2)) < 0.1


def test_every_float_section_has_an_aim_of_its_own_and_counters_stay():
    honest = update(np.ones(SIZE), client=0, **{CONTROL: np.ones(SIZE), COUNTERS: [4.0]})
    lie = Collusion(fraction=1.0).tell(honest, Attacker(0, 1, CLIENTS, 5))
    first, second = (lie.sections[name].vector.astype(float) for name in (DELTA, CONTROL))
    assert abs(first @ second) < 0.1 * np.linalg.norm(first) * np.linalg.norm(second)
    assert lie.sections[COUNTERS].vector.tolist() == [4.0]


def test_a_client_that_learnt_nothing_sends_nothing():
    honest = update(np.zeros(5), client=0)
    lie = Collusion(fraction=1.0).tell(honest, Attacker(0, 1, CLIENTS, 5))
    assert not lie.delta.vector.any()
