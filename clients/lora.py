"""Low-rank adapters in a frozen pretrained language model, and a linear layer on it.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3: W·x + (α/r)·B·A·x, with W as it was
pretrained. What travels and is trained is A, B and the linear layer, a few hundred times less than the model. The
adapters are peft's, in the layers that peft adapts in each family (queries and values in BERT and LLaMA, the joint
projection in GPT-2); weights are read as in `clients.pretrained`.

Training few parameters is also what makes differential privacy affordable: noise grows with their number, and
per-example gradients of an adapter are small (Yu et al. 2022, "Differentially Private Fine-tuning of Language Models").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any, Self

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clients.places import Place
from clients.pretrained import check_tokens, load_encoder, mean_state

_NAME = "default"
"""Of the one adapter, as peft has it."""


class LoraClassifier(nn.Module):
    """Mean of the adapted encoder's last states over a text's tokens, and a linear layer on it.

    The pretrained weights are no part of the model's state: `adapters` and `head` are trained, sent and saved. They are
    in memory once for all models of a process. The encoder runs without dropout, also in training. B is zero at first,
    so an untrained adapter changes nothing.

    Args:
        input_shape: (length,) of one row of tokens.
        num_classes: number of logits.
        vocab_size: how many ids the task's tokens have; must be those of this model's tokenizer.
        padding_id: the id that fills a row up behind its last token.
        pretrained: a folder with config.json, model.safetensors and the tokenizer's files, or a hub name.
        rank: r, of A and B.
        alpha: α; B·A counts α/r times.
        targets: endings of the names of the layers that get adapters; None for those that peft names for the family.

    Raises:
        DataError: there is no such folder, or what is in it cannot be loaded.
        ValueError: the task has no tokens, or those of another tokenizer, or its rows are longer than the encoder
            takes; or there are no such layers.
    """

    _encoder: Any

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        vocab_size: int | None,
        padding_id: int = 0,
        *,
        pretrained: Place,
        rank: Annotated[int, Ge(1)] = 8,
        alpha: Annotated[float, Gt(0)] = 16.0,
        targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if vocab_size is None or len(input_shape) != 1:
            raise ValueError(
                f"a pretrained language model takes rows of tokens, and this task's inputs of shape "
                f"{tuple(input_shape)} are none: use a task with text"
            )
        encoder = _sharing_weights(_frozen(pretrained))
        check_tokens(encoder, pretrained, vocab_size, input_shape[0])
        self.padding_id = padding_id
        self.adapters = _adapted(encoder, rank, alpha, targets)
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)
        # Past nn.Module's registration: what is not a submodule is no part of the state.
        object.__setattr__(self, "_encoder", encoder)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of tokens, (batch, length) long; padding stands at the end."""
        lengths = (inputs != self.padding_id).sum(dim=1).clamp(min=1)
        longest = int(lengths.max()) if len(inputs) else 1
        mask = torch.arange(longest, device=inputs.device) < lengths.unsqueeze(1)
        logits: Tensor = self.head(mean_state(self._encoder, inputs[:, :longest], mask.long()))
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._encoder._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


@lru_cache(maxsize=1)
def _frozen(place: Place) -> Any:
    return load_encoder(place).eval().requires_grad_(False)


def _sharing_weights(encoder: Any) -> Any:
    """Layers of its own around the very same tensors: adapters go into one copy only."""
    tensors = [*encoder.parameters(), *encoder.buffers()]
    return copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors})


def _adapted(encoder: Any, rank: int, alpha: float, targets: Sequence[str] | None) -> nn.ModuleDict:
    """Puts adapters into an encoder, in place, and returns them by the name of the layer that each is in."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(layer, Conv1D) for layer in encoder.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a factor, which peft only divides by r
        target_modules=None if targets is None else list(targets),
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, encoder, _NAME)
    return nn.ModuleDict(
        {
            name.replace(".", "_"): nn.ModuleDict(
                {"A": layer.lora_A[_NAME], "B": layer.lora_B[_NAME]}
            )
            for name, layer in encoder.named_modules()
            if isinstance(layer, LoraLayer)
        }
    )
