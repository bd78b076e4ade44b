"""Low-rank adapters, put into the layers of a frozen Hugging Face model or of a half of one.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3: W·x + s·B·A·x with s = α/r. Here r in s is
the rank of the model, the largest, whatever rank a layer or a client has: products can be added, and an adapter of rank
k is the first k rows of A and columns of B of one of rank r. The adapters are peft's, in the layers that peft adapts in
each family (queries and values in BERT and LLaMA, the joint projection in GPT-2).

With a shared A (Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", FFA-LoRA) only B is trained
and sent, and the mean of products is the product of the mean. With a residual the layer is W·x + s·B·A·x + L·R·x, where
L and R are frozen and travel down: what exact aggregation of products leaves over (Wang et al. 2024, FLoRA; Singhal et
al. 2024, FedEx-LoRA). This file knows nothing of clients, of heads or of how arrays travel.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

OF_GOALS: Final = ("heads", "auxiliary")
"""What names of arrays begin with that belong to one goal of a task, whose name follows."""

_NAME = "default"
"""Of the one adapter, as peft has it."""


@dataclass(frozen=True)
class Adapted:
    """What was put into a model; a module that registers both under these names has the arrays' names right.

    Attributes:
        layers: names of all layers that may have adapters, in the model's order.
        adapters: by layer, with `_` in place of dots, `A` and `B` as linear layers without bias: `A.weight` is (r, n),
            `B.weight` (m, r). `A` is missing where it is shared, a layer where its rank is 0.
        residual: by layer, frozen `left`, (m, q), and `right`, (q, n), zero at first; empty without a residual.
    """

    layers: tuple[str, ...]
    adapters: nn.ModuleDict
    residual: nn.ModuleDict

    def check(self, ranks: Mapping[str, int] | None) -> None:
        """Raises `ValueError` where ranks name a layer that a whole model does not have."""
        unknown = {name.replace(".", "_") for name in ranks or {}} - set(self.layers)
        if unknown:
            raise ValueError(f"ranks of {sorted(unknown)}: there are {', '.join(self.layers)}")


def adapted(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    ranks: Mapping[str, int] | None = None,
    share_a: bool = False,
    residual_rank: int = 0,
) -> Adapted:
    """Puts adapters into a model, in place; B is zero, so that they change nothing yet.

    Adapters are float32 over half precision too, and add in float32. A is drawn from torch's generator, in as many
    numbers whatever the layers' own ranks.

    Args:
        model: frozen by the caller; a Hugging Face model, or a half that keeps the whole model's `config` and names.
        rank: r of the model, the largest.
        alpha: α; B·A counts α/r times in all layers.
        targets: endings of the names of the layers that get adapters; None for those that peft names for the family.
        ranks: each layer's own rank, by its name (dots may stand for underscores); one with 0, or that is not named,
            has no adapter, and names of another half's layers are left to it. None: `rank` for all.
        share_a: A is frozen, and the same wherever a layer of this name has as many inputs.
        residual_rank: q of the frozen product beside each layer, also where a layer has no adapter; 0 for none.

    Raises:
        ValueError: there are no such layers, or a rank is not in 0..`rank`, or two layers' names are one without dots.
    """
    found = _injected(model, rank, alpha, targets)
    own = dict.fromkeys(found, rank) if ranks is None else _own_ranks(ranks, found, rank)
    adapters, residual = nn.ModuleDict(), nn.ModuleDict()
    for name, (path, layer) in found.items():
        kept = own[name]
        if residual_rank:
            residual[name] = _add_residual(layer, residual_rank)
        if kept:
            _cut(layer, kept)
            factors = {"A": layer.lora_A[_NAME], "B": layer.lora_B[_NAME]}
            if share_a:
                _draw(factors.pop("A").weight, name)
            adapters[name] = nn.ModuleDict(factors)
        else:
            _remove(model, path, layer)
    return Adapted(tuple(found), adapters, residual)


def _injected(
    model: Any, rank: int, alpha: float, targets: Sequence[str] | None
) -> dict[str, tuple[str, Any]]:
    """Puts peft's layers in, and returns them with their dotted names, by name without dots."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a factor, which peft only divides by r
        target_modules=None if targets is None else list(targets),
    )
    with warnings.catch_warnings():
        # GPT-2's weights are (inputs, outputs); peft finds that out for each layer, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        inject_adapter_in_model(config, model, _NAME)
    paths = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    found = {path.replace(".", "_"): (path, layer) for path, layer in paths.items()}
    if len(found) < len(paths):
        raise ValueError(f"names of layers are not unique without dots: {sorted(paths)}")
    return found


def _own_ranks(ranks: Mapping[str, int], layers: Iterable[str], most: int) -> dict[str, int]:
    """The rank of each of these layers, 0 where none is given.

    Raises:
        ValueError: a rank is not in 0..`most`.
    """
    given = {name.replace(".", "_"): rank for name, rank in ranks.items()}
    wrong = {name: rank for name, rank in given.items() if not 0 <= rank <= most}
    if wrong:
        raise ValueError(f"ranks {wrong} are not in 0..{most}, the model's rank")
    return {name: given.get(name, 0) for name in layers}


def _cut(layer: Any, rank: int) -> None:
    """The leading rows of A and columns of B, in float32 at least; the layer keeps its scale."""
    a, b = layer.lora_A[_NAME], layer.lora_B[_NAME]
    for part, weight in ((a, a.weight[:rank]), (b, b.weight[:, :rank])):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        part.weight = nn.Parameter(weight.detach().to(dtype, copy=True))
        part.out_features, part.in_features = part.weight.shape
    layer.lora_alpha[_NAME] *= rank / layer.r[_NAME]
    layer.r[_NAME] = rank


def _remove(model: nn.Module, path: str, layer: Any) -> None:
    """The layer as it was, where it was."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.base_layer)


def _draw(weight: nn.Parameter, name: str) -> None:
    """Fills a shared A, (r, n), uniformly within ±1/√n, as peft does, and freezes it.

    From raw bits, whose sequence no version of a library changes; row by row, so that less rank is fewer rows.
    """
    seed = int.from_bytes(hashlib.sha256(f"shared A of {name}".encode()).digest()[:16], "big")
    bits = np.random.PCG64(seed).random_raw(weight.numel()) >> 40
    uniform = (bits.astype(np.float32) + 0.5) * np.float32(
        2**-23
    ) - 1  # within ±1, never at its ends
    drawn = torch.from_numpy(
        uniform.reshape(tuple(weight.shape)) / np.float32(sqrt(weight.shape[1]))
    )
    weight.data.copy_(drawn)
    weight.requires_grad_(False)


def _add_residual(layer: Any, rank: int) -> nn.ParameterDict:
    """A frozen product beside a layer, (m, q)·(q, n), zero."""
    like = {"dtype": torch.float32, "device": layer.base_layer.weight.device}
    factors = nn.ParameterDict(
        {
            "left": nn.Parameter(torch.zeros(layer.out_features, rank, **like), False),
            "right": nn.Parameter(torch.zeros(rank, layer.in_features, **like), False),
        }
    )
    # At the base layer, which stays in the model also where there is no adapter.
    layer.base_layer.register_forward_hook(_Residual(factors))
    return factors


class _Residual:
    """Adds L·R·x to what a layer gives; an object, so that a copy of the model has its own."""

    def __init__(self, factors: nn.ParameterDict) -> None:
        self._factors = factors

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        left, right = self._factors["left"], self._factors["right"]
        added: Tensor = inputs[0].to(left.dtype) @ right.T @ left.T
        return (output + added).to(output.dtype)
