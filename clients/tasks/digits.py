"""Digits: the 1,797 small handwritten digits (8 × 8) that come with scikit-learn.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (its
test set). Quick to learn: made for tests and for trying things out. The file is read where the package has it, and
scikit-learn is not imported: it takes 100 MB of a device's memory, and most of a second.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from clients.tasks.folds import Fold, Folds, split
from clients.tasks.task import Examples, Task

# Pixels are counts from 0 to 16; these standardise them.
_PIXEL_MEAN, _PIXEL_STD = 4.884, 6.017
_SPLIT_SEED = 19_980_701


class Digits(Task):
    """Ten digits, stratified by class; with five folds 1,437 or 1,438 images to train on.

    The split is fixed: it does not depend on the run's seed. Pixels are standardised.

    Args:
        fold: which part of the images is the test set, 0 to folds - 1; cross-validation runs over all.
        folds: how many parts there are.

    Raises:
        ValueError: `fold` is not one of 0 … folds - 1.
    """

    input_shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, fold: Fold = 0, folds: Folds = 5) -> None:
        self._train, self._test = _split(fold, folds)

    def train(self) -> Examples:
        """The other images, (n, 1, 8, 8) float32, and their digits, (n,) long."""
        return self._train

    def test(self) -> Examples:
        """The images of the fold, (n, 1, 8, 8) float32, and their digits, (n,) long."""
        return self._test


@functools.lru_cache(maxsize=2)
def _split(fold: int, folds: int) -> tuple[Examples, Examples]:
    pixels, labels = _images()
    inputs = torch.from_numpy(pixels).float().sub_(_PIXEL_MEAN).div_(_PIXEL_STD)
    every = Examples(inputs.reshape(-1, *Digits.input_shape), torch.from_numpy(labels))
    train, test = split(labels, fold, folds, _SPLIT_SEED)
    return every.take(train), every.take(test)


def _images() -> tuple[np.ndarray, np.ndarray]:
    """As `load_digits(return_X_y=True)` gives them: pixels, (1797, 64) float64, and digits, (1797,) int64.

    Raises:
        FileNotFoundError: scikit-learn is not installed, or without its data.
    """
    # Looked for on the path alone: nothing of the package runs.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "task=digits reads images of scikit-learn: pip install scikit-learn"
        )
    rows = np.loadtxt(
        Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=","
    )
    return rows[:, :-1], rows[:, -1].astype(np.int64)
