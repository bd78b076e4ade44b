"""A Hugging Face model in two or three parts that compute exactly what it computes.

Vepakomma et al. 2018, "Split learning for health: Distributed deep learning without sharing raw patient data", figure
2: a bottom with the embeddings and the first blocks and a top with the rest; U-shaped, the rest is a middle and a tail,
and the tail is the client's again. The parts are models of the whole model's class, with its names and block indices,
so no family needs code of its own, and an adapter has the same name in a part and in the whole.

It knows nothing of adapters, wires or federations.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from clients.split.halves import Bottom, Middle, Top, part_class
from clients.split.loading import load_bottom, load_middle, load_tail, load_top, whole_class
from clients.split.surgery import blocks_of, check_cut


def cut(
    source: Any,
    at: int,
    tail: int | None = None,
    *,
    cls: Any = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """The parts of a model: (bottom, top), or with `tail` (bottom, middle, tail).

    Args:
        source: a model, whose weights the parts share: the same tensors in the same mode, and the model stays as it
            was. Or a configuration, for parts of one random model. Or a folder or hub name, from which each part reads
            its own weights.
        at: how many blocks are below the first cut, from 1 to all but one.
        tail: how many blocks are below the second cut, more than `at`; all of them leave the heads to the tail.
        cls: of the whole model, where `source` is none: a class of transformers, or one of its Auto classes; None
            is AutoModel, the family's base model.
        dtype: of weights that are made or loaded here.

    Returns:
        Parts that take and give as `Bottom`, `Middle` and `Top` say.

    Raises:
        ValueError: the model's family can't be cut, or not there.
        DataError: nothing can be loaded from the folder.
    """
    if isinstance(source, str):
        if tail is None:
            return (
                load_bottom(source, at=at, cls=cls, dtype=dtype),
                load_top(source, at=at, cls=cls, dtype=dtype),
            )
        return (
            load_bottom(source, at=at, cls=cls, dtype=dtype),
            load_middle(source, at=at, tail=tail, cls=cls, dtype=dtype),
            load_tail(source, at=tail, cls=cls, dtype=dtype),
        )
    if not isinstance(source, nn.Module):
        source = whole_class(source, cls)(copy.deepcopy(source)).to(dtype)
    count = blocks_of(source)[1]
    check_cut(count, at, tail)
    if tail is None:
        return _part(source, Bottom, 0, at), _part(source, Top, at, count)
    return (
        _part(source, Bottom, 0, at),
        _part(source, Middle, at, tail),
        _part(source, Top, tail, count),
    )


def _part(model: Any, kind: Any, start: int, stop: int) -> Any:
    """A part around the model's very tensors; modules, configuration and hooks are the part's own."""
    blocks = model.get_submodule(blocks_of(model)[0])
    # Blocks that the part drops are not worth a copy.
    dropped = (*blocks[:start], *blocks[stop:])
    shared = (*model.parameters(), *model.buffers(), *dropped)
    whole: Any = type(model)
    part: Any = copy.deepcopy(model, {id(kept): kept for kept in shared})
    part.__class__ = part_class(kind, whole)
    part.carve(start, stop)
    return part
