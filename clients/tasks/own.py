"""What tasks on a user's own data share: classes numbered, a test set cut off, numbers scaled, text made tokens.

Classes, scales and vocabularies are found from the training examples of all clients together, before any training; who
may not know them (a vocabulary of clients' words, say) makes the task with constants instead, as a class of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clients.places import DataError, Place
from clients.tasks.folds import split
from clients.tasks.task import Examples, Task
from clients.tasks.text import tokens

_SEED = 20_170_401

Label = str | int


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples as they were read.

    Attributes:
        inputs: (n, *shape) numbers, or n texts.
        labels: n classes, all words or all whole numbers.
        source: the file or folder, for messages.
        owners: whose each example is; None where that is not known.
    """

    inputs: np.ndarray | list[str]
    labels: Sequence[Label]
    source: str
    owners: Sequence[str] | None = None

    def take(self, rows: np.ndarray) -> Rows:
        """The rows named by (k,) numbers, in their order."""
        inputs = self.inputs
        return Rows(
            [inputs[row] for row in rows] if isinstance(inputs, list) else inputs[rows],
            [self.labels[row] for row in rows],
            self.source,
            None if self.owners is None else [self.owners[row] for row in rows],
        )


@dataclass(frozen=True)
class TextSettings:
    """How text becomes tokens; the fields are those of `clients.tasks.text.tokens`."""

    vocab_size: int
    max_length: int
    tokenizer: Place | None


class OwnData(Task):
    """A task that a subclass reads from somewhere; `settle` makes everything else of it.

    Attributes:
        classes: the classes in sorted order; a label counts them from 0.
    """

    classes: list[Label]

    def settle(
        self,
        rows: Rows,
        test: Rows | None,
        *,
        fold: int,
        folds: int,
        text: TextSettings | None = None,
        axes: tuple[int, ...] = (0,),
    ) -> None:
        """Take what was read.

        Args:
            rows: to train on, and to test on too where there is no `test`.
            test: to test on; None cuts a fold off `rows`.
            fold: which part is cut off; 0 where `test` is given.
            folds: of how many.
            text: for inputs that are text.
            axes: of numbers, those that share a mean and a standard deviation, by which they are scaled.

        Raises:
            DataError: there are too few rows or classes, or test rows that do not fit the others.
            ValueError: there is no such fold.
        """
        if test is not None and fold:
            raise ValueError(f"fold={fold}: a test set is given, so there is nothing to fold")
        self.classes = sorted(set(rows.labels))  # all words or all numbers
        if len(self.classes) < 2:
            raise DataError(
                f"{rows.source}: {len(rows.labels)} examples of {len(self.classes)} class: "
                "at least two classes are needed"
            )
        if test is None:
            train_rows, test_rows = split(self._targets(rows), fold, folds, _SEED)
            rows, test = rows.take(train_rows), rows.take(test_rows)
        inputs, test_inputs = self._inputs(rows, test, text, axes)
        self._train = Examples(inputs, torch.from_numpy(self._targets(rows)))
        self._test = Examples(test_inputs, torch.from_numpy(self._targets(test)))
        self.input_shape, self.num_classes = tuple(inputs.shape[1:]), len(self.classes)
        self._owners = rows.owners

    def train(self) -> Examples:
        """The training examples; what is in them depends on where they are from."""
        return self._train

    def test(self) -> Examples:
        """The test file's examples, or those of the fold."""
        return self._test

    def natural_ids(self) -> Sequence[str] | None:
        """Whose each training example is, where the data say so."""
        return self._owners

    def _targets(self, rows: Rows) -> np.ndarray:
        numbers = {label: number for number, label in enumerate(self.classes)}
        unknown = sorted({str(label) for label in rows.labels if label not in numbers})
        if unknown:
            raise DataError(
                f"{rows.source}: class {unknown[0]!r} is not among the {len(numbers)} classes to "
                "train on: leave those rows out, or give examples of it to train on"
            )
        return np.array([numbers[label] for label in rows.labels], dtype=np.int64)

    def _inputs(
        self, rows: Rows, test: Rows, text: TextSettings | None, axes: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        train_inputs, test_inputs = rows.inputs, test.inputs
        if isinstance(train_inputs, list) and isinstance(test_inputs, list):
            assert text is not None  # whoever reads text says how it becomes tokens
            way = tokens(train_inputs, **vars(text))
            self.vocab_size, self.padding_id = way.vocab_size, way.padding_id
            return way.encode(train_inputs), way.encode(test_inputs)
        train, held_out = np.asarray(train_inputs), np.asarray(test_inputs)
        if train.shape[1:] != held_out.shape[1:]:
            raise DataError(
                f"{test.source}: inputs of shape {held_out.shape[1:]}, those to train on have "
                f"{train.shape[1:]}: bring them to the same shape"
            )
        mean = train.mean(axis=axes, dtype=np.float64, keepdims=True)
        spread = train.std(axis=axes, dtype=np.float64, keepdims=True)
        spread[spread == 0] = 1  # a constant tells nothing, and 0 says so

        def scaled(numbers: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(((numbers - mean) / spread).astype(np.float32))

        return scaled(train), scaled(held_out)


def class_labels(
    values: Sequence[object], place: str, row_name: Callable[[int], str] = "row {}".format
) -> list[Label]:
    """Class labels from what a file holds: whole numbers where all are, else words.

    Args:
        values: texts, or what JSON has.
        place: the file and the column, for messages.
        row_name: what the user calls a row, from its number.

    Raises:
        DataError: numbers with a fraction, missing labels, or words and numbers mixed; names the row.
    """
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(
                f"{place}, {row_name(row)}: the label is missing: fill it in or drop the row"
            )
    numbers = [_whole(value) for value in values]
    if None not in numbers:
        return [number for number in numbers if number is not None]
    texts = [value.strip() for value in values if isinstance(value, str)]
    if len(texts) < len(values) or all(map(_is_number, texts)):
        row = numbers.index(None)
        raise DataError(
            f"{place}, {row_name(row)}: {values[row]!r} among the labels: "
            "classes are words, or whole numbers, and not both"
        )
    return list(texts)


def _whole(value: object) -> int | None:
    """A whole number; None for what is none. Texts are read as one would write them."""
    if isinstance(value, int):
        return int(value)
    try:
        if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)
        number = _float(value) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None
    return int(number) if float(number).is_integer() else None


def _is_number(text: str) -> bool:
    try:
        _float(text)
    except ValueError:
        return False
    return True


def _float(text: str) -> float:
    """Without Python's own spelling of numbers, in which 1_0 is 10."""
    if "_" in text:
        raise ValueError(text)
    return float(text)
