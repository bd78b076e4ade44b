"""A pretrained model as small as can be: a BERT of random weights with a WordPiece vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["red", "green", "blue", "apple", "leaf", "sky", "##s", "the", "is"]


def save_tiny_bert(folder: Path, *, seed: int = 0) -> Path:
    """Writes a model and its tokenizer as `from_pretrained` reads them."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return folder
