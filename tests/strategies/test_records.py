"""Records made without Flower's checks are the records that Flower makes."""

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from strategies.records import bundle, extended, record_in, records_in

ARRAYS, METRICS, CONFIG = ArrayRecord(), MetricRecord({"loss": 0.5}), ConfigRecord({"a": 1})


def test_a_bundle_is_a_record_dict_in_the_same_order():
    records = {"arrays": ARRAYS, "metrics": METRICS, "config": CONFIG}
    made, checked = bundle(records), RecordDict(records)
    assert made == checked
    assert list(made) == list(checked)
    assert made.config_records == checked.config_records
    assert made["config"] is CONFIG


def test_an_extended_record_is_another_one():
    longer = extended(CONFIG, {"b": [1, 2], "a": 3})
    assert longer == ConfigRecord({"a": 3, "b": [1, 2]})
    assert longer.deflate() == ConfigRecord({"a": 3, "b": [1, 2]}).deflate()
    assert ConfigRecord({"a": 1}) == CONFIG


def test_records_are_found_by_name_and_kind():
    content = RecordDict({"m": METRICS, "c": CONFIG})
    assert record_in(content, "c", ConfigRecord) is CONFIG
    assert record_in(content, "c", MetricRecord) is None
    assert record_in(content, "absent", ConfigRecord) is None
    assert records_in(content, MetricRecord) == {"m": METRICS}
