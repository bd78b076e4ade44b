"""Text files of a small made-up language, and a language model of it that takes a second to train."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

_NOUNS = ("clients", "servers", "rounds", "models", "adapters", "tokens", "layers", "sums")
_VERBS = ("send", "hold", "train", "see", "add", "keep")
_RULES = ("never", "always", "often", "seldom")


def write_notes(
    folder: Path,
    *,
    files: int = 6,
    paragraphs: int = 30,
    seed: int = 0,
    nouns: Sequence[str] = _NOUNS,
) -> Path:
    """Writes note-N.md files of different paragraphs about these things; the same seed writes the same."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for number in range(files):
        text = [
            " ".join(
                f"{draw.choice(nouns).title()} {draw.choice(_RULES)} {draw.choice(_VERBS)} {draw.choice(nouns)}."
                for _ in range(4)
            )
            for _ in range(paragraphs)
        ]
        (folder / f"note-{number}.md").write_text("\n\n".join(text), encoding="utf-8")
    return folder


def save_tiny_language_model(folder: Path, *, tokens: int = 1) -> Path:
    """A GPT-2 of two layers of 16 units and its tokenizer, trained on that many tokens of the notes."""
    from clients.base_model.corpus import corpus_source, read_corpus
    from clients.base_model.pretrain import BaseModelSettings, make_base_model

    notes = write_notes(folder / "notes")
    settings = BaseModelSettings(
        layers=2, width=16, heads=2, vocab=300, context=32, tokens=tokens, lr=1e-2
    )
    make_base_model(settings, read_corpus(notes), corpus_source(notes), folder / "model")
    return folder / "model"
