"""Clients that are gone in any step: the survivors' sum where enough are left, else nothing, and nobody reveals."""

import numpy as np
import pytest

from strategies.collectors.masked import Masked
from strategies.protocols import Reply, Request
from strategies.secagg.terms import ID_BYTES
from strategies.wire import Refused
from tests.support.masked import MALICIOUS_STEPS, STEPS, Cohort, cohort, said

ALL = [("semi-honest", step) for step in STEPS] + [("malicious", step) for step in MALICIOUS_STEPS]
EACH_STEP = pytest.mark.parametrize(("mode", "step"), ALL)
MODES = pytest.mark.parametrize("mode", ["semi-honest", "malicious"])


@EACH_STEP
@pytest.mark.parametrize("gone", [[2], [0, 4]], ids=["one", "two"])
def test_enough_are_left_and_their_sum_is_exact(mode, step, gone):
    """n = 5, t = 3, quorum 3: two may go in any step."""
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(lost={step: gone})
        uploaded = step in ("agree", "unmask")
        survivors = [one for one in range(5) if uploaded or one not in gone]
        assert outcome.update.members == tuple(survivors)
        expected = clients.sum_of(clients.terms(outcome), survivors)
        np.testing.assert_array_equal(outcome.ring, expected)
        assert {one: refused.reason for one, refused in outcome.refusals.items()} == dict.fromkeys(
            gone, "timeout"
        )
        assert list(outcome.asked) == list(clients.steps)


def test_one_client_in_every_step():
    with cohort(9, dropouts=0.4) as clients:
        lost = {"keys": [0], "shares": [1], "upload": [2], "unmask": [3]}
        outcome = clients.run(lost=lost)
        expected = clients.sum_of(clients.terms(outcome), range(3, 9))
        np.testing.assert_array_equal(outcome.ring, expected)


@EACH_STEP
def test_too_few_are_left_and_nobody_reveals_anything(mode, step):
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(lost={step: [0, 2, 4]})
        assert outcome.update is None
        assert f"after the phase {step}" in outcome.void
        if step != "unmask":
            assert "2 of 5 clients are left, 3 are needed" in outcome.void
            assert "unmask" not in outcome.asked
        else:
            assert "2 shares came of a secret of client 0, 3 are needed" in outcome.void
        assert outcome.session.done
        assert clients.void() == outcome.session._terms.session


@EACH_STEP
def test_the_next_session_is_new_and_knows_of_the_void_one(mode, step):
    with cohort(5, mode=mode) as clients:
        void = clients.run(lost={step: [0, 2, 4]})
        again = clients.run()
        first, second = clients.terms(void), clients.terms(again)
        assert first.session != second.session
        assert said(again.of("keys", 1, "request"))["void"] == first.session
        if step != "keys":
            assert said(void.of("keys", 0))["keys"] != said(again.of("keys", 0))["keys"]
        if (mode, step) == ("malicious", "unmask"):
            # Two have given shares to a server that is not believed when it says that nothing was opened.
            assert {c: "reused" in str(r) for c, r in again.refusals.items()} == {1: True, 3: True}
            np.testing.assert_array_equal(again.ring, clients.sum_of(second, [0, 2, 4]))
        else:
            np.testing.assert_array_equal(again.ring, clients.sum_of(second, range(5)))


def test_a_shareholder_too_few_of_one_client_voids_the_session_before_the_opening():
    """Ten of a hundred may drop out; ten of one client's nineteen shareholders are one too many, and unlikely."""
    with cohort(100, dropouts=0.1) as clients:
        session = clients.open()
        terms, near = session._terms, sorted(session._neighbours[0])
        spare = len(near) + 1 - terms.threshold
        assert terms.members - terms.quorum > spare
        outcome = clients.run(session=session, lost={"upload": near[: spare + 1]})
        assert "shareholders of client" in outcome.void
        assert "unmask" not in outcome.asked


def test_the_rounds_quorum_is_the_sums():
    with cohort(5) as clients:
        clients.quorum = 5
        outcome = clients.run(lost={"upload": [3]})
        assert outcome.void == "after the phase upload 4 of 5 clients are left, 5 are needed"


@MODES
def test_who_has_revealed_is_in_no_second_sum_on_the_model(mode):
    """Whether the server is the same or restored, the clients too: their ledger is on the disk."""
    with cohort(5, mode=mode) as clients:
        clients.run()
        clients.restore()
        clients.restart()
        again = clients.run()
        assert "0 of 5 clients are left" in again.void
        assert all("reused" in str(refused) for refused in again.refusals.values())
        clients.model = {"w": clients.model["w"] + 1}
        assert clients.run().update.members == (0, 1, 2, 3, 4)


def test_a_sum_that_was_opened_on_a_model_is_the_only_one():
    """The same server, asked again, gives the sum that it has, and asks nobody."""
    with cohort(5) as clients:
        update = clients.run().update
        session = clients.collector.open(clients.job(), clients.members)
        assert session.start() == []
        assert session.expire() == [update]


def test_a_server_that_is_restored_still_says_what_was_void():
    with cohort(5) as clients:
        clients.run(lost={"unmask": [0, 1, 2]})
        clients.restore()
        assert clients.run().update.members == (0, 1, 2, 3, 4)


def test_sessions_are_void_for_their_own_model_only():
    with cohort(5) as clients:
        clients.run(lost={"keys": range(5)})
        clients.run(lost={"keys": range(5)})
        assert len(clients.void()) == 2 * ID_BYTES
        clients.model = {"w": clients.model["w"] + 1}
        clients.run()
        assert clients.void() == b""


def test_a_reply_that_was_not_asked_for_or_comes_too_late_is_refused_and_changes_nothing():
    with cohort(5) as clients:
        session = clients.open()
        first = session.start()
        answers = [clients.answer(one.client, one.content) for one in first]
        stranger = Request(9, "train", first[0].content, 1)
        with pytest.raises(Refused, match="duplicate"):  # a client that was not asked
            session.receive(Reply(stranger, answers[0]))
        events = [session.receive(Reply(r, a)) for r, a in zip(first, answers, strict=True)]
        with pytest.raises(Refused, match="duplicate"):  # a reply to an earlier phase
            session.receive(Reply(first[0], answers[0]))
        second = events[-1]
        shares = clients.answer(second[0].client, second[0].content)
        assert session.receive(Reply(second[0], shares)) == []
        with pytest.raises(Refused, match="duplicate"):  # twice in the same phase
            session.receive(Reply(second[0], shares))
        session.expire()
        assert session.done
        with pytest.raises(Refused, match="duplicate"):
            session.receive(Reply(second[1], shares))
        assert session.expire() == []


def test_a_clients_error_is_its_drop_out():
    with cohort(5) as clients:
        session = clients.open()
        requests = session.start()
        (event,) = session.receive(Reply(requests[0], None, "out of memory"))
        assert (event.client, event.refused.reason) == (0, "client_error")
        (event,) = session.receive(Reply(requests[1], None))
        assert "no reason" in event.refused.detail


def test_the_collectors_state_must_be_one():
    clients = Masked()
    with pytest.raises(ValueError, match="hex"):
        clients.load_state_dict({"run": "zz", "void": "", "model": ""})


def test_cohorts_are_sorted_and_keep_their_ids():
    with cohort(5) as clients:
        clients.members = [4, 2, 0, 1, 3]
        assert isinstance(clients, Cohort)
        assert clients.run().asked["keys"] == [0, 1, 2, 3, 4]
