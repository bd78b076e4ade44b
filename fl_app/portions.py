"""Which part of the model each client is sent and trains: its own task's head, adapters of its own ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clients.lora import RankPlan
from clients.split.server import OF_GOALS
from strategies.contract import Claim
from strategies.state import State
from strategies.update import Layout, Update, Vector


@dataclass(frozen=True)
class ClientParts:
    """Parts by clients.

    Attributes:
        goal_of: the one goal that a client trains, None for all there are.
        several: whether clients train different goals.
        ranks: ranks of each client's adapters; None where all have the model's.
    """

    goal_of: Callable[[int], str | None]
    several: bool
    ranks: RankPlan | None

    label = "the clients' parts of the model"

    def check(self, claim: Claim) -> Claim:
        """Clients train different parts, if there is anything to differ in."""
        if self.ranks is not None:
            claim = self.ranks.check(claim)
        return claim.given(self, parts=True) if self.several else claim

    def part(self, client: int, whole: Layout) -> Layout:
        """The client's ranks of the adapters, and of several heads its own goal's."""
        part = whole if self.ranks is None else self.ranks.part(client, whole)
        goal = self.goal_of(client) if self.several else None
        return part if goal is None else with_head(part, goal)

    def observe(self, change: Update, sent: Vector) -> None:
        """Ranks follow what layers turn out to be worth."""
        if self.ranks is not None:
            self.ranks.observe(change, sent)

    def state_dict(self) -> State:
        """The ranks' state."""
        return {} if self.ranks is None else self.ranks.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Takes up that state; raises `ValueError` for another plan's."""
        if self.ranks is not None:
            self.ranks.load_state_dict(state)


def with_head(part: Layout, goal: str) -> Layout:
    """A part without the heads of other goals."""
    kept = {
        name: shape
        for name, shape in zip(part.names, part.shapes, strict=True)
        if name.partition(".")[0] not in OF_GOALS or name.split(".")[1] == goal
    }
    return Layout(tuple(kept), tuple(kept.values()))
