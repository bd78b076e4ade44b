"""Images in MNIST's format; what a file says of itself is not believed."""

import gzip
import io
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from clients.places import DataError
from clients.tasks import Idx
from clients.tasks.idx import parse_idx, read_idx
from clients.tasks.task import check_task

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    kind = array.dtype.str[1:]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[kind], array.ndim, *array.shape)
    return header + array.astype(f">{kind}").tobytes()


def packed(content):
    """Without the time of day, which would give the cases below another name in each process."""
    return gzip.compress(content, mtime=0)


def save(path, array):
    content = idx_bytes(array)
    path.write_bytes(packed(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (50, 6, 5), dtype=np.uint8), np.arange(50, dtype=np.uint8) % 5


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_images_and_labels_make_a_task(tmp_path, pictures, ending):
    images = save(tmp_path / f"images{ending}", pictures[0])
    labels = save(tmp_path / f"labels{ending}", pictures[1])
    task = Idx(images, labels)
    check_task(task)
    assert (task.input_shape, task.num_classes, task.classes) == ((1, 6, 5), 5, [0, 1, 2, 3, 4])
    assert (len(task.train()), len(task.test())) == (40, 10)
    inputs = task.train().inputs
    assert inputs.dtype == torch.float32
    assert inputs.mean().abs() < 1e-5
    assert (inputs.std() - 1).abs() < 1e-2
    of_pixels = {image.tobytes(): label for image, label in zip(*pictures, strict=True)}
    ordered = np.sort(pictures[0].ravel())
    every = torch.cat([inputs, task.test().inputs])
    values = torch.cat([task.train().targets, task.test().targets])
    # Scaling keeps the order of the numbers, so ranks give the pixels back.
    ranks = every.flatten().argsort().argsort(stable=True).numpy()
    back = ordered[ranks].reshape(50, 6, 5)
    assert [of_pixels[image.tobytes()] for image in back] == values.tolist()


def test_test_files_are_taken_where_they_are_named(tmp_path, pictures):
    files = {
        "images": save(tmp_path / "a", pictures[0]),
        "labels": save(tmp_path / "b", pictures[1]),
        "test_images": save(tmp_path / "c", pictures[0][:7]),
        "test_labels": save(tmp_path / "d", pictures[1][:7]),
    }
    task = Idx(**files)
    assert (len(task.train()), len(task.test())) == (50, 7)
    assert torch.equal(task.train().inputs[:7], task.test().inputs)
    with pytest.raises(ValueError, match="give both or neither"):
        Idx(**{**files, "test_labels": None})
    save(tmp_path / "c", pictures[0][:7, :3])
    with pytest.raises(
        DataError, match=r"inputs of shape \(1, 3, 5\), those to train on have \(1, 6, 5\)"
    ):
        Idx(**files)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 2, 2), np.uint8), np.zeros((4, 2), np.uint8), "are the two files exchanged"),
        (np.zeros((4, 2, 2), np.uint8), np.zeros(4, np.float32), "labels are one whole number"),
        (np.zeros((4, 2, 2), np.uint8), np.zeros(5, np.uint8), "holds 4 images, .* 5 labels"),
        (np.zeros(4, np.uint8), np.zeros(4, np.uint8), "has one dimension"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, images, labels, message):
    with pytest.raises(DataError, match=message):
        Idx(save(tmp_path / "a", images), save(tmp_path / "b", labels))


ARRAYS = st.sampled_from(sorted(CODES)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**31)
    )
)


@given(ARRAYS)
def test_every_type_is_read_back_as_it_was_written(made):
    kind, shape, seed = made
    array = np.random.default_rng(seed).normal(0, 50, shape).astype(kind)
    found = parse_idx(io.BytesIO(idx_bytes(array)), "file")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@given(st.binary(max_size=64))
@example(b"\0\0\x08\x01\0\0\0\x02ab")
@example(b"\0\0\x08\x04" + b"\xff" * 60)
def test_hostile_bytes_give_a_clean_refusal_or_the_array_that_they_are(content):
    try:
        found = parse_idx(io.BytesIO(content), "file")
    except DataError:
        return
    assert idx_bytes(found) == content


@given(
    st.sampled_from(sorted(CODES.values())),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
    st.binary(max_size=64),
)
def test_a_header_that_promises_anything_is_not_believed(code, shape, content):
    head = struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
    try:
        found = parse_idx(io.BytesIO(head + content), "file")
    except DataError:
        return
    assert idx_bytes(found) == head + content


def test_no_memory_is_set_aside_for_what_is_only_promised(tmp_path):
    path = tmp_path / "promise.gz"
    path.write_bytes(packed(struct.pack(">BBBB3I", 0, 0, 8, 3, 1000, 1000, 1000) + b"x"))
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"should hold 1,000,000,000 bytes of numbers and has only 1"
        ):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_packed_file_that_unpacks_to_more_than_it_says_is_left_at_once(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(packed(struct.pack(">BBBB1I", 0, 0, 8, 1, 10) + bytes(50_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="should hold 10 bytes of numbers and has more"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not packed", "cannot be read"),
        (packed(b"\0\0\x08\x01\0\0\0\x09" + bytes(9))[:-12], "cannot be read"),
        (packed(b"GIF89a"), "is no IDX file: it begins with 47 49 46 38"),
        (packed(b""), "it begins with nothing"),
        (packed(b"\0\0\x08\x05" + bytes(40)), "has 5 dimensions: 1 to 4"),
        (packed(b"\0\0\x08\x02\0\0"), "ends within its header"),
        (packed(b"\0\0\x08\x01\0\0\0\0"), "0 bytes: 1 to"),
        (packed(b"\0\0\x0d\x01\0\0\0\x01\x7f\xc0\0\0"), "not finite"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_broken_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "broken.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"broken\.gz.*{message}"):
        read_idx(path)
