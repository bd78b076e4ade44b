"""Digits: the 1,797 small handwritten digits (8 × 8) that come with scikit-learn.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (its
test set). Quick to learn: made for tests and for trying things out.
"""

import functools
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le

from clients.tasks.task import Examples, Task, stratified_folds

# Pixels are counts from 0 to 16; these standardise them.
_PIXEL_MEAN, _PIXEL_STD = 4.884, 6.017
_FOLDS = 5
_SPLIT_SEED = 19_980_701


class Digits(Task):
    """Ten digits; 1,437 or 1,438 images to train on and the rest to test on, stratified by class.

    The split is fixed: it does not depend on the run's seed. Pixels are standardised.

    Args:
        fold: which fifth of the images is the test set; cross-validation runs over all five.

    Raises:
        ValueError: `fold` is not one of 0 … 4.
    """

    input_shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, fold: Annotated[int, Ge(0), Le(_FOLDS - 1)] = 0) -> None:
        if not 0 <= fold < _FOLDS:
            raise ValueError(f"fold={fold}: there are {_FOLDS} folds, 0 to {_FOLDS - 1}")
        self._train, self._test = _split(fold)

    def train(self) -> Examples:
        """Four fifths of the images, (n, 1, 8, 8) float32, and their digits, (n,) long."""
        return self._train

    def test(self) -> Examples:
        """The other fifth, (n, 1, 8, 8) float32, and their digits, (n,) long."""
        return self._test


@functools.lru_cache(maxsize=2)
def _split(fold: int) -> tuple[Examples, Examples]:
    # scikit-learn takes most of a second to import, and only this task needs it.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pixels).float().sub_(_PIXEL_MEAN).div_(_PIXEL_STD)
    every = Examples(inputs.reshape(-1, *Digits.input_shape), torch.from_numpy(labels).long())
    folds = stratified_folds(labels, _FOLDS, _SPLIT_SEED)
    return every.take(np.flatnonzero(folds != fold)), every.take(np.flatnonzero(folds == fold))
