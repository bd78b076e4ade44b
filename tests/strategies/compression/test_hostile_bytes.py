"""Decoders and whatever a client may send: a vector of the right size, or `Refused`, and never much memory."""

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.compression.entropy import Reader, deflate, most_bytes
from strategies.compression.levels import pack_levels, unpack_levels
from strategies.compression.low_rank import (
    factorise,
    first_right,
    matrices_of,
    pack_low_rank,
    unpack_low_rank,
)
from strategies.compression.signs import pack_signs, signs_of, unpack_signs
from strategies.compression.sparse import pack_sparse, unpack_sparse
from strategies.update import Layout
from strategies.wire import Refused
from tests.support.examples import many

LAYOUT = Layout(("w", "b"), ((20, 20), (7,)))
SIZE = LAYOUT.size
MATRICES = matrices_of(LAYOUT, 2)
VECTOR = np.random.default_rng(0).normal(0, 1, SIZE).astype(np.float32)
THINNED = np.where(np.abs(VECTOR) > 1.5, VECTOR, np.float32(0))


def thresholds(out: np.ndarray) -> None:
    out[:] = np.arange(len(out)) * 6151 % 2**16


def low_rank(codec: str) -> bytes:
    return pack_low_rank(
        VECTOR, MATRICES, *factorise(VECTOR, MATRICES, first_right(MATRICES, 0)), codec
    )


CASES: dict[str, tuple[bytes, Callable[[bytes], np.ndarray]]] = {
    "signs": (pack_signs(*signs_of(VECTOR)), lambda data: unpack_signs(data, SIZE))
}
for _codec in ("zstd", "none"):
    for _precision in ("float16", "float32"):
        CASES[f"sparse {_precision} {_codec}"] = (
            pack_sparse(THINNED, _precision, _codec),
            lambda data, p=_precision, c=_codec: unpack_sparse(data, SIZE, 90, p, c),
        )
    for _bits in (2, 4, 8):
        CASES[f"{_bits} bits {_codec}"] = (
            pack_levels(VECTOR, _bits, 64, thresholds, _codec),
            lambda data, b=_bits, c=_codec: unpack_levels(data, SIZE, b, 64, c),
        )
    CASES[f"low rank {_codec}"] = (
        low_rank(_codec),
        lambda data, c=_codec: unpack_low_rank(data, SIZE, MATRICES, c),
    )
each = pytest.mark.parametrize("case", CASES)


def survives(case: str, data: bytes) -> None:
    """A vector or a refusal; warnings are errors, and any other exception fails the test."""
    try:
        found = CASES[case][1](data)
    except Refused:
        return
    assert found.shape == (SIZE,)
    assert found.dtype == np.float32


@each
@settings(max_examples=many(80), deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_bytes_that_were_changed(case, changes):
    data = bytearray(CASES[case][0])
    for place, value in changes:
        data[place % len(data)] = value
    survives(case, bytes(data))


@each
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes(case, data):
    survives(case, data)


@each
def test_every_truncation_is_refused(case):
    data = CASES[case][0]
    for end in range(len(data)):
        with pytest.raises(Refused):
            CASES[case][1](data[:end])


@each
def test_a_byte_that_follows_is_refused(case):
    with pytest.raises(Refused, match="malformed"):
        CASES[case][1](CASES[case][0] + b"\0")


@each
def test_a_memoryview_will_do(case):
    data, unpack = CASES[case]
    np.testing.assert_array_equal(unpack(memoryview(data)), unpack(data))


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def read(body: bytes, least: int = 0, most: int = 1000) -> np.ndarray:
    return Reader(framed(body)).stream(least, most, "zstd")


BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
UNSAID = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))


def wide() -> bytes:
    """A frame of 100 bytes that asks for a window of 128 MiB (RFC 8878, 3.1.1)."""
    magic, descriptor, window, size = 0xFD2FB528, 0b10_0_0_0_0_00, (27 - 10) << 3, 100
    block = struct.pack("<I", size << 3 | 1)[:3] + bytes(size)
    return struct.pack("<IBBI", magic, descriptor, window, size) + block


@pytest.mark.parametrize(
    "body",
    [
        BOMB,
        UNSAID,
        zstandard.compress(bytes(1001)),
        zstandard.compress(b"ab") + zstandard.compress(b"cd"),
        zstandard.compress(b"ab") + b"\0",
        b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
        b"",
        b"not a frame",
        wide(),
    ],
    ids=[
        "a bomb of 256 MiB",
        "no content size",
        "a byte too many",
        "two frames",
        "a byte behind",
        "a skippable frame",
        "nothing",
        "no frame",
        "a window of 128 MiB",
    ],
)
def test_streams_that_are_not_one_whole_frame_of_the_size_expected_are_refused_in_little_memory(
    body,
):
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="malformed"):
            read(body)
        assert tracemalloc.get_traced_memory()[1] < len(body) + 2**20
    finally:
        tracemalloc.stop()


def test_a_frame_that_says_less_than_it_holds_is_refused():
    body = bytearray(zstandard.compress(bytes(range(200))))
    assert body[5] == 200  # the content's size, in one byte
    body[5] = 100
    with pytest.raises(Refused, match="malformed"):
        read(bytes(body))


def test_a_small_window_would_have_been_read():
    assert read(wide().replace(b"\x88", b"\x00", 1)).tobytes() == bytes(100)


@pytest.mark.parametrize("codec", ["zstd", "none"])
@given(data=st.binary(max_size=3000))
def test_a_stream_comes_back_and_is_no_longer_than_said(codec, data):
    coded = deflate(np.frombuffer(data, np.uint8), codec)
    assert len(coded) <= most_bytes(len(data), codec)
    assert Reader(coded).stream(len(data), len(data), codec).tobytes() == data


@pytest.mark.parametrize("size", [1 << 17, 1 << 20])
def test_bytes_that_nothing_makes_shorter_stay_within_the_bound(size):
    noise = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    coded = deflate(noise, "zstd")
    assert size < len(coded) <= most_bytes(size, "zstd")
    np.testing.assert_array_equal(Reader(coded).stream(size, size, "zstd"), noise)
