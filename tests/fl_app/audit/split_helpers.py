"""MiniLM with real weights, cut, and docstrings as public and as private text."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clients.fetch import MINILM, is_whole
from clients.pretrained import load_encoder
from clients.split import cut
from clients.tasks.docstrings import read_docstrings
from clients.tasks.text import tokens

FOLDER = Path(__file__).resolve().parents[3] / "models" / "minilm"

needs_minilm = pytest.mark.skipif(
    not is_whole(FOLDER, MINILM), reason="models/minilm is not there: make models"
)


@dataclass(frozen=True)
class Words:
    """Texts as tokens, and what is real of them."""

    ids: Tensor
    mask: Tensor

    @property
    def inner(self) -> Tensor:
        """Real tokens but a text's first and last, (n, l) bool."""
        found = self.mask.bool().clone()
        found[:, 0] = False
        found[torch.arange(len(found)), self.mask.sum(dim=1) - 1] = False
        return found


@lru_cache(maxsize=2)
def words(packages: tuple[str, ...], count: int, length: int = 24) -> Words:
    """Texts of packages, `count` of each."""
    texts = [one.text for one in read_docstrings(packages, count, 12)]
    way = tokens([], vocab_size=3, max_length=length, tokenizer=str(FOLDER))
    ids = way.encode(texts)
    return Words(ids, (ids != way.padding_id).long())


@lru_cache(maxsize=1)
def encoder():
    """The whole model, frozen."""
    return load_encoder(str(FOLDER)).eval().requires_grad_(False)


def bottom(at: int):
    """Tokens to the activation after `at` blocks."""
    lower = cut(encoder(), at)[0].eval()
    return lambda ids, mask=None: lower(
        input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask
    )


def activations(at: int, text: Words) -> Tensor:
    """At the real inner tokens, (n, 384)."""
    with torch.no_grad():
        return bottom(at)(text.ids, text.mask)[text.inner]
