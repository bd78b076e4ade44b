"""Which part of the model each client is sent and trains: its own task's head, adapters of its own ranks.

And what a run with such parts, or with rules over their products, must have before it begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from clients.lora import RankPlan
from clients.lora.adapters import OF_GOALS
from clients.lora.profile import Profile, measure
from clients.tasks import Task
from clients.trainers import SGD
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.nodes import TargetNode
from fl_app.config.schema import Config
from fl_app.config.targets import build
from strategies.contract import Claim
from strategies.protocols import Combiner, Plan
from strategies.state import State
from strategies.update import DELTA, Layout, Update, Vector

log = logging.getLogger(__name__)


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
    blocks = zip(part.names, part.shapes, strict=True)
    kept = {name: shape for name, shape in blocks if of_goal(name) in (None, goal)}
    return Layout(tuple(kept), tuple(kept.values()))


def of_goal(name: str) -> str | None:
    """The goal whose head an array is of; None where it is of none in particular."""
    kind, *rest = name.split(".")
    return rest[0] if kind in OF_GOALS and len(rest) > 1 else None


def planned_ranks(
    config: Config, node: TargetNode, model: nn.Module, task: Task, trainer: SGD
) -> RankPlan:
    """The ranks of each client's adapters, by what a step of its model is measured to take.

    Args:
        config: of the run.
        node: the plan's settings.
        model: what clients hold of the model; of one that is cut, the lower half.
        task: a batch of whose examples is measured.
        trainer: of the clients.

    Raises:
        ConfigError: a budget does not hold the model, or this has no adapters.
    """
    plan: RankPlan = build(node, batch_size=trainer.batch_size)
    try:
        plan.measured(
            clients_profile(model, task, trainer.batch_size), config.model.arguments["rank"]
        )
    except (ValueError, KeyError) as error:
        raise ConfigError([Fault("ranks", str(error), node.name)]) from error
    log.info("%s", plan.table())
    return plan


def clients_profile(model: Any, task: Task, batch_size: int) -> Profile:
    """What a step of the clients' model, or of its lower half, takes: measured on a batch of the task's."""
    rows = task.train().inputs
    # The longest: padding that all rows have is no memory.
    longest = (rows != task.padding_id).flatten(1).sum(dim=1).argsort(descending=True)
    inputs = rows[longest[:batch_size]]
    lower = getattr(model, "lower", None)
    if lower is not None:
        return measure(lower, inputs, lambda given: given[0].square().mean())
    return measure(model, inputs)


def check_factors(config: Config, combiner: Combiner, layout: Layout, trainer: SGD) -> None:
    """Refuses what a rule over the model's factors lacks, and a residual that no rule makes, before anything runs.

    Raises:
        ConfigError: the combiner can't work with the model's arrays; or nobody, or weight decay, tends the residual.
    """
    if getattr(combiner, "wants_sent", False):
        try:
            combiner.begin(Plan({DELTA: layout}, 1, 1, sent=np.zeros(layout.size, np.float32)))
        except ValueError as error:
            raise ConfigError([Fault("combiner", str(error), config.combiner.name)]) from error
    if not config.model.arguments.get("residual_rank"):
        return
    if not getattr(combiner, "needs_residual", False):
        told = "is for combiner=lora_fedex and lora_stack, and other rules make nothing of a residual: set it to 0"
        raise ConfigError([Fault("model.residual_rank", told)])
    if trainer.weight_decay:
        told = "takes from the residual too, which is frozen: set it to 0"
        raise ConfigError([Fault("client.weight_decay", told)])
