"""The server's half with real clients' halves behind it: who is sent what, and that all come to the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl_app.services.checkpoint import dump, read
from strategies.contract import Claim, ContractError
from strategies.downlink import Downlink, HeldModels
from strategies.downlink.messages import HELD, PLANES
from strategies.protocols import Request
from strategies.records import bundle, record_in
from strategies.sizes import count_bytes
from strategies.wire import ARRAYS, CONFIG, Refused, pack_model, unpack_model

SIZE = 4_000


class Server:
    """A model that drifts, and the requests that carry it."""

    def __init__(self, downlink: Downlink, seed: int = 0) -> None:
        self.downlink = downlink
        self.rng = np.random.default_rng(seed)
        self.arrays = {
            "w": self.rng.normal(0, 0.1, (SIZE // 50, 50)).astype(np.float32),
            "b": np.zeros(50, np.float32),
            "steps": np.array(0, np.int64),
        }
        self.record = downlink.release(self.arrays)

    def step(self, size: float = 0.01) -> None:
        self.arrays = {
            "w": self.arrays["w"] + self.rng.normal(0, size, self.arrays["w"].shape),
            "b": self.arrays["b"] + self.rng.normal(0, size, 50),
            "steps": self.arrays["steps"] + 1,
        }
        self.arrays = {
            "w": self.arrays["w"].astype(np.float32),
            "b": self.arrays["b"].astype(np.float32),
            "steps": np.asarray(self.arrays["steps"]),
        }
        self.record = self.downlink.release(self.arrays)

    def request(self, client: int) -> Request:
        content = bundle({ARRAYS: self.record, CONFIG: ConfigRecord({"client": client})})
        return Request(client, "train", content, 1)

    def ask(self, client: int, held: HeldModels) -> RecordDict:
        """One exchange that goes well: what was sent, once the client has restored it."""
        request = self.request(client)
        sent = self.downlink.content(request)
        restored = held.restored(sent)
        assert list(restored) == [ARRAYS, CONFIG]
        assert octets(restored) == octets(request.content)
        self.downlink.answered(request)
        return sent


def octets(content: RecordDict) -> list[tuple[str, bytes]]:
    record = record_in(content, ARRAYS, ArrayRecord)
    assert record is not None
    return [(name, array.data) for name, array in record.items()]


def is_change(sent: RecordDict) -> bool:
    assert (ARRAYS in sent) is not (PLANES in sent)
    return PLANES in sent


def test_the_first_model_goes_whole_and_then_what_has_changed(tmp_path):
    server, held = Server(Downlink()), HeldModels(tmp_path)
    whole = server.ask(3, held)
    assert not is_change(whole)
    for _ in range(5):
        server.step()
        sent = server.ask(3, held)
        assert is_change(sent)
        assert count_bytes(sent) < count_bytes(whole) / 2.5


def test_the_same_version_again_is_a_few_bytes(tmp_path):
    server, held = Server(Downlink()), HeldModels(tmp_path)
    server.ask(0, held)
    again = server.ask(0, held)
    assert is_change(again)
    assert count_bytes(again) < 300


def test_clients_of_any_version_come_to_the_same_model(tmp_path):
    """Each takes part now and then; those who hold what is forgotten are sent the whole."""
    server = Server(Downlink(versions=4))
    clients = {one: HeldModels(tmp_path / str(one)) for one in range(6)}
    last: dict[int, int] = {}
    rng = np.random.default_rng(1)
    found = set()
    for version in range(30):
        for client in rng.choice(6, 2, replace=False):
            sent = server.ask(int(client), clients[client])
            age = version - last.get(client, -100)
            assert is_change(sent) is (age < 4)
            found.add(min(age, 10))
            last[int(client)] = version
        server.step()
    assert {1, 2, 3, 10} <= found


def test_requests_to_holders_of_one_version_share_their_records(tmp_path):
    server, held = Server(Downlink()), HeldModels(tmp_path)
    for client in range(3):
        server.ask(client, held)
    server.step()
    sent = [server.downlink.content(server.request(client)) for client in range(3)]
    assert sent[0][PLANES] is sent[1][PLANES] is sent[2][PLANES]
    assert len({id(held.restored(one)[ARRAYS]) for one in sent}) == 1


def test_a_client_that_lost_its_models_refuses_and_is_sent_the_whole(tmp_path):
    server = Server(Downlink())
    server.ask(0, HeldModels(tmp_path / "before"))
    server.step()
    request, fresh = server.request(0), HeldModels(tmp_path / "after")
    with pytest.raises(Refused, match="held: the model that the change is for is not here"):
        fresh.restored(server.downlink.content(request))
    server.downlink.lost(0)
    sent = server.downlink.content(request)
    assert not is_change(sent)
    assert octets(fresh.restored(sent)) == octets(request.content)


def test_who_has_not_answered_holds_nothing_new(tmp_path):
    """A request that was lost on its way is no reason to believe that it came."""
    server, held = Server(Downlink()), HeldModels(tmp_path)
    server.ask(0, held)
    server.step()
    server.downlink.content(server.request(0))  # never arrives
    server.step()
    assert is_change(server.ask(0, held))


def test_a_late_answer_to_a_forgotten_version_counts_for_nothing(tmp_path):
    server = Server(Downlink(versions=2))
    late = server.request(0)
    for _ in range(3):
        server.step()
    server.downlink.answered(late)
    assert not is_change(server.downlink.content(server.request(0)))


def test_a_request_of_an_older_version_is_served_while_that_is_remembered(tmp_path):
    server, held = Server(Downlink(versions=3)), HeldModels(tmp_path)
    server.ask(0, held)
    server.step()
    straggler = server.request(0)
    server.step()
    sent = server.downlink.content(straggler)
    assert is_change(sent)
    assert octets(held.restored(sent)) == octets(straggler.content)
    server.step()
    server.step()
    assert server.downlink.content(straggler) is straggler.content


def test_a_model_is_known_by_its_bits_too(tmp_path):
    """A request that is asked again after a restart has a record of its own."""
    server, held = Server(Downlink()), HeldModels(tmp_path)
    server.ask(0, held)
    server.step()
    again = pack_model(unpack_model(server.record))
    request = Request(0, "train", bundle({ARRAYS: again}), 1)
    sent = server.downlink.content(request)
    assert is_change(sent)
    held.restored(sent)
    server.downlink.answered(request)
    assert count_bytes(server.ask(0, held)) < 300


def test_requests_without_a_model_stay_as_they_are():
    server = Server(Downlink())
    other = Request(0, "train", bundle({CONFIG: ConfigRecord({"client": 0})}), 1)
    assert server.downlink.content(other) is other.content
    server.downlink.answered(other)
    assert not is_change(server.downlink.content(server.request(0)))


def test_an_unchanged_model_is_the_same_version():
    server = Server(Downlink())
    first = server.record
    assert server.downlink.release(server.arrays) is first
    nudged = {name: array + np.array(1e-9, array.dtype) for name, array in server.arrays.items()}
    nudged["b"] = server.arrays["b"]
    assert server.downlink.release(nudged) is first


@pytest.mark.parametrize("value", [np.nan, np.inf, np.finfo(np.float32).max])
def test_a_model_that_has_no_grid_goes_whole_and_so_does_the_one_after(tmp_path, value):
    server, held = Server(Downlink()), HeldModels(tmp_path)
    server.ask(0, held)
    good = server.arrays
    server.arrays = {**good, "w": np.full_like(good["w"], value)}
    server.record = server.downlink.release(server.arrays)
    assert not is_change(server.ask(0, held))
    server.arrays = good
    server.step()
    assert not is_change(server.ask(0, held))
    server.step()
    assert is_change(server.ask(0, held))


def test_a_change_that_saves_nothing_is_not_sent():
    """Of three numbers the whole is shorter than the names of two models."""
    downlink = Downlink()
    for number in range(2):
        record = downlink.release({"w": np.full(3, 1.0 + number, np.float32)})
        request = Request(0, "train", bundle({ARRAYS: record}), 1)
        sent = downlink.content(request)
        downlink.answered(request)
    assert not is_change(sent)


def test_a_restarted_server_goes_on_with_the_very_same_messages(tmp_path):
    """Through a checkpoint's file and back: the ring and who holds what are those of a server that never died."""
    first = Server(Downlink(versions=4))
    clients = {one: HeldModels(tmp_path / str(one)) for one in range(5)}
    for client in range(5):
        first.ask(client, clients[client])
        first.step()
    path = tmp_path / "checkpoint"
    path.write_bytes(dump(first.downlink.state_dict()))
    second = Downlink(versions=4)
    second.load_state_dict(read(path))
    first.step()
    again = second.release(first.arrays)
    for client in range(5):
        request = first.request(client)
        theirs = Request(client, "train", bundle({**request.content, ARRAYS: again}), 1)
        one, other = first.downlink.content(request), second.content(theirs)
        assert is_change(one) is is_change(other) is (client > 2)
        assert [*one] == [*other]
        assert dict(one[HELD]) == dict(other[HELD])
        assert octets(clients[client].restored(other)) == octets(request.content)


def test_a_fresh_servers_state_is_that_of_one_that_has_sent_nothing(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(dump(Downlink().state_dict()))
    restored = Downlink()
    restored.load_state_dict(read(path))
    server = Server(restored)
    assert not is_change(restored.content(server.request(0)))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda state: {}, "'newest' should be a mapping"),
        (lambda state: {**state, "newest": {"w": np.zeros(3, np.float32)}}, "do not follow"),
        (lambda state: {**state, "holders": {"1": "x"}}, "should be a whole number"),
        (lambda state: {**state, "versions": {"4": 3}}, "'4' should be a mapping"),
    ],
    ids=["another part's", "another model", "no version", "no versions"],
)
def test_a_state_that_is_none_is_refused(tmp_path, spoil, word):
    server, held = Server(Downlink()), HeldModels(tmp_path)
    server.ask(0, held)
    server.step()
    with pytest.raises(ValueError, match=word):
        Downlink().load_state_dict(spoil(dict(server.downlink.state_dict())))


def test_a_checkpoint_holds_one_model_and_changes(tmp_path):
    server = Server(Downlink(versions=10))
    for _ in range(20):
        server.step()
    whole = sum(array.nbytes for array in server.arrays.values())
    assert len(dump(server.downlink.state_dict())) < whole * (1 + 9 / 2.5) + 10_000


def test_vanilla_clients_are_refused_with_the_mend():
    claim = Claim(client_half=False)
    with pytest.raises(ContractError, match="pipeline_mod"):
        Downlink().check(claim)
    assert Downlink().check(Claim()) == Claim()


@pytest.mark.parametrize("setting", [{"bits": 1}, {"versions": 1}, {"codec": "gzip"}])
def test_settings_out_of_range_are_refused(setting: Mapping[str, object]):
    with pytest.raises(ValueError, match="Downlink"):
        Downlink(**setting)


def test_no_error_adds_up(tmp_path):
    """After 100 versions a client is as near the server's model as after one: half a step of each array."""
    server, held = Server(Downlink(bits=8)), HeldModels(tmp_path)
    for _ in range(100):
        server.step()
        server.ask(0, held)
    (name, data), *_ = octets(held.restored(server.downlink.content(server.request(0))))
    restored = np.frombuffer(data[-4 * SIZE :], np.float32)
    exact = server.arrays[name].ravel()
    rms = np.sqrt(np.mean(exact.astype(float) ** 2))
    assert np.abs(restored - exact).max() <= rms * 2.0**-8 / 2


def sizes(downlink: Downlink, folder: Path, steps: Sequence[float]) -> list[int]:
    server, held = Server(downlink), HeldModels(folder)
    server.ask(0, held)
    found = []
    for step in steps:
        server.step(step)
        found.append(count_bytes(server.ask(0, held)))
    return found


def test_smaller_changes_and_coarser_grids_take_fewer_bytes(tmp_path):
    large, small = sizes(Downlink(bits=10), tmp_path / "a", [0.03, 0.0003])
    (coarse,) = sizes(Downlink(bits=6), tmp_path / "b", [0.03])
    assert small < large / 2
    assert coarse < large * 0.75
