"""The text that a base model is made of, and the part of it that measures the model.

The packages are others than those whose docstrings are the tasks (`clients.tasks.docstrings`, `clients.tasks.prose`): a
model that has read the clients' text has nothing to learn from them, and a membership attack nothing to find. Whole
modules are held out. A corpus knows nothing of tokens; its hash tells it from another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from clients.places import DataError
from clients.tasks.passages import Passage, read_folder, read_packages, text_files

PACKAGES: Final = ("networkx", "numpy", "ray", "sympy", "transformers")
"""Trellis depends on all of them, directly or not; none is a package of `clients.tasks.docstrings.PACKAGES`."""

_HELD_OUT = 50
"""One unit in so many is held out."""


@dataclass(frozen=True)
class Corpus:
    """Texts to train on and texts to measure by.

    Attributes:
        train: texts, in a fixed order.
        held_out: texts of other modules; none of their paragraphs is in `train`.
        sha256: over both, in hex.
        described: where they are from, in words.
    """

    train: Sequence[str]
    held_out: Sequence[str]
    sha256: str
    described: str


def read_corpus(folder: Path | None = None, packages: Sequence[str] = PACKAGES) -> Corpus:
    """A corpus: the text files of a folder where one is given, and else the docstrings of packages.

    Raises:
        DataError: there is no text, or too little to hold any out.
    """
    if folder is not None:
        passages = read_folder(folder)
        # A folder may be one long file: there the pieces are what is held out.
        units = [f"{item.module}#{number}" for number, item in enumerate(passages)]
        return _cut(passages, units, f"text files of {folder.name or folder}")
    passages = read_packages(tuple(sorted(set(packages))))
    return _cut(passages, [item.module for item in passages], ", ".join(sorted(set(packages))))


def corpus_source(folder: Path | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """What a corpus is read from, without reading it as text: the version of each package, or each file's hash.

    Raises:
        DataError: there is no such folder.
    """
    if folder is None:
        return {name: version(name) for name in sorted(set(packages))}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in text_files(folder)
    }


def _cut(passages: Sequence[Passage], units: Sequence[str], described: str) -> Corpus:
    """Holds out every fiftieth unit, in the order of their names' hashes, and one at least."""
    names = sorted(set(units), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(names) < 2:
        raise DataError(f"{described}: one piece of text, too little to hold any out: add more")
    measured = frozenset(names[: max(1, len(names) // _HELD_OUT)])
    train = [item.text for item, unit in zip(passages, units, strict=True) if unit not in measured]
    held_out = [item.text for item, unit in zip(passages, units, strict=True) if unit in measured]
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(len(part).to_bytes(8, "big"))
        for text in part:
            data = text.encode("utf-8", "replace")
            digest.update(len(data).to_bytes(8, "big") + data)
    return Corpus(train, held_out, digest.hexdigest(), described)
