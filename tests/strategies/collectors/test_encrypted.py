"""Sessions of encrypted training, their replies made by hand: who is asked, what passes, and who is out for what."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies.collectors import Encrypted
from strategies.collectors.encrypted import (
    COMPUTE,
    ENCRYPTED,
    MODE,
    OWNER,
    REFUSED,
    ROLE,
    SESSION,
    TURN,
)
from strategies.collectors.turns import LAST, write_turn
from strategies.protocols import Job, Refusal, Reply, Request
from strategies.replies import write_update
from strategies.update import DELTA, EPSILON, Layout, Section, Update
from strategies.wire import ARRAYS, CONFIG, REPLY_BYTES, TRAINS, Refused, pack_model

LAYOUT = Layout(("layers.0.weight", "layers.0.bias"), ((3, 2), (3,)))
PARTY = 9
LARGE = np.uint64(1 << 63)


@dataclass
class Doubling:
    """A computing half whose answer is twice the residues, so that who got whose answer shows."""

    answered: list[int] = field(default_factory=list)

    def answer(self, client, arrays):
        if "x" not in arrays:
            raise Refused("missing", "x")
        if arrays["x"].dtype != np.uint64:
            raise Refused("dtype", "x")
        self.answered.append(client)
        return {"y": arrays["x"] - LARGE}


class Party:
    """As `Served`."""

    def __init__(self, most=10**6):
        self.begun: list[Doubling] = []
        self.most = most

    def describe(self):
        return "a toy"

    def settings(self):
        return {"encrypted.degree": 4096}

    def turn_bytes(self):
        return self.most

    def begin(self, sent):
        assert {name: array.dtype for name, array in sent.items()} == dict.fromkeys(
            LAYOUT.names, np.float32
        )
        self.begun.append(Doubling())
        return self.begun[-1]


def job_of(**settings) -> Job:
    model = {n: np.ones(s, np.float32) for n, s in zip(LAYOUT.names, LAYOUT.shapes, strict=True)}
    return Job(
        3, 7, {ARRAYS: pack_model(model)}, {"key": "value", **settings}, {1: 2}, {DELTA: LAYOUT},
        dict.fromkeys(LAYOUT.names, DELTA),
    )  # fmt: skip


def session_of(cohort, **settings):
    session = Encrypted(**{"served": Party(), **settings}).open(job_of(), cohort)
    return session, session.start()


def relay_of(cohort, **settings):
    return session_of(cohort, served=None, compute_client=PARTY, **settings)


def residues(client: int) -> np.ndarray:
    return np.full((2, 2), LARGE + np.uint64(client), np.uint64)


def turned(request: Request, *, last=False, arrays=None, **told) -> RecordDict:
    """An owner's turn."""
    receipt = {
        "client": request.client, "round": 3, "turn": request.content[CONFIG][TURN], LAST: last
    }  # fmt: skip
    sent = {"x": residues(request.client)} if arrays is None else arrays
    return write_turn(ENCRYPTED, sent, {**receipt, **told})


def computed(request: Request, arrays=None, **told) -> RecordDict:
    """What a computing client makes of an owner's turn."""
    config = request.content[CONFIG]
    assert (request.client, config[ROLE], config[TRAINS]) == (PARTY, COMPUTE, False)
    receipt = {"client": PARTY, "round": 3, "turn": config[TURN], OWNER: config[OWNER], **told}
    given_arrays = {"y": request.content[ENCRYPTED]["x"].numpy() - LARGE}
    return write_turn(ENCRYPTED, given_arrays if arrays is None else arrays, receipt)


def concluded(request: Request, value=5.0) -> RecordDict:
    delta = Section(np.full(LAYOUT.size, value, np.float32), LAYOUT)
    metrics = {"train_loss": 0.5, EPSILON: 2.0}
    update = Update({DELTA: delta}, 10.0, (request.client,), 7, metrics)
    return write_update(update, client=request.client, round_number=3)


def reply(session, request, content):
    return session.receive(Reply(request, content, None if content is not None else "killed"))


def refusals(events) -> dict[int, str]:
    return {e.client: e.refused.reason for e in events if isinstance(e, Refusal)}


def requests_of(events) -> list[Request]:
    return [event for event in events if isinstance(event, Request)]


def run(session, requests, *, turns=2):
    """Everybody's honest way to the end, in the order of their requests; what became of each."""
    waiting, became, seen = list(requests), [], []
    while waiting:
        request = waiting.pop(0)
        seen.append(request)
        config = request.content[CONFIG]
        if config.get(ROLE) == COMPUTE:
            content = computed(request)
        elif config[TRAINS]:
            content = concluded(request, float(request.client))
        else:
            content = turned(request, last=config[TURN] == turns - 1)
        events = reply(session, request, content)
        waiting += requests_of(events)
        became += [event for event in events if not isinstance(event, Request)]
    return became, seen


class TestTheServerComputes:
    def test_what_each_request_holds(self):
        session, (request,) = session_of([1], mode="strict")
        (update,), seen = run(session, [request])
        configs = [r.content[CONFIG] for r in seen]
        assert [c[TURN] for c in configs] == [0, 1, 2]
        assert [c[TRAINS] for c in configs] == [False, False, True]
        assert [c["phase"] for c in configs] == [0, 0, 1]
        assert len({c[SESSION] for c in configs}) == 1
        for config in configs:
            assert (config["client"], config["included"], config["phases"]) == (1, 2, 2)
            assert (config["server-round"], config["version"], config["key"]) == (3, 7, "value")
            assert (config[MODE], config["encrypted.degree"]) == ("strict", 4096)
            assert config[REPLY_BYTES] == 4 * LAYOUT.size
            assert ROLE not in config
        # The model goes to nobody.
        assert all(list(r.content) == [ENCRYPTED, CONFIG] for r in seen)
        assert [set(r.content[ENCRYPTED]) for r in seen] == [set(), {"y"}, {"y"}]
        np.testing.assert_array_equal(seen[2].content[ENCRYPTED]["y"].numpy(), np.ones((2, 2)))
        assert seen[2].content[ENCRYPTED]["y"].numpy().dtype == np.uint64
        assert (update.members, update.version, update.weight) == ((1,), 7, 10.0)
        np.testing.assert_array_equal(update.delta.vector, np.ones(LAYOUT.size))
        assert session.done

    def test_one_learner_serves_all_owners_of_a_session_and_none_of_another(self):
        party = Party()
        for _ in range(2):
            session, requests = session_of([0, 1, 2], served=party)
            became, _ = run(session, requests)
            assert [update.members for update in became] == [(0,), (1,), (2,)]
        assert [sorted(learner.answered) for learner in party.begun] == [[0, 0, 1, 1, 2, 2]] * 2

    def test_without_metrics_an_update_s_vector_is_all_that_is_looked_at(self):
        session, requests = session_of([1], metrics=False)
        (update,), _ = run(session, requests)
        assert (update.weight, dict(update.metrics)) == (1.0, {EPSILON: 2.0})

    def test_a_packed_reply_s_size_is_the_pipeline_s_to_say(self):
        session = Encrypted(served=Party()).open(job_of(**{REPLY_BYTES: 11}), [1])
        assert session.start()[0].content[CONFIG][REPLY_BYTES] == 11

    def test_one_that_dies_or_is_refused_is_out_and_the_others_go_on(self):
        session, (first, second, third) = session_of([0, 1, 2])
        assert refusals(reply(session, first, None)) == {0: "client_error"}
        wrong = turned(second, arrays={"x": np.zeros(3)})
        assert refusals(reply(session, second, wrong)) == {1: "dtype"}
        (update,), _ = run(session, [third])
        assert (update.members, session.done) == ((2,), True)

    @pytest.mark.parametrize("settings", [{"most_bytes_mb": 0.001}, {"served": Party(most=1000)}])
    def test_a_turn_of_too_many_bytes_is_refused(self, settings):
        session, (first, second) = session_of([0, 1], **settings)
        most = turned(first, arrays={"x": np.zeros(109, np.uint64)})
        assert sum(len(array.data) for array in most[ENCRYPTED].values()) == 1000
        assert len(requests_of(reply(session, first, most))) == 1
        beyond = turned(second, arrays={"x": np.zeros(110, np.uint64)})
        assert refusals(reply(session, second, beyond)) == {1: "too_large"}

    def test_who_comes_to_no_end_is_out(self):
        session, (request,) = session_of([0], most_turns=2)
        (request,) = reply(session, request, turned(request))
        assert refusals(reply(session, request, turned(request))) == {0: "too_large"}
        assert session.done

    def test_nobody_computes(self):
        with pytest.raises(ValueError, match="who computes"):
            Encrypted().open(job_of(), [0])

    @pytest.mark.parametrize(
        "settings", [{"mode": "both"}, {"most_turns": 0}, {"most_bytes_mb": 0.0}, {"compute_client": -1}]
    )  # fmt: skip
    def test_settings_have_ranges(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Encrypted(**settings)


class TestAClientComputes:
    def test_what_it_is_asked(self):
        session, requests = relay_of([1])
        became, seen = run(session, requests)
        asked = [r for r in seen if r.client == PARTY]
        assert [r.content[CONFIG][TURN] for r in asked] == [0, 1]
        for request in asked:
            config = request.content[CONFIG]
            assert request.kind == "train"
            assert (config[ROLE], config[OWNER], config["client"]) == (COMPUTE, 1, PARTY)
            assert (config[TRAINS], config["phase"], config["phases"]) == (False, 0, 2)
            assert (config["server-round"], config["version"], config["key"]) == (3, 7, "value")
            assert config[SESSION] == seen[0].content[CONFIG][SESSION]
            # It has the model with each turn; it may keep nothing between two.
            assert request.content[ARRAYS] is session.job.records[ARRAYS]
            np.testing.assert_array_equal(request.content[ENCRYPTED]["x"].numpy(), residues(1))
        owners = [r for r in seen if r.client == 1]
        assert all(ARRAYS not in r.content for r in owners)
        np.testing.assert_array_equal(owners[1].content[ENCRYPTED]["y"].numpy(), np.ones((2, 2)))
        assert [update.members for update in became] == [(1,)]

    @given(data=st.data())
    def test_in_whatever_order_owners_answer_each_gets_what_was_made_of_its_own(self, data):
        session, requests = relay_of([0, 1, 2, 3])
        waiting, became = list(requests), []
        while waiting:
            request = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            config = request.content[CONFIG]
            if config.get(ROLE) == COMPUTE:
                content = computed(request)
            elif config[TRAINS]:
                expected = np.full((2, 2), request.client)
                np.testing.assert_array_equal(request.content[ENCRYPTED]["y"].numpy(), expected)
                content = concluded(request)
            else:
                content = turned(request, last=config[TURN] == 1)
            events = reply(session, request, content)
            waiting += requests_of(events)
            became += [event for event in events if not isinstance(event, Request)]
            # It is asked for one owner at a time.
            assert sum(r.client == PARTY for r in waiting) <= 1
        assert sorted(update.members for update in became) == [(0,), (1,), (2,), (3,)]
        assert session.done

    def test_where_it_fails_all_who_need_it_are_out_by_its_name_and_who_does_not_goes_on(self):
        session, (first, second, third, fourth) = relay_of([0, 1, 2, 3])
        (asked,) = reply(session, first, turned(first, last=True))
        (closing,) = reply(session, asked, computed(asked))
        (asked,) = reply(session, second, turned(second))
        assert reply(session, third, turned(third)) == []  # it is at work for another
        events = reply(session, asked, None)
        assert refusals(events) == dict.fromkeys([1, 2, 3], "client_error")
        assert all(f"client {PARTY}" in e.refused.detail for e in events)
        assert not session.done
        # Whoever was asked before it failed is to blame for nothing.
        assert reply(session, fourth, turned(fourth)) == []
        with pytest.raises(Refused, match="duplicate"):
            reply(session, fourth, turned(fourth))
        (update,) = reply(session, closing, concluded(closing))
        assert (update.members, session.done) == ((0,), True)

    @pytest.mark.parametrize(
        "spoilt",
        [{"client": 0}, {"round": 2}, {"turn": 1}, {OWNER: 1}, {REFUSED: "no word!"}, {REFUSED: 3}],
        ids=str,
    )
    def test_a_reply_that_is_none_is_its_failure_and_no_owner_s(self, spoilt):
        session, (first, _) = relay_of([0, 1])
        (asked,) = reply(session, first, turned(first))
        events = reply(session, asked, computed(asked, **spoilt))
        assert refusals(events) == {0: "client_error", 1: "client_error"}
        assert session.done

    def test_it_may_refuse_one_owner_s_turn(self):
        session, (first, second) = relay_of([0, 1])
        (asked,) = reply(session, first, turned(first))
        assert reply(session, second, turned(second, last=True)) == []
        events = reply(session, asked, computed(asked, arrays={}, **{REFUSED: "too_large"}))
        assert refusals(events) == {0: "too_large"}
        (asked,) = requests_of(events)
        assert asked.content[CONFIG][OWNER] == 1
        (closing,) = reply(session, asked, computed(asked))
        (update,) = reply(session, closing, concluded(closing))
        assert (update.members, session.done) == ((1,), True)

    def test_its_answers_are_no_longer_than_an_owner_s(self):
        session, (first,) = relay_of([0], most_bytes_mb=0.001)
        (asked,) = reply(session, first, turned(first))
        long = computed(asked, arrays={"y": np.zeros(110, np.uint64)})
        assert refusals(reply(session, asked, long)) == {0: "client_error"}

    def test_an_owner_with_too_many_turns_is_out_and_the_next_one_s_turn_is_computed(self):
        session, (first, second) = relay_of([0, 1], most_turns=1)
        (asked,) = reply(session, first, turned(first))
        assert reply(session, second, turned(second, last=True)) == []
        events = reply(session, asked, computed(asked))
        assert refusals(events) == {0: "too_large"}
        assert [r.content[CONFIG][OWNER] for r in requests_of(events)] == [1]

    def test_a_second_answer_and_one_to_nothing_are_refused(self):
        session, (first,) = relay_of([0])
        with pytest.raises(Refused, match="duplicate"):
            reply(session, Request(PARTY, "train", RecordDict(), 3), None)
        (asked,) = reply(session, first, turned(first))
        content = computed(asked)
        reply(session, asked, content)
        with pytest.raises(Refused, match="duplicate"):
            reply(session, asked, content)

    def test_at_the_deadline_it_is_named_to_those_who_wait_for_it(self):
        session, (first, second, third) = relay_of([0, 1, 2])
        (asked,) = reply(session, first, turned(first))
        reply(session, second, turned(second))
        events = session.expire()
        assert refusals(events) == dict.fromkeys([0, 1, 2], "timeout")
        named = [f"client {PARTY}" in e.refused.detail for e in events]
        assert (named, session.done) == ([True, True, False], True)
        for late, content in ((asked, computed(asked)), (third, turned(third))):
            with pytest.raises(Refused, match="duplicate"):
                reply(session, late, content)

    def test_it_is_no_owner(self):
        with pytest.raises(ValueError, match="no owner"):
            relay_of([0, PARTY])

    def test_nobody_asked_is_done(self):
        session, requests = relay_of([])
        assert (session.done, requests, session.expire()) == (True, [], [])
