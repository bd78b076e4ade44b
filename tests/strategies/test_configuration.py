"""The digest of the settings that all clients of a round share."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from strategies.configuration import OWN, config_digest, digest_of_request
from strategies.wire import CONFIG, Refused

SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(codec="utf-8"))
    | st.binary()
)
LISTS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1)), st.lists(st.floats()), st.lists(st.booleans()),
    st.lists(st.text(st.characters(codec="utf-8"))), st.lists(st.binary()),
)  # fmt: skip
CONFIGS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), SCALARS | LISTS)


def travelled(config) -> ConfigRecord:
    """A configuration as it arrives."""
    sent = recorddict_to_proto(RecordDict({CONFIG: ConfigRecord(config)}))
    return recorddict_from_proto(type(sent).FromString(sent.SerializeToString())).config_records[
        CONFIG
    ]


@given(CONFIGS)
def test_the_digest_is_the_same_before_and_after_the_wire(config):
    assert config_digest(travelled(config)) == config_digest(config)


@given(CONFIGS, st.sampled_from(sorted(OWN)), st.integers(0, 9))
def test_what_is_a_clients_or_a_phases_own_counts_for_nothing(config, name, value):
    common = {key: item for key, item in config.items() if key not in OWN}
    assert config_digest(common | {name: value}) == config_digest(common)


@given(CONFIGS, CONFIGS)
def test_other_settings_have_another_digest(one, other):
    same = repr(sorted(one.items())) == repr(sorted(other.items()))
    assert same or config_digest(one) != config_digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 1.0}), ({"a": True}, {"a": 1}), ({"a": "x"}, {"a": b"x"}), ({"a": [1]}, {"a": 1}),
        ({"a": ["xy"]}, {"a": ["x", "y"]}), ({"ab": "c"}, {"a": "bc"}), ({"a": 0.0}, {"a": -0.0}),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}), ({}, {"a": []}), ({"a": 127}, {"a": -129}),
    ],
)  # fmt: skip
def test_settings_that_look_alike_are_told_apart(one, other):
    assert config_digest(one) != config_digest(other)


@pytest.mark.parametrize("value", [None, {}, (1,), [None], [[1]], object])
def test_a_value_that_no_record_holds_is_refused(value):
    with pytest.raises(Refused, match="malformed: a setting is of the type"):
        config_digest({"a": value})


def test_settings_beside_the_configuration_are_refused():
    """A train function of the user's own may read them, and nothing binds them."""
    content = RecordDict(
        {"arrays": ArrayRecord(), "said": ConfigRecord(), CONFIG: ConfigRecord({"a": 1})}
    )
    assert digest_of_request(content, "said") == config_digest({"a": 1})
    for record in (ConfigRecord({"lr": 0.0}), MetricRecord({"lr": 0.0})):
        beside = RecordDict({**dict(content.items()), "more": record})
        with pytest.raises(Refused, match="malformed: the request has a record 'more'"):
            digest_of_request(beside, "said")
    with pytest.raises(Refused, match="has no ConfigRecord"):
        digest_of_request(RecordDict({"said": ConfigRecord()}), "said")
