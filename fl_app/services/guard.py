"""A guard that ends a run whose model has gone wrong, before more rounds are spent on it."""

from __future__ import annotations

import math

from strategies.hooks import RoundView, Stop


def divergence_guard(view: RoundView) -> Stop | None:
    """Ends the run when the central test loss is NaN or infinite."""
    loss = view.evaluation.get("loss")
    if loss is None or math.isfinite(loss):
        return None
    return Stop(
        f"anomaly: the test loss of version {view.round} is {loss}; lower client.lr or server.lr"
    )
