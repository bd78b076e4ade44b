"""A user's own data set of the Hugging Face kind: a local folder, or a name on the hub.

Only a hub name makes a download, and only into the cache of the library `datasets`; code that comes with a data set is
never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clients.places import DataError, Place, require_folder
from clients.tasks.folds import Fold, Folds
from clients.tasks.own import OwnData, Rows, TextSettings, class_labels
from clients.tasks.pictures import Channels, Side, read_image, same_size
from clients.tasks.text import MaxLength, VocabSize


class HuggingFace(OwnData):
    """A data set's examples: one column of text, images, numbers or lists of numbers, and one of classes.

    Text becomes (max_length,) long tokens; images (channels, height, width) float32 and numbers float32 are
    standardised by the training examples.

    Args:
        path: a folder (as `save_to_disk` writes it, or of Parquet, CSV, JSON or image files), or a
            name on the hub.
        input: the column to learn from.
        target: the column of the class.
        name: of the data set's configuration, where it has several.
        split: to train on.
        test_split: to test on; without one, a fold of `split`.
        client: a column that says whose each example is, for ``partition=natural``.
        size: sides in pixels that every image is brought to; without it, all must have the same.
        channels: of images, 1 for grey, 3 for colour.
        max_length: tokens of a text; longer ones are cut.
        vocab_size: at most so many ids of tokens.
        tokenizer: a pretrained model's, in the place of whole words: a folder, or a hub name.
        fold: which part of the examples is the test set, 0 to folds - 1.
        folds: how many parts there are.

    Raises:
        DataError: the data set, a split or a column is not there, or does not hold such data.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        path: Place,
        *,
        input: str = "text",
        target: str = "label",
        name: str | None = None,
        split: str = "train",
        test_split: str | None = None,
        client: str | None = None,
        size: Side | None = None,
        channels: Channels = 3,
        max_length: MaxLength = 64,
        vocab_size: VocabSize = 5_000,
        tokenizer: Place | None = None,
        fold: Fold = 0,
        folds: Folds = 5,
    ) -> None:
        splits = _load(path, name)

        def rows(chosen: str) -> Rows:
            found = _split(splits, chosen, path)
            owners = None if client is None else list(map(str, _column(found, client, path)))
            labels = class_labels(list(_column(found, target, path)), f"{path}, column {target!r}")
            place = f"{path}, split {chosen}"
            return Rows(_inputs(found, input, place, size, channels), labels, place, owners)

        train = rows(split)
        is_image = isinstance(train.inputs, np.ndarray) and train.inputs.ndim == 4
        self.settle(
            train,
            None if test_split is None else rows(test_split),
            fold=fold,
            folds=folds,
            text=TextSettings(vocab_size, max_length, tokenizer),
            axes=(0, 2, 3) if is_image else (0,),
        )


def _load(place: Place, name: str | None) -> Any:
    """The data set's splits by name; a folder that was saved without splits is one called train."""
    folder = require_folder(place, "a data set's folder, or its name on the hub without ./")
    import datasets  # takes a second, and only this task needs it

    saved = any((Path(folder) / file).exists() for file in ("state.json", "dataset_dict.json"))
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder, name)
    except Exception as error:  # of the many kinds of file that it reads, each fails in its own way
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"no data set can be loaded from {place}: {first[0]}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    return {"train": found} if isinstance(found, datasets.Dataset) else found


def _split(splits: Any, name: str, place: Place) -> Any:
    if name not in splits:
        raise DataError(
            f"{place} has no split {name!r}: set task.split and task.test_split to one of "
            f"{', '.join(splits)}"
        )
    return splits[name]


def _column(found: Any, name: str, place: Place) -> Any:
    if name not in found.column_names:
        raise DataError(
            f"{place} has no column {name!r}: set task.input, task.target and task.client to one "
            f"of {', '.join(found.column_names)}"
        )
    return found[name]


def _inputs(
    found: Any, name: str, place: str, size: int | None, channels: Channels
) -> np.ndarray | list[str]:
    """A column as texts, images (n, channels, height, width) uint8, or numbers (n, …) float64."""
    from datasets import Image

    values = _column(found, name, place)
    if isinstance(found.features[name], Image):
        encoded = found.cast_column(name, Image(decode=False))[name]
        images = [
            (where := f"{place}, row {row}, column {name!r}", _image(item, where, size, channels))
            for row, item in enumerate(encoded)
        ]
        return same_size(images)
    items = list(values)
    if all(isinstance(item, str) for item in items):
        return items
    try:
        numbers = np.array(items, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{place}, column {name!r}: neither text, nor images, nor numbers of one shape ({error})"
        ) from error
    if not np.isfinite(numbers).all():
        raise DataError(f"{place}, column {name!r}: holds numbers that are not finite, or gaps")
    return numbers[:, np.newaxis] if numbers.ndim == 1 else numbers


def _image(item: Any, where: str, size: int | None, channels: Channels) -> np.ndarray:
    if not item or (item.get("bytes") is None and item.get("path") is None):
        raise DataError(f"{where}: there is no image: fill it in or drop the row")
    source = Path(item["path"]) if item["bytes"] is None else item["bytes"]
    return read_image(source, where, size, channels)
