"""An update's way from a client's stages through a reply to the server's, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import ConfigRecord

from strategies.encoding import encode, packing_of, reshaped
from strategies.pipeline import Pipeline
from strategies.protocols import Stage
from strategies.replies import Expected, read_update, write_update
from strategies.update import DELTA, Layout, Section, Update

FLAT = Layout(("w",), ((400,),))


def one(
    values: np.ndarray, layout: Layout | None = None, version: int = 0, client: int = 0
) -> Update:
    """One client's update of one section."""
    vector = np.asarray(values, np.float32)
    layout = layout or Layout(("w",), ((vector.size,),))
    return Update({DELTA: Section(vector, layout)}, 1.0, (client,), version)


def normal(size: int = 400, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def configured(stages: Sequence[Stage], number: int = 1) -> ConfigRecord:
    """What a request says to the stages."""
    config: dict[str, object] = {"server-round": number}
    for stage in stages:
        config |= {f"{stage.name}.{key}": value for key, value in stage.configure().items()}
    return ConfigRecord(config)


def encoded(
    update: Update,
    stages: Sequence[Stage],
    memory: Mapping[str, np.ndarray] | None = None,
    number: int = 1,
) -> tuple[Update, dict[str, np.ndarray]]:
    """What a client makes of an update, and what it is to remember."""
    proposed: dict[str, np.ndarray] = {}
    (client,) = update.members
    sent = encode(update, stages, configured(stages, number), client, memory or {}, proposed)
    return sent, proposed


def received(sent: Update, stages: Sequence[Stage], layout: Layout) -> Update:
    """What the server's door makes of the reply: before admission, and before any server half."""
    (client,) = sent.members
    layouts = reshaped({DELTA: layout}, stages)
    expected = Expected(layouts, client, 1, sent.version, packing_of(stages))
    return read_update(write_update(sent, client=client, round_number=1), expected)


def arrived(
    update: Update, stages: Sequence[Stage], memory: Mapping[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What reaches the combiner of an update, and what its client is to remember."""
    sent, proposed = encoded(update, stages, memory)
    found = Pipeline(stages=stages).decode(received(sent, stages, update.delta.layout))
    return found.delta.vector, proposed
