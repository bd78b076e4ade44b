"""Any `threshold` shares give the secret back, and fewer leave every secret as likely as before."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from strategies.secagg.field import ORDER, multiply
from strategies.secagg.shamir import combine, combine_many, share

ALPHA = 1e-6
"""False-alarm rate of each statistical test here: their randomness is the operating system's."""

elements = st.integers(0, ORDER).map(np.uint16)


def slow_product(a, b):
    product = 0
    while b:
        product ^= a * (b & 1)
        a, b = (a << 1) ^ (0x1100B if a & 0x8000 else 0), b >> 1
    return product


@given(elements, elements, elements)
def test_the_field_is_a_field(a, b, c):
    assert multiply(a, b) == multiply(b, a) == slow_product(int(a), int(b))
    assert multiply(a, multiply(b, c)) == multiply(multiply(a, b), c)
    assert multiply(a, b ^ c) == multiply(a, b) ^ multiply(a, c)


def test_every_element_but_zero_has_an_inverse():
    every = np.arange(1, ORDER + 1, dtype=np.uint16)
    for factor in (2, 3, 40_000, ORDER):
        assert sorted(multiply(every, np.uint16(factor))) == every.tolist()
    assert not multiply(every, np.uint16(0)).any()


@given(st.data())
def test_any_threshold_of_the_shares_in_any_order_give_the_secret(data):
    count = data.draw(st.integers(1, 40), "count")
    threshold = data.draw(st.integers(1, count), "threshold")
    secret = data.draw(st.binary(max_size=12).map(lambda half: half + half), "secret")
    shares = share(secret, threshold, count)
    assert shares.shape == (count, len(secret))
    order = data.draw(st.permutations(range(count)), "order")
    some = order[: data.draw(st.integers(threshold, count), "holders")]
    assert combine({i + 1: shares[i].tobytes() for i in some}, threshold) == secret


def test_three_of_five():
    shares = share(b"attack at dawn", 3, 5)
    for some in itertools.permutations(range(5), 3):
        assert combine({i + 1: shares[i].tobytes() for i in some}, 3) == b"attack at dawn"


def test_the_largest_committees_that_the_field_has_points_for():
    secret = os.urandom(2)
    shares = share(secret, 3, ORDER)
    assert (
        combine({1: bytes(shares[0]), 300: bytes(shares[299]), ORDER: bytes(shares[-1])}, 3)
        == secret
    )
    long = share(secret, 700, 1_000)
    assert combine({i + 1: bytes(long[i]) for i in range(300, 1_000)}, 700) == secret


def test_many_secrets_that_share_their_points():
    secrets = [os.urandom(64) for _ in range(200)]
    points = [7, 2, 90, 41]
    rows = np.stack([share(s, 4, 100)[[p - 1 for p in points]] for s in secrets])
    assert [bytes(row) for row in combine_many(points, rows)] == secrets
    assert combine_many(points, rows[:0]).shape == (0, 64)


@given(st.binary(min_size=4, max_size=4), st.permutations(range(1, 30)))
def test_with_two_shares_of_three_every_secret_has_exactly_one_polynomial(pair, points):
    """Exact, not statistical: for two given shares, the 65,536 third shares lead to the 65,536 secrets, each once."""
    known = np.frombuffer(pair, np.uint8).reshape(1, 2, 2)
    third = np.arange(ORDER + 1, dtype="<u2").view(np.uint8).reshape(-1, 1, 2)
    rows = np.concatenate([np.broadcast_to(known, (len(third), 2, 2)), third], axis=1)
    secrets = combine_many(points[:3], rows).view("<u2").ravel()
    assert np.array_equal(np.bincount(secrets, minlength=ORDER + 1), np.ones(ORDER + 1))


@pytest.mark.parametrize("secret", [b"\0\0", b"\1\0", b"\xff\xff", b"\x34\x12"])
@pytest.mark.parametrize("holders", [(0, 1), (1, 4), (3, 4)])
def test_two_shares_of_three_are_jointly_uniform_whatever_the_secret(secret, holders):
    """Chi-square over 16 × 16 cells (the top four bits of both symbols); see ALPHA."""
    many = 20_000
    shares = share(secret * many, 3, 5).view("<u2")
    first, second = (shares[i].astype(int) >> 12 for i in holders)
    counts = np.bincount(16 * first + second, minlength=256)
    statistic = ((counts - many / 256) ** 2).sum() / (many / 256)
    assert chi2.ppf(ALPHA / 2, 255) < statistic < chi2.isf(ALPHA / 2, 255)


def test_all_coefficients_come_from_the_entropy_zero_ones_too():
    asked = []

    def nothing(count):
        asked.append(count)
        return bytes(count)

    constant = share(b"abcd", 4, 6, entropy=nothing)
    assert asked == [3 * 4]
    assert {row.tobytes() for row in constant} == {b"abcd"}


def test_zero_top_coefficients_are_as_frequent_as_any():
    """A polynomial of a lower degree is as likely as chance: expected 20 of 20 · 2¹⁶, Poisson; alarm below 1e-6."""
    many = 20 << 16
    first, second = share(bytes(2 * many), 2, 2).view("<u2")
    assert 3 <= np.count_nonzero((first == 0) & (second == 0)) <= 48


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: share(b"ab", 0, 3), "0 of 3 shares"),
        (lambda: share(b"ab", 4, 3), "4 of 3 shares"),
        (lambda: share(b"ab", 2, 65_536), "65,535"),
        (lambda: share(b"abc", 2, 3), "3 bytes.*even"),
        (lambda: combine({1: b"ab"}, 2), "1 shares: the threshold is 2"),
        (lambda: combine({1: b"ab", 2: b"abcd"}, 2), r"different lengths: \[2, 4\]"),
        (lambda: combine({1: b"abc", 2: b"abc"}, 2), "even"),
        (lambda: combine({0: b"ab", 2: b"ab"}, 2), "the point 0"),
        (lambda: combine({1: b"ab", 65_536: b"ab"}, 2), "the point 65536"),
        (lambda: combine({}, 0), "at least one"),
        (lambda: combine_many([1, 1], np.zeros((1, 2, 2), np.uint8)), "each once"),
        (lambda: combine_many([1, 2], np.zeros((1, 3, 2), np.uint8)), "3 shares a secret for 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
