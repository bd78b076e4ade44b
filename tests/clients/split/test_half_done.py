"""What a client is in the middle of comes back as it was, or not at all."""

import logging
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.split.half_done import HalfDone, HalfDoneFolder
from tests.support.examples import many

SHAPES = {"adapters.a.A.weight": (2, 3), "head.bias": (4,)}


def state(**changes) -> HalfDone:
    found = {
        "session": "s1",
        "turn": 3,
        "shapes": SHAPES,
        "parameters": torch.arange(10.0),
        "moments": torch.ones(2, 11),
        "pending": None,
        "key": "ab" * 32,
        "figures": {"train_loss": 0.1 + 0.2, "train_loss/count": 1.0},
    }
    return HalfDone(**{**found, **changes})


@pytest.fixture
def folder(tmp_path):
    return HalfDoneFolder(tmp_path / "own")


@pytest.mark.parametrize("moments", [None, torch.rand(2, 11)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("pending", [None, torch.rand(3, 10)], ids=["", "u_shaped"])
def test_it_comes_back_to_the_bit(folder, moments, pending):
    folder.save(5, state(moments=moments, pending=pending))
    found = folder.load(5, "s1")
    assert (found.turn, found.figures, found.session) == (3, state().figures, "s1")
    assert list(found.shapes.items()) == list(SHAPES.items())
    for name, wanted in (
        ("parameters", torch.arange(10.0)),
        ("moments", moments),
        ("pending", pending),
    ):
        tensor = getattr(found, name)
        assert tensor is None if wanted is None else torch.equal(tensor, wanted)


def test_what_is_loaded_can_be_changed_and_the_file_stays(folder):
    folder.save(0, state())
    folder.load(0, "s1").parameters.add_(1)
    assert torch.equal(folder.load(0, "s1").parameters, torch.arange(10.0))


def test_another_session_s_or_another_client_s_is_none(folder):
    folder.save(0, state())
    assert folder.load(0, "s2") is None
    assert folder.load(1, "s1") is None
    folder.save(0, state(session="s2"))
    assert folder.load(0, "s1") is None


def test_one_file_a_client_replaced_as_a_whole(folder, tmp_path):
    for turn in range(3):
        folder.save(0, state(turn=turn))
    folder.save(1, state())
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == [
        "client-0.turn.safetensors",
        "client-1.turn.safetensors",
    ]
    assert folder.load(0, "s1").turn == 2


def test_a_folder_that_is_not_there_is_no_fault_and_stays_away(tmp_path, caplog):
    assert HalfDoneFolder(tmp_path / "none").load(0, "s1") is None
    assert not (tmp_path / "none").exists()
    assert not caplog.records


@settings(max_examples=many(200), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_torn_or_changed_file_is_none_or_has_the_numbers_of_its_tensors(folder, tmp_path, data):
    folder.save(0, state())
    path = tmp_path / "own" / "client-0.turn.safetensors"
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        torn = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:  # within the header: what follows are numbers
        at = data.draw(st.integers(0, whole.index(b"}}") + 2))
        torn = whole[:at] + data.draw(st.binary(min_size=1, max_size=4)) + whole[at + 1 :]
    path.write_bytes(torn)
    found = folder.load(0, "s1")
    assert found is None or isinstance(found, HalfDone)


@pytest.mark.parametrize("torn", [b"", b"cos\nsystem\n(S'true'\ntR.", b"\0" * 100])
def test_what_can_t_be_read_is_said_in_the_log_and_no_more(folder, tmp_path, caplog, torn):
    folder.save(0, state())
    (tmp_path / "own" / "client-0.turn.safetensors").write_bytes(torn)
    with caplog.at_level(logging.WARNING):
        assert folder.load(0, "s1") is None
    assert "client 0" in caplog.text


def test_what_can_t_be_written_leaves_what_was_there(folder, tmp_path):
    folder.save(0, state())
    (tmp_path / "own" / f"client-0.turn.{os.getpid()}.part").mkdir()
    with pytest.raises(Exception, match=r"(?i)is a directory"):
        folder.save(0, state(turn=9))
    assert folder.load(0, "s1").turn == 3
