"""What a training step of a model with adapters takes of a device's memory, for any ranks, from one measured step.

Counted: the frozen weights, in the dtype that they are in; and each number that travels, as often as a trainer holds it
(with its gradient and Adam's two moments). Measured, on a step with all layers at the model's rank: what autograd saves
for the backward pass (`torch.autograd.graph.saved_tensors_hooks`), by storage, and what else is alive at the same time.

What is saved hangs on ranks in three ways. An adapter keeps its input x, whatever its rank, and A·x, of r numbers a
token. Two adapters on one input keep it once. And nothing is saved below the lowest adapter, as no gradient goes there:
a small device trains the upper blocks. The estimate is an upper bound on the tensors of the step, but for workspace
that kernels allocate past torch. glibc keeps much of what is freed, unless it is told otherwise: `return_freed_memory`.
This file knows no budgets, and nothing of what layers are worth.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OVERHEAD = 48 * 2**20
"""Bytes of code, tables and kernels' workspace that a first step brings in, beyond the imports; 43 MB were measured."""

COPIES = 9
"""Float32 numbers for each that travels: as it is, as it was sent, where training began, the gradient twice (by array,
and as a vector), Adam's two moments and its step, and the update."""

_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD."""


@dataclass(frozen=True)
class LayerCost:
    """What one unit of rank costs in a layer.

    Attributes:
        travelling: numbers of its adapters that travel.
        frozen: bytes of what stays (a shared A).
        saved: bytes of A·x.
    """

    travelling: int
    frozen: int
    saved: int


@dataclass(frozen=True)
class Piece:
    """Bytes that are saved for the same reasons.

    Attributes:
        size: bytes.
        stage: adapted layers that had begun when the base last saved it; -1 where no part of the base does.
        layers: those whose adapters save it, too.
    """

    size: int
    stage: int
    layers: frozenset[str]


@dataclass(frozen=True)
class Profile:
    """A model's training step on batches of one size and length.

    Attributes:
        frozen: bytes of weights and buffers that are neither trained nor sent.
        travelling: numbers that travel whatever the ranks (heads, residuals).
        layers: cost of a unit of rank, by layer in the order in which they run.
        pieces: what is saved whatever the ranks are, but for 0.
        transient: bytes that are alive beside all this at most.
        batch: examples of the step.
        length: of each.
    """

    frozen: int
    travelling: int
    layers: Mapping[str, LayerCost]
    pieces: tuple[Piece, ...]
    transient: int
    batch: int
    length: int


def memory_of(profile: Profile, ranks: Mapping[str, int]) -> int:
    """Bytes of a client whose layers have these ranks; one that is not named has none. Never less for more rank.

    Raises:
        ValueError: a rank of a layer that was not measured.
    """
    unknown = sorted(set(ranks) - set(profile.layers))
    if unknown:
        raise ValueError(f"ranks of {unknown}: the layers measured are {list(profile.layers)}")
    active = {name for name, rank in ranks.items() if rank > 0}
    order = list(profile.layers)
    lowest = min((order.index(name) for name in active), default=len(order))
    saved = sum(p.size for p in profile.pieces if p.stage > lowest or p.layers & active)
    costs = [(profile.layers[name], ranks[name]) for name in active]
    travelling = profile.travelling + sum(cost.travelling * rank for cost, rank in costs)
    own = sum((cost.frozen + cost.saved) * rank for cost, rank in costs)
    return OVERHEAD + profile.frozen + 4 * COPIES * travelling + saved + own + profile.transient


def measure(
    model: nn.Module, inputs: Tensor, loss: Callable[[Any], Tensor] | None = None
) -> Profile:
    """One step of a model, with all layers at its rank, on a batch such as clients train on; nothing is changed.

    Args:
        model: with `adapters` by layer, as in `clients.lora.adapters`; its frozen base may be no submodule.
        inputs: (batch, length, …) of what it takes: the longest that clients train on, not padded to it, since a model
            may leave padding out.
        loss: a scalar of its output; None for cross-entropy over the last dimension.

    Raises:
        ValueError: the model has no adapters.
    """
    adapters = _adapters(model)
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no adapters, whose memory could be measured")
    weights = _weights(model)
    scalar = loss or _cross_entropy
    with torch.no_grad(), _Live(weights) as forward:
        scalar(model(inputs))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recorder = _Recorder(weights)
    with ExitStack() as hooks:
        recorder.watch(model, adapters, hooks)
        with _Live(weights) as live:
            recorder.saved_by = live.saved
            hooks.enter_context(
                torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda t: t)
            )
            value = scalar(model(inputs))
            live.peak = 0  # of the forward pass the other run tells
            torch.autograd.grad(value, trained, allow_unused=True)
    own = {id(parameter) for parameter in model.parameters()}
    within = {id(p) for pair in adapters.values() for p in (pair.a.weight, pair.b.weight)}
    layers = {name: _cost(adapters[name], recorder.products[name], own) for name in recorder.order}
    return Profile(
        frozen=sum(_bytes(t) for t in weights if id(t) not in own | within),
        travelling=sum(t.numel() for t in model.parameters() if id(t) not in within),
        layers=layers,
        pieces=recorder.pieces(),
        transient=max(forward.peak, live.peak),
        batch=len(inputs),
        length=inputs.shape[1],
    )


def return_freed_memory(threshold: int = 2**17) -> bool:
    """Has glibc give blocks of at least so many bytes back when they are freed; False where there is no glibc.

    Otherwise it keeps them for later, in pieces that do not fit the next, and a step takes up to twice its tensors.
    Blocks below the threshold are still kept: tensors of 0.8 MB below one of 1 MB cost MiniLM 30 MB. For a process
    that has a budget to keep; each large block is then mapped anew, which takes time.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, threshold))
    except (OSError, AttributeError):
        return False


@dataclass(frozen=True)
class _Pair:
    a: nn.Linear
    b: nn.Linear


def _cost(pair: _Pair, product: int, own: set[int]) -> LayerCost:
    """Of a unit of rank; `product` is the bytes of A·x at the measured one."""
    rank = pair.b.in_features
    sent = [w.numel() for w in (pair.a.weight, pair.b.weight) if id(w) in own]
    kept = [_bytes(w) for w in (pair.a.weight, pair.b.weight) if id(w) not in own]
    return LayerCost(sum(sent) // rank, sum(kept) // rank, -(-product // rank))


def _everything(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, with those that one holds without having registered them."""
    waiting, seen = [model], set[int]()
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting += [*module.children(), *_modules_in(vars(module).values())]


def _modules_in(values: Any) -> list[nn.Module]:
    return [value for value in values if isinstance(value, nn.Module)]


def _weights(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers, each once, whoever holds them."""
    found = {
        id(tensor): tensor
        for module in _everything(model)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return list(found.values())


def _adapters(model: nn.Module) -> dict[str, _Pair]:
    """A and B of each layer, by its name; a shared A is in the base alone."""
    named: Any = getattr(model, "adapters", {})
    names = {id(pair["B"]): name for name, pair in named.items()}
    found: dict[str, _Pair] = {}
    for module in _everything(model):
        a: Any
        b: Any
        a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if a is not None and b is not None:
            pairs = zip(a.values(), b.values(), strict=True)
            found.update({names[id(y)]: _Pair(x, y) for x, y in pairs if id(y) in names})
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cross_entropy(output: Tensor) -> Tensor:
    logits = output.reshape(-1, output.shape[-1])
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is not typed
    """Counts the bytes of storages that operations make, while they are alive; those that are saved, apart.

    Attributes:
        peak: the most that was alive and not saved.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = {_key(tensor): 0 for tensor in weights}
        self._saved: set[int] = set()
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self._now)
        return output

    def _count(self, tensor: Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def saved(self, tensor: Tensor) -> None:
        """From now on it counts as saved, not as alive beside."""
        key = _key(tensor)
        if key not in self._saved:
            self._saved.add(key)
            self._now -= self._sizes.get(key, 0)

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._saved:
            self._saved.remove(key)
        else:
            self._now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass
class _Kept:
    """One storage that was saved, and by whom."""

    size: int
    stage: int = -1
    layers: set[str] = field(default_factory=set)


class _Recorder:
    """Who saves what, while a model runs forward.

    Attributes:
        order: layers as they run.
        products: bytes of each layer's A·x.
        saved_by: told of each tensor that is saved.
    """

    saved_by: Callable[[Tensor], None]

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = {_key(tensor) for tensor in weights}
        self._kept: dict[int, _Kept] = {}
        self._inside: str | None = None
        self._stage = 0
        self._of_products: set[int] = set()
        self.order: list[str] = []
        self.products: dict[str, int] = {}

    def watch(self, model: nn.Module, adapters: Mapping[str, _Pair], hooks: ExitStack) -> None:
        """Hooks adapters, and what else is trained, until `hooks` is closed."""
        for name, pair in adapters.items():
            for part in (pair.a, pair.b):
                enter, leave = self._entering(name, part is pair.b), self._leave
                hooks.callback(part.register_forward_pre_hook(enter).remove)
                hooks.callback(part.register_forward_hook(leave).remove)
        inside = {id(part) for pair in adapters.values() for part in (pair.a, pair.b)}
        for module in model.modules():
            own = any(p.requires_grad for p in module.parameters(recurse=False))
            if own and id(module) not in inside:
                hooks.callback(module.register_forward_pre_hook(self._at_head).remove)

    def _entering(self, name: str, second: bool) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inside = name
            if second:
                self.products[name] = _bytes(inputs[0])
                self._of_products.add(_key(inputs[0]))
            elif name not in self.products:
                self.order.append(name)
                self._stage = len(self.order)

        return enter

    def _leave(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._inside = None

    def _at_head(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """What is saved from here on is saved without any adapter, too."""
        self._stage = len(self.order) + 1

    def pack(self, tensor: Tensor) -> Tensor:
        """Takes note of a tensor that autograd saves."""
        key = _key(tensor)
        if key in self._weights:
            return tensor
        self.saved_by(tensor)
        if key not in self._of_products:
            kept = self._kept.setdefault(key, _Kept(tensor.untyped_storage().nbytes()))
            if self._inside is None:
                kept.stage = max(kept.stage, self._stage)
            else:
                kept.layers.add(self._inside)
        return tensor

    def pieces(self) -> tuple[Piece, ...]:
        """What was saved, together where it is for the same reasons."""
        sizes: dict[tuple[int, frozenset[str]], int] = {}
        for kept in self._kept.values():
            reasons = kept.stage, frozenset(kept.layers)
            sizes[reasons] = sizes.get(reasons, 0) + kept.size
        return tuple(Piece(size, *reasons) for reasons, size in sizes.items())
