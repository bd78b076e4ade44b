"""Tables of a user's own: CSV and JSON lines."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.places import DataError
from clients.tasks import Csv, FederatedData, Jsonl
from clients.tasks.own import class_labels
from clients.tasks.tables import read_csv, read_jsonl
from clients.tasks.task import check_task
from tests.support.bert import save_tiny_bert

FRUIT = [
    {
        "weight": 100 + 7 * row % 31,
        "width": 0.5 * row,
        "kind": "pear" if row % 3 else "apple",
        "farm": f"f{row % 4}",
    }
    for row in range(30)
]


def save_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=[(Csv, save_csv), (Jsonl, save_jsonl)], ids=["csv", "jsonl"])
def kind(request, tmp_path):
    """Makes a task of rows."""
    task, save = request.param

    def make(rows, *, test=None, **settings):
        held_out = {} if test is None else {"test_path": save(tmp_path / "test", test)}
        return task(save(tmp_path / "train", rows), **{"target": "kind", **held_out, **settings})

    return make


def test_numbers_are_standardised_by_the_training_rows_and_classes_count_in_sorted_order(kind):
    task = kind(FRUIT, features=["weight", "width"])
    check_task(task)
    assert (task.classes, task.input_shape, task.num_classes) == (["apple", "pear"], (2,), 2)
    assert (len(task.train()), len(task.test())) == (24, 6)
    assert task.test().targets.bincount().tolist() == [2, 4]
    inputs = task.train().inputs
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(2))
    weights = sorted(row["weight"] for row in FRUIT)
    ordered = torch.cat([inputs, task.test().inputs])[:, 0].sort().values.double().numpy()
    assert np.corrcoef(ordered, weights)[0, 1] == pytest.approx(1)


def test_the_folds_cover_all_rows_once(kind):
    tests = [kind(FRUIT, features=["width"], folds=3, fold=fold).test() for fold in range(3)]
    assert [len(part) for part in tests] == [10, 10, 10]
    assert sum(part.targets.sum().item() for part in tests) == 20


def test_a_test_file_is_scaled_like_the_training_file(kind):
    rows = [{key: row[key] for key in ("weight", "width", "kind")} for row in FRUIT]
    turned = [dict(reversed(row.items())) for row in rows[:5]]
    task = kind(rows, test=turned)
    assert (len(task.train()), len(task.test())) == (30, 5)
    assert torch.equal(task.train().inputs[:5], task.test().inputs)


def test_features_are_all_other_columns_unless_named(kind):
    rows = [{key: row[key] for key in ("weight", "width", "kind")} for row in FRUIT]
    assert kind(rows).input_shape == (2,)
    with pytest.raises(DataError, match=r"line [12], column 'farm': 'f0' is no finite number"):
        kind(FRUIT)
    assert kind(FRUIT, client="farm").input_shape == (2,)


def test_a_column_says_whose_each_row_is(kind):
    task = kind(FRUIT, client="farm")
    data = FederatedData(task, 4, partition="natural")
    owners = np.array(task.natural_ids())
    assert sorted({frozenset(owners[np.concatenate(data.rows(c))]) for c in range(4)}, key=str) == [
        frozenset({f"f{farm}"}) for farm in range(4)
    ]
    assert kind(FRUIT, features=["weight"]).natural_ids() is None


def test_whole_numbers_are_classes_in_their_own_order(kind):
    rows = [{"x": row, "kind": (10, 9, -1)[row % 3]} for row in range(12)]
    assert kind(rows).classes == [-1, 9, 10]


def test_a_constant_column_becomes_zero(kind):
    rows = [{"x": 5, "y": row, "kind": row % 2} for row in range(20)]
    assert (kind(rows).train().inputs[:, 0] == 0).all()


def test_text_becomes_tokens(kind, tmp_path):
    rows = [{"text": "red sky, blue" if i % 2 else "green\nleaf", "kind": i % 2} for i in range(20)]
    task = kind(rows, text="text", max_length=4)
    check_task(task)
    assert (task.input_shape, task.vocab_size) == ((4,), 7)
    assert {tuple(row) for row in task.train().inputs.ne(0).tolist()} == {
        (True, True, True, False),
        (True, True, False, False),
    }
    bert = save_tiny_bert(tmp_path / "bert")
    assert kind(rows, text="text", tokenizer=str(bert)).vocab_size == 14


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (FRUIT, {"target": "kinds"}, "has no column 'kinds': did you mean kind"),
        (FRUIT, {"features": ["wieght"]}, "did you mean weight"),
        (FRUIT, {"client": "owner", "features": ["width"]}, "set task.client to one of weight"),
        (FRUIT, {"text": "farm", "features": ["width"]}, "give one of them, not both"),
        (FRUIT, {"features": ["width"], "fold": 5}, "there are 5 folds"),
        ([{"kind": "a"}, {"kind": "b"}], {}, "has no column beside 'kind'"),
        ([{"x": 1, "kind": "a"}] * 9, {}, "9 examples of 1 class: at least two"),
        (
            [{"x": 1, "kind": 0.5}, {"x": 2, "kind": 1}],
            {},
            r"0\.5'? among the labels: classes are words",
        ),
        ([{"x": 1, "kind": "a"}, {"x": 2, "kind": ""}], {}, "line [23]: the label is missing"),
        (
            [{"x": 1, "kind": "a"}, {"x": "nan", "kind": "b"}],
            {},
            "line [23], column 'x': 'nan' is no",
        ),
        ([{"x": 1, "kind": "a"}, {"x": "", "kind": "b"}], {}, "fill it in or drop the row"),
        ([{"x": 1, "kind": "a"}, {"x": "9" * 400 + "e9", "kind": "b"}], {}, "is no finite number"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_in_words(kind, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(rows, **settings)


def test_a_class_of_the_test_file_alone_is_refused(kind):
    test = [{**FRUIT[0], "kind": "plum"}]
    with pytest.raises(DataError, match=r"test: class 'plum' is not among the 2 classes"):
        kind(FRUIT, test=test, features=["width"])
    with pytest.raises(ValueError, match="fold=1: a test set is given"):
        kind(FRUIT, test=FRUIT, features=["width"], fold=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"a,b\n", "has no rows"),
        (b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields, the header has 2: is the delimiter ','"),
        (b"a,a\n1,2\n", "line 1: column 'a' is there twice"),
        (b"a,b\n1,\xff\n", "is no CSV file in UTF-8"),
        (b'a,b\n1,"2\n', "is no CSV file in UTF-8"),
        (b"a,b\n1," + b"x" * 200_000, "field larger than field limit"),
    ],
)
def test_a_broken_csv_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"broken\.csv.*{message}"):
        read_csv(path)


def test_csv_knows_other_delimiters_quotes_a_byte_order_mark_and_empty_lines(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfa;b\n1;"x;\ny"\n\n2;z\n')
    table = read_csv(path, ";")
    assert table.columns == {"a": ["1", "2"], "b": ["x;\ny", "z"]}
    assert table.lines == [3, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (b'{"a": 1}\n{"a": 1', "line 2 is no JSON"),
        (b'{"a": 1}\n[1]\n', r"line 2: \[1\] is no object"),
        (b'{"a": 1}\n{"b": 1}\n', "line 2 lacks the key 'a', unlike the first"),
        (b'{"a": 1}\n{"a": 1, "b": 1}\n', "line 2 has the key 'b', unlike the first"),
        (b'{"a": "\xff"}\n', "cannot be read as UTF-8"),
        (b"[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_broken_json_lines_are_refused_with_their_line(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(path)


@pytest.mark.parametrize("value", [None, [1, 2], {"a": 1}, 10**400, "word"])
def test_json_values_that_are_no_numbers_or_text_are_named(tmp_path, value):
    path = save_jsonl(tmp_path / "rows", [{"x": 1, "k": 0}, {"x": value, "k": 1}])
    with pytest.raises(DataError, match=r"line 2, column 'x'.* is no finite number"):
        Jsonl(path, "k")
    if not isinstance(value, str):
        with pytest.raises(DataError, match="line 1, column 'x': 1 is no text"):
            Jsonl(path, "k", text="x")


@pytest.mark.parametrize("path", ["none.csv", "."])
def test_a_file_that_is_not_there_is_named_in_full(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}.* relative path counts from"):
        read_csv(tmp_path / path)


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1))
def test_labels_of_whole_numbers_are_the_same_as_text_as_numbers_and_as_floats(numbers):
    for values in (numbers, list(map(str, numbers)), list(map(float, numbers))):
        assert class_labels(values, "here") == numbers


@given(st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1))
def test_labels_are_words_or_numbers_or_refused(texts):
    try:
        found = class_labels(texts, "here")
    except DataError:
        return
    assert found in (
        [text.strip() for text in texts],
        [int(text) for text in texts if _is_whole(text)],
    )


def _is_whole(text):
    try:
        int(text)
    except ValueError:
        return False
    return True


def test_pythons_own_spelling_of_a_number_is_a_word():
    assert class_labels(["1_0", "a"], "labels") == ["1_0", "a"]
