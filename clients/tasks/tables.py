"""A user's own tables: CSV, and JSON lines. Numbers in columns, or text in one; a class in another."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Len

from clients.places import DataError, Place, require_file
from clients.tasks.folds import Fold, Folds
from clients.tasks.own import OwnData, Rows, TextSettings, class_labels
from clients.tasks.text import MaxLength, VocabSize
from strategies import plain_json


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length.

    Attributes:
        path: of the file.
        columns: values by name, texts or what JSON has.
        lines: the line of the file on which each row ends.
    """

    path: Path
    columns: dict[str, list[object]]
    lines: list[int]

    def column(self, name: str, setting: str) -> list[object]:
        """The values of a column.

        Raises:
            DataError: there is none of that name; says which setting named it.
        """
        if name not in self.columns:
            close = get_close_matches(name, self.columns, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise DataError(
                f"{self.path} has no column {name!r}: {hint}set {setting} to one of "
                f"{', '.join(self.columns)}"
            )
        return self.columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """A column of finite numbers, (n,) float64.

        Raises:
            DataError: a value is no finite number; says on which line.
        """
        values = self.column(name, "task.features")
        try:
            numbers = np.array(values, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            numbers = np.empty(0)
        if numbers.shape == (len(values),) and np.isfinite(numbers).all():
            return numbers
        row = next(row for row, value in enumerate(values) if not _is_finite(value))
        value = values[row]
        mend = (
            "fill it in or drop the row"
            if value in ("", None)
            else (
                "mend it, or name the columns of numbers by task.features, or one of text by task.text"
            )
        )
        raise DataError(
            f"{self.path}, line {self.lines[row]}, column {name!r}: "
            f"{_short(value)} is no finite number: {mend}"
        )

    def texts(self, name: str) -> list[str]:
        """A column of text.

        Raises:
            DataError: a value is something else; says on which line.
        """
        values = self.column(name, "task.text")
        for line, value in zip(self.lines, values, strict=True):
            if not isinstance(value, str):
                raise DataError(
                    f"{self.path}, line {line}, column {name!r}: {_short(value)} is no text"
                )
        return [str(value) for value in values]


class _TableTask(OwnData):
    def _take(
        self,
        table: Table,
        test: Table | None,
        *,
        target: str,
        features: Sequence[str] | None,
        text: str | None,
        client: str | None,
        tokens: TextSettings,
        fold: int,
        folds: int,
    ) -> None:
        if text is not None and features is not None:
            raise ValueError("task.text and task.features: give one of them, not both")
        for name, setting in ((target, "task.target"), (client, "task.client")):
            if name is not None:
                table.column(name, setting)
        names = features or [name for name in table.columns if name not in (target, client)]
        if text is None and not names:
            raise DataError(f"{table.path} has no column beside {target!r}: nothing to learn from")

        def rows(one: Table, owners: str | None) -> Rows:
            labels = class_labels(
                one.column(target, "task.target"),
                f"{one.path}, column {target!r}",
                lambda row: f"line {one.lines[row]}",
            )
            inputs = (
                one.texts(text)
                if text is not None
                else np.stack([one.numbers(name) for name in names], axis=1)
            )
            whose = None if owners is None else list(map(str, one.column(owners, "task.client")))
            return Rows(inputs, labels, str(one.path), whose)

        self.settle(
            rows(table, client),
            None if test is None else rows(test, None),
            fold=fold,
            folds=folds,
            text=tokens,
        )


class Csv(_TableTask):
    """A CSV file in UTF-8 with a header: columns of numbers, (columns,) float32, or one of text as tokens.

    Numbers are standardised by the training rows. Classes count from 0 in sorted order.

    Args:
        path: of the file.
        target: the column of the class, words or whole numbers.
        features: the columns of numbers; all but `target` and `client` where there is no `text`.
        text: a column of text to learn from, in the place of numbers.
        client: a column that says whose each row is, for ``partition=natural``.
        delimiter: between two fields.
        test_path: a file to test on; without one, a fold of `path`.
        max_length: tokens of a text; longer ones are cut.
        vocab_size: at most so many ids of tokens.
        tokenizer: a pretrained model's, in the place of whole words: a folder, or a hub name.
        fold: which part of the rows is the test set, 0 to folds - 1.
        folds: how many parts there are.

    Raises:
        DataError: a file cannot be read, or does not hold such data; names file, line and column.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        *,
        features: Sequence[str] | None = None,
        text: str | None = None,
        client: str | None = None,
        delimiter: Annotated[str, Len(1, 1)] = ",",
        test_path: Path | None = None,
        max_length: MaxLength = 64,
        vocab_size: VocabSize = 5_000,
        tokenizer: Place | None = None,
        fold: Fold = 0,
        folds: Folds = 5,
    ) -> None:
        self._take(
            read_csv(path, delimiter),
            None if test_path is None else read_csv(test_path, delimiter),
            target=target,
            features=features,
            text=text,
            client=client,
            tokens=TextSettings(vocab_size, max_length, tokenizer),
            fold=fold,
            folds=folds,
        )


class Jsonl(_TableTask):
    """A file of JSON lines in UTF-8, one object with the same keys on each; otherwise like `Csv`.

    Args:
        path: of the file.
        target: the key of the class, words or whole numbers.
        features: the keys of numbers; all but `target` and `client` where there is no `text`.
        text: a key of text to learn from, in the place of numbers.
        client: a key that says whose each row is, for ``partition=natural``.
        test_path: a file to test on; without one, a fold of `path`.
        max_length: tokens of a text; longer ones are cut.
        vocab_size: at most so many ids of tokens.
        tokenizer: a pretrained model's, in the place of whole words: a folder, or a hub name.
        fold: which part of the rows is the test set, 0 to folds - 1.
        folds: how many parts there are.

    Raises:
        DataError: a file cannot be read, or does not hold such data; names file, line and key.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        *,
        features: Sequence[str] | None = None,
        text: str | None = None,
        client: str | None = None,
        test_path: Path | None = None,
        max_length: MaxLength = 64,
        vocab_size: VocabSize = 5_000,
        tokenizer: Place | None = None,
        fold: Fold = 0,
        folds: Folds = 5,
    ) -> None:
        self._take(
            read_jsonl(path),
            None if test_path is None else read_jsonl(test_path),
            target=target,
            features=features,
            text=text,
            client=client,
            tokens=TextSettings(vocab_size, max_length, tokenizer),
            fold=fold,
            folds=folds,
        )


def read_csv(path: Path, delimiter: str = ",") -> Table:
    """A CSV file with a header; every row has as many fields as that.

    Raises:
        DataError: it cannot be read so; names the line.
    """
    path = require_file(path)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            for row in reader:
                if len(row) != len(header) and row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, the header has "
                        f"{len(header)}: is the delimiter {delimiter!r}?"
                    )
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError, OSError, TypeError) as error:
        raise DataError(f"{path} is no CSV file in UTF-8: {error}") from error
    if not rows:
        raise DataError(f"{path} has no rows: a header and one row an example are needed")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path}, line 1: column {twice!r} is there twice: rename one")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    return Table(path, columns, lines)


def read_jsonl(path: Path) -> Table:
    """A file of JSON objects, one a line, that all have the same keys; empty lines are skipped.

    Raises:
        DataError: it cannot be read so; names the line.
    """
    path = require_file(path)
    columns: dict[str, list[object]] = {}
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _append(columns, _object(line, path, number), f"{path}, line {number}")
                    lines.append(number)
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as UTF-8: {error}") from error
    if not lines:
        raise DataError(f"{path} has no rows: one JSON object an example is needed")
    return Table(path, columns, lines)


def _object(line: str, path: Path, number: int) -> dict[str, object]:
    try:
        found = plain_json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f'{path}, line {number}: {_short(found)} is no object, as in {{"x": 1}}')
    return found


def _append(columns: dict[str, list[object]], row: dict[str, object], place: str) -> None:
    if not columns:
        columns.update({name: [] for name in row})
    if odd := sorted(columns.keys() ^ row.keys()):
        there = "has" if odd[0] in row else "lacks"
        raise DataError(
            f"{place} {there} the key {odd[0]!r}, unlike the first: give each line the same keys"
        )
    for name, value in row.items():
        columns[name].append(value)


def _is_finite(value: object) -> bool:
    try:
        return bool(np.isfinite(np.float64(value)))  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return False


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}…"
