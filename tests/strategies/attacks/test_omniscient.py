"""What attackers that see the round send, against the papers' formulas."""

import logging
from statistics import NormalDist

import numpy as np
import pytest

from strategies.attacks import Alie, Attacker, Ipm, Omniscient, Sight
from strategies.attacks.omniscient import blocks, z_max
from strategies.update import BUFFERS, CONTROL, COUNTERS, DELTA
from tests.support.updates import update

RNG = np.random.default_rng(4)


def sight(rows, attackers=(7, 9), round_number=3, **sections):
    """A round whose honest clients 0, 1, … sent these deltas."""
    honest = [
        update(row, client=client, **{name: values[client] for name, values in sections.items()})
        for client, row in enumerate(rows)
    ]
    return Sight(honest, tuple(attackers), round_number, 11)


@pytest.mark.parametrize(
    ("clients", "attackers", "share"),
    [
        (50, 24, 24 / 26),  # s = 26 - 24 = 2: of 26 honest ones 24 may lie on the attackers' side
        (51, 12, 25 / 39),  # s = 26 - 12 = 14
        (20, 8, 9 / 12),  # s = 11 - 8 = 3
        (10, 4, 4 / 6),  # s = 6 - 4 = 2
    ],
)
def test_z_max_is_the_papers_quantile(clients, attackers, share):
    """Algorithm 3 by hand: s = floor(n/2 + 1) - m, z = quantile((n - m - s) / (n - m))."""
    assert NormalDist().cdf(z_max(clients, attackers)) == pytest.approx(share, abs=1e-12)


def test_z_max_by_the_table_of_the_normal_distribution():
    """From a printed table: 0.9231 at 1.426, 0.75 at 0.6745."""
    assert z_max(50, 24) == pytest.approx(1.426, abs=5e-4)
    assert z_max(20, 8) == pytest.approx(0.6745, abs=5e-5)


def test_too_few_attackers_have_no_room_and_a_majority_has_a_finite_one():
    assert z_max(10, 2) == z_max(10, 1) == 0.0
    for attackers, share in [(5, 4 / 5), (6, 3 / 4)]:  # s is 1, and 0 taken for 1
        assert NormalDist().cdf(z_max(10, attackers)) == pytest.approx(share)
    assert z_max(10, 9) == 0.0  # one honest client has no spread


def test_alie_is_the_mean_less_z_deviations_of_the_honest_alone():
    rows = RNG.normal(size=(12, 30)).astype(np.float32)
    lie = Alie().plot(sight(rows, attackers=range(20, 28)), {})[DELTA]
    expected = rows.astype(float).mean(0) - z_max(20, 8) * rows.astype(float).std(0)
    np.testing.assert_allclose(lie, expected, rtol=1e-6)
    set_by_user = Alie(z=2.5).plot(sight(rows), {})[DELTA]
    np.testing.assert_allclose(
        set_by_user, rows.astype(float).mean(0) - 2.5 * rows.astype(float).std(0), rtol=2e-6
    )


def test_alie_says_in_the_first_round_that_it_has_no_room(caplog):
    rows = RNG.normal(size=(8, 3)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        Alie().plot(sight(rows, round_number=2), {})
        Alie(z=0.0).plot(sight(rows, round_number=1), {})
        assert not caplog.records
        lie = Alie().plot(sight(rows, round_number=1), {})[DELTA]
    assert "raise attack.fraction" in caplog.text
    np.testing.assert_allclose(lie, rows.astype(float).mean(0), rtol=1e-6)


def test_ipm_is_minus_epsilon_times_the_mean():
    rows = RNG.normal(size=(5, 9)).astype(np.float32)
    lie = Ipm(epsilon=0.3).plot(sight(rows), {})[DELTA]
    np.testing.assert_allclose(lie, -0.3 * rows.astype(float).mean(0), rtol=1e-6)
    assert lie.astype(float) @ rows.astype(float).mean(0) < 0


def test_every_float_section_is_lied_in_and_counters_stay_the_attackers_own():
    rows = RNG.normal(size=(3, 4)).astype(np.float32)
    seen = sight(rows, **{CONTROL: 2 * rows, BUFFERS: rows[:, :2], COUNTERS: np.full((3, 1), 5.0)})
    lies = Ipm(epsilon=1).plot(seen, {})
    assert set(lies) == {DELTA, CONTROL, BUFFERS}
    own = update(np.ones(4), weight=6, client=9, metrics={"train_loss": 0.5},
                 **{CONTROL: np.ones(4), BUFFERS: np.ones(2), COUNTERS: [8.0]})  # fmt: skip
    sent = Ipm(epsilon=1).tell(own, Attacker(9, 3, 10, 11, told=lies))
    for name, lie in lies.items():
        np.testing.assert_array_equal(sent.sections[name].vector, lie)
    assert sent.sections[COUNTERS].vector.tolist() == [8.0]
    assert (sent.weight, sent.members, sent.metrics) == (6, (9,), {"train_loss": 0.5})


def test_an_attacker_that_was_told_nothing_sends_its_own_update():
    own = update(np.ones(4), client=9)
    np.testing.assert_array_equal(
        Ipm().tell(own, Attacker(9, 1, 10, 0)).delta.vector, own.delta.vector
    )


def test_long_vectors_are_worked_at_in_blocks_that_cover_them_once():
    rows = list(RNG.normal(size=(3, 800_000)).astype(np.float32))
    parts = [part for part, block in blocks(rows) if block.dtype == np.float64]
    assert len(parts) > 2
    assert np.concatenate([np.arange(800_000)[part] for part in parts]).tolist() == list(
        range(800_000)
    )
    lie = Alie(z=1.0).craft(rows, sight([[0.0]]))
    stacked = np.stack(rows).astype(float)
    np.testing.assert_allclose(lie, stacked.mean(0) - stacked.std(0), rtol=1e-5, atol=1e-7)


def test_a_class_that_says_nothing_is_told_so():
    with pytest.raises(TypeError, match="Omniscient does not say"):
        Omniscient().plot(sight([[1.0]]), {})
