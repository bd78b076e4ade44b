"""Which examples train and which test: k-fold cross-validation, the same for every task.

A cut depends on the labels (or groups) and on a fixed seed of the task, never on the run's seed.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from annotated_types import Ge

Fold = Annotated[int, Ge(0)]
"""Which fold is the test set, 0 to folds - 1."""
Folds = Annotated[int, Ge(2)]
"""How many folds there are."""


def check_fold(fold: int, folds: int) -> None:
    """Refuse a fold that there is not.

    Raises:
        ValueError: fewer than two folds, or `fold` is not one of 0 … folds - 1.
    """
    if folds < 2:
        raise ValueError(f"folds={folds}: must be at least 2, one to test on and one to train on")
    if not 0 <= fold < folds:
        raise ValueError(f"fold={fold}: there are {folds} folds, 0 to {folds - 1}")


def split(
    targets: np.ndarray,
    fold: int,
    folds: int,
    seed: int,
    groups: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to test on; each example is tested on in exactly one fold.

    Args:
        targets: (n, …). Class labels, (n,) integers, have equal shares in every fold; others are
            shuffled and dealt.
        fold: which fold is the test set.
        folds: how many there are.
        seed: of the draw.
        groups: (n,) names; examples of one group are never split (group k-fold). Needs class labels.

    Returns:
        Two int64 arrays in rising order.

    Raises:
        ValueError: there is no such fold, or one of the two sets would be empty.
    """
    check_fold(fold, folds)
    if groups is not None:
        dealt = grouped_folds(targets, groups, folds, seed)
    elif targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        dealt = stratified_folds(targets, folds, seed)
    else:
        dealt = stratified_folds(np.zeros(len(targets), dtype=np.int64), folds, seed)
    train, test = np.flatnonzero(dealt != fold), np.flatnonzero(dealt == fold)
    if not len(train) or not len(test):
        empty = "test" if len(train) else "train"
        raise ValueError(
            f"fold={fold} of folds={folds} leaves nothing to {empty} on: there are "
            f"{len(targets)} examples{'' if groups is None else f' in {len(set(groups))} groups'}, "
            "lower folds"
        )
    return train, test


def stratified_folds(targets: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal examples into folds so that every fold has the same share of every class.

    Args:
        targets: (n,) class labels.
        folds: number of folds.
        seed: of the draw; the same seed gives the same folds.

    Returns:
        (n,) int64, the fold of each example. Sizes of two folds differ by at most one, in total
        and in each class.
    """
    shuffled = np.random.default_rng(seed).permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    fold = np.empty(len(targets), dtype=np.int64)
    fold[by_class] = np.arange(len(targets)) % folds
    return fold


def grouped_folds(targets: np.ndarray, groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Deal whole groups into folds, the largest first, each where its classes are rarest so far.

    Args:
        targets: (n,) class labels from 0.
        groups: (n,) the group of each example.
        folds: number of folds.
        seed: of the draw.

    Returns:
        (n,) int64, the fold of each example, equal within a group. Within a class whose groups
        hold no other class, sizes of two folds differ by at most the size of its largest group.
    """
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    classes = int(targets.max()) + 1 if len(targets) else 1
    cells = np.bincount(group_of * classes + targets, minlength=len(names) * classes)
    counts = cells.reshape(len(names), classes)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    order = shuffled[np.argsort(-counts.sum(axis=1)[shuffled], kind="stable")]
    held = np.zeros((folds, classes), dtype=np.int64)
    fold_of = np.empty(len(names), dtype=np.int64)
    for group in order:
        # Of folds that hold equally many of the group's classes, the smallest.
        load = held @ counts[group]
        fold = np.lexsort((held.sum(axis=1), load))[0]
        fold_of[group] = fold
        held[fold] += counts[group]
    dealt: np.ndarray = fold_of[group_of]
    return dealt
