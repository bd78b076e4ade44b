"""Ranges of the scheme's parameters, and the security that SEAL enforces."""

import pytest

from strategies.ckks import CkksParameters


@pytest.mark.parametrize(
    "wrong",
    [
        {"degree": 2048},
        {"bits": ()},
        {"bits": (60, 60, 60)},
        {"bits": (61,)},
        {"bits": (30,)},
        {"members": 1},
        {"members": 1 << 20},
        {"limit": 0.0},
        {"limit": float("inf")},
        {"noise_bits": -1},
        {"decryptions": 0},
    ],
)
def test_values_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CkksParameters(**wrong)


def test_rings_that_are_not_128_bit_secure_are_refused():
    with pytest.raises(ValueError, match="degree 4096 with bits"):
        _ = CkksParameters(4096, (60, 60)).modulus
    assert CkksParameters(8192, (60, 60)).modulus.bit_length() == 60


def test_more_security_costs_accuracy():
    """Two bits, or four times the decryptions, double the noise."""
    base = CkksParameters()
    assert CkksParameters(noise_bits=7).flooding == pytest.approx(2 * base.flooding)
    assert CkksParameters(decryptions=4 * 4096).flooding == pytest.approx(2 * base.flooding)
    assert CkksParameters(noise_bits=7).error == pytest.approx(2 * base.error, rel=0.05)
