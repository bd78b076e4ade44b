"""The next token of prose: what a causal language model is trained for, on docstrings or a user's own text files.

Each module's texts are laid end to end and cut into rows, so that hardly a token is padding. Modules are held out as a
whole for the test. The tokens are those of the model that is adapted. This file says nothing of the model itself.

Means over rows make perplexity: with `nll` and `tokens` as `Prose.metrics` gives them, the perplexity of a set of rows
is exp(nll / tokens), whatever batches or clients they came in (`perplexity`). A mean of perplexities would be another,
larger number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, MinLen
from torch import Tensor

from clients.places import DataError, Place, require_folder
from clients.tasks.docstrings import PACKAGES
from clients.tasks.folds import Fold, Folds, check_fold, split
from clients.tasks.passages import Passage, read_folder, read_packages
from clients.tasks.task import Examples, Task
from clients.tasks.text import load_tokenizer

IGNORED: Final = -100
"""Stands where there is no next token."""

_SEED = 20_260_302
_MEND = "`trellis make-base-model` makes models/base-gpt2; or name a folder or hub name of a causal language model"


class Prose(Task):
    """Rows of tokens and the token behind each.

    A text begins behind an end-of-text token, and the next one follows it in its row. No paragraph
    is there twice. A module is a natural client; those of one package are neighbours by name.

    Args:
        packages: installed packages, whose docstrings are the texts; not looked at where there is a folder.
        folder: of .txt and .md files, which are the texts instead; a file is what a module is else.
        max_per_package: how many docstrings of each package at most; a tenth of them of one module.
        min_words: texts with fewer are left out.
        max_length: L, tokens of a row; no more than the model takes.
        tokenizer: the model's: a folder, or a hub name.
        fold: which part of the modules is the test set, 0 to folds - 1.
        folds: how many parts there are.

    Raises:
        DataError: there is no such text, or no such tokenizer, or it has no token for the end of a text.
        ValueError: an argument is out of its range, or no tokenizer is named.

    Attributes:
        sources: the package that each training row is from, and that of each test row; of files, the folder.
    """

    def __init__(
        self,
        packages: Annotated[Sequence[str], MinLen(1)] = PACKAGES,
        *,
        folder: Path | None = None,
        max_per_package: Annotated[int, Ge(1)] = 200,
        min_words: Annotated[int, Ge(1)] = 8,
        max_length: Annotated[int, Ge(2)] = 64,
        tokenizer: Place | None = None,
        fold: Fold = 0,
        folds: Folds = 5,
    ) -> None:
        check_fold(fold, folds)
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: must be at least 2")
        if tokenizer is None:
            raise ValueError("task=prose takes the tokens of a language model: use model=lora_lm")
        found = (
            read_packages(tuple(sorted(set(packages))), max_per_package, min_words)
            if folder is None
            else read_folder(folder, min_words)
        )
        encoding = _causal(tokenizer)
        padding = encoding.pad_token_id
        self.padding_id = int(encoding.eos_token_id if padding is None else padding)
        self.vocab_size = self.num_classes = len(encoding)
        self.input_shape = (max_length,)
        every, modules, sources = _rows(found, encoding, max_length, self.padding_id)
        labels = np.unique(np.asarray(sources), return_inverse=True)[1].astype(np.int64)
        train, test = split(labels, fold, folds, _SEED, groups=modules)
        self._train, self._test = every.take(train), every.take(test)
        self._modules = [modules[row] for row in train]
        self.sources = [sources[row] for row in train], [sources[row] for row in test]

    def train(self) -> Examples:
        """Tokens, (n, max_length) long, and the tokens behind them, (n, max_length) long; -100 where there is none."""
        return self._train

    def test(self) -> Examples:
        """The same of the modules in the fold."""
        return self._test

    def natural_ids(self) -> Sequence[str]:
        """The module that each training row is from."""
        return self._modules

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of each row's tokens, nats, (batch,).

        Args:
            output: (batch, max_length, vocab_size) float, the model's logits.
            targets: (batch, max_length) long.
        """
        return _nll(output, targets).sum(dim=1) / _counts(targets).clamp(min=1)

    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        """Means over rows: `accuracy` of the next token, and `nll` and `tokens`, a row's summed nats and its tokens.

        Args:
            output: (batch, max_length, vocab_size) float, the model's logits.
            targets: (batch, max_length) long.
        """
        counts = _counts(targets)
        right = (output.argmax(dim=-1) == targets).sum(dim=1) / counts.clamp(min=1)
        return {
            "accuracy": right.mean().item(),
            "nll": _nll(output, targets).sum(dim=1).mean().item(),
            "tokens": counts.float().mean().item(),
        }


def perplexity(figures: Mapping[str, float]) -> float:
    """Of a token, from what evaluation on `Prose` gives, or from a row of summary.json.

    Raises:
        KeyError: `nll` or `tokens` is missing.
    """
    return math.exp(figures["nll"] / figures["tokens"])


def _nll(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, nats, (batch, length); 0 where there is no next token."""
    return F.cross_entropy(output.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


def _counts(targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum(dim=1)


def _causal(place: Place) -> Any:
    """A tokenizer with a token for the end of a text."""
    require_folder(place, _MEND)
    tokenizer = load_tokenizer(place)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {place} has no token for the end of a text, so it is no causal model's: {_MEND}"
        )
    return tokenizer


def _rows(
    passages: Sequence[Passage], tokenizer: Any, length: int, padding: int
) -> tuple[Examples, list[str], list[str]]:
    """All rows, and the module and the source that each is from."""
    found = tokenizer([item.text for item in passages], add_special_tokens=False)["input_ids"]
    streams: dict[tuple[str, str], list[int]] = {}
    for item, ids in zip(passages, found, strict=True):
        stream = streams.setdefault((item.module, item.source), [tokenizer.eos_token_id])
        stream += [*ids, tokenizer.eos_token_id]
    modules, sources = [], []
    inputs, targets = [], []
    for (module, source), stream in streams.items():
        for row in _windows(stream, length):
            inputs.append(F.pad(row[:-1], (0, length + 1 - len(row)), value=padding))
            targets.append(F.pad(row[1:], (0, length + 1 - len(row)), value=IGNORED))
            modules.append(module)
            sources.append(source)
    return Examples(torch.stack(inputs), torch.stack(targets)), modules, sources


def _windows(stream: Sequence[int], length: int) -> Iterator[Tensor]:
    """Stretches of `length` + 1 tokens, each beginning with the last token of the one before; the last is shorter."""
    for start in range(0, len(stream) - 1, length):
        yield torch.tensor(stream[start : start + length + 1], dtype=torch.long)
