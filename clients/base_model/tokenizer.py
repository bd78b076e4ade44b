"""A byte-level tokenizer of a corpus: byte-pair encoding, so that any text has tokens and none is unknown.

Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units", §3.2, over bytes as
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", §2.2, have it. Two ids are no text: the end
of a text, and what fills a row up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

END, PADDING = "<|endoftext|>", "<|padding|>"
"""The tokens with the ids 0 and 1."""

LEAST_VOCABULARY: Final = 258
"""The two and a token for each byte."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A tokenizer of transformers' fast kind with at most `vocab_size` ids; the same texts give the same one.

    Raises:
        ValueError: fewer ids than there are bytes.
    """
    if vocab_size < LEAST_VOCABULARY:
        raise ValueError(f"vocab_size = {vocab_size}: must be at least {LEAST_VOCABULARY}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # takes a second

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
