"""The CKKS collector's two halves against each other, replies fed by hand: no grid, no clock."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

from strategies.ckks import SharedKey
from strategies.ckks.member import CkksClient
from strategies.ckks.messages import CIPHERTEXTS, CKKS, PLAIN, carrier
from strategies.collectors import Ckks
from strategies.contract import Claim, ContractError, Visibility
from strategies.mod import kinds_of, layouts_of
from strategies.protocols import Job, Refusal, Reply, Request, Void
from strategies.records import bundle, extended
from strategies.update import BUFFERS, DELTA, Update
from strategies.wire import ARRAYS, CONFIG, TRAINS, Refused, pack, pack_model
from tests.support.updates import parameters, update

MODEL = parameters(1, 2, 3)
KINDS = kinds_of(MODEL, [])
JOB = Job(
    round=4,
    version=3,
    records={ARRAYS: pack_model(MODEL)},
    config={"lr": 0.1},
    included={7: 2},
    layouts=layouts_of(MODEL, KINDS),
    kinds=KINDS,
)
COHORT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def key() -> SharedKey:
    return SharedKey.generate()


@pytest.fixture(scope="module")
def other_key() -> SharedKey:
    return SharedKey.generate()


@pytest.fixture
def client(key, tmp_path) -> CkksClient:
    return CkksClient(Ckks(), lambda: key, tmp_path)


def own(number: int, weight: float = 10.0) -> Update:
    values = np.array([0.1 * number, -0.5, 0.25], np.float32)
    return update(values, weight=weight, client=number, version=3, metrics={"train_loss": number})


def uploaded(client: CkksClient, request: Request, weight: float = 10.0) -> Reply:
    assert client.prepare(request.content) is None
    return Reply(request, client.reply(own(request.client, weight), request.content))


def opened(client: CkksClient, request: Request) -> Reply:
    try:
        return Reply(request, client.answer(request.content))
    except Refused as refused:
        return Reply(request, None, str(refused))


def upload_all(session, client: CkksClient, silent=()) -> list:
    events = []
    for request in session.start():
        if request.client not in silent:
            events += session.receive(uploaded(client, request))
    return events + (session.expire() if silent else [])


def requests_in(events) -> list[Request]:
    return [event for event in events if isinstance(event, Request)]


def voids_in(events) -> list[str]:
    return [event.reason for event in events if isinstance(event, Void)]


def refusals_in(events) -> dict[int, str]:
    return {event.client: event.refused.reason for event in events if isinstance(event, Refusal)}


def finish(session, client: CkksClient, events) -> list:
    """Opens the sum, and gives all that follows."""
    events = list(events)
    while waiting := requests_in(events):
        events = [event for event in events if not isinstance(event, Request)]
        for request in waiting:
            events += session.receive(opened(client, request))
    return events


def tampered(request: Request, **said) -> Request:
    """The same request with other words of the protocol's."""
    content = dict(request.content)
    content[CKKS] = extended(content[CKKS], said)
    return replace(request, content=bundle(content))


# ---- a round ----


def test_a_round_gives_the_mean_and_hides_the_rest(client):
    session = Ckks().open(JOB, COHORT)
    events = upload_all(session, client)
    (mean,) = finish(session, client, events)
    assert session.done
    assert mean.members == tuple(COHORT)
    assert (mean.version, mean.weight) == (3, 5)
    np.testing.assert_allclose(mean.sections[DELTA].vector, [0.3, -0.5, 0.25], atol=1e-6)
    assert mean.metrics["train_loss"] == pytest.approx(3.0, abs=1e-4)
    assert mean.metrics["saturated"] == pytest.approx(0, abs=1e-6)
    # The expected relative error: the noise's deviation in each of three elements, of the sum of five.
    noise = Ckks().parameters.flooding * 3**0.5 / 5
    length = np.linalg.norm([0.3, -0.5, 0.25])
    assert mean.metrics["fixed_point_error"] == pytest.approx(noise / length, rel=1e-3)


def test_weights_by_examples_stay_within_the_ciphertexts(key, tmp_path):
    settings = Ckks(max_weight=100)
    client, session = CkksClient(settings, lambda: key, tmp_path), settings.open(JOB, COHORT)
    events = []
    for request in session.start():
        events += session.receive(uploaded(client, request, weight=10.0 * request.client))
    (mean,) = finish(session, client, events)
    assert mean.weight == pytest.approx(150)
    expected = sum(10 * n * 0.1 * n for n in COHORT) / 150
    assert mean.sections[DELTA].vector[0] == pytest.approx(expected, abs=1e-6)


def test_an_upload_says_nothing_of_its_client_in_clear(client):
    (request, *_) = Ckks().open(JOB, COHORT).start()
    one, two = (
        client.reply(replace_weight, request.content)
        if not index
        else CkksClient(Ckks(), lambda: client._key, client._folder / "other").reply(
            replace_weight, request.content
        )
        for index, replace_weight in enumerate([own(1, 10.0), own(1, 999.0)])
    )
    assert set(one) == {CKKS, CIPHERTEXTS}
    assert set(one[CKKS]) == {"session", "settings", "layouts", "key", "nonce", "tag"}
    same = {name for name in one[CKKS] if one[CKKS][name] == two[CKKS][name]}
    assert same == {"session", "settings", "layouts", "key"}


def test_requests_train_first_and_open_later(client):
    session = Ckks().open(JOB, COHORT)
    requests = session.start()
    assert [request.content[CONFIG]["phase"] for request in requests] == [0] * 5
    assert all(request.content[CONFIG][TRAINS] for request in requests)
    assert requests[0].content[ARRAYS] is requests[1].content[ARRAYS]
    events = []
    for request in requests:
        events += session.receive(uploaded(client, request))
    assert len(events) == 2
    for request in requests_in(events):
        assert request.client in COHORT
        assert request.content[CONFIG]["phase"] == 1
        assert request.content[CONFIG][TRAINS] is False
        assert ARRAYS not in request.content


def test_decryptors_are_drawn_at_random(client, tmp_path):
    """All of 20 draws alike: a false alarm once in 10^19."""
    drawn = set()
    for attempt in range(20):
        session = Ckks().open(JOB, COHORT)
        fresh = CkksClient(Ckks(), lambda: client._key, tmp_path / str(attempt))
        drawn.add(frozenset(one.client for one in requests_in(upload_all(session, fresh))))
    assert len(drawn) > 1


def test_values_beyond_the_limit_are_cut_and_told_of(key, tmp_path, caplog):
    settings = Ckks(limit=0.2)
    client, session = CkksClient(settings, lambda: key, tmp_path), settings.open(JOB, COHORT)
    (mean,) = finish(session, client, upload_all(session, client))
    np.testing.assert_allclose(mean.sections[DELTA].vector, [0.18, -0.2, 0.2], atol=1e-6)
    assert mean.metrics["saturated"] == pytest.approx(13 / 15, abs=1e-5)
    assert "86.7% of all elements were cut at ±0.2" in caplog.text


def test_nothing_is_said_of_cuts_where_there_are_none(client, caplog):
    session = Ckks().open(JOB, COHORT)
    finish(session, client, upload_all(session, client))
    assert "cut at" not in caplog.text


def test_a_key_that_has_opened_enough_is_told_of_once(client, caplog):
    collector = Ckks(decryptions=4)
    collector.open(JOB, COHORT)
    assert "under one key" not in caplog.text
    for number in (5, 6):
        collector.open(replace(JOB, round=number), COHORT)
    assert caplog.text.count("round 5 opens 5 ciphertexts under one key, 4 are laid out for") == 1
    assert "round 6" not in caplog.text


# ---- drop-outs ----


def test_clients_that_drop_out_before_they_upload_are_left_out(client):
    session = Ckks().open(JOB, COHORT)
    events = upload_all(session, client, silent=(2, 4))
    assert refusals_in(events) == {2: "timeout", 4: "timeout"}
    (mean,) = [one for one in finish(session, client, events) if isinstance(one, Update)]
    assert mean.members == (1, 3, 5)
    assert mean.sections[DELTA].vector[0] == pytest.approx(0.3, abs=1e-6)


def test_too_few_uploads_open_nothing(client):
    collector = Ckks()
    session = collector.open(JOB, COHORT)
    events = upload_all(session, client, silent=(1, 2, 4))
    assert not requests_in(events)
    assert "2 clients uploaded, no sum of fewer than 3" in voids_in(events)[0]
    assert session.done


def test_the_quorum_of_the_round_counts_too(client):
    session = Ckks().open(replace(JOB, quorum=5), COHORT)
    assert "fewer than 5" in voids_in(upload_all(session, client, silent=(1,)))[0]


def test_nobody_uploads():
    session = Ckks().open(JOB, COHORT)
    session.start()
    events = session.expire()
    assert set(refusals_in(events).values()) == {"timeout"}
    assert voids_in(events)
    assert session.done


def test_a_decryptor_that_is_gone_is_replaced_while_there_are_others(client):
    session = Ckks().open(JOB, COHORT)
    first, second = requests_in(upload_all(session, client))
    assert session.receive(opened(client, first)) == []
    events = session.expire()
    assert refusals_in(events) == {second.client: "timeout"}
    (third,) = requests_in(events)
    assert third.client not in (first.client, second.client)
    failed = session.receive(Reply(third, None, "out of battery"))
    assert refusals_in(failed) == {third.client: "client_error"}
    (mean,) = finish(session, client, requests_in(failed))
    assert mean.members == tuple(COHORT)


def test_the_round_is_void_when_nobody_opens_the_sum(client):
    collector = Ckks()
    session = collector.open(JOB, COHORT)
    events = upload_all(session, client)
    while not voids_in(events):
        events = session.expire()
    assert session.done
    assert "members are left to open the sum, 2 must agree" in voids_in(events)[0]
    # No plain sum came, so the same clients may repeat the round.
    again = collector.open(JOB, COHORT)
    assert finish(again, client, upload_all(again, client))


def test_an_empty_cohort_is_done_at_once():
    assert Ckks().open(JOB, []).done


# ---- what the server refuses ----


def test_late_repeated_and_foreign_replies_are_refused(client, tmp_path):
    session, other = Ckks().open(JOB, COHORT), Ckks().open(JOB, COHORT)
    requests = session.start()
    first = uploaded(client, requests[0])
    assert session.receive(first) == []
    with pytest.raises(Refused, match="duplicate"):
        session.receive(first)
    stranger = replace(requests[1], client=99)
    with pytest.raises(Refused, match="duplicate"):
        session.receive(Reply(stranger, first.content))
    foreign = uploaded(CkksClient(Ckks(), lambda: client._key, tmp_path / "o"), other.start()[1])
    assert refusals_in(session.receive(foreign)) == {2: "session"}
    assert requests_in(session.expire()) == []
    with pytest.raises(Refused, match="late"):
        session.receive(uploaded(client, requests[2]))


def test_an_upload_that_comes_in_the_next_phase_is_late(client):
    session = Ckks().open(JOB, COHORT)
    requests = session.start()
    replies = [uploaded(client, request) for request in requests]
    for reply in replies[:4]:
        session.receive(reply)
    assert requests_in(session.expire())
    with pytest.raises(Refused, match="late"):
        session.receive(replies[4])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: bundle({}), "missing"),
        (lambda content: bundle({CKKS: content[CKKS]}), "missing"),
        (lambda content: _said(content, tag=b"short"), "malformed"),
        (lambda content: _said(content, nonce=7), "malformed"),
        (lambda content: _said(content, key="short"), "malformed"),
        (lambda content: _said(content, key=7), "malformed"),
        (lambda content: _said(content, session=b"x" * 16), "session"),
        (lambda content: _said(content, settings=b"x" * 16), "session"),
        (lambda content: _said(content, layouts=["0" * 16]), "shape"),
        (lambda content: _ciphertexts(content, b""), "malformed"),
        (lambda content: _ciphertexts(content, b"\xff" * (8 * 4096 + 64)), "malformed"),
    ],
)
def test_a_bad_upload_is_refused_with_its_reason_and_the_others_are_summed(client, spoil, reason):
    session = Ckks().open(JOB, COHORT)
    events = []
    for request in session.start():
        reply = uploaded(client, request)
        if request.client == 3:
            reply = replace(reply, content=spoil(reply.content))
        events += session.receive(reply)
    assert refusals_in(events) == {3: reason}
    (mean,) = [one for one in finish(session, client, events) if isinstance(one, Update)]
    assert mean.members == (1, 2, 4, 5)


def _said(content, **said):
    return bundle({**dict(content), CKKS: extended(content[CKKS], said)})


def _ciphertexts(content, blob: bytes):
    return bundle({**dict(content), CIPHERTEXTS: carrier(CIPHERTEXTS, blob)})


def test_clients_with_another_key_are_told_apart(client, other_key, tmp_path):
    stranger = CkksClient(Ckks(), lambda: other_key, tmp_path / "stranger")
    session = Ckks().open(JOB, COHORT)
    events = []
    for request in session.start():
        events += session.receive(uploaded(stranger if request.client == 1 else client, request))
    assert refusals_in(events) == {1: "key"}
    (mean,) = [one for one in finish(session, client, events) if isinstance(one, Update)]
    assert mean.members == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        (np.zeros(7, np.float32), "shape"),
        (np.zeros(3), "shape"),
        (np.full(7, np.nan), "too_large"),
        (np.full(7, 1e6), "too_large"),
    ],
)
def test_a_bad_plain_sum_is_refused_and_another_member_asked(client, plain, reason):
    session = Ckks().open(JOB, COHORT)
    first, second = requests_in(upload_all(session, client))
    content = client.answer(first.content)
    bad = bundle({CKKS: content[CKKS], PLAIN: ArrayRecord({PLAIN: pack(plain)})})
    events = session.receive(Reply(first, bad))
    assert refusals_in(events) == {first.client: reason}
    (third,) = requests_in(events)
    assert third.client not in (first.client, second.client)
    (mean,) = finish(session, client, [second, third])
    assert isinstance(mean, Update)


def test_decryptors_that_disagree_make_the_round_void(client):
    collector = Ckks()
    session = collector.open(JOB, COHORT)
    first, second = requests_in(upload_all(session, client))
    content = client.answer(first.content)
    lie = np.frombuffer(content[PLAIN][PLAIN].data[128:], np.float64).copy()
    lie[0] += 1e-3
    lied = bundle({CKKS: content[CKKS], PLAIN: ArrayRecord({PLAIN: pack(lie)})})
    assert session.receive(Reply(first, lied)) == []
    events = session.receive(opened(client, second))
    assert "disagree in 1 of 7 elements, by up to 0.001" in voids_in(events)[0]
    # The server has seen a plain sum: the same clients join no second one on this model.
    (request, *_) = collector.open(JOB, COHORT).start()
    with pytest.raises(Refused, match="reused"):
        client.prepare(request.content)


def test_a_neighbouring_step_of_the_grid_is_agreement(client):
    session = Ckks().open(JOB, COHORT)
    first, second = requests_in(upload_all(session, client))
    content = client.answer(first.content)
    near = np.frombuffer(content[PLAIN][PLAIN].data[128:], np.float64).copy()
    near[0] += Ckks().parameters.grid
    moved = bundle({CKKS: content[CKKS], PLAIN: ArrayRecord({PLAIN: pack(near)})})
    session.receive(Reply(first, moved))
    (mean,) = session.receive(opened(client, second))
    assert isinstance(mean, Update)


# ---- what a client refuses ----


def the_opening(session, client: CkksClient) -> Request:
    return requests_in(upload_all(session, client))[0]


def test_a_client_opens_the_sum_again_with_the_same_noise(client):
    request = the_opening(Ckks().open(JOB, COHORT), client)
    one, two = (client.answer(request.content)[PLAIN][PLAIN].data for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"tag": b"x" * 16}, "tag"),
        ({"session": b"x" * 16}, "session"),
        ({"settings": b"x" * 16}, "session"),
        ({"members": "all"}, "malformed"),
        ({"members": [1, 2, True]}, "malformed"),
        ({"members": [1, 2, -3]}, "malformed"),
        ({"nonces": b""}, "malformed"),
    ],
)
def test_a_client_opens_nothing_else_than_the_sum(client, said, reason):
    request = tampered(the_opening(Ckks().open(JOB, COHORT), client), **said)
    with pytest.raises(Refused) as caught:
        client.answer(request.content)
    assert caught.value.reason == reason


def test_a_client_does_not_open_another_clients_upload(client):
    """Nor a multiple of it: the server says that it is the sum of all, and adds up to as many."""
    from strategies.ckks import Sum, add_tags

    collector = Ckks()
    session = collector.open(JOB, COHORT)
    replies = [uploaded(client, request) for request in session.start()]
    events = []
    for reply in replies:
        events += session.receive(reply)
    request = requests_in(events)[0]
    victim = replies[0].content
    forged, tag = Sum(collector.parameters, 7), bytes(16)
    for _ in COHORT:
        forged.add(victim[CIPHERTEXTS][CIPHERTEXTS].data)
        tag = add_tags(tag, victim[CKKS]["tag"], collector.parameters.modulus)
    content = dict(tampered(request, tag=tag).content)
    content[CIPHERTEXTS] = carrier(CIPHERTEXTS, forged.to_bytes())
    with pytest.raises(Refused, match="not the sum of those clients' uploads"):
        client.answer(bundle(content))


def test_a_client_opens_no_sum_of_too_few_or_without_itself(client):
    session = Ckks().open(JOB, COHORT)
    request = the_opening(session, client)
    nonces = request.content[CKKS]["nonces"]
    for members in ([request.client, request.client + 1], [7, 8, 9], [request.client] * 3):
        short = tampered(request, members=members, nonces=nonces[: 16 * len(members)])
        with pytest.raises(Refused, match="members"):
            client.answer(short.content)


def test_a_client_that_did_not_upload_opens_nothing(client, key, tmp_path):
    request = the_opening(Ckks().open(JOB, COHORT), client)
    with pytest.raises(Refused, match="session"):
        CkksClient(Ckks(), lambda: key, tmp_path / "elsewhere").answer(request.content)


def test_a_client_opens_one_sum_a_session(client, key, tmp_path):
    """Other ciphertexts with tags that fit: the honest sum of fewer members, sent to who has opened that of all."""
    collector = Ckks()
    session = collector.open(JOB, COHORT)
    replies = [uploaded(client, request) for request in session.start()]
    events = []
    for reply in replies:
        events += session.receive(reply)
    request = requests_in(events)[0]
    client.answer(request.content)
    from strategies.ckks import Sum, add_tags

    fewer, tag, nonces = Sum(collector.parameters, 7), bytes(16), b""
    members = sorted([request.client, *[one for one in COHORT if one != request.client][:2]])
    for member in members:
        content = replies[COHORT.index(member)].content
        fewer.add(content[CIPHERTEXTS][CIPHERTEXTS].data)
        tag = add_tags(tag, content[CKKS]["tag"], collector.parameters.modulus)
        nonces += content[CKKS]["nonce"]
    content = dict(tampered(request, members=members, nonces=nonces, tag=tag).content)
    content[CIPHERTEXTS] = carrier(CIPHERTEXTS, fewer.to_bytes())
    with pytest.raises(Refused, match="reused"):
        client.answer(bundle(content))


def test_a_client_uploads_once_on_a_model_and_once_to_a_session(client):
    collector = Ckks()
    session = collector.open(JOB, COHORT)
    (request, *_) = session.start()
    uploaded(client, request)
    with pytest.raises(Refused, match="replayed"):
        client.prepare(request.content)
    with pytest.raises(Refused, match="replayed"):
        client.reply(own(1), request.content)
    (second, *_) = collector.open(JOB, COHORT).start()
    with pytest.raises(Refused, match="reused"):
        client.prepare(tampered(second, void=b"").content)
    other = replace(JOB, records={ARRAYS: pack_model(parameters(4, 5, 6))})
    (third, *_) = collector.open(other, COHORT).start()
    assert client.prepare(third.content) is None


def test_a_client_with_other_settings_takes_no_part(key, tmp_path):
    (request, *_) = Ckks().open(JOB, COHORT).start()
    with pytest.raises(Refused, match="settings"):
        CkksClient(Ckks(limit=2.0), lambda: key, tmp_path).prepare(request.content)


def test_a_client_whose_model_is_another_takes_no_part(client):
    (request, *_) = Ckks().open(JOB, COHORT).start()
    with pytest.raises(Refused, match="shape"):
        client.reply(update([1.0], client=1, version=3), request.content)


def test_what_is_not_finite_is_not_sent(client):
    (request, *_) = Ckks().open(JOB, COHORT).start()
    with pytest.raises(Refused, match="not_finite"):
        client.reply(update([np.nan, 0, 0], client=1, version=3), request.content)


def test_a_key_of_another_ring_is_told(key, tmp_path):
    settings = Ckks(degree=8192)
    (request, *_) = settings.open(JOB, COHORT).start()
    with pytest.raises(Refused, match="key"):
        CkksClient(settings, lambda: key, tmp_path).prepare(request.content)


def test_a_request_without_the_protocols_record_is_refused(client):
    (request, *_) = Ckks().open(JOB, COHORT).start()
    content = {name: record for name, record in request.content.items() if name != CKKS}
    for ask in (client.prepare, client.answer):
        with pytest.raises(Refused, match="missing"):
            ask(bundle(content))
    bare = bundle({CKKS: request.content[CKKS], CONFIG: ConfigRecord({"client": 1})})
    with pytest.raises(Refused, match="missing"):
        client.answer(bare)


# ---- the contract ----


def test_the_server_sees_the_sum_and_nothing_in_clear():
    claim = Ckks().check(Claim(clear=frozenset({"num-examples"})))
    assert claim.visibility is Visibility.SUM
    assert not claim.clear


def test_models_with_running_statistics_are_refused_with_the_mend():
    with pytest.raises(ContractError, match="GroupNorm"):
        Ckks().check(Claim(sections=frozenset({DELTA, BUFFERS})))


def test_more_clients_than_the_scale_has_room_for_are_refused():
    with pytest.raises(ContractError, match=r"members=101"):
        Ckks().check(Claim(cohort=101))
    session = Ckks().open(JOB, range(101))  # of a sampler that nothing is known of beforehand
    assert session.start() == []
    (void,) = session.expire()
    assert "101 clients were drawn" in void.reason


def test_rings_that_are_not_secure_are_refused_before_a_round():
    with pytest.raises(ContractError, match="degree 4096"):
        Ckks(bits=(60, 60)).check(Claim())


@pytest.mark.parametrize(
    "wrong", [{"decryptors": 1}, {"decryptors": 4}, {"quorum": 1}, {"members": 1}, {"limit": 0}]
)
def test_settings_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Ckks(**wrong)


def with_settings(request: Request, **settings) -> Request:
    """The same request with other settings in its configuration."""
    content = dict(request.content)
    content[CONFIG] = extended(content[CONFIG], settings)
    return replace(request, content=bundle(content))


def with_broadcast(request: Request, **_) -> Request:
    """The same request with another vector beside the model."""
    content = dict(request.content)
    return replace(request, content=bundle({**content, "control": pack_model({"w": np.ones(3)})}))


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (with_settings, {"clip.norm": 1e-12}), (with_settings, {"lr": 0.0}), (with_settings, {"version": 4}),
        (with_settings, {"num-clients": 9}), (with_broadcast, {}),
    ],
)  # fmt: skip
def test_clients_that_were_told_other_settings_are_in_no_sum_together(client, change, settings):
    """Else a server tells all but one of them to clip at nothing, and the sum is that one's update."""
    session = Ckks().open(JOB, COHORT)
    events = []
    for request in session.start():
        told = request if request.client == 1 else change(request, **settings)
        events += session.receive(Reply(request, uploaded(client, told).content))
    waiting = requests_in(events)
    while waiting and not session.done:
        reply = opened(client, waiting.pop(0))
        assert reply.error is not None
        assert reply.error.startswith("tag: ")
        events = session.receive(reply)
        waiting += requests_in(events)
    (reason,) = voids_in(events)
    assert "members are left to open the sum" in reason


def test_settings_of_each_clients_own_do_not_part_them(client):
    session = Ckks().open(JOB, COHORT)
    events = []
    for request in session.start():
        told = with_settings(request, included=request.client)
        events += session.receive(Reply(request, uploaded(client, told).content))
    (mean,) = finish(session, client, events)
    assert mean.members == tuple(COHORT)


def test_settings_that_nothing_binds_are_refused_before_training(client):
    (request, *_) = Ckks().open(JOB, COHORT).start()
    content = bundle({**dict(request.content), "more": ConfigRecord({"lr": 0.0})})
    with pytest.raises(Refused, match="malformed: the request has a record 'more'"):
        client.prepare(content)


# ---- the key's wear ----


def test_a_key_that_has_told_what_it_may_opens_no_further_sum(key, tmp_path):
    """In whatever run: the ledger is the key's."""
    said = []
    for folder in (tmp_path / "one", tmp_path / "one", tmp_path / "two"):
        collector = Ckks(decryptions=1)
        client, session = CkksClient(collector, lambda: key, folder), collector.open(JOB, COHORT)
        request, *_ = requests_in(upload_all(session, client))
        said.append([opened(client, request).error for _ in range(2)])
    first, worn, elsewhere = said
    assert (first, elsewhere) == ([None, None], [None, None])
    assert all(error.startswith("worn:") for error in worn)


def test_a_simulations_key_protects_nobody_and_does_not_wear(key, tmp_path):
    client = CkksClient(Ckks(decryptions=1), lambda: key, tmp_path, wears=False)
    for _ in range(2):
        session = Ckks(decryptions=1).open(JOB, COHORT)
        assert not voids_in(finish(session, client, upload_all(session, client)))
