"""Prose to learn a language from: docstrings of installed packages, or a user's own text files, as they were written.

Case and punctuation stay, lines of code go. A paragraph that stood anywhere before is left out, so that what is held
out for a test is not also trained on: docstrings repeat one another a lot. Packages are found and read, never imported.
Nothing here knows of tokens, tasks or models.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from clients.places import DataError
from clients.tasks.docstrings import docstrings_of, is_wanted, package_folder

_SEED = 20_260_301
_PIECE = 4_000
"""Letters of a user's file that make one passage, about: whole paragraphs."""
_SUFFIXES = (".txt", ".md")
_BREAK = re.compile(r"\n\s*\n")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Passage:
    """A stretch of prose.

    Attributes:
        source: the package that it is from; of a user's files, the folder below the one that was named, or the file.
        module: the file's path, with slashes: from the folder that holds the package, or from the one that was named.
        text: its paragraphs, with a blank line between two.
    """

    source: str
    module: str
    text: str


@lru_cache(maxsize=4)
def read_packages(
    packages: tuple[str, ...], most: int | None = None, min_words: int = 8
) -> tuple[Passage, ...]:
    """The docstrings of packages: the same ones in the same order in every process.

    Modules are taken in an order that is drawn from a fixed seed until there are enough.

    Args:
        packages: names as they are imported.
        most: how many docstrings of each package at most, and a tenth of them of one module; None for all.
        min_words: docstrings with fewer, of what is new in them, are left out.

    Raises:
        DataError: no package is named, one is not there, or has no docstrings of that length.
    """
    if not packages:
        raise DataError("packages=[]: name one or more to read docstrings of")
    seen: set[bytes] = set()
    found: list[Passage] = []
    for package in packages:
        mine = list(_of_package(package, most, min_words, seen))
        if not mine:
            raise DataError(
                f"packages: {package} has no docstrings of {min_words} words: lower min_words or leave it out"
            )
        found += mine
    return tuple(found)


def _of_package(
    package: str, most: int | None, min_words: int, seen: set[bytes]
) -> Iterator[Passage]:
    root = package_folder(package)
    files = sorted(path for path in root.rglob("*.py") if is_wanted(path, root))
    of_module: Counter[str] = Counter()
    for number in np.random.default_rng(_SEED).permutation(len(files)):
        module = files[number].relative_to(root.parent).as_posix()
        for docstring, _ in docstrings_of(files[number]):
            if most is not None and of_module.total() == most:
                return
            if most is not None and of_module[module] == max(1, most // 10):
                break
            text = "\n\n".join(_fresh(_BREAK.split(_prose(docstring)), seen))
            if len(_WORD.findall(text)) >= min_words:
                of_module[module] += 1
                yield Passage(package, module, text)


@lru_cache(maxsize=4)
def read_folder(folder: Path, min_words: int = 8) -> tuple[Passage, ...]:
    """The text files (.txt, .md) of a folder and of those below it, in pieces of whole paragraphs.

    Raises:
        DataError: there is no such folder, a file is not UTF-8, or there is no text.
    """
    seen: set[bytes] = set()
    found: list[Passage] = []
    for path in text_files(folder):
        name = path.relative_to(folder)
        try:
            paragraphs = _fresh(_BREAK.split(path.read_text(encoding="utf-8")), seen)
            pieces = list(_pieces(paragraphs))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 ({error.reason}, byte {error.start}): convert it, or take it away"
            ) from error
        found += [
            Passage(name.parts[0], name.as_posix(), text)
            for text in pieces
            if len(_WORD.findall(text)) >= min_words
        ]
    if not found:
        raise DataError(f"{folder.absolute()} holds no .txt or .md file with {min_words} words")
    return tuple(found)


def text_files(folder: Path) -> list[Path]:
    """The files that `read_folder` reads, in its order.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder.absolute()}: name one with .txt or .md files")
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in _SUFFIXES
    )


def _prose(docstring: str) -> str:
    """A docstring without its common indentation, its examples' code and what that prints."""
    kept: list[str] = []
    in_code = False
    for line in inspect.cleandoc(docstring).splitlines():
        in_code = bool(line.strip()) and (in_code or line.lstrip().startswith((">>>", "...")))
        if not in_code:
            kept.append(line.rstrip())
    return "\n".join(kept)


def _fresh(paragraphs: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """The paragraphs that stood nowhere before, without the spaces around them; their digests are added to `seen`."""
    for paragraph in paragraphs:
        text = paragraph.strip("\n").rstrip()
        key = hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).digest()[:16]
        if text.strip() and key not in seen:
            seen.add(key)
            yield text


def _pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    waiting: list[str] = []
    letters = 0
    for paragraph in paragraphs:
        waiting.append(paragraph)
        letters += len(paragraph)
        if letters >= _PIECE:
            yield "\n\n".join(waiting)
            waiting, letters = [], 0
    if waiting:
        yield "\n\n".join(waiting)
