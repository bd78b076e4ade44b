"""A client's half against a server that lies: each lie is refused by its reason, whatever its types."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.records import bundle, extended
from strategies.secagg.keys import KEY_BYTES, Identity, KeyPair
from strategies.secagg.policy import Policy, Roster
from strategies.secagg.sealing import seal
from strategies.secagg.statements import POINT_BYTES, SEALED_BYTES, agreement, introduction
from strategies.secagg.terms import SECAGG, Terms, ids_digest
from strategies.wire import ARRAYS, CONFIG, Refused, pack_model
from tests.support.masked import Cohort, Outcome, altered, cohort, said

SEMI, HARD = "semi-honest", "malicious"
Change = Callable[[dict[str, Any]], dict[str, Any]]
HUGE = 2**80


def put(**values: Any) -> Change:
    return lambda given: values


def without(*names: str) -> Change:
    return lambda given: dict.fromkeys(names)


def spoil(name: str, place: int = 0) -> Change:
    """One bit of a value changed."""

    def change(given: dict[str, Any]) -> dict[str, Any]:
        data = bytearray(given[name])
        data[place] ^= 1
        return {name: bytes(data)}

    return change


def first_of(name: str, length: int) -> Change:
    """The first of some rows replaced by the second."""
    return lambda g: {name: g[name][length : 2 * length] + g[name][length:]}


def swapped(name: str, length: int) -> Change:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        rows = given[name]
        return {name: rows[length : 2 * length] + rows[:length] + rows[2 * length :]}

    return change


KEYS_ROWS = [
    (SEMI, put(members=2), "terms", "members"),
    (SEMI, put(threshold=2), "terms", "more than half"),  # 2t = 4 of 5 holders
    (SEMI, put(degree=6, members=9), "terms", "more than half"),
    (SEMI, put(degree=5, threshold=4), "terms", "can't have 5 neighbours"),
    (SEMI, put(quorum=6), "terms", "quorum of 6"),
    (SEMI, put(quorum=1), "terms", "quorum"),
    (SEMI, put(malicious=True, clients=[0, 1, 2, 3, 4]), "terms", "server's mode is malicious"),
    (SEMI, put(round=2), "terms", "server-round 2, the request is of 1"),
    (SEMI, put(round=HUGE), "terms", "the request is of 1"),
    (SEMI, put(round=0), "terms", "round"),
    (SEMI, put(round=True), "terms", "round is True"),
    (SEMI, put(limit=float("nan")), "terms", "finite"),
    (SEMI, put(limit=1), "terms", "limit is 1"),
    (SEMI, put(session=b"short"), "terms", "session"),
    (SEMI, put(session=bytes(17)), "terms", "too long"),
    (SEMI, put(model=bytes(33)), "terms", "too long"),
    (SEMI, put(settings=bytes(33)), "terms", "too long"),
    (SEMI, put(version=1), "terms", "version 1, the request is of 0"),
    (SEMI, without("settings"), "terms", "settings is None"),
    (SEMI, put(model="model"), "terms", "model is 'model'"),
    (SEMI, put(metrics="train_loss"), "terms", "metrics"),
    (SEMI, without("run"), "terms", "run is None"),
    (SEMI, without("metrics"), "terms", "metrics is None"),
    (SEMI, put(step="nonsense"), "phase", "no step 'nonsense'"),
    (SEMI, put(step=7), "phase", "no step '7'"),
    (SEMI, without("step"), "phase", "no step"),
    (HARD, put(malicious=False), "terms", "this client's malicious"),
    (HARD, put(degree=3), "terms", "this client's conditions give 3 of 4"),
    (HARD, put(threshold=4), "terms", "this client's conditions give 3 of 4"),
    (HARD, put(quorum=2), "terms", "at least 3 is needed"),
    (HARD, put(clients=[1, 2, 3, 4]), "terms", "list of members"),
    (HARD, put(clients=[1, 2, 3, 4, 5]), "terms", "not in the roster"),
    (HARD, put(clients=[0, 1, 2, 3, 3]), "malformed", "each once"),
    (HARD, put(clients=[1, 0, 2, 3, 4]), "malformed", "ascending"),
    (HARD, put(clients=["0", "1"]), "malformed", "ids of clients"),
    (HARD, put(clients=[0, 1, 2, 3, HUGE]), "malformed", "ids of clients"),
    (HARD, put(clients=[-1, 0, 1, 2, 3]), "malformed", "ids of clients"),
    (HARD, put(clients=4), "malformed", "a list of clients"),
    (HARD, without("clients"), "malformed", "a list of clients"),
    (HARD, put(cohort=bytes(32)), "terms", "list of members"),
    (HARD, put(members=40, degree=10, threshold=6, quorum=21), "terms", "list of members"),
]  # fmt: skip

SHARES_ROWS = [
    (SEMI, put(session=bytes(16)), "session", "never began here"),
    (SEMI, put(session=5), "malformed", "should be 16 bytes, not int"),
    (SEMI, put(peers=[1, 1, 2, 3]), "malformed", "each once"),
    (SEMI, put(peers=[4, 3, 2, 1]), "malformed", "ascending"),
    (SEMI, put(peers=[0, 1, 2, 3]), "neighbours", "itself among them"),
    (SEMI, put(peers=[1, 2, 3, 4, 5], keys=bytes(5 * 64)), "neighbours", "5 neighbours of 4"),
    (SEMI, put(peers=[1], keys=bytes(64)), "neighbours", "2 shareholders are left, 3 open"),
    (SEMI, put(peers=[1.5, 2.0]), "malformed", "ids of clients"),
    (SEMI, put(peers=[1, 2, 3, HUGE]), "malformed", "ids of clients"),
    (SEMI, put(keys=b""), "malformed", "keys should be 256 bytes"),
    (SEMI, put(keys="k" * 256), "malformed", "not str"),
    (SEMI, put(keys=bytes(256)), "neighbours", "low order"),
    (SEMI, without("peers"), "malformed", "list of clients"),
    (HARD, spoil("keys"), "signature", "keys of client 1 are not signed by it"),
    (HARD, spoil("signatures"), "signature", "keys of client 1 are not signed by it"),
    (HARD, swapped("keys", 64), "signature", "keys of client 1 are not signed"),
    (HARD, swapped("signatures", 64), "signature", "keys of client 1 are not signed"),
    (HARD, put(signatures=bytes(10)), "malformed", "signatures should be"),
    (HARD, without("signatures"), "malformed", "signatures should be"),
    (HARD, without("drawn"), "malformed", "own neighbours are missing"),
    (HARD, put(drawn=[1, 2]), "malformed", "own neighbours are missing"),
    (HARD, lambda g: {"drawn": [HUGE] * len(g["drawn"])}, "malformed", "not ids"),
    (HARD, lambda g: {"drawn": [2**63] * len(g["drawn"])}, "malformed", "not ids"),
    (HARD, lambda g: {"drawn": [-1] * len(g["drawn"])}, "malformed", "not ids"),
    (HARD, lambda g: {"drawn": ["0"] * len(g["drawn"])}, "malformed", "not ids"),
    (HARD, lambda g: {"drawn": [*g["drawn"][:-1], g["drawn"][-1] + 1]}, "signature", "not signed"),
    (HARD, put(peers=[1, 2, 3, 99]), "neighbours", "client 99 is not of this session"),
]  # fmt: skip

UPLOAD_ROWS = [
    (SEMI, spoil("sealed"), "malformed", "share of client 1 was changed on its way"),
    (SEMI, spoil("sealed", -1), "malformed", "share of client 4 was changed on its way"),
    (SEMI, swapped("sealed", SEALED_BYTES), "malformed", "share of client 1 was changed"),
    (SEMI, first_of("sealed", SEALED_BYTES), "malformed", "share of client 1 was changed"),
    (SEMI, put(sealed=b""), "malformed", "sealed should be"),
    (SEMI, put(senders=[1, 2, 3, 9]), "neighbours", "not among the neighbours"),
    (SEMI, put(partners=[1, 2, 3, 4, 9]), "neighbours", "not among the neighbours"),
    (SEMI, put(partners=[1, 2]), "neighbours", "not among the neighbours"),
    (SEMI, put(partners=[], senders=[], sealed=b""), "neighbours", "1 shareholders are left"),
    (SEMI, put(partners=[1], senders=[], sealed=b""), "neighbours", "2 shareholders are left"),
    (SEMI, put(partners="all"), "malformed", "list of clients"),
    (SEMI, without("senders"), "malformed", "list of clients"),
    (SEMI, without("session"), "malformed", "session should be"),
    (HARD, put(partners=[], senders=[], sealed=b""), "neighbours", "1 shareholders are left"),
    (HARD, spoil("sealed"), "malformed", "share of client 1 was changed on its way"),
]  # fmt: skip

AGREE_ROWS = [
    (HARD, put(survivors=[1, 2, 3, 4]), "survivors", "must be among them"),
    (HARD, put(survivors=[0, 1]), "survivors", "2 survivors"),
    (HARD, put(survivors=[0, 1, 2, 3, 4, 9]), "survivors", "1 of them unknown"),
    (HARD, put(survivors=[0, 0, 1]), "malformed", "each once"),
    (HARD, put(survivors=[2, 1, 0]), "malformed", "ascending"),
    (HARD, put(survivors=b"all"), "malformed", "list of clients"),
    (HARD, put(step="unmask", alive=[0, 1, 2, 3, 4], dropped=[]), "phase", "not past 'agree'"),
]

UNMASK_ROWS = [
    (SEMI, put(alive=[0, 1, 2, 3, 4], dropped=[4]), "survivors", "both to have survived"),
    (SEMI, put(alive=[1, 2, 3, 4]), "survivors", "not among the survivors"),
    (SEMI, put(alive=[1, 2, 3], dropped=[0, 4]), "survivors", "not among the survivors"),
    (SEMI, put(alive=[0, 1, 2, 3, 4, 9]), "survivors", "strangers are"),
    (SEMI, put(dropped=[9]), "survivors", "strangers are"),
    (SEMI, put(alive=[0, 1], dropped=[2, 3, 4]), "survivors", "2 survivors among the neighbours"),
    (SEMI, put(alive=[0], dropped=[]), "survivors", "1 survivors among the neighbours"),
    (SEMI, put(alive=[], dropped=[]), "survivors", "not among the survivors"),
    (SEMI, put(alive=[0, 0, 1, 2]), "malformed", "each once"),
    (SEMI, put(alive=[2, 1, 0]), "malformed", "ascending"),
    (SEMI, put(dropped=HUGE), "malformed", "list of clients"),
    (SEMI, without("dropped"), "malformed", "list of clients"),
    (SEMI, put(step="agree", survivors=[0, 1, 2]), "phase", "in the malicious mode only"),
    (HARD, put(alive=[0, 1, 2, 3], dropped=[4]), "survivors", "not those that were agreed on"),
    (HARD, put(alive=[0, 1, 2, 3]), "survivors", "not those that were agreed on"),
    (HARD, put(signers=[0, 1], signatures=bytes(128)), "signature", "0 of the survivors signed"),
    (HARD, lambda g: {"signers": [0, 1], "signatures": g["signatures"][:128]}, "signature", "2 of the surv"),
    (HARD, lambda g: {"signatures": 5 * g["signatures"][:64]}, "signature", "1 of the survivors signed"),
    (HARD, lambda g: {"signers": [0, 0, 0, 0, 0]}, "malformed", "each once"),
    (HARD, put(signers=[5, 6, 7, 8, 9]), "signature", "0 of the survivors signed"),
    (HARD, put(signatures=b""), "malformed", "signatures should be"),
    (HARD, without("signers"), "malformed", "list of clients"),
    (HARD, spoil("included"), "signature", "client 1 has not signed that it masked"),
    (HARD, swapped("included", 64), "signature", "client 1 has not signed that it masked"),
    (HARD, without("included"), "malformed", "included should be"),
]  # fmt: skip


def lied(step: str, mode: str, change: Change) -> tuple[Cohort, Outcome, Refused]:
    """Client 0 is told a lie in this step, and the truth afterwards."""
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(until=step)
        request = outcome.of(step, 0, "request")
        lie = altered(request, **change(said(request)))
        with pytest.raises(Refused) as refusal:
            clients.answer(0, lie)
        if step != "keys" or said(lie).get("step") != step:
            # The lie changed nothing: the client goes on from where it was, with the truth.
            clients.answer(0, request)
        return clients, outcome, refusal.value


def rows(*tables: tuple[str, list[tuple[Any, ...]]]) -> pytest.MarkDecorator:
    listed = [(step, *row) for step, table in tables for row in table]
    ids = [f"{step}-{row[0]}-{index}" for step, table in tables for index, row in enumerate(table)]
    return pytest.mark.parametrize(("step", "mode", "change", "reason", "words"), listed, ids=ids)


@rows(
    ("keys", KEYS_ROWS),
    ("shares", SHARES_ROWS),
    ("upload", UPLOAD_ROWS),
    ("agree", AGREE_ROWS),
    ("unmask", UNMASK_ROWS),
)
def test_a_lie_is_refused_by_its_reason(step, mode, change, reason, words):
    _, _, refused = lied(step, mode, change)
    assert refused.reason == reason
    assert words in refused.detail


@pytest.mark.parametrize("mode", [SEMI, HARD])
@pytest.mark.parametrize("record", [CONFIG, SECAGG])
@pytest.mark.parametrize("step", ["keys", "shares", "upload", "unmask"])
def test_a_record_that_is_missing_is_a_refusal(mode, record, step):
    with cohort(5, mode=mode) as clients:
        request = clients.run(until=step).of(step, 0, "request")
        bare = bundle({name: value for name, value in request.items() if name != record})
        with pytest.raises(Refused):
            clients.answer(0, bare)
        # … and so is one of another kind under its name.
        with pytest.raises(Refused):
            clients.answer(0, bundle({**dict(request.items()), record: ArrayRecord()}))


@pytest.mark.parametrize("mode", [SEMI, HARD])
def test_each_request_is_answered_once(mode):
    """A second request of a step, and an earlier one replayed, find the session elsewhere."""
    with cohort(5, mode=mode) as clients:
        outcome = clients.run()
        for step in clients.steps:
            with pytest.raises(Refused) as refusal:
                clients.answer(0, outcome.of(step, 0, "request"))
            assert refusal.value.reason == ("replayed" if step == "keys" else "session")
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(until="unmask")
        again = [step for step in clients.steps if step not in ("keys", "upload", "unmask")]
        for step in again:
            with pytest.raises(Refused, match="phase"):
                clients.answer(0, outcome.of(step, 0, "request"))
        with pytest.raises(Refused, match="replayed"):
            clients.answer(0, outcome.of("keys", 0, "request"))
        assert clients.answer(0, outcome.of("unmask", 0, "request"))


@pytest.mark.parametrize("mode", [SEMI, HARD])
def test_another_model_than_the_keys_are_for_is_refused(mode):
    with cohort(5, mode=mode) as clients:
        request = clients.run(until="upload").of("upload", 0, "request")
        other = pack_model({"w": np.full(6, 1e-30, np.float32)})
        for records in ({ARRAYS: other}, {ARRAYS: request[ARRAYS], "more": other}):
            with pytest.raises(Refused, match="the model is not the one"):
                clients.answer(0, bundle({**dict(request.items()), **records}))
        assert clients.trained == []


def test_a_sealed_share_of_a_stranger_is_refused():
    """The server seals a share of its own in another client's name."""
    with cohort(5) as clients:
        outcome = clients.run(until="upload")
        request = outcome.of("upload", 0, "request")
        info = clients.terms(outcome).context("share", sender=1, receiver=0)
        public = said(outcome.of("keys", 0))["keys"][:KEY_BYTES]
        forged = seal(KeyPair.generate().agree(public, info), bytes(POINT_BYTES + 64), info)
        sealed = forged + said(request)["sealed"][SEALED_BYTES:]
        with pytest.raises(Refused, match="share of client 1 was changed"):
            clients.answer(0, altered(request, sealed=sealed))


def test_keys_of_the_servers_own_do_not_pass_for_a_clients():
    """Well-formed, signed, and by somebody who is not the client."""
    with cohort(5, mode=HARD) as clients:
        outcome = clients.run(until="shares")
        request = outcome.of("shares", 0, "request")
        values, terms = said(request), clients.terms(outcome)
        keys = KeyPair.generate().public + KeyPair.generate().public
        drawn = values["drawn"][: terms.degree]
        signature = Identity.generate().sign(introduction(terms, 1, keys, drawn))
        lie = {
            "keys": keys + values["keys"][64:],
            "signatures": signature + values["signatures"][64:],
        }
        with pytest.raises(Refused, match="not signed by it"):
            clients.answer(0, altered(request, **lie))


def test_signed_keys_of_an_earlier_session_do_not_pass():
    with cohort(5, mode=HARD) as clients:
        old = clients.run(lost={"shares": range(5)})
        new = clients.run(until="shares")
        request = new.of("shares", 0, "request")
        was = said(old.of("keys", 1))
        values = said(request)
        lie = {
            "keys": was["keys"] + values["keys"][64:],
            "signatures": was["signature"] + values["signatures"][64:],
        }
        with pytest.raises(Refused, match="not signed by it"):
            clients.answer(0, altered(request, **lie))


def test_a_neighbour_that_neither_drew_is_refused():
    with cohort(102, mode=HARD, dropouts=0.0) as clients:
        outcome = clients.run(until="shares")
        session, terms = outcome.session, clients.terms(outcome)
        stranger = next(
            one
            for one in range(1, 102)
            if one not in session._drawn[0] and 0 not in session._drawn[one]
        )
        request = outcome.of("shares", 0, "request")
        peers = sorted([*said(request)["peers"], stranger])
        told = {
            "peers": peers,
            "keys": b"".join(session._keys[one] for one in peers),
            "drawn": [drawn for one in peers for drawn in session._drawn[one]],
            "signatures": b"".join(session._signed[one] for one in peers),
        }
        assert terms.degree < 101
        with pytest.raises(Refused, match=f"neither drew the other: client {stranger}"):
            clients.answer(0, altered(request, **told))


def test_a_crowd_that_drew_one_client_is_refused():
    """Colluders may draw whom they like: more than four times as many as at random are too many."""
    with cohort(102, mode=HARD, dropouts=0.0) as clients:
        outcome = clients.run(until="shares")
        session, terms = outcome.session, clients.terms(outcome)
        peers = list(range(1, 102))
        drawn = {
            one: [0, *[other for other in peers if other != one][: terms.degree - 1]]
            for one in peers
        }
        signatures = [
            clients.identities[one].sign(introduction(terms, one, session._keys[one], drawn[one]))
            for one in peers
        ]
        told = {
            "peers": peers,
            "keys": b"".join(session._keys[one] for one in peers),
            "drawn": [one for peer in peers for one in drawn[peer]],
            "signatures": b"".join(signatures),
        }
        with pytest.raises(Refused, match="101 clients drew this one"):
            clients.answer(0, altered(outcome.of("shares", 0, "request"), **told))


def test_a_client_that_was_left_alone_is_not_opened_by_the_others():
    """After the shares, the server tells client 0 that only colluders are there; nobody gives the seed of client 0.

    Client 0 masks with the fewest that it accepts. The others, who hold its shares and know it to be alive, ask for its
    signature that the mask with them is in its upload, and there is none.
    """
    with cohort(5, mode=HARD) as clients:
        near = {3, 4}

        def alone(step: str, client: int, content: RecordDict) -> RecordDict:
            if (step, client) != ("upload", 0):
                return content
            sealed = said(content)["sealed"]
            kept = b"".join(sealed[(i - 1) * SEALED_BYTES : i * SEALED_BYTES] for i in sorted(near))
            return altered(content, partners=sorted(near), senders=sorted(near), sealed=kept)

        def padded(step: str, client: int, content: RecordDict) -> RecordDict:
            if (step, client) != ("upload", 0):
                return content
            signatures = said(content)["included"]
            assert len(signatures) == 64 * len(near)
            return altered(content, included=2 * signatures)

        outcome = clients.run(request=alone, reply=padded)
        assert outcome.update is None
        for one in (1, 2):
            assert "client 0 has not signed" in str(outcome.refusals[one])
        sharers = [c for kind, step, c, _ in outcome.sent if (kind, step) == ("reply", "unmask")]
        assert len(set(sharers) - {0}) < clients.terms(outcome).threshold


@settings(max_examples=40)
@given(data=st.data())
def test_no_order_of_requests_gets_both_secrets_of_one_client(data):
    """Whatever a server asks one client in one session, for each peer at most one of the two shares leaves it."""
    mode = data.draw(st.sampled_from([SEMI, HARD]), "mode")
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(until=clients.steps[3])
        terms, request = clients.terms(outcome), outcome.of(clients.steps[3], 0, "request")
        some = st.lists(st.integers(0, 4), unique=True).map(sorted)
        seeds: set[int] = set()
        masking: set[int] = set()
        for _ in range(data.draw(st.integers(1, 6), "requests")):
            alive = data.draw(some, "alive")
            dropped = data.draw(some | st.just(sorted(set(range(5)) - set(alive))), "dropped")
            survivors = data.draw(some | st.just(alive), "survivors")
            everybody = [
                clients.identities[one].sign(agreement(terms, survivors)) for one in range(5)
            ]
            step = data.draw(st.sampled_from(["agree", "unmask"]), "step")
            # All others collude: they sign whatever set the server names, and that they masked with everybody.
            others = [one for one in alive if one != 0]
            included = [outcome.session._included[one][0] for one in others] if mode == HARD else []
            lie = altered(
                request,
                step=step, survivors=survivors, alive=alive, dropped=dropped,
                signers=list(range(5)), signatures=b"".join(everybody), included=b"".join(included),
            )  # fmt: skip
            try:
                given_away = said(clients.answer(0, lie))
            except Refused:
                continue
            if "seeds" in given_away:
                seeds |= set(alive)
                masking |= set(dropped)
        assert not seeds & masking


def test_a_second_set_of_survivors_is_not_signed():
    with cohort(5, mode=HARD) as clients:
        request = clients.run(until="agree").of("agree", 0, "request")
        assert clients.answer(0, request)
        with pytest.raises(Refused, match="phase"):
            clients.answer(0, altered(request, survivors=[0, 1, 2, 3]))
        with pytest.raises(Refused, match="phase"):
            clients.answer(0, request)


def test_a_cohort_below_the_clients_least_is_refused():
    with cohort(5, least=6) as clients:
        outcome = clients.run()
        assert "a cohort of 5 hides too little: 6 are asked for" in str(outcome.refusals[0])
    with cohort(5, mode=HARD, least=5) as clients:
        outcome = clients.run(lost={"upload": [4]})
        assert "5 there" in str(outcome.refusals[0])


@pytest.mark.parametrize("mode", [SEMI, HARD])
def test_a_run_of_the_other_mode_is_refused(mode):
    other = HARD if mode == SEMI else SEMI
    with cohort(5, mode=other) as wrong, cohort(5, mode=mode, policies=wrong.policies) as clients:
        outcome = clients.run()
        assert f"the server's mode is {mode}, this client's {other}" in str(outcome.refusals[0])
        assert "0 of 5 clients are left" in outcome.void


def test_the_malicious_mode_without_a_roster_is_refused_when_it_is_built():
    with pytest.raises(ValueError, match="trellis keys identities"):
        Policy(malicious=True)


def test_a_process_is_no_client_whose_identity_it_does_not_have():
    with cohort(5, mode=HARD) as clients:
        roster = Roster({one: identity.public for one, identity in clients.identities.items()})
        clients.policies[0] = Policy(True, roster, {}, 3, 0.4, 0.0)
        clients.restart()
        assert "client 0 has no identity of its own" in str(clients.run().refusals[0])


def test_numbers_that_give_no_malicious_protocol_are_refused():
    with cohort(5, mode=HARD) as clients:
        roster = clients.policies[0].roster
        clients.policies[0] = Policy(True, roster, {0: clients.identities[0]}, 3, 0.8, 0.0)
        clients.restart()
        assert "assume fewer drop-outs" in str(clients.run().refusals[0])


VALUES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
    | st.binary(max_size=80) | st.lists(st.integers(-2, 2**64 - 1), max_size=6)
    | st.lists(st.text(max_size=3), max_size=3) | st.lists(st.floats(), max_size=3)
)  # fmt: skip


@settings(max_examples=25)
@given(data=st.data())
def test_no_value_of_any_type_makes_a_client_do_anything_but_refuse(data):
    """A request with any of its values replaced is answered or refused: nothing else is ever raised."""
    mode = data.draw(st.sampled_from([SEMI, HARD]))
    with cohort(5, mode=mode) as clients:
        step = data.draw(st.sampled_from(clients.steps))
        request = clients.run(until=step).of(step, 1, "request")
        for _ in range(8):
            names = data.draw(
                st.sets(st.sampled_from(sorted(said(request))), min_size=1, max_size=3)
            )
            lie = altered(request, **{name: data.draw(VALUES) for name in sorted(names)})
            with suppress(Refused):
                clients.answer(1, lie)
                break  # the lie made no difference, and the step is over


def test_terms_are_the_same_after_their_journey():
    with cohort(5, mode=HARD) as clients:
        outcome = clients.run(until="shares")
        terms = outcome.session._terms
        assert Terms.read(terms.record()) == terms
        assert terms.cohort == ids_digest([4, 3, 2, 1, 0])
        assert extended(ConfigRecord(), terms.record())["metrics"] == ["train_loss"]
