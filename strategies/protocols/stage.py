"""The seam of stages: one transformation of an update, its client half and its server half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from strategies.contract import Checked
from strategies.update import Layout, Update, Vector

Settings = Mapping[str, bool | int | float | str]
"""What one part's server half sends down to its client half."""

Memory = Mapping[str, NDArray[np.float32]]
"""Vectors by name that a client keeps from round to round."""


@dataclass(frozen=True)
class ClientContext:
    """What a client half may know: who is asked, for which round, and the settings that came down.

    Attributes:
        client: logical id.
        round: the round's number, from 1.
        settings: of the part that is called.
        state: what this stage of this client remembered with the last update that the model holds; vectors by name.
        proposed: what it is to remember if the server takes this update, filled by `encode`.
    """

    client: int
    round: int
    settings: Settings
    state: Memory = field(default_factory=dict)
    proposed: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class Stage(Checked, Protocol):
    """One transformation of an update, both halves in one class."""

    name: str

    def configure(self) -> Settings:
        """Server: what this round's clients must know."""
        ...

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half."""
        ...

    def decode(self, update: Update) -> Update:
        """Server half; raises `Refused` for what no honest client half can have made."""
        ...


@runtime_checkable
class Maker(Protocol):
    """A stage that adds sections to each update, and so can bound and lay them out."""

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Those that it makes, by name."""
        ...


@runtime_checkable
class Bounding(Protocol):
    """A stage that bounds sections, by as much as it says at the time."""

    def bounds(self) -> Mapping[str, float]:
        """L2 bounds of one client's sections in the round that comes."""
        ...


@runtime_checkable
class Shaping(Protocol):
    """A stage behind which sections have another shape."""

    def reshaped(self, layouts: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """All sections as they are behind its `encode`, given how they are before."""
        ...


@runtime_checkable
class Packing(Protocol):
    """The last stage, where its client half leaves sections packed; they are unpacked before anything else sees them.

    Attributes:
        sections: those that are packed.
    """

    sections: Sequence[str]

    def most_bytes(self, layout: Layout) -> int:
        """The largest packed size of a section: what is longer is refused unread."""
        ...

    def unpack(self, name: str, data: bytes | memoryview, layout: Layout) -> Vector:
        """A vector, in no more memory than its layout says; raises `Refused` for what no client half sends."""
        ...


def settings_of(config: ConfigRecord, prefix: str) -> dict[str, bool | int | float | str]:
    """The settings of one part out of a request's flat configuration: `clip.norm` → `norm`."""
    dotted = f"{prefix}."
    return {
        key.removeprefix(dotted): value
        for key, value in config.items()
        if key.startswith(dotted) and isinstance(value, bool | int | float | str)
    }
