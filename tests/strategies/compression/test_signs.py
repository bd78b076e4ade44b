import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.compression.signs import most_sign_bytes, pack_signs, signed, signs_of, unpack_signs
from strategies.wire import Refused

vectors = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=70).map(np.float32)


@given(vectors)
def test_a_vector_comes_back_as_its_signs_times_its_mean_magnitude(vector):
    data = pack_signs(*signs_of(vector))
    assert len(data) == most_sign_bytes(len(vector)) == 4 + -(-len(vector) // 8)
    found = unpack_signs(data, len(vector))
    scale, bits = signs_of(vector)
    expected = np.where(np.signbit(vector), -scale, scale)
    np.testing.assert_array_equal(found, expected)
    assert found.tobytes() == signed(scale, bits, len(vector)).tobytes()
    if len(vector):
        assert scale == pytest.approx(np.abs(vector.astype(float)).mean(), rel=1e-6)


@given(st.integers(0, 99))
def test_the_error_is_shorter_than_the_vector(seed):
    """Karimireddy et al. 2019, Lemma 8: ‖x − C(x)‖² = (1 − ‖x‖₁² / (d ‖x‖₂²)) ‖x‖²."""
    x = np.random.default_rng(seed).standard_t(3, 500).astype(np.float32)
    left = float(((x - unpack_signs(pack_signs(*signs_of(x)), 500)).astype(float) ** 2).sum())
    norm1, norm2 = float(np.abs(x).sum(dtype=float)), float((x.astype(float) ** 2).sum())
    assert left == pytest.approx((1 - norm1**2 / (500 * norm2)) * norm2, rel=1e-4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_refused_as_that(wrong):
    with pytest.raises(Refused) as refused:
        unpack_signs(pack_signs(*signs_of(np.float32([1, wrong]))), 2)
    assert refused.value.reason == "not_finite"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        np.float32([-1]).tobytes() + b"\x01",
        np.float32([1]).tobytes() + b"\x10",
        np.float32([1]).tobytes() + b"\x01\x01",
        np.float32([1]).tobytes(),
    ],
    ids=["nothing", "a negative scale", "a bit too many", "a byte too many", "no signs"],
)
def test_bytes_that_no_client_sends_are_refused(data):
    with pytest.raises(Refused, match="malformed"):
        unpack_signs(data, 4)
