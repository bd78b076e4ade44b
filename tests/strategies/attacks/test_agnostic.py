"""Min-Max and Min-Sum keep their constraint for the very vector that is sent, and use the room that it leaves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from strategies.attacks import MinMax, MinSum, Sight
from strategies.attacks.agnostic import largest
from tests.support.updates import update

DIRECTIONS = ["std", "unit", "sign"]
RNG = np.random.default_rng(8)
SIGHT = Sight([update([0.0])], (4, 5), 1, 0)

shapes = st.tuples(st.integers(1, 7), st.integers(1, 9))
values = st.floats(-1e3, 1e3, width=32)
swarms = st.one_of(
    shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=values)),
    # Vectors so near to each other that float32 itself is what keeps them apart.
    shapes.flatmap(
        lambda shape: arrays(
            np.float32, shape, elements=st.floats(100, np.float32(100.001), width=32)
        )
    ),
)


def squares(rows, others):
    """Squared distances in float64, plainly."""
    first, second = np.asarray(rows, float), np.asarray(others, float)
    return ((first[:, None] - second) ** 2).sum(-1)


def within(attack, rows, lie) -> bool:
    among, off = squares(rows, rows), squares(rows, [lie])[:, 0]
    if isinstance(attack, MinMax):
        return bool(off.max() <= among.max())
    return bool(off.sum() <= among.sum(1).max())


@pytest.mark.parametrize("kind", [MinMax, MinSum])
@given(rows=swarms, direction=st.sampled_from(DIRECTIONS))
def test_the_constraint_holds_for_what_is_sent(kind, rows, direction):
    attack = kind(direction=direction)
    lie = attack.craft(list(rows), SIGHT)
    assert lie.dtype == np.float32
    assert within(attack, rows, lie)


@pytest.mark.parametrize("kind", [MinMax, MinSum])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_perturbation_is_the_papers_and_no_larger_one_would_do(kind, direction):
    attack = kind(direction=direction)
    rows = RNG.normal(1.0, 0.4, size=(9, 40)).astype(np.float32)
    lie = attack.craft(list(rows), SIGHT)
    exact = rows.astype(float)
    mean = exact.mean(0)
    push = {
        "std": -exact.std(0), "unit": -mean / np.linalg.norm(mean), "sign": -np.sign(mean)
    }[direction]  # fmt: skip
    gammas = (lie - mean) / push
    gamma = gammas.mean()
    np.testing.assert_allclose(gammas, gamma, rtol=1e-3)
    assert gamma > 0.1
    assert not within(attack, rows, mean + (gamma + 5e-5) * push)


@pytest.mark.parametrize("kind", [MinMax, MinSum])
def test_honest_clients_that_agree_are_copied(kind):
    row = RNG.normal(size=6).astype(np.float32)
    for rows in ([row], [row, row.copy(), row.copy()]):
        np.testing.assert_array_equal(kind().craft(rows, SIGHT), row)


def test_min_sum_stays_closer_than_min_max():
    rows = list(RNG.normal(size=(8, 50)).astype(np.float32))
    mean = np.mean(rows, axis=0)
    far, near = (np.linalg.norm(kind().craft(rows, SIGHT) - mean) for kind in (MinMax, MinSum))
    assert near < far


def test_the_distances_of_many_blocks_add_up():
    rows = list(RNG.normal(size=(4, 600_000)).astype(np.float32))
    attack = MinMax()
    assert within(attack, rows, attack.craft(rows, SIGHT))


@given(st.floats(0, 19.9), st.floats(1e-6, 1e-2))
def test_the_search_halves_its_way_to_the_limit(limit, tolerance):
    found = largest(lambda gamma: gamma <= limit, 10.0, tolerance)
    assert limit - 2 * tolerance <= found <= limit


def test_the_search_finds_nothing_where_nothing_holds():
    assert largest(lambda gamma: False, 10.0, 1e-5) == 0.0
