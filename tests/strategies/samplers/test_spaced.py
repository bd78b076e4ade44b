"""Whatever happens, no client is asked too often or too early; and what DP-FTRL charges covers every such schedule."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.services.checkpoint import dump, read
from strategies.contract import Claim, ContractError
from strategies.privacy.banded import BandedToeplitz
from strategies.protocols import Persistent
from strategies.samplers import Spaced


def draw(sampler: Spaced, clients, number: int = 1, attempt: int = 0, seed: int = 0) -> list[int]:
    return sampler.draw(clients, seed=seed, round_number=number, attempt=attempt)


rosters = st.sets(st.integers(0, 14), max_size=15).map(sorted)
lives = st.lists(st.tuples(rosters, st.integers(1, 3)), min_size=1, max_size=30)
"""Rounds: who is there, and how many attempts it takes."""


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 5),
    lives,
    st.integers(0, 2**63 - 1),
)
def test_nobody_is_asked_too_often_or_too_early_and_cohorts_are_as_large_as_that_allows(
    participations, separation, fraction, minimum, life, seed
):
    sampler = Spaced(participations, separation, fraction, minimum)
    asked = defaultdict(list)
    for number, (there, attempts) in enumerate(life, 1):
        for attempt in range(attempts):
            free = [
                client
                for client in there
                if len(asked[client]) < participations
                and (not asked[client] or number - asked[client][-1] >= separation)
            ]
            cohort = draw(sampler, there, number, attempt, seed)
            assert cohort == sorted(set(cohort))
            assert set(cohort) <= set(free)
            assert len(cohort) == min(len(free), sampler.cohort(len(there)))
            assert all(type(client) is int for client in cohort)
            for client in cohort:
                asked[client].append(number)
    everyone = range(15)
    over = all(len(asked[client]) == participations for client in everyone)
    assert sampler.exhausted(everyone) == over


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), lives, st.integers(0, 9))
def test_no_client_of_any_run_changes_more_than_is_charged(
    participations, separation, bands, life, seed
):
    """Sampler and matrix together: the norm of C·u of each client's rounds, for every prefix."""
    sampler = Spaced(participations, separation, 0.5)
    matrix = BandedToeplitz(min(bands, separation))
    taking_part = np.zeros((len(life), 15))
    for number, (there, attempts) in enumerate(life, 1):
        for attempt in range(attempts):
            taking_part[number - 1, draw(sampler, there, number, attempt, seed)] += 1
    coefficients = matrix.coefficients()
    changed = np.array([np.convolve(column, coefficients)[: len(life)] for column in taking_part.T])
    for rounds in range(1, len(life) + 1):
        largest = np.linalg.norm(changed[:, :rounds], axis=1).max()
        assert largest <= matrix.sensitivity(rounds, participations, separation) + 1e-12


@given(st.integers(1, 3), st.integers(1, 5), lives, st.integers(0, 30), st.integers(0, 4), lives)
def test_each_process_keeps_the_bounds_though_checkpoints_lack_rounds(
    participations, separation, before, kept, back, after
):
    """A run is killed; the next process has any older checkpoint, and each is charged for itself."""
    first = Spaced(participations, separation)
    saved, number = first.state_dict(), 0
    for number, (there, _) in enumerate(before, 1):
        draw(first, there, number)
        if number <= kept:
            saved = first.state_dict()
    second = Spaced(participations, separation)
    second.load_state_dict(saved)
    counts = dict(zip(saved["clients"].tolist(), saved["times"].tolist(), strict=True))
    asked = defaultdict(list)
    begin = max(1, min(kept, number) + 1 - back)
    for number, (there, attempts) in enumerate(after, begin):
        for attempt in range(attempts):
            for client in draw(second, there, number, attempt):
                asked[client].append(number)
    for client, rounds in asked.items():
        assert len(rounds) <= participations - counts.get(client, 0)
        assert all(np.diff(rounds) >= separation)


def test_a_state_that_is_loaded_takes_nothing_back():
    """An older checkpoint in the same process, as by a roll-back: what was asked since still counts."""
    sampler = Spaced(2, 3)
    old = sampler.state_dict()
    assert draw(sampler, [1, 2], 1) == [1, 2]
    sampler.load_state_dict(old)
    assert draw(sampler, [1, 2], 2) == []
    other = Spaced(2, 3)
    assert draw(other, [2, 5], 4) == [2, 5]
    sampler.load_state_dict(other.state_dict())
    assert draw(sampler, [1, 2, 5], 6) == [1]
    assert draw(sampler, [1, 2, 5], 7) == [2, 5]
    assert sampler.exhausted([1, 2, 5])


def test_a_round_number_that_goes_back_keeps_clients_away():
    sampler = Spaced(5, 3)
    assert draw(sampler, [1], 10) == [1]
    assert [draw(sampler, [1], number) for number in range(4, 14)] == [[]] * 9 + [[1]]


def test_a_state_lasts_through_a_checkpoint(tmp_path):
    sampler = Spaced(3, 2, 0.5)
    assert isinstance(sampler, Persistent)
    for number in range(1, 7):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(dump(sampler.state_dict()))  # the first one is empty
        other = Spaced(3, 2, 0.5)
        other.load_state_dict(read(path))
        cohort = draw(sampler, range(10), number, seed=7)
        assert draw(other, range(10), number, seed=7) == cohort
        assert len(cohort) == 5


def test_those_asked_least_come_first_so_that_participations_last():
    """7 clients twice each, 3 a round, 2 rounds apart: 14 places in 5 rounds, none of them lost to bad luck."""
    for seed in range(20):
        sampler = Spaced(2, 2, fraction=3 / 7)
        sizes = [len(draw(sampler, range(7), number, seed=seed)) for number in range(1, 7)]
        assert sizes == [3, 3, 3, 3, 2, 0]


def test_the_order_is_of_the_seed_the_round_and_the_attempt():
    first = draw(Spaced(1, 1, 0.1), range(100))
    assert draw(Spaced(1, 1, 0.1), range(100)) == first
    assert draw(Spaced(1, 1, 0.1), range(100), seed=1) != first
    assert draw(Spaced(1, 1, 0.1), range(100), 2) != first
    assert draw(Spaced(1, 1, 0.1), range(100), attempt=1) != first


def test_a_client_that_is_listed_twice_is_asked_once():
    assert draw(Spaced(2, 1), [4, 4, 6]) == [4, 6]


def test_a_run_is_over_when_everybody_has_had_their_turns_and_not_when_nobody_is_there():
    sampler = Spaced(1, 5)
    draw(sampler, [1, 2])
    assert sampler.exhausted([1, 2])
    assert not sampler.exhausted([1, 2, 3])
    assert not sampler.exhausted([])


def test_the_contract_is_told_how_often_and_how_far_apart_and_nothing_of_chance():
    claim = Spaced(3, 10, 0.1, population=200).check(Claim())
    assert (claim.sampling, claim.cohort) == ("uncontrolled", 20)
    assert (claim.participations, claim.separation) == (3, 10)
    assert claim.source("participations") == claim.source("separation") == "sampler=spaced"
    assert Spaced(3, 10, 0.1).check(Claim()).cohort is None


def test_cohorts_that_can_never_all_be_whole_are_refused():
    with pytest.raises(ContractError, match=r"set sampler\.separation=9 at most") as told:
        Spaced(3, 10, 0.11, population=100).check(Claim())
    assert "10 cohorts of 11 have no client in common, and there are 100 clients" in str(told.value)
    assert (told.value.first, told.value.second) == ("sampler.fraction", "sampler.separation")
    assert Spaced(3, 9, 0.11, population=100).check(Claim()).cohort == 11


GOOD = {name: np.array([1], np.int64) for name in ("clients", "last", "times")}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"run": "00"},
        GOOD | {"last": 1},
        GOOD | {"last": np.array([1.0])},
        GOOD | {"times": np.array([[1]], np.int64)},
        GOOD | {"times": np.array([1, 2], np.int64)},
        GOOD | {"times": np.array([0], np.int64)},
        GOOD | {"last": np.array([-3], np.int64)},
    ],
)
def test_another_parts_state_is_refused(wrong):
    sampler = Spaced(2, 2)
    with pytest.raises(ValueError, match="state"):
        sampler.load_state_dict(wrong)
    assert draw(sampler, [1]) == [1]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"participations": 0}, "participations = 0"),
        ({"separation": 0}, "separation = 0"),
        ({"fraction": 0.0}, "fraction = 0.0"),
        ({"fraction": 1.1}, "fraction = 1.1"),
        ({"minimum": 0}, "minimum = 0"),
    ],
)
def test_settings_outside_their_ranges_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        Spaced(**{"participations": 1, "separation": 1} | keywords)
