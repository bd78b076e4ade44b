"""k-fold cross-validation: stratified, plain, and by groups."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.tasks import Digits, Mnist
from clients.tasks.folds import grouped_folds, split, stratified_folds

LABELS = st.lists(st.integers(0, 4), max_size=60)

# SHA-256 of inputs and targets, the training set's and then the test set's: published figures rest on these splits.
SPLITS = {
    Mnist: [
        "1eb4f184a9a2eb9b",
        "3bc4b07bb00bfb3f",
        "844ecb2da4966f5d",
        "5ff976e29739313c",
        "0d1edde501aebf08",
    ],
    Digits: [
        "9948c0492cc6bb8b",
        "f0b2dcc4696aac85",
        "77f3af82d2bd43f0",
        "cb45f352f2012d65",
        "ec7811b60eb593ba",
    ],
}


@given(LABELS, st.integers(1, 6), st.integers(0, 2**32))
def test_folds_have_equal_shares_in_all_and_of_each_class(labels, folds, seed):
    targets = np.array(labels, dtype=np.int64)
    dealt = stratified_folds(targets, folds, seed)
    assert np.array_equal(dealt, stratified_folds(targets, folds, seed))
    for chosen in (np.ones(len(targets), dtype=bool), *(targets == label for label in range(5))):
        sizes = np.bincount(dealt[chosen], minlength=folds)
        assert len(sizes) == folds
        assert sizes.max() - sizes.min() <= 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=80),
    st.integers(2, 5),
    st.integers(0, 2**32),
)
def test_a_group_is_never_split_and_classes_stay_balanced(rows, folds, seed):
    targets = np.array([label for label, _ in rows])
    groups = [f"{label}/{module}" for label, module in rows]  # a module is of one package
    dealt = grouped_folds(targets, groups, folds, seed)
    assert np.array_equal(dealt, grouped_folds(targets, groups, folds, seed))
    assert dealt.min() >= 0
    assert dealt.max() < folds
    for name in set(groups):
        assert len({fold for fold, group in zip(dealt, groups, strict=True) if group == name}) == 1
    for label in set(targets.tolist()):
        sizes = np.bincount(dealt[targets == label], minlength=folds)
        largest = max(groups.count(name) for name in set(groups) if name.startswith(f"{label}/"))
        assert sizes.max() - sizes.min() <= largest


@pytest.mark.parametrize(
    "targets", [np.arange(23) % 3, np.linspace(0, 1, 23), np.zeros((23, 2))], ids=str
)
def test_each_example_is_tested_on_once(targets):
    parts = [split(targets, fold, 4, seed=1) for fold in range(4)]
    assert sorted(row for _, test in parts for row in test) == list(range(23))
    for train, test in parts:
        assert sorted([*train, *test]) == list(range(23))
        assert 5 <= len(test) <= 6


def test_targets_that_are_no_labels_are_shuffled():
    _, test = split(np.linspace(0, 1, 1000), 0, 5, seed=1)
    assert abs(test.mean() - 499.5) < 60
    assert not np.array_equal(np.diff(test), np.full(199, 5))


@pytest.mark.parametrize(
    ("fold", "folds", "message"),
    [
        (5, 5, "fold=5: there are 5 folds, 0 to 4"),
        (-1, 5, "fold=-1"),
        (0, 1, "folds=1: must be at least 2"),
        (7, 9, "fold=7 of folds=9 leaves nothing to test on: there are 4 examples, lower folds"),
    ],
)
def test_a_fold_that_there_is_not_is_refused(fold, folds, message):
    with pytest.raises(ValueError, match=message):
        split(np.arange(4), fold, folds, seed=0)


def test_one_group_alone_cannot_be_cut():
    with pytest.raises(ValueError, match="nothing to train on: there are 4 examples in 1 groups"):
        split(np.zeros(4, dtype=int), 0, 2, seed=0, groups=["a"] * 4)


@pytest.mark.parametrize(("task", "expected"), SPLITS.items(), ids=["mnist", "digits"])
def test_the_splits_of_the_tasks_that_come_with_the_project_stay_as_they_are(task, expected):
    for fold, digest in enumerate(expected):
        made, found = task(fold=fold), hashlib.sha256()
        for examples in (made.train(), made.test()):
            found.update(examples.inputs.numpy().tobytes())
            found.update(examples.targets.numpy().tobytes())
        assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("task", [Mnist, Digits])
def test_the_number_of_folds_can_be_chosen(task):
    made = task(fold=9, folds=10)
    assert len(made.test()) == pytest.approx((len(made.train()) + len(made.test())) / 10, abs=1)
