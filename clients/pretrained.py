"""A pretrained language model under a linear layer.

The weights come from a local folder, or from the Hugging Face hub where a name is given; they are read as safetensors
only, and no code that comes with them is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from clients.places import DataError, Place, require_folder
from clients.tasks.text import MEND, load_tokenizer

_MOST_KEPT = 100_000
"""Features that a process remembers: 150 MB for 384 units."""


class PretrainedClassifier(nn.Module):
    """Mean of a pretrained encoder's last states over a text's tokens, and a linear layer on it.

    A frozen encoder is no part of the model's state: only `head` is trained, sent and saved. It runs without gradients
    and in eval mode, each text by itself and without its padding, so that a text's features do not depend on its
    batch; they are kept, and each process computes them once.

    Args:
        input_shape: (length,) of one row of tokens.
        num_classes: number of logits.
        vocab_size: how many ids the task's tokens have; must be those of this model's tokenizer.
        padding_id: the id that fills a row up behind its last token.
        pretrained: a folder with config.json, model.safetensors and the tokenizer's files, or a hub name.
        frozen: whether the encoder stays as it is. Otherwise all of it is trained, and travels.

    Raises:
        DataError: there is no such folder, or what is in it cannot be loaded.
        ValueError: the task has no tokens, or those of another tokenizer, or its rows are longer
            than the encoder takes.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        vocab_size: int | None,
        padding_id: int = 0,
        *,
        pretrained: Place,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        vocab_size = check_rows(vocab_size, input_shape)
        self._features = _shared(pretrained, padding_id) if frozen else None
        encoder = self._features.encoder if self._features else load_encoder(pretrained)
        check_tokens(encoder, pretrained, vocab_size, input_shape[0])
        self.padding_id = padding_id
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)
        self.encoder = None if frozen else encoder

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of tokens, (batch, length) long; padding stands at the end."""
        if self._features is not None:
            features = self._features(inputs)
        else:
            mask = (inputs != self.padding_id).long()
            features = mean_state(self.encoder, inputs, mask)
        logits: Tensor = self.head(features)
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._features is not None:
            self._features.move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


class _Features:
    """The features of texts under a frozen encoder; those of the first 100,000 are remembered."""

    def __init__(self, encoder: Any, padding_id: int) -> None:
        self.encoder = encoder
        self._padding_id = padding_id
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        """(batch, length) long to (batch, hidden) float on the same device."""
        return torch.stack([self._of(row) for row in inputs])

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Changes device or dtype as `nn.Module._apply` does."""
        before = self._kind
        self.encoder._apply(fn)
        if self._kind != before:
            self._known.clear()

    @property
    def _kind(self) -> tuple[torch.device, torch.dtype]:
        first: Tensor = next(self.encoder.parameters())
        return first.device, first.dtype

    def _of(self, row: Tensor) -> Tensor:
        key = row.cpu().numpy().tobytes()
        found = self._known.get(key)
        if found is None:
            length = max(1, int((row != self._padding_id).sum()))
            text = row[:length].unsqueeze(0)
            with torch.no_grad():
                found = mean_state(self.encoder, text, torch.ones_like(text))[0]
            if len(self._known) < _MOST_KEPT:
                self._known[key] = found
        return found


@lru_cache(maxsize=1)
def _shared(place: Place, padding_id: int) -> _Features:
    """One frozen encoder for all models of a process, since nothing changes it."""
    return _Features(load_encoder(place).eval().requires_grad_(False), padding_id)


def mean_state(encoder: Any, inputs: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last states over the tokens that `mask` has, (batch, hidden)."""
    states: Tensor = encoder(input_ids=inputs, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(2).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def load_encoder(place: Place) -> Any:
    """A pretrained encoder in float32.

    Raises:
        DataError: it cannot be loaded.
    """
    folder = require_folder(place, MEND)
    import transformers  # takes a second, and only pretrained models need it

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"no model can be loaded from {place}: {first}") from error


def check_rows(vocab_size: int | None, input_shape: Sequence[int]) -> int:
    """How many ids a task's tokens have; raises `ValueError` where its inputs are no rows of tokens."""
    if vocab_size is None or len(input_shape) != 1:
        raise ValueError(
            f"a pretrained language model takes rows of tokens, and this task's inputs of shape "
            f"{tuple(input_shape)} are none: use a task with text, such as task=docstrings"
        )
    return vocab_size


def check_tokens(encoder: Any, place: Place, vocab_size: int, length: int) -> None:
    """Raises `ValueError` where a task's tokens are not the encoder's own, or its rows too long for it."""
    known = len(load_tokenizer(place))
    if vocab_size != known:
        raise ValueError(
            f"the task's tokens have {vocab_size} ids, those of {place} have {known}: "
            f"set task.tokenizer={place}"
        )
    longest = getattr(encoder.config, "max_position_embeddings", length)
    if length > longest:
        raise ValueError(
            f"the task's rows have {length} tokens, {place} takes at most {longest}: "
            f"set task.max_length={longest}"
        )
