"""A turn on the wire: what is written is read again, whatever numbers it holds, and what is no turn is refused."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from strategies.collectors.turns import LAST, read_turn, write_turn
from strategies.wire import RECEIPT, Refused, pack

NAME = "encrypted"
WANTED = {"client": 3, "round": 5, "turn": 1}
RECEIVED = {**WANTED, LAST: True}
PRIME = (1 << 60) - 16383
"""Residues of a prime of 60 bits: float64 holds none of the largest exactly."""


def travelled(content: RecordDict) -> RecordDict:
    """The content after Flower's own serialisation."""
    wire = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(wire))


DTYPES = st.sampled_from([np.uint64, np.int64, np.uint8, np.uint32, np.float32, np.float64])
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
NAMED = st.dictionaries(
    NAMES, DTYPES.flatmap(lambda d: arrays(d, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))), max_size=5
)  # fmt: skip


class TestTurnsOnTheWire:
    @given(sent=NAMED, last=st.booleans())
    def test_what_is_written_is_read_again_bit_for_bit(self, sent, last):
        content = travelled(write_turn(NAME, sent, {**WANTED, LAST: last}))
        found, receipt = read_turn(content, NAME, WANTED)
        assert receipt[LAST] is last
        assert list(found) == list(sent)
        for name, array in sent.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes()

    def test_residues_of_sixty_bits_cross_whole(self):
        rng = np.random.default_rng(1)
        residues = rng.integers(PRIME - 1000, PRIME, (3, 2, 2, 64), np.uint64)
        residues[0, 0, 0, 0] = np.iinfo(np.uint64).max
        content = travelled(write_turn(NAME, {"batch": residues}, RECEIVED))
        (found,) = read_turn(content, NAME, WANTED)[0].values()
        np.testing.assert_array_equal(found, residues)
        assert found.dtype == np.uint64
        assert not found.flags.writeable

    @pytest.mark.parametrize(
        ("spoilt", "reason"),
        [
            ({"client": 4}, "impostor"),
            ({"round": 4}, "round"),
            ({"turn": 0}, "phase"),
            ({"turn": "1"}, "phase"),
            ({"owner": 2}, "owner"),
        ],
        ids=str,
    )
    def test_a_receipt_that_says_otherwise_is_refused_by_its_reason(self, spoilt, reason):
        content = write_turn(NAME, {}, {**RECEIVED, "owner": 1, **spoilt})
        with pytest.raises(Refused) as caught:
            read_turn(content, NAME, {**WANTED, "owner": 1})
        assert caught.value.reason == reason

    @pytest.mark.parametrize("beyond", [0, 1])
    def test_bytes_are_counted_before_anything_is_read(self, beyond):
        content = write_turn(NAME, {"a": np.zeros(10, np.uint64)}, RECEIVED)
        size = len(content[NAME]["a"].data)
        if not beyond:
            assert read_turn(content, NAME, WANTED, most_bytes=size)[0]["a"].size == 10
            return
        broken = Array("uint64", (10,), "numpy.ndarray", b"\0" * (size + 1))
        content[NAME] = ArrayRecord({"a": broken})
        with pytest.raises(Refused, match="too_large"):
            read_turn(content, NAME, WANTED, most_bytes=size)

    def test_ten_thousand_arrays_and_one_are_refused(self):
        one = pack(np.zeros(1, np.uint8))
        content = write_turn(NAME, {}, RECEIVED)
        content[NAME] = ArrayRecord({str(n): one for n in range(10_001)})
        with pytest.raises(Refused, match="too_large"):
            read_turn(content, NAME, WANTED)

    @pytest.mark.parametrize(
        "content",
        [
            RecordDict(),
            RecordDict({RECEIPT: ConfigRecord(dict(RECEIVED))}),
            RecordDict({NAME: ArrayRecord()}),
            RecordDict({RECEIPT: MetricRecord({"client": 3}), NAME: ArrayRecord()}),
            RecordDict({RECEIPT: ConfigRecord(dict(RECEIVED)), "other": ArrayRecord()}),
        ],
        ids=["nothing", "no arrays", "no receipt", "another receipt", "another record"],
    )
    def test_what_is_no_turn_is_refused(self, content):
        with pytest.raises(Refused, match="missing"):
            read_turn(content, NAME, WANTED)

    @given(data=st.binary(max_size=300))
    def test_arbitrary_bytes_are_an_array_or_refused(self, data):
        content = write_turn(NAME, {}, RECEIVED)
        content[NAME] = ArrayRecord({"a": Array("uint64", (1,), "numpy.ndarray", data)})
        with pytest.raises(Refused) as caught:
            read_turn(content, NAME, WANTED)
        assert caught.value.reason in {"malformed", "dtype"}
