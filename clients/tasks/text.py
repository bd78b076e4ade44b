"""Text to tokens: whole words counted on the training texts, or a pretrained model's own tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from clients.places import DataError, Place, require_folder

PADDING, UNKNOWN = 0, 1
"""Ids of what stands behind the last word, and of a word that the vocabulary does not hold."""

MEND = "`make models`, run in the checkout, fetches MiniLM to ./models/minilm; or name a folder or hub name"

MaxLength = Annotated[int, Ge(1)]
VocabSize = Annotated[int, Ge(3)]

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Tokens:
    """How texts become rows of ids.

    Attributes:
        encode: (n,) texts to (n, max_length) long; rows are cut, or filled up with `padding_id`.
        vocab_size: how many ids there are.
        padding_id: the id that fills a row up.
    """

    encode: Callable[[Sequence[str]], Tensor]
    vocab_size: int
    padding_id: int


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, so that `n_samples` is two of them."""
    return _WORD.findall(text.lower())


def tokens(
    training: Iterable[str], *, vocab_size: int, max_length: int, tokenizer: Place | None
) -> Tokens:
    """The way from text to ids.

    Args:
        training: texts that the vocabulary is counted on; never the test texts. A vocabulary of
            clients' words is released with the model. Not looked at where there is a tokenizer.
        vocab_size: at most so many ids, those of padding and of unknown words among them.
        max_length: tokens of a row.
        tokenizer: of a pretrained model, a folder or a hub name; None for whole words.

    Raises:
        DataError: the tokenizer cannot be loaded, or does not say how to pad.
        ValueError: a number is out of its range.
    """
    for name, value, least in (("vocab_size", vocab_size, 3), ("max_length", max_length, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if tokenizer is not None:
        return _pretrained(tokenizer, max_length)
    counts = Counter(word for text in training for word in words(text))
    kept = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 2]
    ids = {word: number for number, word in enumerate(kept, UNKNOWN + 1)}

    def encode(texts: Sequence[str]) -> Tensor:
        rows = torch.full((len(texts), max_length), PADDING, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            found = [ids.get(word, UNKNOWN) for word in words(text)[:max_length]]
            row[: len(found)] = torch.tensor(found, dtype=torch.long)
        return rows

    return Tokens(encode, len(ids) + 2, PADDING)


def _pretrained(place: Place, max_length: int) -> Tokens:
    tokenizer = load_tokenizer(place)
    if tokenizer.pad_token_id is None:
        raise DataError(f"the tokenizer {place} has no padding token: take another one")

    def encode(texts: Sequence[str]) -> Tensor:
        # Filled up by hand: a tokenizer may warn of a length that it was not saved with.
        rows = torch.full((len(texts), max_length), int(tokenizer.pad_token_id), dtype=torch.long)
        found = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        for row, ids in zip(rows, found, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return rows

    return Tokens(encode, len(tokenizer), int(tokenizer.pad_token_id))


@lru_cache(maxsize=2)
def load_tokenizer(place: Place) -> Any:
    """A pretrained model's tokenizer; no code that comes with it is run.

    Raises:
        DataError: it cannot be loaded.
    """
    folder = require_folder(place, MEND)
    from transformers import AutoTokenizer  # takes a second, and only pretrained models need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"no tokenizer can be loaded from {place}: {first}") from error
    tokenizer.padding_side = "right"
    return tokenizer
