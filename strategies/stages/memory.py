"""Error feedback: what a lossy stage left out, kept on the client's disk and added to the next change.

Karimireddy, Rebjock, Stich & Jaggi 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes",
Algorithm 2. What is remembered holds once the server has taken the update that it went with (`ClientContext.proposed`).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from strategies.compression.selection import Indices
from strategies.protocols import ClientContext
from strategies.update import Vector

ERROR: Final = "error"
"""What the memory is called in a stage's state."""


def fed_back(vector: Vector, context: ClientContext) -> Vector:
    """A new vector: the one given, plus what the last update left out."""
    error = context.state.get(ERROR)
    if error is None:
        return vector.copy()
    with np.errstate(over="ignore", invalid="ignore"):  # admission refuses what comes of it
        return np.asarray(vector + error, np.float32)


def remember(
    target: Vector, chosen: Indices | slice, values: Vector, context: ClientContext
) -> None:
    """Proposes what is left out of `target` where `values` arrive in the places `chosen`, and 0 elsewhere.

    It is worked out in `target` itself: another array of a model's size would be fresh pages from the system.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        target[chosen] -= values
    context.proposed[ERROR] = target
