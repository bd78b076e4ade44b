"""What a model costs to train, by stretches: what is below the blocks, each block, and what is above them.

Bytes are counted, seconds measured, on real training steps that change nothing; sums of them are the cost of every cut
(`clients.split.planner`). A client runs its half forward twice, once for what it sends and, as a process that begins
anew, once more for what comes back, and then backward; the server runs its own once. What a backward pass needs while
it runs is taken for as much as the largest stretch keeps for it. With that, the resident memory of MiniLM's halves is
right to 5%, once the C library maps each tensor by itself; as it is, its heap takes twice as much for activations.

It knows of blocks and of one cut, and of no federation, message or configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from clients.split.coding import Precision, encoded_bytes
from clients.split.planner import CutCost
from clients.split.surgery import blocks_of
from clients.threads import one_thread


@dataclass(frozen=True)
class Stretch:
    """One stretch of a model, such as a block, in the training of one batch.

    Attributes:
        frozen: bytes of weights and buffers that are not trained.
        trained: bytes of those that are.
        saved: bytes of what the forward pass keeps for the backward pass, weights not counted.
        forward: seconds.
        backward: seconds.
    """

    frozen: int
    trained: int
    saved: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Profile:
    """A model by stretches, measured on one batch.

    Attributes:
        below: what runs before the first block.
        blocks: from the bottom.
        above: what runs after the last one. A matrix that is used at both ends is in both.
        places: of the batch, padding among them.
        tokens: of the batch, without it.
        hidden: width of what a block gives.
    """

    below: Stretch
    blocks: tuple[Stretch, ...]
    above: Stretch
    places: int
    tokens: int
    hidden: int

    def cuts(
        self,
        precision: Precision = "fp32",
        *,
        moments: int = 2,
        batches: int = 1,
        copies: int = 1,
        slack: float = 2.0,
    ) -> tuple[CutCost, ...]:
        """The cost of each cut, from 1 to all blocks but one.

        A half holds its weights; of what is trained also the gradient and the optimiser's moments; what one batch's
        backward pass needs; and activation and gradient at the cut, in float32.

        Args:
            precision: of what crosses the cut.
            moments: numbers that the optimiser keeps for each that is trained: 2 for Adam.
            batches: in one turn, whose activations are there together.
            copies: of what the server trains, one for each client at work where each has its own.
            slack: memory that the process holds for each byte of activations. glibc's is 1.6 to 2.1 for MiniLM, and 1
                where MALLOC_MMAP_THRESHOLD_ is set to 65536.
        """
        crossing = 2 * batches * 4 * self.places * self.hidden
        wire = 2 * encoded_bytes((self.tokens, self.hidden), precision)

        def held(stretches: Sequence[Stretch], copies: int) -> int:
            weights = sum(s.frozen + copies * (2 + moments) * s.trained for s in stretches)
            working = sum(s.saved for s in stretches) + max(s.saved for s in stretches) + crossing
            return weights + round(slack * working)

        costs = []
        for at in range(1, len(self.blocks)):
            lower, upper = (self.below, *self.blocks[:at]), (*self.blocks[at:], self.above)
            costs.append(
                CutCost(
                    at=at,
                    client_bytes=held(lower, 1),
                    server_bytes=held(upper, copies),
                    client_seconds=sum(2 * s.forward + s.backward for s in lower),
                    server_seconds=sum(s.forward + s.backward for s in upper),
                    wire_bytes=wire,
                )
            )
        return tuple(costs)


def measure(
    model: Any,
    batch: Mapping[str, Tensor],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    runs: int = 5,
) -> Profile:
    """A model's profile, by training steps that change nothing; on one thread, as the seconds are of one.

    Gradients are taken: where there is a GPU, no worker process can be forked afterwards.

    Args:
        model: a whole Hugging Face model, with adapters if it is to have some; what requires a gradient is trained.
        batch: what the model is called with, by name; tokens are counted by `attention_mask`, where it is there.
        loss: a scalar, of what the model gives; None for the model's own loss where it gives one, else for the mean
            square of the first tensor that it gives.
        runs: of which seconds are the median; one before them is not timed, and counts bytes.

    Raises:
        ValueError: the model is of no family that can be cut, or nothing in it is trained.
    """
    path, _ = blocks_of(model)
    watch = _Watch(list(model.get_submodule(path)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing in the model is trained: inject adapters first")

    def step() -> None:
        watch.begin()
        value = (loss or _any_loss)(model(**batch))
        watch.turn()
        torch.autograd.grad(value, trained, allow_unused=True)
        watch.end()

    forward: list[list[float]] = []
    backward: list[list[float]] = []
    with one_thread(), torch.enable_grad(), _without_cache(model.config):
        with watch.first_run(model):
            step()
        with watch.timed():
            for _ in range(runs):
                step()
                forward.append(watch.forward())
                backward.append(watch.backward())
    pieces = [
        Stretch(frozen, on, saved, median(up), median(down))
        for (frozen, on), saved, up, down in zip(
            watch.weights(model),
            watch.saved,
            zip(*forward, strict=True),
            zip(*backward, strict=True),
            strict=True,
        )
    ]
    mask = batch.get("attention_mask")
    places = watch.shape[:-1].numel()
    return Profile(
        below=pieces[0],
        blocks=tuple(pieces[1:-1]),
        above=pieces[-1],
        places=places,
        tokens=places if mask is None else int(mask.sum()),
        hidden=watch.shape[-1],
    )


def _any_loss(output: Any) -> Tensor:
    given = getattr(output, "loss", None)
    value: Tensor = output[0].float().square().mean() if given is None else given
    return value


@dataclass
class _Watch:
    """Looks on as a model trains: stretches are 0 below the blocks, then one a block, then what is above.

    Attributes:
        blocks: of the model.
        saved: bytes by stretch.
        shape: of what a block gives.
        early: modules that ran before the first block.
    """

    blocks: list[nn.Module]
    saved: list[int] = field(init=False)
    shape: torch.Size = field(init=False)
    early: set[int] = field(init=False, default_factory=set)
    _now: int = field(init=False, default=0)
    _up: list[float] = field(init=False, default_factory=list)
    _down: dict[int, float] = field(init=False, default_factory=dict)

    def begin(self) -> None:
        """A step begins."""
        self._now, self._up, self._down = 0, [time.perf_counter()], {}

    def turn(self) -> None:
        """The forward pass is over."""
        self._up.append(time.perf_counter())
        self._down[len(self.blocks) + 1] = time.perf_counter()

    def end(self) -> None:
        """The backward pass is over, also where no gradient came as far down."""
        for stretch in range(len(self.blocks) + 1):
            self._down.setdefault(stretch, time.perf_counter())
        self._down[-1] = time.perf_counter()

    def forward(self) -> list[float]:
        """Seconds by stretch."""
        return [after - before for before, after in zip(self._up, self._up[1:], strict=False)]

    def backward(self) -> list[float]:
        """Seconds by stretch: from the gradient of what it gives to that of what it is given."""
        return [
            max(0.0, self._down[stretch - 1] - self._down[stretch])
            for stretch in range(len(self.blocks) + 2)
        ]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Hooks at the blocks' ends."""
        with _removed(
            self.blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            *(block.register_forward_hook(self._leave) for block in self.blocks),
        ):
            yield

    @contextmanager
    def first_run(self, model: nn.Module) -> Iterator[None]:
        """These hooks, others at all modules, and the count of bytes."""
        self.saved = [0] * (len(self.blocks) + 2)
        seen = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model.modules())}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:  # alive until the backward pass, so no other has it
                seen.add(storage.data_ptr())
                self.saved[self._now] += storage.nbytes()
            return tensor

        def ran(module: nn.Module, _: Any) -> None:
            if not self._now:
                self.early.add(id(module))

        watched = [module.register_forward_pre_hook(ran) for module in model.modules()]
        with _removed(*watched), self.timed(), saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    def weights(self, model: nn.Module) -> list[tuple[int, int]]:
        """Bytes that are frozen and that are trained, by stretch."""
        within = [list(block.modules()) for block in self.blocks]
        inner = {id(module) for modules in within for module in modules}
        outer = [module for module in model.modules() if id(module) not in inner]
        below = [module for module in outer if id(module) in self.early]
        above = [module for module in outer if id(module) not in self.early]
        return [_bytes(_tensors(modules)) for modules in (below, *within, above)]

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._stamp(0, args[0] if args else kwargs["hidden_states"])

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        given = output if isinstance(output, Tensor) else output[0]
        self.shape = given.shape
        self._stamp(self._now, given)

    def _stamp(self, stretch: int, given: Tensor) -> None:
        """A stretch's forward pass is over, and its backward pass begins with the gradient of what it gave."""
        self._up.append(time.perf_counter())
        self._now = stretch + 1
        if given.requires_grad:
            given.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self._down.update({stretch: time.perf_counter()})
            )


@contextmanager
def _without_cache(config: Any) -> Iterator[None]:
    """Keys and values are not kept for a next token, as halves keep none."""
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


@contextmanager
def _removed(*handles: Any) -> Iterator[None]:
    """Hooks that are gone at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What the modules themselves hold."""
    return [
        tensor
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]


def _bytes(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Frozen and trained; each tensor once."""
    sizes = {id(tensor): (tensor.nbytes, tensor.requires_grad) for tensor in tensors}.values()
    return sum(n for n, on in sizes if not on), sum(n for n, on in sizes if on)
