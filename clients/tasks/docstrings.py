"""Docstrings: English prose about code, from packages that Trellis depends on; which package is it from?

The packages are found and read, never imported. Lines of code, and the packages' own names, are left out, since they
would give the label away; what is left is style and subject. Docstrings differ from version to version of a package.

Two further questions of the same texts make task groups of one federation: what kind of definition a docstring stands
in, which only its source tells, and whether it lists parameters. The heading of such a list may be among the words.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
from annotated_types import Ge, MinLen

from clients.places import DataError, Place
from clients.tasks.folds import Fold, Folds, check_fold, split
from clients.tasks.task import Examples, Task
from clients.tasks.text import MaxLength, VocabSize, tokens, words

PACKAGES = ("flwr", "matplotlib", "pandas", "scipy", "sklearn", "torch")

GOALS: Final = ("package", "kind", "arguments")
KINDS: Final = ("function", "method", "other")
ARGUMENTS: Final = ("none listed", "listed")

_SEED = 20_240_229
_LARGEST_FILE = 100_000
_ALIASES = {"sklearn": ("scikit", "learn"), "torch": ("pytorch",), "flwr": ("flower",)}
_LISTS_ARGUMENTS = re.compile(
    r"^[ \t]*(?:(?:Parameters|Args|Arguments)[ \t]*:?[ \t]*$|:param\b)", re.MULTILINE
)
_LEFT_OUT = frozenset({"tests", "test", "testing", "vendor", "_vendor", "externals", "extern"})


@dataclass(frozen=True)
class Docstring:
    """One docstring.

    Attributes:
        package: that it is from.
        module: the file's path from the folder that holds the package, with slashes.
        text: its words, in lower case and separated by spaces.
        kind: what it stands in: a function, a method, or (other) a class or a module.
        arguments: whether it has a list of parameters, as numpy, Google or Sphinx write one.
    """

    package: str
    module: str
    text: str
    kind: str
    arguments: bool


class Docstrings(Task):
    """Docstrings of installed packages as rows of tokens; the label is the package, unless other goals are named.

    No two texts are the same. All docstrings of a module are in the same fold, since they repeat
    one another; a module is a natural client.

    Args:
        packages: two or more installed packages, in any order; labels count them in sorted order.
        max_per_package: how many docstrings of each package at most; a tenth of them of one module.
        min_words: docstrings with fewer are left out.
        max_length: tokens of an input; longer texts are cut.
        vocab_size: at most so many ids. The words are counted on the training texts.
        tokenizer: a pretrained model's in the words' place: a folder, or a hub name.
        goals: what is asked of a text, one thing or several: its ``package``; the ``kind`` of what it stands in
            (function, method, other); whether it lists ``arguments``. Folds are even in the first one's classes.
        fold: which part of the modules is the test set, 0 to folds - 1.
        folds: how many parts there are.

    Raises:
        DataError: a package is not there, or has no docstrings.
        ValueError: an argument is out of its range, or goals are none that there are, or repeat.

    Attributes:
        classes: names of the logits' classes, in order.
        texts: the words of each training example, and of each test example.
    """

    def __init__(
        self,
        packages: Annotated[Sequence[str], MinLen(2)] = PACKAGES,
        *,
        max_per_package: Annotated[int, Ge(1)] = 400,
        min_words: Annotated[int, Ge(1)] = 12,
        max_length: MaxLength = 64,
        vocab_size: VocabSize = 5_000,
        tokenizer: Place | None = None,
        goals: Annotated[Sequence[str], MinLen(1)] = ("package",),
        fold: Fold = 0,
        folds: Folds = 5,
    ) -> None:
        check_fold(fold, folds)
        _check_goals(goals)
        found = read_docstrings(tuple(sorted(set(packages))), max_per_package, min_words)
        asked = [_classes_and_labels(goal, found) for goal in goals]
        self.classes = [name for classes, _ in asked for name in classes]
        if len(asked) > 1:
            sizes = (len(classes) for classes, _ in asked)
            self.goals = dict(zip(goals, sizes, strict=True))
        first = asked[0][1]
        labels = np.stack([column for _, column in asked], axis=1) if self.goals else first
        modules = [item.module for item in found]
        train, test = split(first, fold, folds, _SEED, groups=modules)
        encoding = tokens(
            (found[row].text for row in train),
            vocab_size=vocab_size,
            max_length=max_length,
            tokenizer=tokenizer,
        )
        every = Examples(encoding.encode([item.text for item in found]), torch.from_numpy(labels))
        self.input_shape, self.num_classes = (max_length,), len(self.classes)
        self.vocab_size, self.padding_id = encoding.vocab_size, encoding.padding_id
        self._train, self._test = every.take(train), every.take(test)
        self._modules = [modules[row] for row in train]
        self.texts = [found[row].text for row in train], [found[row].text for row in test]

    def train(self) -> Examples:
        """Tokens, (n, max_length) long, and classes, (n,) long, or (n, G) of G goals."""
        return self._train

    def test(self) -> Examples:
        """The same of the modules in the fold."""
        return self._test

    def natural_ids(self) -> Sequence[str]:
        """The module that each training example is from."""
        return self._modules


def _check_goals(goals: Sequence[str]) -> None:
    if odd := sorted(set(goals) - set(GOALS)):
        raise ValueError(f"goals: there is no {odd[0]!r}, choose among {', '.join(GOALS)}")
    if not goals or len(set(goals)) < len(goals):
        raise ValueError(f"goals={list(goals)}: name at least one, and none twice")


def _classes_and_labels(goal: str, found: Sequence[Docstring]) -> tuple[list[str], np.ndarray]:
    """The names of a goal's classes, and the label of each docstring, (n,) int64."""
    if goal == "arguments":
        return list(ARGUMENTS), np.array([item.arguments for item in found], dtype=np.int64)
    of = [item.package if goal == "package" else item.kind for item in found]
    classes = sorted(set(of)) if goal == "package" else list(KINDS)
    return classes, np.array([classes.index(name) for name in of], dtype=np.int64)


@lru_cache(maxsize=4)
def read_docstrings(
    packages: tuple[str, ...], max_per_package: int, min_words: int
) -> tuple[Docstring, ...]:
    """The docstrings of packages: the same ones in the same order in every process.

    Modules are taken in an order that is drawn from a fixed seed until there are enough, so that
    reading a large package takes no longer than a small one.

    Raises:
        DataError: a package is not there, has no source files, or no docstrings of that length.
    """
    if len(packages) < 2:
        raise DataError(f"packages={list(packages)}: two or more are needed, to tell them apart")
    names = {name for package in packages for name in (package, *_ALIASES.get(package, ()))}
    seen: set[str] = set()
    found: list[Docstring] = []
    for package in packages:
        mine: list[Docstring] = []
        of_module: Counter[str] = Counter()
        for item in _docstrings(package, names):
            if len(mine) == max_per_package:
                break
            is_long = item.text.count(" ") + 1 >= min_words
            has_room = of_module[item.module] < max(1, max_per_package // 10)
            if is_long and has_room and item.text not in seen:
                seen.add(item.text)
                of_module[item.module] += 1
                mine.append(item)
        if not mine:
            raise DataError(
                f"packages: {package} has no docstrings of {min_words} words: lower min_words or "
                "leave it out"
            )
        found += mine
    return tuple(found)


def _docstrings(package: str, names: set[str]) -> Iterator[Docstring]:
    root = package_folder(package)
    files = sorted(path for path in root.rglob("*.py") if is_wanted(path, root))
    order = np.random.default_rng(_SEED).permutation(len(files))
    for number in order:
        module = files[number].relative_to(root.parent).as_posix()
        for text, kind in docstrings_of(files[number]):
            lists = _LISTS_ARGUMENTS.search(text) is not None
            yield Docstring(package, module, " ".join(_prose(text, names)), kind, lists)


def package_folder(package: str) -> Path:
    """Where a package's source files are; a top-level package is found without importing it."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise DataError(
            f"packages: there is no installed package {package!r}: name it as it is imported, "
            "without dots"
        )
    return Path(next(iter(places)))


def is_wanted(path: Path, root: Path) -> bool:
    """Whether a source file under a package's folder is read: no tests, nothing vendored, nothing huge."""
    inside = path.relative_to(root)
    return (
        _LEFT_OUT.isdisjoint(inside.parts)
        and not inside.name.startswith(("test_", "conftest"))
        and path.stat().st_size <= _LARGEST_FILE
    )


def docstrings_of(path: Path) -> Iterator[tuple[str, str]]:
    """The docstrings of a source file and their kinds, in its order; none where it is not the Python that runs here."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return  # parsing takes nearly all of the time
    try:
        with warnings.catch_warnings(action="ignore"):  # of the packages' own escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    waiting: list[tuple[ast.AST, bool]] = [(tree, False)]
    while waiting:
        node, in_class = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if text:
                yield text, ("method" if in_class else "function") if is_function else "other"
            in_class = isinstance(node, ast.ClassDef)
            # Only these hold docstrings, or what is under an if or a try does; expressions never do.
        inside = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        waiting += [(child, in_class) for child in reversed(inside)]


def _prose(text: str, names: set[str]) -> list[str]:
    """The words of a docstring without its lines of code and the packages' names."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith((">>>", "..."))]
    return [word for word in words("\n".join(lines)) if word not in names]
