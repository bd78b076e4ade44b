"""Updates as replies: what is written is read, through Flower's own serialisation, and lies are refused."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.mod import kinds_of, layouts_of
from strategies.replies import Expected, read_metrics, read_update, read_weights, write_update
from strategies.update import BUFFERS, CONTROL, COUNTERS, DELTA, Layout, Section, Update
from strategies.wire import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    RECEIPT,
    UPDATE,
    Refused,
    pack,
    pack_model,
    unpack,
)
from tests.support.grids import numbers
from tests.support.updates import update

LAYOUT = Layout(("w", "b"), ((2, 2), ()))
EXPECTED = Expected({DELTA: LAYOUT, CONTROL: LAYOUT}, client=3, round=7, version=6)


def good() -> RecordDict:
    """An honest reply to EXPECTED."""
    vector = np.arange(5, dtype=np.float32)
    sections = {DELTA: Section(vector, LAYOUT), CONTROL: Section(-vector, LAYOUT)}
    honest = Update(sections, 20.0, (3,), 6, {"loss": 0.25, "steps": 4.0})
    return write_update(honest, client=3, round_number=7)


def through_protobuf(content: RecordDict) -> RecordDict:
    """As the deployed engine's API sends records."""
    wire = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(wire))


def through_objects(content: RecordDict) -> RecordDict:
    """As the SuperLink keeps messages: a tree of objects, each deflated by itself."""
    message = Message(content, 1, "train")
    deflated = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, deflated).content


WIRES = [pytest.param(through_protobuf, id="protobuf"), pytest.param(through_objects, id="objects")]


@pytest.mark.parametrize("travel", WIRES)
def test_an_update_is_read_as_it_was_written(travel):
    read = read_update(travel(good()), EXPECTED)
    np.testing.assert_array_equal(read.delta.vector, np.arange(5))
    np.testing.assert_array_equal(read.sections[CONTROL].vector, -np.arange(5))
    assert (read.weight, read.members, read.version) == (20.0, (3,), 6)
    assert read.metrics == {"loss": 0.25, "steps": 4.0}
    assert read.delta.layout is LAYOUT
    assert read.delta.bound is None


@pytest.mark.parametrize("travel", WIRES)
@settings(max_examples=40)
@given(
    vector=npst.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32)),
    weight=st.floats(1, 1e12) | st.integers(1, 2**40),
    metrics=st.dictionaries(
        st.from_regex(r"[a-zA-Z0-9_.-]{1,9}", fullmatch=True), st.floats(), max_size=4
    ),
)
def test_every_float_survives_the_wire_bit_for_bit(travel, vector, weight, metrics):
    metrics.pop(NUM_EXAMPLES, None)
    sent = update(vector, weight=weight, client=3, version=6, metrics=metrics)
    expected = Expected({DELTA: sent.delta.layout}, 3, 7, 6)
    read = read_update(travel(write_update(sent, client=3, round_number=7)), expected)
    assert read.delta.vector.tobytes() == vector.tobytes()
    assert read.weight == weight
    np.testing.assert_equal(dict(read.metrics), metrics)


def test_an_updates_vectors_are_the_replys_own_bytes():
    content = good()
    read = read_update(content, EXPECTED)
    bytes_of_reply = np.frombuffer(content[UPDATE][DELTA].data, np.uint8)
    assert np.shares_memory(read.delta.vector, bytes_of_reply)


@pytest.mark.parametrize("travel", WIRES)
def test_an_empty_list_in_a_requests_settings_survives_the_wire(travel):
    content = travel(RecordDict({"config": ConfigRecord({"buffers": [], "sections": ["delta"]})}))
    assert content["config"]["buffers"] == []
    assert content["config"]["sections"] == ["delta"]


def changed(change) -> RecordDict:
    content = good()
    change(content)
    return content


def put(record: str, key: str, value: object):
    def change(content: RecordDict) -> None:
        content[record][key] = value

    return change


def vectors(**arrays: np.ndarray):
    return lambda content: content.__setitem__(UPDATE, pack_model(arrays))


FIVE = np.zeros(5, np.float32)
HOSTILE = {
    "no receipt": ("missing", lambda c: c.pop(RECEIPT)),
    "no update": ("missing", lambda c: c.pop(UPDATE)),
    "no metrics": ("missing", lambda c: c.pop(METRICS)),
    "nothing": ("missing", lambda c: [c.pop(key) for key in list(c)]),
    "a receipt of numbers": ("missing", lambda c: c.__setitem__(RECEIPT, MetricRecord({"a": 1}))),
    "metrics twice": ("missing", lambda c: c.__setitem__("more", MetricRecord())),
    "another client": ("impostor", put(RECEIPT, "client", 4)),
    "a client's name": ("impostor", put(RECEIPT, "client", "3")),
    "a list of clients": ("impostor", put(RECEIPT, "client", [3])),
    "no client": ("impostor", lambda c: c[RECEIPT].pop("client")),
    "an earlier round": ("round", put(RECEIPT, "round", 6)),
    "a round of NaN": ("round", put(RECEIPT, "round", float("nan"))),
    "an earlier version": ("version", put(RECEIPT, "version", 5)),
    "a huge version": ("version", put(RECEIPT, "version", 2**63 - 1)),
    "no layouts": ("shape", lambda c: c[RECEIPT].pop("layouts")),
    "another layout": ("shape", put(RECEIPT, "layouts", ["0" * 16, LAYOUT.digest])),
    "a layout too few": ("shape", put(RECEIPT, "layouts", [LAYOUT.digest])),
    "layouts of numbers": ("shape", put(RECEIPT, "layouts", [1, 2])),
    "a section too few": ("missing", vectors(delta=FIVE)),
    "a section too many": ("missing", vectors(delta=FIVE, control=FIVE, evil=FIVE)),
    "a section by another name": ("missing", vectors(delta=FIVE, evil=FIVE)),
    "a vector too short": ("shape", vectors(delta=FIVE[1:], control=FIVE)),
    "a vector of vectors": ("shape", vectors(delta=FIVE.reshape(1, 5), control=FIVE)),
    "a scalar": ("shape", vectors(delta=np.float32(1), control=FIVE)),
    "nothing in a vector": ("shape", vectors(delta=FIVE[:0], control=FIVE)),
    "float64": ("dtype", vectors(delta=FIVE.astype(np.float64), control=FIVE)),
    "integers": ("dtype", vectors(delta=FIVE.astype(np.int32), control=FIVE)),
    "big-endian": ("dtype", vectors(delta=FIVE.astype(">f4"), control=FIVE)),
    "bytes that are no array": (
        "malformed",
        put(UPDATE, DELTA, Array("float32", (5,), "numpy.ndarray", b"cos\nsystem\n(S'x'\ntR.")),
    ),
    "no number of examples": ("num_examples", lambda c: c[METRICS].pop(NUM_EXAMPLES)),
    "a list of examples": ("num_examples", put(METRICS, NUM_EXAMPLES, [20.0])),
    "examples past any float": ("malformed", put(METRICS, NUM_EXAMPLES, 10**400)),
    "a metric past any float": ("malformed", put(METRICS, "loss", -(10**400))),
    "many metrics": (
        "malformed",
        lambda c: c[METRICS].update({f"m{index}": 0.0 for index in range(64)}),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_update_is_refused_with_its_reason(name):
    reason, change = HOSTILE[name]
    with pytest.raises(Refused) as caught:
        read_update(changed(change), EXPECTED)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_lists_beside_the_metrics_are_left_out():
    weight, metrics = read_metrics(numbers(5, loss=0.5, losses=[0.1, 0.2]))
    assert (weight, metrics) == (5.0, {"loss": 0.5})


def test_records_that_nobody_asked_for_change_nothing():
    content = changed(lambda c: c.__setitem__("evil", ConfigRecord({"code": "import os"})))
    content["arrays"] = ArrayRecord({"w": pack(FIVE)})
    np.testing.assert_array_equal(read_update(content, EXPECTED).delta.vector, np.arange(5))


# ---- weights of vanilla clients ----

SENT = {
    "w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    "norm.running_mean": np.array([0.5], np.float32),
    "norm.batches": np.array(5, np.int64),
}
KINDS = kinds_of(SENT, ["norm.running_mean"])
ASKED = Expected(layouts_of(SENT, KINDS), client=0, round=1, version=0)


def weights(examples: object = 10, **arrays: np.ndarray) -> RecordDict:
    content = numbers(examples)
    content[ARRAYS] = pack_model({**SENT, **arrays})
    return content


def read(content: RecordDict) -> Update:
    return read_weights(content, ASKED, SENT, KINDS)


@pytest.mark.parametrize("travel", WIRES)
def test_weights_minus_what_was_sent_are_the_update_by_section(travel):
    content = weights(**{"w": SENT["w"] + 1, "norm.batches": np.array(9)})
    content[ARRAYS]["norm.running_mean"] = Array(np.array([0.25], np.float32))
    result = read(travel(content))
    np.testing.assert_array_equal(result.delta.vector, [1, 1, 1, 1])
    np.testing.assert_array_equal(result.sections[BUFFERS].vector, [-0.25])
    np.testing.assert_array_equal(result.sections[COUNTERS].vector, [4])
    assert (result.weight, result.members, result.version) == (10, (0,), 0)


def test_the_order_of_the_arrays_does_not_matter():
    content = weights(w=SENT["w"] * 2)
    content[ARRAYS] = ArrayRecord(dict(reversed(list(content[ARRAYS].items()))))
    np.testing.assert_array_equal(read(content).delta.vector, SENT["w"].ravel())


def test_weights_in_fortran_order_are_those_that_they_are():
    """scikit-learn's `coef_` is, and Flower keeps the order of what it packs."""
    content = weights()
    content[ARRAYS]["w"] = Array(np.asfortranarray(SENT["w"] + [[0, 1], [2, 3]], np.float32))
    assert b"'fortran_order': True" in content[ARRAYS]["w"].data
    np.testing.assert_array_equal(read(content).delta.vector, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (np.array([True, False]), np.array([True, True]), [0, 1]),
        (np.array([5, 250], np.uint8), np.array([3, 255], np.uint8), [-2, 5]),
        (np.array([-(2**31)], np.int32), np.array([2**31 - 1], np.int32), [2**32 - 1]),
        (np.array([60000], np.float16), np.array([-60000], np.float16), [-120000]),
        (np.array([1.0]), np.array([1 + 2**-30]), [2**-30]),
        (np.array(2**40, np.int64), np.array(2**40 + 1, np.int64), [1]),
    ],
    ids=["bool", "uint8", "int32", "float16", "float64", "int64"],
)
def test_differences_are_right_for_every_dtype(before, after, change):
    sent = {"w": np.zeros(1, np.float32), "x": before}
    kinds = kinds_of(sent, ["x"])
    expected = Expected(layouts_of(sent, kinds), 0, 1, 0)
    content = numbers(1)
    content[ARRAYS] = pack_model({**sent, "x": after})
    section = read_weights(content, expected, sent, kinds).sections[kinds["x"]]
    np.testing.assert_array_equal(section.vector, np.float32(change))


def test_weights_that_are_not_finite_are_left_to_admission_without_a_warning():
    huge = np.full((2, 2), 3e38, np.float32)
    content = weights(w=np.array([[np.nan, np.inf], [-np.inf, 0]], np.float32))
    assert np.isnan(read(content).delta.vector[0])
    sent = {**SENT, "w": -huge}
    assert np.isinf(read_weights(weights(w=huge), ASKED, sent, KINDS).delta.vector).all()


HOSTILE_WEIGHTS = {
    "no arrays": ("missing", lambda c: c.pop(ARRAYS)),
    "arrays twice": ("missing", lambda c: c.__setitem__("more", c[ARRAYS])),
    "an array too few": ("shape", lambda c: c[ARRAYS].pop("w")),
    "an array too many": ("shape", put(ARRAYS, "evil", Array(FIVE))),
    "another dtype": ("dtype", put(ARRAYS, "w", Array(SENT["w"].astype(np.float64)))),
    "another byte order": ("dtype", put(ARRAYS, "w", Array(SENT["w"].astype(">f4")))),
    "another shape": ("shape", put(ARRAYS, "w", Array(SENT["w"].ravel()))),
    "one that broadcasts": ("shape", put(ARRAYS, "w", Array(np.zeros((1, 2), np.float32)))),
    "a scalar that broadcasts": ("shape", put(ARRAYS, "w", Array(np.array(1, np.float32)))),
    "no bytes": ("malformed", put(ARRAYS, "w", Array("float32", (2, 2), "numpy.ndarray", b""))),
    "no metrics": ("missing", lambda c: c.pop(METRICS)),
    "no examples": ("num_examples", lambda c: c[METRICS].pop(NUM_EXAMPLES)),
}


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_hostile_weights_are_refused_with_their_reason(name):
    reason, change = HOSTILE_WEIGHTS[name]
    content = weights()
    change(content)
    with pytest.raises(Refused) as caught:
        read(content)
    assert caught.value.reason == reason


def test_weights_are_never_taken_for_a_section_that_they_cannot_make():
    expected = Expected({**ASKED.sections, CONTROL: ASKED.sections[DELTA]}, 0, 1, 0)
    with pytest.raises(Refused, match="weights alone do not make sections"):
        read_weights(weights(), expected, SENT, KINDS)


def test_what_flower_packs_is_read_as_it_is():
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(unpack(Array(array)), array)
