"""A server that picks a cohort of one victim and its own colluders: the client counts those of the whole roster."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.collectors.masked import Masked
from strategies.contract import Claim, ContractError
from strategies.secagg.keys import Identity
from strategies.secagg.parameters import choose
from strategies.secagg.policy import Policy, Roster, least_cohort
from tests.support.masked import Cohort, folder

IDENTITIES = {client: Identity.generate() for client in range(20)}
ROSTER = Roster({client: one.public for client, one in IDENTITIES.items()})


def picked(members, *, population=None, least=None, colluders=0.1):
    """What comes of a session with these members of the roster."""
    policies = {
        one: Policy(True, ROSTER, {one: IDENTITIES[one]}, least, colluders=colluders)
        for one in members
    }
    collector = Masked(malicious=True, population=population, colluders=colluders)
    with folder() as path:
        return Cohort(path, collector, members, policies=policies).run()


def test_a_victim_among_colluders_takes_no_part():
    outcome = picked([4, 7, 11])
    assert outcome.update is None
    assert "a cohort of 3 hides too little: 10 are asked for" in str(outcome.refusals[7])
    assert "secagg-least-cohort" in str(outcome.refusals[7])


def test_nor_where_its_operator_allows_for_small_cohorts():
    """⌊γ · 3⌋ = 0 colluders would be counted, of 2 that the roster has."""
    outcome = picked([4, 7, 11], least=3)
    assert outcome.update is None
    assert "assume fewer drop-outs or colluders" in str(outcome.refusals[7])


def test_half_of_the_roster_sums_where_the_server_counts_the_same_colluders():
    outcome = picked(range(10), population=20)
    assert outcome.update.members == tuple(range(10))
    assert outcome.session._terms.quorum == (10 + 2) // 2 + 1


def test_a_server_that_counts_those_of_the_cohort_only_is_told_the_setting():
    outcome = picked(range(10))
    assert outcome.update is None
    said = str(outcome.refusals[3])
    assert "collector.colluders = 0.1 of a roster of 20" in said


@settings(deadline=None)
@given(st.integers(3, 60), st.integers(0, 60), st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.5, 0.9]))
def test_no_cohort_of_a_population_counts_fewer_than_all_who_collude(members, more, part):
    population = members + more
    colluding = min(int(part * population + 1e-9), members - 1)
    try:
        found = choose(members, dropouts=0.0, colluders=part, malicious=True, population=population)
    except ValueError:  # there is no such protocol
        assert (members + colluding) // 2 + 1 > members or colluding >= members // 2
        return
    assert 2 * found.quorum - members > colluding
    assert found.threshold > min(colluding, found.degree) or found.colluders_near < found.threshold
    assert found.least_honest >= 1


def test_the_default_least_cohort_is_half_of_the_roster():
    assert [least_cohort(size) for size in (0, 3, 6, 7, 100)] == [3, 3, 3, 4, 50]
    assert Policy().least_members == 3
    assert Policy(True, ROSTER).least_members == 10
    assert Policy(True, ROSTER, {}, 4).least_members == 4


@pytest.mark.parametrize(
    ("claim", "masked"),
    [
        (Claim(cohort=9), Masked(malicious=True, population=20)),
        (Claim(cohort=20), Masked(malicious=True, population=20, groups=3, colluders=0.0)),
        (Claim(cohort=8), Masked(least_cohort=9)),
    ],
)
def test_a_cohort_that_all_clients_would_refuse_is_refused_by_the_contract(claim, masked):
    with pytest.raises(ContractError, match=r"raise sampler\.fraction") as told:
        masked.check(claim)
    assert "secagg-least-cohort" in told.value.instead


def test_a_cohort_of_half_passes_and_says_whom_it_counts():
    masked = Masked(malicious=True, population=20)
    masked.check(Claim(cohort=10))
    assert "10% of 20 collude" in masked.describe(10)
    # Against a server that follows the protocol the draw is a draw.
    assert Masked(population=20).plan(10) == Masked().plan(10)
