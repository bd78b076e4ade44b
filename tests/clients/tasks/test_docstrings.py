"""Docstrings of installed packages as a task."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.places import DataError
from clients.tasks import Docstrings, FederatedData
from clients.tasks.docstrings import read_docstrings
from clients.tasks.task import check_task, fingerprint
from clients.tasks.text import words

FEW = {"packages": ("flwr", "sklearn", "matplotlib"), "max_per_package": 60}


@pytest.fixture(scope="module")
def task():
    return Docstrings(**FEW)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of the test's own; importing one would fail."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("oneness", "twoness"):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise ImportError('never imported')\n")
    read_docstrings.cache_clear()
    return tmp_path


def write(path: Path, *docstrings: str) -> None:
    functions = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings)]
    path.write_text("\n".join(functions))


def test_it_is_a_task_of_tokens_with_the_package_as_the_label(task):
    check_task(task)
    assert task.classes == ["flwr", "matplotlib", "sklearn"]
    assert task.input_shape == (64,)
    assert task.train().inputs.max() < task.vocab_size <= 5_000
    for examples in (task.train(), task.test()):
        assert examples.inputs.dtype == examples.targets.dtype == torch.long
        assert examples.targets.unique().tolist() == [0, 1, 2]
    assert len(task.train()) + len(task.test()) == 180


def test_no_module_and_no_text_is_in_two_folds():
    tests, modules = [], []
    for fold in range(5):
        made = Docstrings(**FEW, fold=fold)
        train, test = made.texts
        assert not set(train) & set(test)
        tests += test
        modules.append(set(made.natural_ids()))
        every = {item.module for item in read_docstrings(tuple(sorted(FEW["packages"])), 60, 12)}
        of_text = {
            item.text: item.module
            for item in read_docstrings(tuple(sorted(FEW["packages"])), 60, 12)
        }
        held_out = {of_text[text] for text in test}
        assert modules[-1] | held_out == every
        assert not modules[-1] & held_out
    assert len(tests) == len(set(tests)) == 180


def test_every_fold_tests_on_every_package():
    for fold in range(5):
        counts = Docstrings(**FEW, fold=fold).test().targets.bincount(minlength=3)
        assert counts.min() >= 8


def test_the_vocabulary_is_counted_on_the_training_fold_only(task):
    train, test = task.texts
    known = {word for text in train for word in words(text)}
    row, text = next(
        (row, text)
        for row, text in enumerate(test)
        if any(w not in known for w in text.split()[:64])
    )
    unknown = [w not in known for w in text.split()[:64]]
    assert (task.test().inputs[row][: len(unknown)] == 1).numpy()[unknown].all()


def test_a_small_vocabulary_keeps_the_most_frequent_words():
    made = Docstrings(**FEW, vocab_size=12)
    assert made.vocab_size == 12
    counts = made.train().inputs.flatten().bincount(minlength=12)[2:]
    assert (counts > 0).all()
    assert (made.train().inputs == 1).sum() > counts.max()


def test_the_label_is_not_given_away_by_names_or_code(task):
    for text in [*task.texts[0], *task.texts[1]]:
        assert not {"sklearn", "scikit", "flwr", "flower", "matplotlib"} & set(text.split())
        assert len(text.split()) >= 12


def test_another_process_reads_the_same(task):
    program = (
        "from clients.tasks import Docstrings; from clients.tasks.task import fingerprint; import sys\n"
        f"print(fingerprint(Docstrings(**{FEW!r})), 'sklearn' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [fingerprint(task), "False", "False"]


def test_a_module_is_a_natural_client(task):
    data = FederatedData(
        task, len(set(task.natural_ids())), partition="natural", min_partition_size=1
    )
    owners = np.array(task.natural_ids())
    for client in range(data.num_clients):
        rows = np.concatenate(data.rows(client))
        assert len(set(owners[rows])) == 1
        assert (owners == owners[rows[0]]).sum() == len(rows)


def test_packages_are_read_and_never_imported(packages):
    write(
        packages / "oneness" / "a.py",
        "one two three\n    >>> code_here()\n    ... more()\n    oneness four",
    )
    write(packages / "twoness" / "b.py", "five six seven eight", "one two three four", "too short")
    (packages / "twoness" / "broken.py").write_text('"""a b c d"""\nthis is no Python')
    (packages / "twoness" / "test_b.py").write_text('"""never read this test"""')
    (packages / "twoness" / "tests" / "c.py").write_text('"""never read this either"""')
    found = read_docstrings(("oneness", "twoness"), 10, 4)
    # The text that both hold stays with the first.
    assert [(item.package, item.module, item.text) for item in found] == [
        ("oneness", "oneness/a.py", "one two three four"),
        ("twoness", "twoness/b.py", "five six seven eight"),
    ]
    assert "oneness" not in sys.modules


def test_docstrings_of_classes_methods_and_what_stands_under_an_if_are_found(packages):
    (packages / "oneness" / "a.py").write_text(
        '"""of the module"""\nclass A:\n    """of the class"""\n    async def f(self):\n        """of the method"""\n'
        'if True:\n    try:\n        def g():\n            """of the function"""\n    finally:\n        pass\n'
    )
    write(packages / "twoness" / "b.py", "of another package")
    found = [item.text for item in read_docstrings(("oneness", "twoness"), 100, 3)]
    assert found == [
        "of the module",
        "of the class",
        "of the method",
        "of the function",
        "of another package",
    ]
    tree = ast.parse((packages / "oneness" / "a.py").read_text())
    assert len([n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packages": ["torch"]}, "two or more are needed"),
        ({"packages": ["torch", "no_such_package"]}, "no installed package 'no_such_package'"),
        ({"packages": ["torch", "../etc"]}, "no installed package '../etc'"),
        ({"packages": ["flwr", "sklearn"], "min_words": 100_000}, "lower min_words"),
        ({"fold": 5}, "there are 5 folds"),
        ({**FEW, "vocab_size": 2}, "vocab_size=2: must be at least 3"),
        ({**FEW, "max_length": 0}, "max_length=0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        Docstrings(**arguments)


def test_refusals_of_data_are_data_errors():
    with pytest.raises(DataError):
        Docstrings(("torch", "no_such_package"))
