"""A split session as a state machine, its replies made by hand: whom it asks, what it refuses, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies.collectors import Split
from strategies.collectors.split_session import LAST, SESSION, SPLIT, TURN
from strategies.protocols import Job, Refusal, Reply, Request
from strategies.replies import write_update
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import ARRAYS, CONFIG, RECEIPT, TRAINS, Refused, pack, pack_model

LOWER = Layout(("low",), ((2,),))
UPPER = Layout(("heads.a", "top"), ((2,), (3,)))
WHOLE = Layout(("heads.a", "low", "heads.b", "top"), ((2,), (2,), (2,), (3,)))


@dataclass
class Sum:
    """A server's half that adds up what it is sent."""

    total: float = 0.0
    seen: dict[int, int] = field(default_factory=dict)

    def answer(self, client, arrays):
        if "x" not in arrays or not np.isfinite(arrays["x"]).all():
            raise Refused("not_finite", "x")
        self.total += float(arrays["x"].sum())
        self.seen[client] = self.seen.get(client, 0) + 1
        return {"y": 2 * arrays["x"]}

    def change(self, client):
        vector = np.full(UPPER.size, self.total, np.float32)
        return vector, UPPER, {"server_turns": float(self.seen.get(client, 0))}


class Half:
    """As `Served`."""

    partial = True

    def __init__(self):
        self.begun: list[Sum] = []

    def clients_names(self, client):
        return frozenset({"low"})

    def settings(self):
        return {"split.at": 2}

    def describe(self):
        return "half and half"

    def begin(self, sent):
        assert set(sent) == set(WHOLE.names)
        self.begun.append(Sum())
        return self.begun[-1]


def session_of(cohort, variant="v1", **settings):
    model = {n: np.zeros(s, np.float32) for n, s in zip(WHOLE.names, WHOLE.shapes, strict=True)}
    job = Job(
        3, 7, {ARRAYS: pack_model(model)}, {"key": "value"}, {}, {DELTA: WHOLE},
        dict.fromkeys(WHOLE.names, DELTA),
    )  # fmt: skip
    session = Split(variant=variant, served=Half(), **settings).open(job, cohort)
    return session, session.start()


def turned(request: Request, value=1.0, *, last=False, **told) -> RecordDict:
    receipt = {
        "client": request.client,
        "round": 3,
        "turn": request.content[CONFIG][TURN],
        LAST: last,
        **told,
    }
    rows = np.full(4, value, np.float32)
    return RecordDict({SPLIT: ArrayRecord({"x": pack(rows)}), RECEIPT: ConfigRecord(receipt)})


def concluded(request: Request, value=5.0) -> RecordDict:
    delta = Section(np.full(LOWER.size, value, np.float32), LOWER)
    update = Update({DELTA: delta}, 10.0, (request.client,), 7, {"train_loss": 0.5})
    return write_update(update, client=request.client, round_number=3)


def reply(session, request, content):
    return session.receive(Reply(request, content, None if content is not None else "killed"))


def finish(session, request, turns=2):
    """A client's honest way from a request to its end."""
    for turn in range(turns):
        (request,) = reply(session, request, turned(request, last=turn == turns - 1))
    return reply(session, request, concluded(request))


def parts_of(update: Update) -> dict[str, np.ndarray]:
    section = update.delta
    covered = set((section.part or section.layout).names)
    return {n: v for n, v in section.layout.views(section.vector).items() if n in covered}


class TestTurns:
    def test_what_each_request_holds(self):
        session, (request,) = session_of([4], batches_per_exchange=3, precision="bf16")
        seen = [request]
        for last in (False, True):
            seen += reply(session, seen[-1], turned(seen[-1], last=last))
        configs = [r.content[CONFIG] for r in seen]
        assert [c[TURN] for c in configs] == [0, 1, 2]
        assert [c[TRAINS] for c in configs] == [False, False, True]
        assert [c["phase"] for c in configs] == [0, 0, 1]
        assert len({c[SESSION] for c in configs}) == 1
        for config in configs:
            assert (config["client"], config["server-round"], config["version"]) == (4, 3, 7)
            assert (config["split.batches"], config["split.precision"]) == (3, "bf16")
            assert (config["split.at"], config["key"]) == (2, "value")
        # The clients' half alone goes down, and only at both ends.
        assert [set(r.content[ARRAYS]) if ARRAYS in r.content else None for r in seen] == [
            {"low"},
            None,
            {"low"},
        ]
        assert [set(r.content[SPLIT]) for r in seen] == [set(), {"y"}, {"y"}]
        np.testing.assert_array_equal(seen[1].content[SPLIT]["y"].numpy(), np.full(4, 2.0))

    def test_the_update_is_both_halves_and_no_more(self):
        session, (request,) = session_of([0])
        (update,) = finish(session, request, turns=3)
        assert session.done
        found = parts_of(update)
        assert set(found) == {"heads.a", "low", "top"}
        assert set(update.delta.part.names) == set(found)
        np.testing.assert_array_equal(found["low"], [5, 5])
        np.testing.assert_array_equal(found["top"], [12, 12, 12])
        assert not update.delta.layout.views(update.delta.vector)["heads.b"].any()
        assert update.metrics == {"train_loss": 0.5, "server_turns": 3.0}
        assert (update.weight, update.members, update.version) == (10.0, (0,), 7)

    def test_in_v1_each_has_a_copy_and_is_done_at_once(self):
        session, (first, second) = session_of([0, 1])
        (one,) = finish(session, first)
        assert not session.done
        (two,) = finish(session, second, turns=3)
        assert [parts_of(u)["top"][0] for u in (one, two)] == [8, 12]
        assert session.done

    def test_in_v2_all_share_one_and_wait_for_its_last_step(self):
        session, (first, second) = session_of([0, 1], "v2")
        assert finish(session, first) == []
        events = finish(session, second, turns=3)
        assert [u.members for u in events] == [(0,), (1,)]
        assert [parts_of(u)["top"][0] for u in events] == [20, 20]
        assert session.done

    def test_sessions_have_tokens_of_their_own(self):
        tokens = {session_of([0])[1][0].content[CONFIG][SESSION] for _ in range(20)}
        assert len(tokens) == 20

    def test_nobody_asked_is_done(self):
        session, requests = session_of([])
        assert (session.done, requests, session.expire()) == (True, [], [])


def refusal(events) -> str:
    (event,) = (e for e in events if isinstance(e, Refusal))
    return event.refused.reason


class TestThoseWhoFail:
    @pytest.mark.parametrize("variant", ["v1", "v2"])
    @pytest.mark.parametrize("turns", [0, 1])
    def test_one_that_dies_is_out_and_the_others_go_on(self, variant, turns):
        session, (first, second) = session_of([0, 1], variant)
        for _ in range(turns):
            (first,) = reply(session, first, turned(first))
        assert refusal(reply(session, first, None)) == "client_error"
        (update,) = finish(session, second)
        assert session.done
        shared = 4.0 * turns if variant == "v2" else 0
        assert parts_of(update)["top"][0] == 8 + shared

    def test_in_v2_the_last_one_s_death_releases_those_who_have_finished(self):
        session, (first, second) = session_of([0, 1], "v2")
        assert finish(session, first) == []
        events = reply(session, second, None)
        assert refusal(events) == "client_error"
        assert [e.members for e in events if isinstance(e, Update)] == [(0,)]
        assert session.done

    @pytest.mark.parametrize("variant", ["v1", "v2"])
    def test_a_deadline_ends_it_for_those_who_have_not_answered(self, variant):
        session, requests = session_of([2, 0, 1], variant)
        came = finish(session, requests[1])
        events = session.expire()
        late = [e for e in events if isinstance(e, Refusal)]
        assert [(e.client, e.refused.reason) for e in late] == [(1, "timeout"), (2, "timeout")]
        updates = [e for e in (*came, *events) if isinstance(e, Update)]
        assert [u.members for u in updates] == [(0,)]
        assert session.done
        with pytest.raises(Refused, match="duplicate"):
            reply(session, requests[0], turned(requests[0]))
        assert session.expire() == []

    def test_a_reply_to_an_earlier_turn_is_a_duplicate_and_counts_once(self):
        session, (request,) = session_of([0])
        (following,) = reply(session, request, turned(request))
        for content in (turned(request), concluded(request), None):
            with pytest.raises(Refused, match="duplicate"):
                reply(session, request, content)
        (closing,) = reply(session, following, turned(following, last=True))
        (update,) = reply(session, closing, concluded(closing))
        assert parts_of(update)["top"][0] == 8

    def test_a_stranger_is_none_of_it(self):
        session, (request,) = session_of([0])
        stranger = Request(9, "train", request.content, 3)
        with pytest.raises(Refused, match="duplicate"):
            reply(session, stranger, turned(request))
        finish(session, request)
        assert session.done


def without(content: RecordDict, name: str) -> RecordDict:
    return RecordDict({key: record for key, record in content.items() if key != name})


def flooded(request: Request) -> RecordDict:
    content = turned(request)
    one = pack(np.zeros(1, np.float32))
    content[SPLIT] = ArrayRecord({f"{n}.x": one for n in range(10_001)})
    return content


def with_array(request: Request, data: bytes) -> RecordDict:
    content = turned(request)
    content[SPLIT] = ArrayRecord({"x": Array("float32", (4,), "numpy.ndarray", data)})
    return content


HOSTILE = {
    "another client": (lambda r: turned(r, client=1), "impostor"),
    "no client": (lambda r: turned(r, client=""), "impostor"),
    "another round": (lambda r: turned(r, round=2), "round"),
    "an earlier turn": (lambda r: turned(r, turn=-1), "phase"),
    "a later turn": (lambda r: turned(r, turn=1), "phase"),
    "no receipt": (lambda r: without(turned(r), RECEIPT), "missing"),
    "no arrays": (lambda r: without(turned(r), SPLIT), "missing"),
    "nothing": (lambda r: RecordDict(), "missing"),
    "metrics in the arrays' place": (
        lambda r: RecordDict({**turned(r), SPLIT: MetricRecord({"x": 1.0})}),
        "missing",
    ),
    "ten thousand arrays and one": (flooded, "too_large"),
    "no bytes": (lambda r: with_array(r, b""), "malformed"),
    "a pickle": (lambda r: with_array(r, b"cos\nsystem\n(S'true'\ntR."), "malformed"),
    "what the half refuses": (lambda r: turned(r, math.nan), "not_finite"),
    "its update before its turns": (concluded, "missing"),
}


class TestHostileClients:
    @pytest.mark.parametrize("variant", ["v1", "v2"])
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_each_is_refused_by_its_reason_and_the_others_go_on(self, kind, variant):
        made, reason = HOSTILE[kind]
        session, (first, second) = session_of([0, 1], variant)
        events = reply(session, first, made(first))
        assert (refusal(events), len(events)) == (reason, 1)
        (update,) = finish(session, second)
        assert (update.members, parts_of(update)["top"][0]) == ((1,), 8)
        assert session.done

    def test_who_never_comes_to_an_end_is_out(self):
        session, (request,) = session_of([0], most_turns=3)
        for _ in range(2):
            (request,) = reply(session, request, turned(request))
        assert refusal(reply(session, request, turned(request))) == "too_large"

    def test_the_last_of_the_turns_may_be_the_most(self):
        session, (request,) = session_of([0], most_turns=3)
        (update,) = finish(session, request, turns=3)
        assert update.members == (0,)

    @pytest.mark.parametrize("told", [1, "true", [True], 1.0])
    def test_only_true_is_last(self, told):
        session, (request,) = session_of([0])
        (following,) = reply(session, request, turned(request, last=told))
        assert following.content[CONFIG][TRAINS] is False

    def test_the_update_must_be_that_of_the_client_s_half(self):
        session, (request,) = session_of([0])
        (closing,) = reply(session, request, turned(request, last=True))
        whole = Update({DELTA: Section(np.zeros(WHOLE.size, np.float32), WHOLE)}, 1.0, (0,), 7)
        events = reply(session, closing, write_update(whole, client=0, round_number=3))
        assert refusal(events) == "shape"
        assert session.done

    @given(data=st.data())
    def test_whatever_comes_is_an_event_or_refused(self, data):
        session, requests = session_of([0, 1], data.draw(st.sampled_from(["v1", "v2"])))
        hostile, honest = requests
        scalar = st.one_of(
            st.integers(-2, 3), st.floats(), st.text(max_size=5), st.booleans(), st.binary()
        )
        while hostile is not None:
            content = turned(hostile, last=data.draw(st.booleans()))
            content[RECEIPT][data.draw(st.sampled_from(["client", "round", "turn", LAST, "z"]))] = (
                data.draw(scalar)
            )
            if data.draw(st.booleans()):
                content = data.draw(
                    st.sampled_from(
                        [concluded(hostile), with_array(hostile, data.draw(st.binary()))]
                    )
                )
            events = reply(session, hostile, content)
            hostile = next((e for e in events if isinstance(e, Request)), None)
            if hostile is not None and hostile.content[CONFIG][TURN] > 4:
                break
        finish(session, honest)
        session.expire()
        assert session.done
