"""The parts of a split model: what each is given and gives.

A part is a model of the whole model's class, from which `clients.split.surgery` took what belongs to the others; it
runs the family's own forward pass. Vepakomma et al. 2018, "Split learning for health: Distributed deep learning without
sharing raw patient data", figure 2: the simple configuration is a bottom and a top; the U-shaped one, where labels stay
with the client, has a middle too.

What crosses a cut is the activation and the attention mask. Heads that look for a text's last token by its padding are
given ids made from the mask, so a top never needs the client's tokens. It knows nothing of wires, files or training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from clients.split.surgery import Channel, Reached, blocks_of, drop_above, drop_below


class Part(nn.Module):
    """Some of a model's blocks, under the names and with the indices that they have in the whole.

    Attributes:
        span: indices of the blocks that it holds.
        count: how many blocks the whole model has.
    """

    config: Any
    main_input_name: str
    span: range
    count: int

    def __init__(self, config: Any, *, start: int, stop: int) -> None:
        super().__init__(config)
        self.carve(start, stop)

    def carve(self, start: int, stop: int) -> None:
        """Drops all but the blocks from `start` to `stop`, and what of the model comes with them."""
        self.count = blocks_of(self)[1]
        self.span = range(start, stop)
        self.config.use_cache = False
        self._drop(start, stop)
        module: Any
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                # It would run blocks again in the backward pass, when the part's forward pass is long over.
                module.gradient_checkpointing = False

    def _drop(self, start: int, stop: int) -> None:
        raise NotImplementedError


class Bottom(Part):
    """The embeddings and the blocks before a cut."""

    def _drop(self, start: int, stop: int) -> None:
        drop_above(self, stop)

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor:
        """The activation, (batch, length, hidden), of what the whole model takes: `input_ids`, `attention_mask`."""
        return _until_the_cut(super().forward, *inputs, **named)


class Top(Part):
    """The blocks behind a cut, and the heads. It runs one pass at a time: threads need a copy each."""

    _heads = True

    def _drop(self, start: int, stop: int) -> None:
        self._channel = Channel()
        pad = getattr(self.config, "pad_token_id", None)
        if self._heads and (pad is None or pad < 0):
            # Ids are made from the mask here, so any will do, and a batch may have more than one text.
            self.config.pad_token_id = 0
        drop_below(self, start, self._channel, heads=self._heads)

    def forward(
        self, activation: Tensor, attention_mask: Tensor | None = None, **named: Any
    ) -> Any:
        """What the whole model gives, from what the part below gave.

        Args:
            activation: (batch, length, hidden); cast to the dtype of this part's weights.
            attention_mask: (batch, length), 1 at tokens and 0 at padding, as the part below was given it.
            named: `labels`, and whatever else the whole model takes but `input_ids`.

        Raises:
            ValueError: the activation or the mask has another shape.
        """
        self._check(activation, attention_mask)
        inputs = self._inputs(activation, attention_mask)
        # A tail can be without weights: a base model's, behind all blocks and without a last norm.
        first = next(self.parameters(), activation)
        self._channel.activation = activation.to(first.dtype)
        try:
            return super().forward(**inputs, **named)
        finally:
            self._channel.activation = None

    def _inputs(self, activation: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """What is named in place of the client's inputs: of tokens, whether they are padding."""
        if self.main_input_name != "input_ids":
            return {self.main_input_name: activation.detach()}
        pad = int(self.config.pad_token_id or 0)
        real = 1 if pad == 0 else 0
        if mask is None:
            return {"input_ids": activation.new_full(activation.shape[:2], real, dtype=torch.long)}
        ids = torch.where(mask.to(activation.device, torch.bool), real, pad)
        return {"input_ids": ids, "attention_mask": mask}

    def _check(self, activation: Tensor, mask: Tensor | None) -> None:
        batch_and_length = ("batch", "length") if mask is None else tuple(mask.shape)
        needed = (*batch_and_length, self.config.hidden_size)
        shape = tuple(activation.shape)
        compared = needed if mask is not None else (*shape[:2], self.config.hidden_size)
        if len(shape) != 3 or shape != compared:
            raise ValueError(
                f"an activation of shape {shape} was given, and this part of the model takes "
                f"({', '.join(map(str, needed))})"
            )


class Middle(Top):
    """The blocks between two cuts: an activation in, an activation out."""

    _heads = False

    def _drop(self, start: int, stop: int) -> None:
        super()._drop(start, stop)
        drop_above(self, stop)

    def forward(
        self, activation: Tensor, attention_mask: Tensor | None = None, **named: Any
    ) -> Tensor:
        """The activation at the second cut, (batch, length, hidden), from that at the first."""
        return _until_the_cut(super().forward, activation, attention_mask, **named)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws all of torch's random numbers from a seed, and leaves the generators as they were.

    A part that is run twice under the same seed has the same dropout masks both times, in another process too, and so
    the same activation and gradients: a client need not keep a graph while it waits for the server's gradient.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@lru_cache
def part_class(part: Any, whole: Any) -> Any:
    """A model's class as that of one of its parts; it has the model's name, by which transformers chooses losses."""
    names = {
        "__module__": whole.__module__,
        "__doc__": part.__doc__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    return type(whole.__name__, (part, whole), names)


def _until_the_cut(forward: Any, *inputs: Any, **named: Any) -> Tensor:
    try:
        forward(*inputs, **named)
    except Reached as reached:
        return reached.hidden
    raise RuntimeError("the model ran past its cut")
