"""Data sets of the Hugging Face kind, from local folders."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from clients.places import DataError
from clients.tasks import HuggingFace
from clients.tasks.task import check_task

TEXTS = {
    "text": [f"{'red' if row % 2 else 'green'} leaf number {'abc'[row % 3]}" for row in range(30)],
    "label": [row % 2 for row in range(30)],
    "who": [f"w{row % 3}" for row in range(30)],
    "vector": [[row, -row, 1.0] for row in range(30)],
    "number": list(range(30)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps the library's copies out of the user's own cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict(TEXTS).save_to_disk(folder)
    return str(folder)


def test_text_in_a_saved_data_set(saved):
    task = HuggingFace(saved, max_length=6, client="who")
    check_task(task)
    assert (task.input_shape, task.num_classes, task.vocab_size) == ((6,), 2, 2 + 7)
    assert (len(task.train()), len(task.test())) == (24, 6)
    assert set(task.natural_ids()) == {"w0", "w1", "w2"}


@pytest.mark.parametrize(("column", "shape"), [("vector", (3,)), ("number", (1,))])
def test_numbers_are_standardised(saved, column, shape):
    task = HuggingFace(saved, input=column)
    assert task.input_shape == shape
    assert task.train().inputs.dtype == torch.float32
    assert task.train().inputs[:, 0].mean().abs() < 1e-6


def test_splits_are_chosen_by_name(tmp_path):
    data = datasets.Dataset.from_dict(TEXTS)
    splits = datasets.DatasetDict(
        {"train": data.select(range(20)), "test": data.select(range(20, 30))}
    )
    splits.save_to_disk(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    assert len(HuggingFace(folder).train()) == 16
    task = HuggingFace(folder, test_split="test")
    assert (len(task.train()), len(task.test())) == (20, 10)
    with pytest.raises(DataError, match=r"no split 'validation': .* one of train, test"):
        HuggingFace(folder, test_split="validation")


def test_a_folder_of_json_files_is_read_too(tmp_path):
    (tmp_path / "data").mkdir()
    lines = [
        {"text": text, "label": "ab"[label]}
        for text, label in zip(TEXTS["text"], TEXTS["label"], strict=True)
    ]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = HuggingFace(str(tmp_path / "data"))
    assert task.classes == ["a", "b"]
    assert len(task.train()) + len(task.test()) == 30


def test_images_are_read_by_our_own_reader(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8)) for _ in range(10)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 5}, features=features)
    data.save_to_disk(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    task = HuggingFace(folder, input="image")
    check_task(task)
    assert task.input_shape == (3, 5, 4)
    assert HuggingFace(folder, input="image", size=6, channels=1).input_shape == (1, 6, 6)
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"x", "path": None}] * 2, "label": [0, 1]}, features=features
    )
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(DataError, match="row 0, column 'image' cannot be read as an image"):
        HuggingFace(str(tmp_path / "broken"), input="image")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "txt"}, "has no column 'txt'"),
        ({"target": "labels"}, "has no column 'labels': set task.input, task.target"),
        ({"target": "vector"}, "among the labels: classes are words"),
        ({"fold": 9}, "there are 5 folds"),
    ],
)
def test_what_is_not_there_is_named(saved, settings, message):
    with pytest.raises(ValueError, match=message):
        HuggingFace(saved, **settings)


def test_gaps_and_ragged_lists_are_refused(tmp_path):
    rows = {"gap": [1.0, None], "ragged": [[1], [1, 2]], "label": [0, 1], "none": [None, "x"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    for column in ("gap", "ragged", "none"):
        with pytest.raises(DataError, match=f"column '{column}': "):
            HuggingFace(str(tmp_path / "saved"), input=column)


def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*/none: a data set's folder"):
        HuggingFace(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data set can be loaded from"):
        HuggingFace(str(tmp_path / "empty"))
