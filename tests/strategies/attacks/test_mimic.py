"""The mimic attack learns the direction of the greatest variance and copies the honest client that keeps it."""

import numpy as np
import pytest

from strategies.attacks import Mimic, Sight
from strategies.seeds import generator
from strategies.update import COUNTERS, DELTA
from tests.support.updates import update

SIZE, SEED = 12, 3
RNG = np.random.default_rng(2)
AXIS = np.eye(SIZE)[4]


def deltas(clients=6, spread=3.0, noise=0.2):
    """Updates that differ along one axis, client 5 furthest out, plus noise."""
    places = np.linspace(-0.5, 1.0, clients)[:, None] * spread
    return (places * AXIS + noise * RNG.normal(size=(clients, SIZE))).astype(np.float32)


def sight(rows, round_number=1, clients=None):
    clients = range(len(rows)) if clients is None else clients
    honest = [update(row, client=client) for row, client in zip(rows, clients, strict=True)]
    return Sight(honest, (20, 21), round_number, SEED)


def test_the_state_follows_the_stated_recursion():
    attack, memory = Mimic(warmup=3), {}
    mean, z = np.zeros(SIZE), generator(SEED, "mimic").standard_normal(SIZE)
    scores = np.zeros(6)
    for t in (1, 2, 3):
        rows = deltas()
        exact = rows.astype(float)
        mean = mean + (exact.mean(0) - mean) / t
        step = sum((row - mean) @ z * (row - mean) for row in exact)
        z = (1 - 1 / t) * z + step / np.linalg.norm(step) / t
        z /= np.linalg.norm(z)
        scores += exact @ z
        lie = attack.plot(sight(rows, t), memory)[DELTA]
        np.testing.assert_allclose(memory["mean"], mean)
        np.testing.assert_allclose(memory["direction"], z)
        np.testing.assert_array_equal(lie, rows[np.argmax(np.abs(scores))])
    before = {
        name: np.copy(value) for name, value in memory.items() if isinstance(value, np.ndarray)
    }
    attack.plot(sight(deltas(), 4), memory)
    for name, value in before.items():
        np.testing.assert_array_equal(memory[name], value)


def test_after_the_warm_up_one_client_is_copied_whatever_it_sends():
    attack, memory = Mimic(warmup=4), {}
    for t in range(1, 5):
        attack.plot(sight(deltas(), t), memory)
    assert abs(memory["direction"] @ AXIS) > 0.9
    for t in range(5, 9):
        rows = RNG.normal(size=(6, SIZE)).astype(np.float32)
        np.testing.assert_array_equal(attack.plot(sight(rows, t), memory)[DELTA], rows[5])


def test_a_round_without_that_client_has_the_next_one_copied():
    attack, memory = Mimic(warmup=2), {}
    for t in (1, 2):
        attack.plot(sight(deltas(), t), memory)
    rows = deltas()
    lie = attack.plot(sight(rows[:5], 3), memory)[DELTA]
    np.testing.assert_array_equal(lie, rows[4])


def test_clients_that_the_warm_up_never_met_count_by_what_they_send_now():
    attack, memory = Mimic(warmup=1), {}
    attack.plot(sight(deltas(), 1), memory)
    z = memory["direction"]
    rows = np.stack([0.1 * z, -9.0 * z]).astype(np.float32)
    lie = attack.plot(sight(rows, 2, clients=[30, 31]), memory)[DELTA]
    np.testing.assert_array_equal(lie, rows[1])


def test_the_whole_update_is_copied_but_for_counters():
    honest = [update([1.0, 2.0], client=0, **{COUNTERS: [3.0]}, control=[4.0, 5.0])]
    lies = Mimic().plot(Sight(honest, (1,), 1, 0), {})
    assert set(lies) == {DELTA, "control"}
    assert lies["control"].tolist() == [4.0, 5.0]


def test_honest_clients_that_agree_leave_the_direction_where_it_was():
    memory = {}
    Mimic().plot(sight(np.ones((3, SIZE))), memory)
    assert np.linalg.norm(memory["direction"]) == pytest.approx(1)
