"""Exact products modulo a prime, against Python's integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.encrypted.linear import WeightRangeError, matmul, quantised
from tests.support.examples import many

PRIMES = [1152921504606748673, 4503599627124737, 18014398509404161, 1099511590913]


@given(
    prime=st.sampled_from(PRIMES),
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 40),
    columns=st.integers(1, 30),
    bits=st.integers(1, 36),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=many(150), deadline=None)
def test_products_equal_those_of_whole_numbers(
    prime: int, outputs: int, inputs: int, columns: int, bits: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-(1 << bits), 1 << bits, (outputs, inputs))
    residues = rng.integers(0, prime, (inputs, columns), dtype=np.uint64)
    found = matmul(weights, residues, prime)
    exact = weights.astype(object) @ residues.astype(object) % prime
    assert (found.astype(object) == exact).all()


@pytest.mark.parametrize("prime", PRIMES)
def test_extreme_residues_and_weights_are_exact(prime: int) -> None:
    residues = np.array([[prime - 1] * 3, [0, 1, prime - 1]], np.uint64)
    weights = np.array([[2**40, -(2**40)], [0, 0], [-1, -1]])
    found = matmul(weights, residues, prime)
    exact = weights.astype(object) @ residues.astype(object) % prime
    assert (found.astype(object) == exact).all()


def test_more_columns_than_a_block_and_strided_ones() -> None:
    prime, rng = PRIMES[0], np.random.default_rng(3)
    residues = rng.integers(0, prime, (7, 2, 9001), dtype=np.uint64)[:, 1, :]
    weights = rng.integers(-(2**18), 2**18, (3, 7))
    columns = [0, 4095, 4096, 9000]
    exact = weights.astype(object) @ residues[:, columns].astype(object) % prime
    assert (matmul(weights, residues, prime)[:, columns].astype(object) == exact).all()


def test_weights_that_no_product_holds_are_refused() -> None:
    with pytest.raises(WeightRangeError, match=r"sums to 2\^44"):
        matmul(np.full((1, 2), 2**42), np.zeros((2, 1), np.uint64), PRIMES[0])
    with pytest.raises(WeightRangeError, match="diverged"):
        quantised(np.array([[np.inf]]), 2.0**16)
    with pytest.raises(WeightRangeError, match="1e"):
        quantised(np.array([[1e12]]), 2.0**16)
