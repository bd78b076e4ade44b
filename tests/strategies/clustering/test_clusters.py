"""Groups of rows, their number, and the test for more than one: its false alarms and its power."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score

from strategies.clustering.clusters import (
    _equal,
    _one_large,
    agglomerative,
    directions_in,
    distances,
    hdbscan,
    k_means,
    one_group,
    silhouette,
)
from strategies.clustering.fingerprints import fingerprints, units


def groups(truth, apart: float, seed: int, size: int = 300, shared: float = 1.0):
    """Rows with a centre for each group, noise of deviation 1 and something that all share."""
    rng = np.random.default_rng(seed)
    centres = apart * rng.standard_normal((max(truth) + 1, size))
    return (
        shared * rng.standard_normal(size)
        + centres[truth]
        + rng.standard_normal((len(truth), size))
    )


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**20), n=st.integers(5, 20), k=st.integers(2, 4))
def test_the_silhouette_is_that_of_scikit_learn(seed, n, k):
    rng = np.random.default_rng(seed)
    apart = distances(units(rng.standard_normal((n, 6))))
    labels = np.append(np.arange(k), rng.integers(0, k, n - k))
    assert silhouette(apart, labels) == pytest.approx(
        silhouette_score(apart, labels, metric="precomputed")
    )


def test_copies_have_no_silhouette_and_no_error():
    assert silhouette(np.zeros((4, 4)), np.array([0, 0, 1, 1])) == 0.0


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_number_of_groups_is_found(number):
    truth = np.arange(12) % number
    rows = fingerprints(groups(truth, 1.0, number))
    for labels, score in (agglomerative(distances(rows), 8), k_means(rows, 8)):
        assert adjusted_rand_score(truth, labels) == 1.0
        assert score > 0.2
    assert adjusted_rand_score(truth, hdbscan(rows)[0]) > 0.5


def test_a_known_number_is_kept():
    rows = fingerprints(groups(np.arange(12) % 3, 1.0, 0))
    assert len(set(k_means(rows, 2)[0])) == 2
    assert len(set(k_means(rows, 3, least=3)[0])) == 3
    assert len(set(agglomerative(distances(rows), 2)[0])) == 2


def test_who_is_in_no_group_of_hdbscan_is_alone():
    rows = units(np.concatenate([groups(np.repeat([0, 1], 4), 3.0, 1), -9 * np.eye(300)[:1]]))
    labels, _ = hdbscan(rows)
    assert labels.min() == 0
    assert (labels == labels[-1]).sum() == 1
    assert set(labels) == set(range(labels.max() + 1))


@settings(deadline=None, max_examples=50)
@given(dimension=st.floats(1.0, 60.0), make=st.sampled_from([_equal, _one_large]))
def test_null_directions_scatter_as_asked(dimension, make):
    squares = make(dimension) ** 2
    assert squares.sum() ** 2 / (squares**2).sum() == pytest.approx(dimension, rel=1e-3)
    assert np.isclose(squares, 1.0).any()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), n=st.integers(5, 15))
def test_linkage_is_cut_as_scikit_learn_cuts_it(seed, n):
    apart = distances(units(np.random.default_rng(seed).standard_normal((n, 8))))
    labels, score = agglomerative(apart, 8)
    found = [
        AgglomerativeClustering(k, metric="precomputed", linkage="average").fit_predict(apart)
        for k in range(2, n // 2 + 1)
    ]
    scores = [silhouette_score(apart, each, metric="precomputed") for each in found]
    assert score == pytest.approx(max(scores))
    assert adjusted_rand_score(found[int(np.argmax(scores))], labels) == 1.0


@pytest.mark.parametrize("spectrum", [np.ones(5), np.ones(40), np.arange(1.0, 2_000) ** -1.0])
def test_the_number_of_directions_is_estimated(spectrum):
    rng = np.random.default_rng(4)
    true = spectrum.sum() ** 2 / (spectrum**2).sum()
    scales = np.sqrt(spectrum)
    found = [
        directions_in(3.0 + rng.standard_normal((12, len(scales))) * scales) for _ in range(300)
    ]
    assert np.median(found) == pytest.approx(true, rel=0.15)


def test_rows_that_all_differ_have_any_number_of_directions():
    assert directions_in(np.eye(8)) == np.inf


ONE_TASK = {
    "3 equal": np.ones(3),
    "1 only": np.ones(1),
    "10 equal": np.ones(10),
    "1,000 equal": np.ones(1_000),
    "1/j": np.arange(1.0, 2_000) ** -1.0,
    "j^-1.5": np.arange(1.0, 2_000) ** -1.5,
    "one large": np.append(100.0, np.ones(1_000)),
    "two large": np.append([200.0, 200.0], np.ones(1_000)),
}
"""Variances of clients' directions along each axis, all clients having one task."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_TASK)
@pytest.mark.parametrize("clients", [9, 12])
def test_one_task_is_called_several_no_more_often_than_said(name, clients):
    """At 5%, over 200 federations; where the level holds exactly, each case fails with probability 0.001."""
    rng = np.random.default_rng(len(name))
    scales = np.sqrt(ONE_TASK[name])
    alarms = 0
    for seed in range(200):
        # What all have in common is longer than what they differ in, as clients' updates are, and lies beside it.
        noise = rng.standard_normal((clients, len(scales))) * scales
        rows = np.column_stack([noise, np.full(clients, 3 * np.linalg.norm(scales))])
        alarms += one_group(rows, 8, draws=39, seed=seed) <= 0.05
    assert alarms <= binom.isf(0.001, 200, 0.05)


@pytest.mark.parametrize(
    ("number", "apart"),
    [
        (2, 2.5),
        (3, 0.8),
        *(
            pytest.param(*further, marks=pytest.mark.slow)
            for further in ((2, 5.0), (3, 1.5), (3, 3.0))
        ),
    ],
)
def test_several_tasks_are_told_from_one(number, apart):
    """Centres so many noise deviations apart along each axis: of 10 federations of 12 clients, 8 at least."""
    truth = np.arange(12) % number
    found = [one_group(groups(truth, apart, seed), 8, draws=99) <= 0.05 for seed in range(10)]
    assert sum(found) >= 8


def test_the_same_rows_have_the_same_p_value():
    rows = groups(np.zeros(9, int), 1.0, 0)
    assert one_group(rows, 8) == one_group(rows, 8)
    assert 2 / 200 <= one_group(rows, 8) <= 1


def test_copies_are_one_group_and_no_error():
    assert one_group(np.ones((8, 5)), 8) == 1.0
