"""What is taken out of a Hugging Face model, so that what is left is one part of it, and nothing but that part.

Split learning (Vepakomma et al. 2018, "Split learning for health: Distributed deep learning without sharing raw
patient data") cuts a model between two layers. Here the family's own code stays in charge: masks, rotary tables,
position ids, pooling and loss are computed where they always are, and only modules are exchanged. What a part does not
hold is replaced by a module without weights; blocks keep their indices and parameters their names, so that adapters
and checkpoints mean the same in a part and in the whole.

It knows where each family has its blocks and its embeddings, and nothing of forward passes, files or training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn


@dataclass(frozen=True)
class _Family:
    """Names are counted from the base model; `below` runs before the first block and nowhere else."""

    blocks: str
    below: tuple[str, ...]


_DECODER = _Family("layers", ("embed_tokens",))
_ENCODER = _Family("encoder.layer", ("embeddings",))
_FAMILIES = {
    "bert": _ENCODER,
    "distilbert": _Family("transformer.layer", ("embeddings",)),
    "gemma3_text": _DECODER,
    "gpt2": _Family("h", ("wte", "wpe")),
    "gpt_neox": _Family("layers", ("embed_in",)),
    "llama": _DECODER,
    "mistral": _DECODER,
    "modernbert": _Family("layers", ("embeddings",)),
    "opt": _Family(
        "decoder.layers", ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in")
    ),
    "phi3": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "roberta": _ENCODER,
    "vit": _Family("layers", ("embeddings",)),
}
"""By `model_type`. Each is tested for equality, bit for bit, with the model that is not cut."""


class Reached(Exception):  # noqa: N818  # no error: it ends a forward pass where a part ends
    """The last block of a part has run; `hidden` is what it gave."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Channel:
    """Holds the activation that a part is given, while it runs."""

    activation: Tensor | None = None

    def take(self) -> Tensor:
        """The activation, (batch, length, hidden)."""
        if self.activation is None:
            raise RuntimeError("a part of a split model was run past its own forward")
        return self.activation


class Absent(nn.Module):
    """Stands where a module was that this part does not hold.

    It has the module's names, with tensors without elements that no state has: model code reads dtypes by such names,
    and a family's initialisation writes to them. Below the cut it gives zeros, which no block sees.
    """

    def __init__(self, module: nn.Module, channel: Channel | None, kept: set[int]) -> None:
        super().__init__()
        self._channel = channel
        for name, child in module.named_children():
            self.add_module(name, child if id(child) in kept else Absent(child, channel, kept))
        for name, tensor in {**module._parameters, **module._buffers}.items():
            empty = None if tensor is None else tensor.detach().new_empty(0)
            self.register_buffer(name, empty, persistent=False)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Zeros of the activation's shape."""
        if self._channel is None:
            raise RuntimeError("this part of a split model ends before what was called")
        activation = self._channel.take()
        return activation.new_zeros(()).expand(activation.shape)


class _Passed(nn.Module):
    """A block below the part: hands on what it gets."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Models read settings of their blocks from outside, as `attention_type`.
        for name, value in vars(block).items():
            if isinstance(value, str | int | float) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Received(_Passed):
    """The last block below the part: gives the activation, and drops what was computed before it."""

    def __init__(self, block: nn.Module, channel: Channel) -> None:
        super().__init__(block)
        self._channel = channel

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._channel.take()


def blocks_of(model: Any) -> tuple[str, int]:
    """The name of a model's list of blocks, and how many blocks there are; of a part, how many the whole model has.

    Raises:
        ValueError: it is not of a family that can be cut; the message lists those.
    """
    from transformers import PreTrainedModel  # takes a second

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} is no Hugging Face model: give a model of transformers, with "
            "adapters injected in place, if any"
        )
    family = family_of(model.config)
    return _joined(_base_path(model), family.blocks), int(model.config.num_hidden_layers)


def body_of(model: Any) -> tuple[str, ...]:
    """Where a model has its blocks, and then each module that runs before them: what no checkpoint may lack."""
    family, base = family_of(model.config), _base_path(model)
    return tuple(_joined(base, name) for name in (family.blocks, *family.below))


def family_of(config: Any) -> _Family:
    """The family of a configuration.

    Raises:
        ValueError: it can't be cut; the message lists those that can.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _FAMILIES:
        raise ValueError(
            f"models of type {kind!r} can't be cut; those that can are {', '.join(sorted(_FAMILIES))}"
        )
    if getattr(config, "layerdrop", 0.0):
        raise ValueError(
            "layerdrop leaves whole blocks out by chance, and with them the cut: set layerdrop=0"
        )
    return _FAMILIES[kind]


def check_cut(count: int, at: int, tail: int | None = None) -> None:
    """Raises `ValueError` where a model of `count` blocks has no such cut, or no such second one."""
    if not 1 <= at < count:
        raise ValueError(
            f"a model of {count} blocks can be cut behind block 1 to {count - 1}, not at {at}"
            if count > 1
            else "a model of one block can't be cut"
        )
    if tail is not None and not at < tail <= count:
        raise ValueError(
            f"the second cut comes behind the first, at {at}, and not behind the last of {count} "
            f"blocks: {tail} is not there"
        )


def drop_below(model: Any, start: int, channel: Channel, *, heads: bool) -> None:
    """Takes the embeddings and the blocks before `start` out; block `start` is given the channel's activation.

    Args:
        model: is changed.
        start: index of the first block that stays, from 1.
        channel: holds the activation while the model runs.
        heads: whether the model's heads stay, so that an embedding matrix that is one of their weights stays too.
    """
    path, _ = blocks_of(model)
    blocks = model.get_submodule(path)
    for index in range(start - 1):
        blocks[index] = _Passed(blocks[index])
    blocks[start - 1] = _Received(blocks[start - 1], channel)
    tied = model.all_tied_weights_keys.values() if heads else ()
    kept = {id(model.get_submodule(name.rpartition(".")[0])) for name in tied}
    for name in body_of(model)[1:]:
        parent, _, last = name.rpartition(".")
        module = getattr(model.get_submodule(parent), last)
        if module is not None and id(module) not in kept:
            setattr(model.get_submodule(parent), last, Absent(module, channel, kept))


def drop_above(model: Any, stop: int) -> None:
    """Takes the blocks from `stop` on and all that follows them out; a forward pass ends by raising `Reached`."""
    path, _ = blocks_of(model)
    blocks = model.get_submodule(path)
    blocks[stop - 1].register_forward_hook(_reach)
    del blocks[stop:]
    _drop_but(model, "", set(body_of(model)))
    model.all_tied_weights_keys = {}


def _drop_but(module: nn.Module, path: str, staying: set[str]) -> None:
    """Replaces all with weights that neither stays nor holds what stays."""
    for name, child in list(module.named_children()):
        whole = _joined(path, name)
        if whole in staying:
            continue
        if any(other.startswith(f"{whole}.") for other in staying):
            _drop_but(child, whole, staying)
        elif next(child.parameters(), None) is not None:
            setattr(module, name, Absent(child, None, set()))


def _reach(_: nn.Module, __: Any, output: Tensor) -> NoReturn:
    raise Reached(output)


def _base_path(model: Any) -> str:
    """Where the base model is in a model with a head; empty where it is the model."""
    return "" if model.base_model is model else str(model.base_model_prefix)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
