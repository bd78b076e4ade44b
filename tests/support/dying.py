"""An engine's devices of which one dies: from some round on it answers nothing, and no heartbeat tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from fl_app.engine import DeviceModel
from fl_app.engine.devices import Occasion


@dataclass(frozen=True)
class OneDies(DeviceModel):
    """As the engine's own, but for one.

    Attributes:
        dying: its logical id.
        last: the last round that it answers.
        back: the first round that it answers again; 0 for never.
    """

    dying: Annotated[int, Ge(0)] = 3
    last: Annotated[int, Ge(0)] = 3
    back: Annotated[int, Ge(0)] = 0
    detection_seconds: Annotated[float, Ge(0)] = 1e9

    def drops_at(self, occasion: Occasion, phases: int = 1) -> int | None:
        """At once, in its rounds."""
        gone = occasion.round > self.last and (not self.back or occasion.round < self.back)
        if occasion.client == self.dying and gone:
            return 0
        return super().drops_at(occasion, phases)
