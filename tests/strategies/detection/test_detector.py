"""Flags: on synthetic rounds with a known common direction, so that rates can be stated."""

import numpy as np
import pytest

from strategies.detection import Detector
from strategies.detection.detector import LEAST_UPDATES
from strategies.detection.scores import grams, score
from strategies.update import DELTA, Layout, Section, Update

LAYOUT = Layout(("weight",), ((40, 50),))
ROUNDS = 100


def judged(detector: Detector, rows) -> dict[int, list[str]]:
    updates = [
        Update({DELTA: Section(np.asarray(row, np.float32), LAYOUT)}, 1.0, (client,), 0)
        for client, row in enumerate(rows)
    ]
    return detector.judge(range(len(rows)), score(grams(updates)))


def honest(rng, n: int = 20, signal: float = 1.0, skew: float = 0.25):
    """A common direction, noise of each client's own of length 1, lengths that differ by a factor of e^skew."""
    common = rng.standard_normal(LAYOUT.size) / np.sqrt(LAYOUT.size)
    own = rng.standard_normal((n, LAYOUT.size)) / np.sqrt(LAYOUT.size)
    return (signal * common + own) * np.exp(rng.normal(0, skew, (n, 1)))


def rates(lie, n: int = 20, liars: int = 1, **keywords) -> tuple[float, float]:
    """Shares of liars' and of honest updates that are flagged, over 100 rounds of a new detector each ten."""
    found = flagged = 0
    for number in range(ROUNDS):
        rng = np.random.default_rng(number)
        if number % 10 == 0:
            detector = Detector()
        rows = honest(rng, n, **keywords)
        for client in range(liars):
            rows[client] = lie(rows[client], rows, rng)
        flags = judged(detector, rows).keys()
        found += sum(client < liars for client in flags)
        flagged += sum(client >= liars for client in flags)
    return found / (liars * ROUNDS or 1), flagged / ((n - liars) * ROUNDS)


def towards(row, rows, rng):
    """One direction for all who lie, at an honest length, with a little noise."""
    direction = np.random.default_rng(7).standard_normal(row.size)
    return np.linalg.norm(row) * (
        direction / np.linalg.norm(direction) + 0.005 * rng.standard_normal(row.size)
    )


LIES = {
    "scaling": lambda row, rows, rng: 1000 * row,
    "sign flip": lambda row, rows, rng: -row,
    "gaussian": lambda row, rows, rng: rng.standard_normal(row.size),
    "zero": lambda row, rows, rng: 0 * row,
    "model replacement": lambda row, rows, rng: 20 * row,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_single_liar_of_twenty_is_found_in_95_rounds_of_100_and_few_others_with_it(lie):
    found, flagged = rates(lie)
    assert found >= 0.95
    assert flagged <= 0.01


@pytest.mark.parametrize("n", [5, 7, 10, 20, 50])
@pytest.mark.parametrize("signal", [1.0, 0.3, 0.0], ids=["agree", "hardly agree", "do not agree"])
def test_the_honest_are_flagged_in_one_round_of_a_hundred_at_most(n, signal):
    assert rates(None, n, liars=0, signal=signal)[1] <= 0.01


@pytest.mark.parametrize("n", [5, 7, 10])
def test_a_scaling_liar_is_found_among_few_as_well(n):
    found, flagged = rates(LIES["scaling"], n)
    assert (found, flagged <= 0.01) == (1.0, True)


def test_five_colluders_of_twenty_are_found_by_their_correlation():
    found, flagged = rates(towards, liars=5)
    assert found >= 0.95
    assert flagged <= 0.01


def test_a_copy_is_found_with_the_client_it_copies():
    rows = honest(np.random.default_rng(0))
    rows[3] = rows[11]
    flags = judged(Detector(), rows)
    assert flags.keys() == {3, 11}
    assert flags[3][0].startswith("correlation 1.00 to 1.00 with 11, at most 0.")


def test_a_majority_is_never_a_group():
    rows = honest(np.random.default_rng(0), 8)
    rows[:4] = rows[0]
    assert judged(Detector(), rows) == {}
    assert judged(Detector(), np.repeat(rows[:1], 8, axis=0)) == {}


def test_reasons_have_the_numbers_of_the_client_and_of_the_others():
    rows = honest(np.random.default_rng(0))
    rows[2] *= 100
    rows[5] *= -1
    rows[9] = 0
    flags = judged(Detector(), rows)
    assert flags.keys() == {2, 5, 9}
    assert flags[2][0].startswith("excess ")
    assert "norm 1" in flags[2][0]
    assert "others' " in flags[2][0]
    assert any(reason.startswith("agreement -0.") for reason in flags[5])
    assert flags[9][0].startswith("norm 0, others' ")


def test_one_wild_round_is_not_held_against_a_client_in_the_next():
    detector = Detector()
    rng = np.random.default_rng(0)
    for number in range(6):
        rows = honest(rng)
        if number == 3:
            rows[1] *= 30
        assert (1 in judged(detector, rows)) == (number == 3)


def test_fewer_than_five_are_not_judged():
    rows = honest(np.random.default_rng(0), LEAST_UPDATES - 1)
    rows[0] *= 1e6
    assert judged(Detector(), rows) == {}


def test_a_detector_that_is_taken_up_judges_as_the_one_that_went_on():
    rng = np.random.default_rng(5)
    one = Detector()
    for _ in range(3):
        judged(one, honest(rng, signal=0.4))
    other = Detector()
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    rows = honest(rng, signal=0.4)
    assert judged(one, rows) == judged(other, rows)
    other.forget(4)
    assert "4" not in other.state_dict()["excess"]
    with pytest.raises(ValueError, match="an average should have a total and a weight"):
        other.load_state_dict({**one.state_dict(), "excess_spread": {"total": 1}})
