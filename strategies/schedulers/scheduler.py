"""What a scheduler must offer. It stands here, not with the other seams, for it names what is above them.

It is given rounds to run, a model and a way to the clients; evaluation and hooks belong to whoever reads its views.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from strategies.contract import Checked
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.rounds import Rounds
from strategies.server_models import ServerModel


class Scheduler(Checked, Protocol):
    """The loop over model versions."""

    def run(
        self,
        pipeline: Rounds,
        model: ServerModel,
        exchange: Exchange,
        until: int,
        *,
        timeout: float = 3600.0,
        seed: int = 0,
    ) -> Iterator[RoundView]:
        """Versions until the model has version `until`, each as soon as it exists."""
        ...
