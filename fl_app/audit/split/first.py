"""The first adapters of a clients' half, and what they are given for a token: what the span check needs of a model.

The check works where the input of a layer is a token's own, whatever stands around it: before the first attention. It
is found out by running the model, for any family: which adapted layer is called first, which others get the very same
input, and whether that input stays as it is when the other tokens change. This file knows no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clients.split.model import SplitLora
from fl_app.audit.split.exposure import NotApplicableError
from fl_app.audit.split.span import Inputs


class _ReachedError(Exception):
    """The layer is called; nothing behind it is needed."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given


def first_layers(module: SplitLora, examples: Tensor) -> list[str]:
    """The adapters that get the first adapted layer's input, by their names in `adapters`.

    Args:
        module: a split model whose clients' half has adapters.
        examples: tokens, (n, length) long, by which it is run; at least one.

    Raises:
        NotApplicableError: A is not trained, or its input depends on other tokens than its own.
    """
    if module.factors == "shared_a":
        raise NotApplicableError("A is frozen and has no gradient (share_a)")
    calls: list[tuple[str, Tensor]] = []
    layers = _adapted(module)
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: calls.append((name, given[0])))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            module.lower(examples[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise NotApplicableError("the clients' half has no adapters")
    shared = calls[0][1].data_ptr()
    found = [name for name, given in calls if given.data_ptr() == shared]
    _check_alone(module, found, examples[:1])
    return found


def inputs_of(module: SplitLora, layers: Sequence[str], length: int) -> Inputs:
    """What these layers are given for tokens at each place of a text of so many tokens."""
    return lambda tokens: _given(module, layers[0], tokens.unsqueeze(1).expand(-1, length))


def _check_alone(module: SplitLora, layers: Sequence[str], text: Tensor) -> None:
    real = text[:, : int(module.lower.lengths(text)[0])]
    other = real.flip(1)
    other[:, 0] = real[:, 0]
    first, second = (_given(module, layers[0], ids)[:, 0] for ids in (real, other))
    if not torch.allclose(first, second, atol=1e-5):
        raise NotApplicableError(
            "the first adapter comes behind an attention: its input is no one token's"
        )


def _given(module: SplitLora, name: str, ids: Tensor) -> Tensor:
    """The input of a layer, (b, length, n) float32, of tokens, (b, length) long without padding."""

    def stop(layer: object, given: tuple[Tensor, ...]) -> None:
        raise _ReachedError(given[0])

    handle = _adapted(module)[name].register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            module.lower.part(input_ids=ids, attention_mask=torch.ones_like(ids))
    except _ReachedError as reached:
        return reached.given.float()
    finally:
        handle.remove()
    raise ValueError(f"{name} is not called")


def _adapted(module: SplitLora) -> dict[str, Any]:
    """The layers with adapters by their adapters' names."""
    named = {path.replace(".", "_"): layer for path, layer in module.lower.part.named_modules()}
    return {name: named[name] for name in module.lower.adapters}
