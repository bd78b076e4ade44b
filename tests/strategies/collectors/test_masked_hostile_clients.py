"""The server's half against clients that lie: a bad reply is its author's drop-out, and nothing else is ever raised."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.records import bundle
from strategies.secagg.keys import KEY_BYTES
from strategies.secagg.statements import POINT_BYTES
from strategies.secagg.terms import SECAGG
from strategies.wire import Refused, pack, unpack
from tests.support.masked import Cohort, Outcome, altered, at, cohort, said

SEMI, HARD = "semi-honest", "malicious"
HUGE = 2**80
ROW = POINT_BYTES + KEY_BYTES


def array(values: np.ndarray | Array) -> Any:
    """The upload replaced."""

    def change(content: RecordDict) -> RecordDict:
        one = values if isinstance(values, Array) else pack(values)
        return bundle({**dict(content.items()), "upload": ArrayRecord({"masked": one})})

    return change


def put(**values: Any) -> Any:
    return lambda content: altered(content, **values)


def record_without(name: str) -> Any:
    return lambda content: bundle({k: v for k, v in content.items() if k != name})


def uploads(number: int) -> np.ndarray:
    return np.zeros(number, np.uint32)


LOW = bytes(KEY_BYTES)
"""A public key of low order: every pair agrees with it on zero."""

ROWS = [
    (SEMI, "keys", put(keys=b""), "malformed"),
    (SEMI, "keys", put(keys="text"), "malformed"),
    (SEMI, "keys", put(keys=None), "malformed"),
    (SEMI, "keys", put(keys=LOW + b"\x09" + bytes(31)), "malformed"),
    (SEMI, "keys", put(keys=b"\x09" + bytes(31) + LOW), "malformed"),
    (SEMI, "keys", record_without(SECAGG), "missing"),
    (HARD, "keys", put(drawn=[0, 1, 2, 3]), "neighbours"),
    (HARD, "keys", put(drawn=[0, 1, 3]), "neighbours"),
    (HARD, "keys", put(drawn=[0, 1, 3, 9]), "neighbours"),
    (HARD, "keys", put(drawn=[4, 3, 1, 0]), "malformed"),
    (HARD, "keys", put(drawn=[0, 1, 3, HUGE]), "malformed"),
    (HARD, "keys", put(drawn=None), "malformed"),
    (HARD, "keys", put(signature=b"x"), "malformed"),
    (SEMI, "shares", put(to=[0, 1, 3]), "neighbours"),
    (SEMI, "shares", put(to=[0, 1, 3, 4, 9]), "neighbours"),
    (SEMI, "shares", put(to=[0, 1, 2, 3, 4]), "neighbours"),
    (SEMI, "shares", put(to=[4, 3, 1, 0]), "malformed"),
    (SEMI, "shares", put(to=HUGE), "malformed"),
    (SEMI, "shares", put(sealed=b"short"), "malformed"),
    (SEMI, "shares", put(commitment=b"short"), "malformed"),
    (SEMI, "shares", put(commitment=[1.5]), "malformed"),
    (SEMI, "shares", record_without(SECAGG), "missing"),
    (SEMI, "upload", array(np.zeros(10, np.int64)), "shape"),
    (SEMI, "upload", array(np.zeros(10, np.float32)), "shape"),
    (SEMI, "upload", array(uploads(9)), "shape"),
    (SEMI, "upload", array(uploads(11)), "shape"),
    (SEMI, "upload", array(uploads(10).reshape(2, 5)), "shape"),
    (SEMI, "upload", array(uploads(10).astype(">u4")), "dtype"),
    (SEMI, "upload", array(Array("uint32", (10,), "numpy.ndarray", bytes(40))), "malformed"),
    (SEMI, "upload", record_without("upload"), "missing"),
    (SEMI, "upload", record_without(SECAGG), "missing"),
    (SEMI, "upload", put(layouts=["0" * 16]), "shape"),
    (SEMI, "upload", put(layouts=None), "shape"),
    (HARD, "upload", put(included=b""), "malformed"),
    (HARD, "upload", put(included=None), "malformed"),
    (HARD, "agree", put(signature=b""), "malformed"),
    (HARD, "agree", put(signature=7), "malformed"),
    (SEMI, "unmask", put(seeds=b""), "malformed"),
    (SEMI, "unmask", put(seeds=[1]), "malformed"),
    (SEMI, "unmask", put(masking=b"x"), "malformed"),
    (SEMI, "unmask", record_without(SECAGG), "missing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "step", "change", "reason"), ROWS, ids=[f"{r[1]}-{n}" for n, r in enumerate(ROWS)]
)
def test_a_bad_reply_is_a_drop_out_and_the_others_sum_is_exact(mode, step, change, reason):
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(reply=at(step, 2, change))
        assert outcome.refusals[2].reason == reason
        left = [0, 1, 3, 4] if step in ("keys", "shares", "upload") else range(5)
        expected = clients.sum_of(clients.terms(outcome), left)
        np.testing.assert_array_equal(outcome.ring, expected)


def spoilt(content: RecordDict, *names: str, place: int = -1) -> RecordDict:
    """The last byte of a reply's values changed."""
    changes = {}
    for name in names:
        data = bytearray(said(content)[name])
        data[place] ^= 1
        changes[name] = bytes(data)
    return altered(content, **changes)


def test_wrong_shares_are_noticed_and_others_taken():
    """A liar's shares of a survivor's seed and of a drop-out's masking key are wrong; one more came of each."""
    with cohort(5) as clients:
        lie = at("unmask", 1, lambda c: spoilt(c, "seeds", "masking"))
        outcome = clients.run(lost={"upload": [3]}, reply=lie)
        expected = clients.sum_of(clients.terms(outcome), [0, 1, 2, 4])
        np.testing.assert_array_equal(outcome.ring, expected)


@pytest.mark.parametrize("name", ["seeds", "masking"])
def test_a_wrong_share_that_no_other_replaces_voids_the_session(name):
    with cohort(5) as clients:
        lie = at("unmask", 1, lambda c: spoilt(c, name))
        outcome = clients.run(lost={"upload": [3], "unmask": [0]}, reply=lie)
        owner = {"seeds": 4, "masking": 3}[name]
        assert outcome.update is None
        assert outcome.void == (
            f"after the phase unmask the shares of a secret of client {owner} do not fit: one is wrong"
        )


def test_a_share_under_another_point_counts_for_nothing():
    """Points are the server's own reckoning: a reply can't overwrite what another holder gave."""
    with cohort(5) as clients:
        other = at("unmask", 1, lambda c: spoilt(c, "seeds", place=POINT_BYTES - 1))
        outcome = clients.run(reply=other)
        expected = clients.sum_of(clients.terms(outcome), range(5))
        np.testing.assert_array_equal(outcome.ring, expected)
    with cohort(5) as clients:
        # Client 1's first row is of client 0's seed; with two others gone it is one share too few.
        other = at("unmask", 1, lambda c: spoilt(c, "seeds", place=POINT_BYTES - 1))
        outcome = clients.run(lost={"unmask": [3, 4]}, reply=other)
        assert "2 shares came of a secret of client 0" in outcome.void


def test_a_wrong_commitment_voids_the_session():
    with cohort(5) as clients:
        outcome = clients.run(reply=at("shares", 2, lambda c: spoilt(c, "commitment")))
        assert "shares of a secret of client 2 do not fit" in outcome.void


def test_sealed_shares_that_do_not_open_are_refused_by_those_they_are_for():
    """The liar is one of those who then remain; the rest no longer suffices, and nothing was revealed."""
    with cohort(5) as clients:
        outcome = clients.run(reply=at("shares", 2, lambda c: altered(c, sealed=bytes(4 * 82))))
        assert {one for one, r in outcome.refusals.items() if "changed on its way" in str(r)} == {
            0, 1, 3, 4,
        }  # fmt: skip
        assert "1 of 5 clients are left" in outcome.void


def test_keys_that_are_not_signed_keep_their_author_from_masking():
    with cohort(5, mode=HARD) as clients:
        outcome = clients.run(reply=at("keys", 2, lambda c: spoilt(c, "signature")))
        assert all("keys of client 2" in str(outcome.refusals[one]) for one in (0, 1, 3, 4))


@pytest.mark.parametrize("forged", [1, 3])
def test_forged_signatures_on_the_survivors_open_nothing_below_the_quorum(forged):
    with cohort(5, mode=HARD) as clients:

        def forge(step: str, client: int, content: RecordDict) -> RecordDict:
            return spoilt(content, "signature") if step == "agree" and client < forged else content

        outcome = clients.run(reply=forge)
        if forged == 1:
            assert outcome.update.members == (0, 1, 2, 3, 4)
        else:
            assert outcome.update is None
            assert "2 of the survivors signed their set, 3 must" in str(outcome.refusals[4])


def test_a_sum_that_cannot_be_one_is_refused():
    """A client that sends noise in place of its masked update spoils the sum: the count shows it but once in 2³²."""
    noise = np.random.default_rng(0).integers(0, 2**32, 10, np.uint32)
    with cohort(5) as clients:
        outcome = clients.run(reply=at("upload", 2, array(noise)))
        assert outcome.update is None
        assert outcome.void.startswith("corrupt: the sum of 5 clients counts")


def test_a_masked_client_can_send_what_it_likes_within_the_limit():
    """What is not prevented: the ring's sum is of whatever was sent, and no tail gives a lie away."""
    vectors = {one: [0.0] * 4 for one in range(5)} | {2: [1e30, -1e30, 1.0, 0.0]}
    with cohort(5, vectors=vectors, limit=1.0) as clients:
        np.testing.assert_allclose(
            clients.run().update.delta.vector, [0.2, -0.2, 0.2, 0], atol=1e-8
        )


def test_a_modified_client_moves_the_sum_by_whatever_the_ring_holds():
    """What is not prevented: a number added under the masks, far past the limit of one client, is in the sum."""

    def push(content: RecordDict) -> RecordDict:
        vector = np.array(unpack(content["upload"]["masked"]))
        vector[:1] += np.uint32(2**30)  # half of what is left of the ring's range, n · limit
        return array(vector)(content)

    with cohort(5, vectors={one: [0.0, 0.0] for one in range(5)}, limit=1.0) as clients:
        update = clients.run(reply=at("upload", 2, push)).update
        np.testing.assert_allclose(update.delta.vector, [0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vectors": {one: [np.nan if one == 2 else 0.0] for one in range(5)}}, "not_finite"),
        ({"weights": {0: 1, 1: 1, 2: 0, 3: 1, 4: 1}, "max_weight": 4}, "num_examples"),
        ({"weights": {0: 1, 1: 1, 2: np.nan, 3: 1, 4: 1}, "max_weight": 4}, "num_examples"),
    ],
)
def test_an_update_that_cannot_be_summed_stays_at_home(options, words):
    with cohort(5, **options) as clients:
        outcome = clients.run()
        assert words in str(outcome.refusals[2])
        assert outcome.update.members == (0, 1, 3, 4)


@pytest.mark.parametrize("terms", [{"max_weight": 1e300}, {"limit": 5e-324}])
def test_terms_with_no_room_in_the_ring_are_refused_by_the_clients(terms):
    with cohort(5) as clients:
        outcome = clients.run(
            request=lambda step, _, told: altered(told, **terms) if step == "keys" else told
        )
        assert all("range: " in str(refused) for refused in outcome.refusals.values())
        assert "after the phase upload 0 of 5 clients are left" in outcome.void


VALUES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
    | st.binary(max_size=400) | st.lists(st.integers(-2, 2**64 - 1), max_size=6)
    | st.lists(st.text(max_size=3), max_size=3) | st.lists(st.floats(), max_size=3)
)  # fmt: skip


@settings(max_examples=30)
@given(data=st.data())
def test_no_reply_of_any_shape_stops_the_server(data):
    mode = data.draw(st.sampled_from([SEMI, HARD]), "mode")
    values = data.draw(st.lists(VALUES, min_size=5, max_size=5), "values")
    liars = data.draw(st.sets(st.integers(0, 4), max_size=2), "liars")
    with cohort(5, mode=mode) as clients:
        step = data.draw(st.sampled_from(clients.steps), "step")

        def lie(now: str, client: int, content: RecordDict) -> RecordDict:
            if now != step or client not in liars:
                return content
            return altered(content, **dict.fromkeys(said(content), values[client]))

        outcome = clients.run(reply=lie)
        ended(clients, outcome)


def ended(clients: Cohort, outcome: Outcome) -> None:
    """A session ends with an exact sum or a reason."""
    assert outcome.session.done
    if outcome.void is None:
        members = outcome.update.members
        expected = clients.sum_of(clients.terms(outcome), members)
        np.testing.assert_array_equal(outcome.ring, expected)
    assert all(isinstance(refused, Refused) for refused in outcome.refusals.values())
