"""Strikes, window, quarantine, release: whatever comes, nobody is out for good and nobody too many."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.contract import Claim, ContractError, Visibility
from strategies.detection import Quarantine
from strategies.update import DELTA, Layout, Section, Update

LAYOUT = Layout(("weight",), ((10, 10),))
NO_UPDATES: list[Update] = []


def refused(*clients: int) -> dict[int, str]:
    return dict.fromkeys(clients, "malformed")


def honest(clients, seed: int = 0) -> list[Update]:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(100)
    return [
        Update(
            {DELTA: Section(np.float32(common + 0.5 * rng.standard_normal(100)), LAYOUT)},
            1.0,
            (client,),
            0,
        )
        for client in clients
    ]


def play(
    part: Quarantine, rounds: int, liars, n: int = 10, keep: int = 1, begin: int = 1
) -> list[list[int]]:
    """Who was asked in each round, when liars' replies are refused whenever they are asked."""
    asked = []
    for number in range(begin, begin + rounds):
        cohort = part.allowed(range(n), number, keep)
        good = honest([client for client in cohort if client not in liars], number)
        part.judge(number, good, refused(*(client for client in cohort if client in liars)))
        asked.append(cohort)
    return asked


def test_three_strikes_are_followed_by_ten_rounds_then_by_twenty():
    asked = play(Quarantine(), 60, {4})
    out = [number for number, cohort in enumerate(asked, 1) if 4 not in cohort]
    assert out == [*range(4, 14), *range(17, 37), *range(40, 61)]
    assert all(set(cohort) >= set(range(10)) - {4} for cohort in asked)


def test_the_summary_says_who_why_since_when_and_until_when():
    part = Quarantine()
    play(part, 5, {4})
    assert part.summary() == [
        {
            "client": 4,
            "flags": 3,
            "first_flagged": 1,
            "last_flagged": 3,
            "last_reasons": ["refused at the door: malformed"],
            "since": 4,
            "until": 13,
            "quarantined": True,
            "times": 1,
        }
    ]
    play(part, 9, set(), begin=6)
    assert part.summary()[0] | {"since": 4, "until": 13, "quarantined": False} == part.summary()[0]


def test_strikes_must_fall_within_the_window():
    part = Quarantine(strikes=2, window=3)
    for number, flagged in enumerate([1, 0, 0, 1, 0, 0, 1], 1):
        assert part.allowed(range(10), number, 1) == list(range(10))
        part.judge(number, honest(range(10 - flagged), number), refused(*[9][:flagged]))
    assert part.allowed(range(10), 8, 1) == list(range(10))
    part.judge(8, honest(range(9)), refused(9))
    assert part.allowed(range(10), 9, 1) == list(range(9))


def test_misfortune_is_no_strike():
    part = Quarantine(strikes=1, window=1)
    part.allowed(range(10), 1, 1)
    assert part.judge(1, honest(range(8)), {8: "timeout", 9: "client_error"}) == ()
    assert part.summary() == []


def test_refusals_count_in_a_void_round_too():
    part = Quarantine(strikes=1, window=1)
    part.allowed(range(4), 1, 1)
    assert part.judge(1, NO_UPDATES, refused(2)) == (2,)
    assert part.summary()[0]["quarantined"]


def test_after_a_void_round_everybody_is_asked_once_more():
    """Liars who had honest clients shut out and then fall silent void one round, not all of them."""
    part = Quarantine(strikes=1, window=1)
    part.allowed(range(10), 1, 1)
    part.judge(1, honest(range(9)), refused(9))
    assert part.allowed(range(10), 2, 1) == list(range(9))
    part.judge(2, NO_UPDATES, {0: "timeout"})
    anew = Quarantine(strikes=1, window=1)
    anew.load_state_dict(part.state_dict())
    for each in (part, anew):
        assert each.allowed(range(10), 3, 1) == list(range(10))
    part.judge(3, honest(range(10)), {})
    assert part.allowed(range(10), 4, 1) == list(range(9))


def test_who_should_be_shut_out_and_cannot_be_is_told_of_and_stays(caplog):
    part = Quarantine()
    asked = play(part, 5, {1, 2, 3}, n=6, keep=4)
    assert [len(cohort) for cohort in asked] == [6, 6, 6, 4, 4]
    assert (
        "client 3 stays, or too few clients would be left: flagged in 3 of its last 3"
        in caplog.text
    )
    assert "client 1 is quarantined from round 4 to 13" in caplog.text
    caplog.clear()
    play(part, 1, set(), n=6, begin=14)
    assert "client 1 is out of quarantine, on probation" in caplog.text


def test_liars_cannot_have_more_than_a_share_shut_out():
    asked = play(Quarantine(max_fraction=0.25), 12, {0, 1, 2, 3, 4, 5}, n=10)
    assert min(map(len, asked)) == 10 - 2


def test_clients_come_back_early_where_nodes_are_gone(caplog):
    part = Quarantine(strikes=1, window=1)
    play(part, 1, {0, 1, 2}, n=10)
    assert part.allowed([0, 1, 2, 3], 2, 3) == [0, 1, 3]
    assert "round 2 asks 0, 1 in spite of quarantine" in caplog.text
    assert part.allowed([0, 1], 2, 5) == [0, 1]


@settings(max_examples=60)
@given(
    st.integers(2, 12), st.integers(1, 12), st.floats(0, 1), st.integers(1, 3), st.integers(0, 2),
    st.integers(1, 4), st.lists(st.sets(st.integers(0, 11)), max_size=40),
)  # fmt: skip
def test_whatever_is_refused_the_limits_hold_and_every_quarantine_ends(
    n, keep, share, strikes, more, rounds, story
):
    part = Quarantine(strikes=strikes, window=strikes + more, rounds=rounds, max_fraction=share)
    spells: dict[int, list[int]] = defaultdict(list)
    out: set[int] = set()
    for number, bad in enumerate(story, 1):
        cohort = part.allowed(range(n), number, keep)
        assert len(cohort) >= min(n, keep)
        assert n - len(cohort) <= int(share * n)
        now = set(range(n)) - set(cohort)
        for client in now - out:
            spells[client].append(0)
        for client in now:
            spells[client][-1] += 1
            assert spells[client][-1] <= rounds * 2 ** (len(spells[client]) - 1)
        out = now
        copy = Quarantine(strikes=strikes, window=strikes + more, rounds=rounds, max_fraction=share)
        copy.load_state_dict(part.state_dict())
        assert copy.state_dict() == part.state_dict()
        part.judge(number, NO_UPDATES, refused(*(bad & set(cohort))))
    last = len(story) + max((record.until or 0 for record in part.records.values()), default=0) + 1
    assert part.allowed(range(n), last, keep) == list(range(n))


def test_flags_do_not_depend_on_the_order_of_replies():
    updates = honest(range(8))
    updates[3] = Update(
        {DELTA: Section(updates[3].delta.vector * np.float32(-50), LAYOUT)}, 1.0, (3,), 0
    )
    one, other = Quarantine(), Quarantine()
    assert one.judge(1, updates, {}) == other.judge(1, updates[::-1], {}) == (3,)
    assert one.state_dict() == other.state_dict()


def test_it_needs_to_see_each_client_and_at_least_five():
    claim = Quarantine().check(Claim(cohort=5))
    assert claim.watched
    assert claim.source("watched") == "quarantine"
    for seen in (Visibility.GROUP, Visibility.SUM):
        with pytest.raises(
            ContractError, match=r"a sum of several names nobody; use quarantine=none"
        ):
            Quarantine().check(Claim(visibility=seen))
    with pytest.raises(ContractError, match="a round asks 4 in all"):
        Quarantine().check(Claim(cohort=4))


def test_more_strikes_than_rounds_that_count_are_refused():
    with pytest.raises(ValueError, match=r"Quarantine.strikes = 6: at most 5"):
        Quarantine(strikes=6)
