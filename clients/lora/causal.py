"""A causal language model with low-rank adapters: what federated adaptation of a language model trains.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3, in the layers of `clients.lora.adapters`.
The pretrained model and its output matrix, tied to the embedding or not, stay as they are. Rows are padded behind their
last token only, which causal attention never looks back from: no mask is needed, and no logits in front of the padding
depend on it. This file says nothing of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clients.generation import load_language_model
from clients.lora.adapters import adapted
from clients.lora.model import Dtype, sharing_weights
from clients.places import Place
from clients.pretrained import check_tokens


class LoraCausalLM(nn.Module):
    """Next-token logits of a frozen model with adapters; the adapters alone are trained, sent and saved.

    Pretrained weights are in memory once for all models of a process, and run without dropout. B is zero at first, so
    an untrained model is the pretrained one.

    Args:
        input_shape: (length,) of one row of tokens.
        num_classes: logits a token, as many as there are ids.
        vocab_size: how many ids the task's tokens have; must be those of this model's tokenizer.
        padding_id: not needed; stands behind a row's last token.
        pretrained: a folder with config.json, model.safetensors and the tokenizer's files, or a hub name.
        rank: r of the model, the largest that a layer has.
        alpha: α; B·A counts α/r times.
        targets: endings of the names of the layers that get adapters; None for those that peft names for the family.
        ranks: each layer's own rank, at most `rank`, by its name as arrays have it; a layer that is not named has no
            adapter. None: `rank` for all.
        share_a: train B alone; A is frozen, the same in all processes, and does not travel.
        residual_rank: q of a frozen product that travels down, for rules that leave something over; 0 for none.
        base_dtype: of the pretrained weights and states; adapters and logits are float32 always.

    Attributes:
        factors: which factors of the products clients train, as the contract calls it.

    Raises:
        DataError: there is no such folder, or what is in it cannot be loaded.
        ValueError: the task has no tokens, those of another tokenizer, longer rows than the model takes, or one target
            a row; or there are no such layers, or ranks.
    """

    _model: Any

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
        ranks: Mapping[str, int] | None = None,
        share_a: bool = False,
        residual_rank: Annotated[int, Ge(0)] = 0,
        base_dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        if vocab_size is None or len(input_shape) != 1 or num_classes != vocab_size:
            raise ValueError(
                "a language model gives logits for every token of a row, and this task asks for something else: "
                "use task=prose"
            )
        model = sharing_weights(_frozen(pretrained, base_dtype))
        check_tokens(model, pretrained, vocab_size, input_shape[0])
        model.config.pad_token_id = (
            None  # else it warns of rows with padding and no mask, which need none here
        )
        self.padding_id = padding_id
        self.factors: Literal["both", "shared_a"] = "shared_a" if share_a else "both"
        parts = adapted(
            model,
            rank=rank,
            alpha=alpha,
            targets=targets,
            ranks=ranks,
            share_a=share_a,
            residual_rank=residual_rank,
        )
        parts.check(ranks)
        self.adapters, self.residual = parts.adapters, parts.residual
        # Past nn.Module's registration: what is not a submodule is no part of the state.
        object.__setattr__(self, "_model", model)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, length, vocabulary), of the token behind each, from tokens, (batch, length) long."""
        logits: Tensor = self._model(input_ids=inputs, use_cache=False).logits
        return logits.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._model._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


@lru_cache(maxsize=1)
def _frozen(place: Place, dtype: Dtype) -> Any:
    return load_language_model(place, getattr(torch, dtype))
