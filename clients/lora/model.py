"""A frozen pretrained language model with low-rank adapters, and linear layers on it: a classifier.

What travels and is trained is A, B and the linear layers, a few hundred times less than the model. The adapters are
those of `clients.lora.adapters`; weights are read as in `clients.pretrained`. This file knows neither how ranks are
found nor how a server puts adapters together.

Training few parameters is also what makes differential privacy affordable: noise grows with their number, and
per-example gradients of an adapter are small (Yu et al. 2022, "Differentially Private Fine-tuning of Language Models").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clients.lora.adapters import adapted
from clients.places import Place
from clients.pretrained import check_rows, check_tokens, load_encoder, mean_state

Dtype = Literal["float32", "bfloat16"]
"""What a frozen base may be held in."""


class LoraClassifier(nn.Module):
    """Mean of the adapted encoder's last states over a text's tokens, and a linear layer on it for each goal.

    The pretrained weights are no part of the model's state: `adapters` and `head` (with several goals, `heads`) are
    trained, sent and saved; `residual` is sent and saved. They are in memory once for all models of a process. The
    encoder runs without dropout, also in training. B is zero at first, so an untrained adapter changes nothing.

    Args:
        input_shape: (length,) of one row of tokens.
        num_classes: number of logits.
        vocab_size: how many ids the task's tokens have; must be those of this model's tokenizer.
        padding_id: the id that fills a row up behind its last token.
        goals: classes of each of the task's goals, by name; their logits stand side by side in this order.
        pretrained: a folder with config.json, model.safetensors and the tokenizer's files, or a hub name.
        rank: r of the model, the largest that a layer has.
        alpha: α; B·A counts α/r times.
        targets: endings of the names of the layers that get adapters; None for those that peft names for the family.
        ranks: each layer's own rank, at most `rank`, by its name as arrays have it; a layer that is not named has no
            adapter. None: `rank` for all.
        share_a: train B alone; A is frozen, the same in all processes, and does not travel.
        residual_rank: q of a frozen product that travels down, for rules that leave something over; 0 for none.
        base_dtype: of the pretrained weights and states; adapters, heads and all that travels are float32 always.

    Attributes:
        factors: which factors of the products clients train, as the contract calls it.

    Raises:
        DataError: there is no such folder, or what is in it cannot be loaded.
        ValueError: the task has no tokens, or those of another tokenizer, or its rows are longer than the encoder
            takes; or there are no such layers, or ranks; or the goals' classes are not as many as the task's.
    """

    _encoder: Any

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        vocab_size: int | None,
        padding_id: int = 0,
        goals: Mapping[str, int] | None = None,
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
        vocab_size = check_rows(vocab_size, input_shape)
        encoder = sharing_weights(_frozen(pretrained, base_dtype))
        check_tokens(encoder, pretrained, vocab_size, input_shape[0])
        self.padding_id = padding_id
        self.factors: Literal["both", "shared_a"] = "shared_a" if share_a else "both"
        parts = adapted(
            encoder,
            rank=rank,
            alpha=alpha,
            targets=targets,
            ranks=ranks,
            share_a=share_a,
            residual_rank=residual_rank,
        )
        parts.check(ranks)
        self.adapters, self.residual = parts.adapters, parts.residual
        self._add_heads(encoder.config.hidden_size, num_classes, goals or {})
        # Past nn.Module's registration: what is not a submodule is no part of the state.
        object.__setattr__(self, "_encoder", encoder)

    def _add_heads(self, width: int, num_classes: int, goals: Mapping[str, int]) -> None:
        """One linear layer a goal; `head` where there is but one."""
        if goals and sum(goals.values()) != num_classes:
            raise ValueError(f"the task has {num_classes} classes, and its goals {dict(goals)}")
        if len(goals) > 1:
            self.heads = nn.ModuleDict({g: nn.Linear(width, size) for g, size in goals.items()})
        else:
            self.head = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of tokens, (batch, length) long; padding stands at the end."""
        lengths = (inputs != self.padding_id).sum(dim=1).clamp(min=1)
        longest = int(lengths.max()) if len(inputs) else 1
        mask = torch.arange(longest, device=inputs.device) < lengths.unsqueeze(1)
        features = mean_state(self._encoder, inputs[:, :longest], mask.long())
        heads: list[Any] = [self.head] if "head" in self._modules else list(self.heads.values())
        features = features.to(heads[0].weight.dtype)
        logits = [head(features) for head in heads]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._encoder._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


@lru_cache(maxsize=1)
def _frozen(place: Place, dtype: Dtype) -> Any:
    return load_encoder(place).to(getattr(torch, dtype)).eval().requires_grad_(False)


def sharing_weights(encoder: Any) -> Any:
    """Layers of its own around the very same tensors: adapters go into one copy only."""
    tensors = [*encoder.parameters(), *encoder.buffers()]
    return copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors})
