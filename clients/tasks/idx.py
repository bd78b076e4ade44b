"""A user's own images in MNIST's file format, IDX, as they are or packed by gzip.

Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits", 1998, section "File formats".
"""

from __future__ import annotations

import gzip
import io
import zlib
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from clients.places import DataError, require_file
from clients.tasks.folds import Fold, Folds
from clients.tasks.own import OwnData, Rows

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_DIMENSIONS = 4
_MOST_BYTES = 4 * 2**30
_CHUNK = 2**20


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""
        ...


class Idx(OwnData):
    """Images and labels from IDX files, as MNIST, Fashion-MNIST and EMNIST come; names ending in .gz are unpacked.

    Inputs are (1, height, width) float32 for files of (n, height, width), else as the file has them; they are
    standardised by the mean and the standard deviation of all training numbers.

    Args:
        images: the file of the images.
        labels: the file of their labels.
        test_images: the same to test on; without them, a fold of the others.
        test_labels: the labels of `test_images`.
        fold: which part of the images is the test set, 0 to folds - 1.
        folds: how many parts there are.

    Raises:
        DataError: a file is no IDX file, or two do not belong together; names the file.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        *,
        test_images: Path | None = None,
        test_labels: Path | None = None,
        fold: Fold = 0,
        folds: Folds = 5,
    ) -> None:
        if (test_images is None) != (test_labels is None):
            raise ValueError("test_images and test_labels: give both or neither")
        rows = _rows(images, labels)
        test = (
            None if test_images is None or test_labels is None else _rows(test_images, test_labels)
        )
        axes = tuple(range(np.ndim(rows.inputs)))
        self.settle(rows, test, fold=fold, folds=folds, axes=axes)


def _rows(images: Path, labels: Path) -> Rows:
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim < 2:
        raise DataError(f"{images} has one dimension, so it holds no images: is it the labels?")
    if classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer):
        raise DataError(
            f"{labels} holds {classes.dtype} of shape {classes.shape}, and labels are one whole "
            "number an image: are the two files exchanged?"
        )
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} holds {len(pixels)} images, {labels} {len(classes)} labels: "
            "take two files that belong together"
        )
    if pixels.ndim == 3:
        pixels = pixels[:, np.newaxis]
    return Rows(pixels, classes.tolist(), str(images))


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, in the machine's own byte order.

    Raises:
        DataError: it is no IDX file, is larger than 4 GiB, or has too few bytes or too many.
    """
    path = require_file(path)
    try:
        with path.open("rb") as file:
            if path.suffix != ".gz":
                return parse_idx(file, str(path))
            with gzip.GzipFile(fileobj=file) as unpacked:
                return parse_idx(unpacked, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def parse_idx(stream: Readable, name: str) -> np.ndarray:
    """The array in an IDX stream; no more is read than its header says, nor set aside before it is there.

    Args:
        stream: open for reading bytes.
        name: for messages.

    Raises:
        DataError: see `read_idx`.
    """
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _TYPES:
        raise DataError(f"{name} is no IDX file: it begins with {start.hex(' ') or 'nothing'}")
    if not 1 <= start[3] <= _MOST_DIMENSIONS:
        raise DataError(f"{name} has {start[3]} dimensions: 1 to {_MOST_DIMENSIONS} can be used")
    header = stream.read(4 * start[3])
    if len(header) < 4 * start[3]:
        raise DataError(f"{name} ends within its header: it was not copied whole")
    shape = tuple(np.frombuffer(header, dtype=">u4").tolist())
    kind = np.dtype(_TYPES[start[2]])
    expected = prod(shape) * kind.itemsize
    if not 0 < expected <= _MOST_BYTES:
        raise DataError(
            f"{name} says that it holds {' × '.join(map(str, shape))} numbers, {expected:,} bytes: "
            f"1 to {_MOST_BYTES:,} can be used"
        )
    content = _read_at_most(stream, expected + 1)
    if len(content) != expected:
        found = f"only {len(content):,}" if len(content) < expected else "more"
        raise DataError(f"{name} should hold {expected:,} bytes of numbers and has {found}")
    numbers = np.frombuffer(content, dtype=kind).reshape(shape).astype(kind.newbyteorder("="))
    if kind.kind == "f" and not np.isfinite(numbers).all():
        raise DataError(f"{name} holds numbers that are not finite")
    return numbers


def _read_at_most(stream: Readable, limit: int) -> bytes:
    content = io.BytesIO()
    while content.tell() < limit and (chunk := stream.read(min(_CHUNK, limit - content.tell()))):
        content.write(chunk)
    return content.getvalue()
