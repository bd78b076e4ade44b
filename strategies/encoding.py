"""How updates leave a client: the stages' client halves, in order, and what sections look like behind them.

What both ends must know of a list of stages, and all that a client needs of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from strategies.protocols import ClientContext, Memory, Packing, Shaping, Stage, settings_of
from strategies.update import Layout, Update


def reshaped(layouts: Mapping[str, Layout], stages: Iterable[Stage]) -> Mapping[str, Layout]:
    """The sections as they travel, given how the combiner sees them."""
    for stage in stages:
        if isinstance(stage, Shaping):
            layouts = stage.reshaped(layouts)
    return layouts


def packing_of(stages: Sequence[Stage]) -> Packing | None:
    """The stage that leaves sections packed; None where they travel as they are."""
    last = stages[-1] if stages else None
    return last if isinstance(last, Packing) else None


def most_bytes(name: str, layout: Layout, packing: Packing | None) -> int:
    """The largest size of a section as it travels."""
    if packing is not None and name in packing.sections:
        return packing.most_bytes(layout)
    return layout.size * np.dtype(np.float32).itemsize


def encode(
    update: Update,
    stages: Iterable[Stage],
    config: ConfigRecord,
    client: int,
    memory: Memory = MappingProxyType({}),
    proposed: dict[str, NDArray[np.float32]] | None = None,
) -> Update:
    """The client halves, in order, each with the settings that came down for it.

    Args:
        update: as it was trained.
        stages: the server's, in the same order.
        config: the request's.
        client: logical id.
        memory: what this client's stages remember, `<stage>.<name>` to vector.
        proposed: takes what they are to remember if the server takes the update.
    """
    proposed = {} if proposed is None else proposed
    for stage in stages:
        state = {
            key.removeprefix(f"{stage.name}."): vector
            for key, vector in memory.items()
            if key.startswith(f"{stage.name}.")
        }
        context = ClientContext(client, _round(config), settings_of(config, stage.name), state)
        update = stage.encode(update, context)
        proposed |= {f"{stage.name}.{key}": vector for key, vector in context.proposed.items()}
    return update


def _round(config: ConfigRecord) -> int:
    number = config["server-round"]
    if not isinstance(number, int):
        raise TypeError(f"server-round should be a whole number, not {number!r}")
    return number
