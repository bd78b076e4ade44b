import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.combiners import MajorityVote
from strategies.combiners.functional import majority_vote
from strategies.contract import Claim, ContractError
from strategies.update import BUFFERS, COUNTERS, DELTA


def plainly(updates: np.ndarray) -> np.ndarray:
    """By the words: the sign of the sum of signs, times the median of the mean magnitudes."""
    votes = np.sign(np.sign(updates.astype(float)).sum(axis=0))
    return votes * np.median(np.abs(updates.astype(float)).mean(axis=1))


@given(st.integers(1, 12), st.integers(1, 50), st.integers(0, 999))
def test_the_vote_is_the_sign_of_the_sum_of_signs_times_a_median(n, d, seed):
    updates = np.random.default_rng(seed).integers(-2, 3, (n, d)).astype(np.float32)
    np.testing.assert_allclose(majority_vote(updates), plainly(updates), rtol=1e-6)


def test_many_columns_are_as_few():
    updates = np.random.default_rng(0).normal(0, 1, (9, 100_000)).astype(np.float32)
    np.testing.assert_allclose(majority_vote(updates), plainly(updates), rtol=1e-5)


@given(st.integers(0, 99))
def test_a_minority_turns_no_vote_of_agreeing_clients_and_moves_the_scale_within_theirs(seed):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1, 1], 30)
    honest = (signs * rng.uniform(0.5, 2, (4, 30))).astype(np.float32)
    liars = (-signs * 1e20 * np.ones((3, 30))).astype(np.float32)
    found = majority_vote(np.concatenate([honest, liars]), f=3)
    np.testing.assert_array_equal(np.sign(found), signs)
    scales = np.abs(honest).mean(axis=1)
    slack = 1 + 1e-6  # of float32 means
    assert scales.min() / slack <= np.abs(found[0]) <= scales.max() * slack


def test_even_votes_move_nothing():
    np.testing.assert_array_equal(majority_vote(np.float32([[1, 3], [-5, 1]])), [0, 2.5])


def test_a_majority_must_be_honest():
    with pytest.raises(ValueError, match="needs at least 5 updates and got 4"):
        majority_vote(np.ones((4, 2), np.float32), f=2)
    with pytest.raises(ContractError, match="needs at least 5 inputs"):
        MajorityVote(f=2).check(Claim(cohort=4))


def test_one_scale_is_for_the_parameters_alone():
    MajorityVote(f=0).check(Claim(sections=frozenset({DELTA, COUNTERS})))
    with pytest.raises(ContractError, match="buffers would have to share"):
        MajorityVote(f=0).check(Claim(sections=frozenset({DELTA, BUFFERS})))


def test_votes_are_by_coordinate():
    with pytest.raises(ContractError, match="clients send different coordinates"):
        MajorityVote(f=0).check(Claim(support="per_client"))
