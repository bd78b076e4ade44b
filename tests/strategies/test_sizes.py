"""The traffic that is counted is the traffic there is: sizes against Flower's own serialisation."""

from contextlib import suppress

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies import sizes
from strategies.sizes import count_bytes, record_bytes
from strategies.wire import pack

names = st.text(max_size=200).filter(lambda text: text.isprintable())
signed = st.integers(-(2**63), 2**63 - 1)
integers = st.integers(-(2**63), 2**64 - 1)
floats = st.floats(allow_nan=False)
scalars = st.one_of(st.booleans(), integers, floats, names, st.binary(max_size=300))
lists = st.one_of(
    *(st.lists(kind, max_size=20) for kind in (st.booleans(), signed, floats, names, st.binary()))
)


@given(st.dictionaries(names, scalars | lists, max_size=12))
def test_a_config_record_takes_as_many_bytes_as_flower_sends(items):
    record = ConfigRecord(items)
    assert record_bytes(record) == len(record.deflate())


@given(st.dictionaries(names, integers | floats | st.lists(floats, max_size=5), max_size=12))
def test_a_metric_record_takes_as_many_bytes_as_flower_sends(items):
    record = MetricRecord(items)
    assert record_bytes(record) == len(record.deflate())


@pytest.mark.parametrize("number", [-1, 0, 63, 64, 2**62, 2**63 - 1, -(2**63), 2**63])
def test_the_edges_of_a_varint(number):
    record = ConfigRecord({"a": number})
    assert record_bytes(record) == len(record.deflate())


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800"])
def test_what_no_wire_carries_is_refused(value):
    with pytest.raises((ValueError, TypeError)):
        count_bytes(RecordDict({"config": ConfigRecord({"a": value})}))


def test_arrays_count_with_their_names():
    vector = pack(np.zeros(4))
    content = RecordDict({"arrays": ArrayRecord({"weight": vector})})
    assert count_bytes(content) == len("weight") + 128 + 4 * 8


def test_nothing_large_of_a_peer_is_remembered():
    before = sizes._cached.cache_info().currsize
    for value in ("x" * 1_000, b"y", ["z" * 200], [str(i) for i in range(50)], 2**70):
        with suppress(ValueError, TypeError):
            record_bytes(ConfigRecord({"a": value}))
    record_bytes(ConfigRecord({"k" * 1_000: 1}))
    assert sizes._cached.cache_info().currsize == before
