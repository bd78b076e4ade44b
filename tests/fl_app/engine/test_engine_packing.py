from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
from engine_helpers import loose_requests
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fl_app.engine.channel import Channel
from fl_app.engine.flwr_internals import metadata_fields
from fl_app.engine.packing import pack_replies, pack_requests, unpack_replies, unpack_requests

floats = st.floats(allow_nan=False)
integers = st.integers(-(2**63), 2**63 - 1)
configs = st.dictionaries(
    st.text(),
    st.one_of(
        st.booleans(),
        integers,
        floats,
        st.text(),
        st.binary(),
        st.lists(integers),
        st.lists(floats),
        st.lists(st.text()),
        st.lists(st.binary()),
        st.lists(st.booleans()),
    ),
).map(ConfigRecord)
metrics = st.dictionaries(
    st.text(), st.one_of(integers, floats, st.lists(integers), st.lists(floats))
).map(MetricRecord)
arrays = st.builds(
    Array,
    st.text(),
    st.lists(st.integers(0, 9)).map(tuple),
    st.text(),
    st.binary(),
)
array_records = st.dictionaries(st.text(), arrays).map(ArrayRecord)
contents = st.dictionaries(st.text(), st.one_of(configs, metrics, array_records)).map(RecordDict)

[REQUEST] = loose_requests(1)


def returned(reply: Message) -> Message:
    """The reply after a way through the pipe."""
    [arrived] = unpack_replies(through_a_pipe(pack_replies([reply])), [REQUEST])
    return arrived


def through_a_pipe(value: Any) -> Any:
    """What the other side of a channel receives."""
    here, there = (Channel(end) for end in multiprocessing.Pipe())
    sending = threading.Thread(target=here.send, args=(value,))
    sending.start()
    try:
        return there.receive()
    finally:
        sending.join()
        here.close()
        there.close()


@given(contents)
def test_whatever_a_reply_holds_arrives_as_it_was(content: RecordDict) -> None:
    packed = pickle.loads(pickle.dumps(pack_replies([Message(content, reply_to=REQUEST)])))
    [arrived] = unpack_replies(packed, [REQUEST])
    assert arrived.content == content
    assert {n: type(r) for n, r in arrived.content.items()} == {
        n: type(r) for n, r in content.items()
    }
    assert arrived.metadata.reply_to_message_id == REQUEST.metadata.message_id


def test_the_type_of_a_scalar_is_kept() -> None:
    record = ConfigRecord({"yes": True, "one": 1, "real": 1.0, "inf": math.inf, "text": "1"})
    arrived = returned(Message(RecordDict({"config": record}), reply_to=REQUEST))
    assert [(k, type(v)) for k, v in arrived.content["config"].items()] == [
        (k, type(v)) for k, v in record.items()
    ]


def test_numpy_floats_and_other_subclasses_arrive_as_plain_numbers() -> None:
    class Grams(int):
        pass

    class Name(str):
        def __str__(self) -> str:
            return "another"

    class Blob(bytes):
        pass

    config = ConfigRecord({"g": Grams(3), "n": Name("x"), "b": Blob(b"y"), "f": np.float64(0.1)})
    arrived = returned(Message(RecordDict({"config": config}), reply_to=REQUEST))
    assert dict(arrived.content["config"]) == {"g": 3, "n": "x", "b": b"y", "f": 0.1}
    assert {type(v) for v in arrived.content["config"].values()} == {int, str, bytes, float}


def test_an_error_reply_arrives_with_its_code_and_reason() -> None:
    arrived = returned(Message(Error(17, "because"), reply_to=REQUEST))
    assert arrived.error == Error(17, "because")
    assert returned(Message(Error(17), reply_to=REQUEST)).error.reason is None


def test_requests_arrive_with_all_their_metadata() -> None:
    requests = loose_requests(3, ArrayRecord([np.arange(4.0)]))
    arrived = unpack_requests(through_a_pipe(pack_requests(requests)))
    for there, here in zip(arrived, requests, strict=True):
        assert metadata_fields(there.metadata) == metadata_fields(here.metadata)
        assert there.content == here.content


def test_the_model_that_requests_share_crosses_once_and_is_shared_again() -> None:
    model = ArrayRecord([np.zeros(100_000)])
    packed = pack_requests(loose_requests(5, model))
    assert len(pickle.dumps(packed)) < 1.1 * 800_000
    arrived = unpack_requests(through_a_pipe(packed))
    assert len({id(message.content["arrays"]) for message in arrived}) == 1


def test_arrays_whose_id_was_computed_can_be_sent() -> None:
    model = ArrayRecord([np.zeros(10)])
    assert model.object_id
    assert unpack_requests(through_a_pipe(pack_requests(loose_requests(1, model))))


def test_a_reply_that_cannot_be_sent_becomes_an_error_alone() -> None:
    spoilt = ArrayRecord([np.zeros(3)])
    spoilt["0"].data = memoryview(b"abc")  # type: ignore[assignment]
    bad = Message(RecordDict({"update": spoilt}), reply_to=REQUEST)
    good = Message(RecordDict({"metrics": MetricRecord({"loss": 1.0})}), reply_to=REQUEST)
    replies = unpack_replies(through_a_pipe(pack_replies([good, bad, good])), [REQUEST] * 3)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "cannot be sent: TypeError: an array's data is memoryview" in (
        replies[1].error.reason or ""
    )


def test_a_value_that_no_record_may_hold_becomes_an_error() -> None:
    record = MetricRecord()
    record.__dict__["_data"]["x"] = {"nested": 1}
    arrived = returned(Message(RecordDict({"metrics": record}), reply_to=REQUEST))
    assert "holds a dict" in (arrived.error.reason or "")


@pytest.mark.parametrize("thing", [print, ConfigRecord, np.float64(1.0), RuntimeError("x")])
def test_a_pipe_carries_no_class_and_no_function(thing: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="only plain values"):
        through_a_pipe(thing)


def test_values_of_any_size_come_whole_and_one_by_one() -> None:
    values = [b"x" * size for size in (0, 1, 65_535, 65_536, 3_000_000)] + [["y" * 200_000] * 3]
    here, there = (Channel(end) for end in multiprocessing.Pipe())
    sending = threading.Thread(target=lambda: deque(map(here.send, values), 0))
    sending.start()
    assert [there.receive() for _ in values] == values
    sending.join()
    here.close()
    with pytest.raises(EOFError):
        there.receive()
    there.close()


def test_a_value_that_is_cut_short_is_an_error() -> None:
    here, there = multiprocessing.Pipe()
    os.write(here.fileno(), pickle.dumps([b"x" * 100_000])[:50_000])
    here.close()
    channel = Channel(there)
    with pytest.raises((EOFError, pickle.UnpicklingError)):
        channel.receive()
    channel.close()
