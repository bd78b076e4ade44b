import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.compression.codes import pack_codes, packed_size, unpack_codes
from strategies.compression.levels import (
    buckets,
    dequantize,
    most_level,
    most_level_bytes,
    pack_levels,
    quantize,
    unpack_levels,
)
from strategies.wire import Refused

BITS = (2, 4, 8)
CODECS = ("zstd", "none")
finite = npst.arrays(
    np.float32,
    st.integers(0, 200),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


def drawn(seed: int = 0):
    rng = np.random.default_rng(seed)

    def fill(out):
        out[:] = rng.integers(0, 2**16, len(out), np.uint16)

    return fill


def always(value: int):
    return lambda out: out.fill(value)


@pytest.mark.parametrize("bits", BITS)
@given(count=st.integers(0, 70), seed=st.integers(0, 99))
def test_codes_come_back_and_take_their_bits(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.nbytes == packed_size(count, bits) == -(-count * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed, count, bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_lie_in_a_byte_from_its_lowest_bits_up(bits):
    packed = pack_codes(np.uint8([1, 2, 3, 0]), bits)
    assert packed.tolist() == {2: [0b00_11_10_01], 4: [0x21, 0x03]}[bits]


def test_a_last_byte_that_is_filled_up_with_something_is_refused():
    with pytest.raises(Refused, match="malformed"):
        unpack_codes(np.uint8([0b01_00_00_00]), 3, 2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bucket", [16, 64])
@given(vector=finite, seed=st.integers(0, 9))
def test_the_error_is_below_a_step_and_levels_within_the_largest(bits, bucket, vector, seed):
    steps, levels = quantize(vector, bits, bucket, drawn(seed))
    assert len(steps) == buckets(len(vector), bucket)
    assert np.abs(levels.astype(int)).max(initial=0) <= most_level(bits)
    found = dequantize(steps, levels, bucket)
    for index in range(len(steps)):
        part = slice(index * bucket, (index + 1) * bucket)
        largest = np.abs(vector[part].astype(float)).max()
        step = 0.0 if largest < 2e-28 and steps[index] == 0 else largest / most_level(bits)
        assert steps[index] == pytest.approx(step, rel=2e-6)
        error = np.abs(found[part].astype(float) - vector[part])
        assert error.max() <= (step or largest) * (1 + 1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threshold", [0, 2**16 - 1])
def test_no_draw_lifts_the_largest_element_past_the_largest_level(bits, threshold):
    rng = np.random.default_rng(1)
    vector = (rng.normal(0, 1, 5000) * 10.0 ** rng.integers(-20, 20, 5000)).astype(np.float32)
    steps, levels = quantize(vector, bits, 1, always(threshold))
    s = most_level(bits)
    assert set(levels.tolist()) == ({-s, s - 1} if threshold == 0 else {1 - s, s})
    lifted = levels == (-s if threshold == 0 else s)
    found = dequantize(steps, levels, 1)
    np.testing.assert_allclose(found[lifted], vector[lifted], rtol=3e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_mean_of_many_roundings_is_the_element(bits):
    """4,000 roundings of 64 elements: a mean's error has a standard deviation of at most h / 2 / √4000. Rate of false
    alarms: 64 two-sided tails at 7 standard deviations, 2·10⁻¹⁰; the slack of 2⁻¹⁶ h is that of 16 random bits."""
    vector = np.random.default_rng(2).normal(0, 1, 64).astype(np.float32)
    repeats = 4000
    steps, levels = quantize(np.tile(vector, repeats), bits, 64, drawn(3))
    found = dequantize(steps, levels, 64).reshape(repeats, 64).mean(axis=0, dtype=float)
    step = float(steps[0])
    assert np.abs(found - vector).max() < step * (7 / 2 / np.sqrt(repeats) + 2**-16)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 70_000])
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_carry_what_was_rounded(bits, size, codec):
    vector = np.random.default_rng(size).normal(0, 1, size).astype(np.float32)
    data = pack_levels(vector, bits, 1000, drawn(4), codec)
    assert len(data) <= most_level_bytes(size, bits, 1000, codec)
    steps, levels = quantize(vector, bits, 1000, drawn(4))
    np.testing.assert_array_equal(
        unpack_levels(data, size, bits, 1000, codec), dequantize(steps, levels, 1000)
    )


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", BITS)
def test_a_vector_that_is_not_finite_is_refused_as_that(wrong, bits):
    vector = np.ones(100, np.float32)
    vector[37] = wrong
    data = pack_levels(vector, bits, 10, drawn(), "zstd")
    with pytest.raises(Refused) as refused:
        unpack_levels(data, 100, bits, 10, "zstd")
    assert refused.value.reason == "not_finite"


def test_zeros_stay_zeros_and_what_is_too_small_for_a_step_becomes_zero():
    vector = np.float32([0, 0, 1e-40, -1e-38])
    steps, levels = quantize(vector, 8, 2, drawn())
    assert steps.tolist() == [0, 0]
    assert not dequantize(steps, levels, 2).any()


@pytest.mark.parametrize("bits", BITS)
def test_a_negative_step_and_a_level_too_many_are_refused(bits):
    good = bytearray(pack_levels(np.ones(8, np.float32), bits, 8, always(0), "none"))
    unpack_levels(bytes(good), 8, bits, 8, "none")
    negative = bytes([*good[:3], good[3] | 0x80, *good[4:]])
    beyond = bytes([*good[:-1], 0x80 if bits == 8 else 0xFF])
    for bad in (negative, beyond):
        with pytest.raises(Refused, match="a step is negative, or a level beyond"):
            unpack_levels(bad, 8, bits, 8, "none")
