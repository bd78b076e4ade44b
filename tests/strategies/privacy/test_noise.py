"""Gaussian noise: its law, its independence, and where it comes from."""

import os

import numpy as np
import pytest
from scipy import stats

from strategies.privacy.noise import Seeded, gaussian

FALSE_ALARM = 1e-6


def seeded(seed=0):
    return Seeded(seed, "test")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 17, 32_767, 32_768, 32_769])
def test_as_many_numbers_as_asked_for(size):
    noise = gaussian(size)
    assert noise.shape == (size,)
    assert noise.dtype == np.float64
    assert np.isfinite(noise).all()


def test_the_law_is_the_standard_normal():
    noise = gaussian(400_000)
    assert stats.kstest(noise, "norm").pvalue > FALSE_ALARM
    tail = int((np.abs(noise) > 4).sum())
    expected = len(noise) * 2 * stats.norm.sf(4)
    assert stats.binomtest(tail, len(noise), expected / len(noise)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("lag", [1, 2, 8192, 16_384, 32_768])
def test_numbers_at_the_edges_of_blocks_are_as_independent_as_any(lag):
    noise = gaussian(200_000)
    correlation = float(noise[:-lag] @ noise[lag:]) / np.sqrt(len(noise) - lag)
    assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2) * 1.01  # asymptotically N(0, 1)


def test_noise_comes_from_the_operating_system_and_never_twice(monkeypatch):
    asked = []
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: asked.append(count) or urandom(count))
    assert not np.array_equal(gaussian(10, os.urandom), gaussian(10, os.urandom))
    assert asked == [32, 32]


def test_a_seed_repeats_its_noise_for_tests():
    np.testing.assert_array_equal(gaussian(100, seeded()), gaussian(100, seeded()))
    assert not np.array_equal(gaussian(100, seeded()), gaussian(100, seeded(1)))
    entropy = seeded()
    assert not np.array_equal(gaussian(100, entropy), gaussian(100, entropy))
