"""What a client holds on its disk: kept, found again, checked, pruned, shared, and never believed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from strategies.downlink import Downlink, HeldModels
from strategies.downlink.messages import HELD, PLANES, mark_of
from strategies.protocols import Request
from strategies.records import bundle, extended
from strategies.wire import ARRAYS, CONFIG, Refused, pack, pack_model, unpack_model


def model(version: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(version)
    return {
        "z": rng.normal(0, 0.1, (30, 40)).astype(np.float32),
        "a": rng.normal(0, 0.1, 40).astype(np.float32),
        "scale": np.array(1.0 + version, np.float32),
        "steps": np.array(version, np.int64),
    }


def requests(downlink: Downlink, versions: int) -> list[RecordDict]:
    """What a client is sent that answers each request."""
    sent = []
    for version in range(versions):
        record = downlink.release(model(version))
        content = bundle({ARRAYS: record, CONFIG: ConfigRecord({"server-round": version + 1})})
        request = Request(0, "train", content, version + 1)
        sent.append(downlink.content(request))
        downlink.answered(request)
    return sent


def arrays(content: RecordDict) -> dict[str, np.ndarray]:
    return unpack_model(content.array_records[ARRAYS])


def near(content: RecordDict, version: int) -> None:
    restored, sent = arrays(content), model(version)
    assert list(restored) == list(sent)
    for name, array in sent.items():
        assert (restored[name].dtype, restored[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(restored[name], array, atol=1e-3)


def test_a_restarted_client_goes_on_from_its_disk(tmp_path):
    for version, content in enumerate(requests(Downlink(), 4)):
        restored = HeldModels(tmp_path).restored(content)  # a new process for each message
        near(restored, version)
        assert set(restored) == {ARRAYS, CONFIG}


def test_requests_that_name_no_model_stay_as_they_are(tmp_path):
    content = bundle({ARRAYS: pack_model(model(0)), CONFIG: ConfigRecord({})})
    assert HeldModels(tmp_path / "none").restored(content) is content
    assert not (tmp_path / "none").exists()


def test_only_the_last_models_stay(tmp_path):
    held = HeldModels(tmp_path, keep=2)
    for content in requests(Downlink(), 5):
        held.restored(content)
        assert len(list(tmp_path.iterdir())) <= 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_that_is_sent_again_is_the_last_one_again(tmp_path):
    downlink = Downlink()
    first, second, third = requests(downlink, 3)
    held = HeldModels(tmp_path, keep=2)
    held.restored(first)
    held.restored(second)
    HeldModels(tmp_path, keep=2).restored(first)
    HeldModels(tmp_path, keep=2).restored(third)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {bytes(one[HELD]["model"]).hex() for one in (first, third)}


def test_a_model_that_is_there_already_is_taken_whatever_its_base(tmp_path):
    """Another process of the machine has restored it."""
    whole, change = requests(Downlink(), 2)
    held = HeldModels(tmp_path)
    held.restored(whole)
    held.restored(change)
    (tmp_path / f"{bytes(whole[HELD]['model']).hex()}.safetensors").unlink()
    near(HeldModels(tmp_path).restored(change), 1)


@pytest.mark.parametrize("damage", ["torn", "empty", "altered", "another's"])
def test_a_damaged_file_counts_as_absent_and_is_mended_by_the_whole_model(tmp_path, damage, caplog):
    whole, change = requests(Downlink(), 2)
    HeldModels(tmp_path).restored(whole)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if damage == "another's":
        HeldModels(tmp_path / "other").restored(requests(Downlink(bits=5), 1)[0])
        data = next((tmp_path / "other").iterdir()).read_bytes()
    altered = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes({"torn": data[:-9], "empty": b"", "altered": altered}.get(damage, data))
    held = HeldModels(tmp_path)
    with pytest.raises(Refused, match="held: the model that the change is for is not here"):
        held.restored(change)
    assert "can't be read" in caplog.text or "not the one of its name" in caplog.text
    near(held.restored(whole), 0)
    near(held.restored(change), 1)


def test_a_full_disk_keeps_nobody_from_training(tmp_path, caplog):
    (content,) = requests(Downlink(), 1)
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    near(HeldModels(blocked).restored(content), 0)
    assert "can't be kept" in caplog.text


def altered(content: RecordDict, **values: object) -> RecordDict:
    said = {**content[HELD], **values}
    kept = {name: value for name, value in said.items() if value is not None}
    return bundle({**content, HELD: extended(ConfigRecord(), kept)})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"model": bytes(32)}, "not the one that the request names"),
        ({"model": b"short"}, "'model' should be 32 bytes"),
        ({"model": None}, "'model' should be 32 bytes"),
        ({"base": None}, "'base' should be 32 bytes"),
        ({"base": "../../etc/passwd"}, "'base' should be 32 bytes"),
        ({"base": bytes(32)}, "is not here"),
        ({"codec": "none"}, "the codec 'none' is unknown"),
        ({"exponents": b"odd"}, "do not go together"),
        ({"widths": b""}, "do not go together"),
        ({"widths": 3}, "neither a model nor a change"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_server_may_not_say_is_refused(tmp_path, values, word):
    whole, change = requests(Downlink(), 2)
    held = HeldModels(tmp_path)
    held.restored(whole)
    with pytest.raises(Refused, match=word) as caught:
        held.restored(altered(change, **values))
    assert caught.value.reason == "held"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "planes",
    [
        {"0": np.zeros(3, np.float32)},
        {"0": np.zeros((3, 3), np.uint8)},
        {"1": np.zeros(3, np.uint8)},
        {},
    ],
    ids=["floats", "two axes", "another name", "none"],
)
def test_planes_that_are_no_rows_of_bytes_are_refused(tmp_path, planes):
    whole, change = requests(Downlink(), 2)
    held = HeldModels(tmp_path)
    held.restored(whole)
    record = ArrayRecord()
    for name, array in planes.items():
        record[name] = pack(array)
    with pytest.raises(Refused, match="held"):
        held.restored(bundle({**change, PLANES: record}))


def test_a_whole_model_is_held_against_its_digest_too(tmp_path):
    content = bundle({ARRAYS: pack_model(model(0)), HELD: mark_of(bytes(32))})
    with pytest.raises(Refused, match="not the one that the request names"):
        HeldModels(tmp_path).restored(content)
    assert not list(tmp_path.iterdir())


def restore_all(folder: Path, contents: list[RecordDict], failures) -> None:
    held = HeldModels(folder, keep=3)
    for version, content in enumerate(contents):
        try:
            near(held.restored(content), version)
        except BaseException as error:
            failures.put(f"{os.getpid()}: {version}: {error!r}")


def test_processes_that_share_a_folder_do_not_disturb_one_another(tmp_path):
    contents = requests(Downlink(), 12)
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [
        context.Process(target=restore_all, args=(tmp_path, contents, failures)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert failures.empty()
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
