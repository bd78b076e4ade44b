"""The model of a run: how it is made, whole and in parts, and which of its arrays travel.

Its initial weights are the same wherever the run's seed is. What clients hold of a model that is cut, or of one with
ranks and heads of their own, is `fl_app.halves`' and `fl_app.portions`' to say; where that has to be measured, it is
once. Must not know who asks: both ends and whoever looks at a run make their modules here.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

import torch
from flwr.app import ArrayRecord
from torch import nn

from clients.resident import ModuleMaker, arrays_of, buffers_of
from clients.tasks import Task
from clients.trainers import SGD
from fl_app.config.schema import DEFAULT_NUM_CLIENTS, Config
from fl_app.config.targets import build
from fl_app.halves import PartMaker, planned_cut
from fl_app.portions import ClientParts, of_goal, planned_ranks
from strategies.seeds import integer
from strategies.server_models.model import sections_of
from strategies.update import DELTA, Layout
from strategies.wire import pack_model


class Network:
    """The configured model.

    Args:
        config: of the run.
        task: gives the shapes of inputs and outputs, and a batch where a cut or ranks are measured.
        trainer: of the clients.
        split: whether the model is cut between clients and server.
    """

    def __init__(self, config: Config, task: Task, trainer: SGD, *, split: bool) -> None:
        self._config, self._task, self._trainer, self._split = config, task, trainer, split
        self._smaller: dict[str, object] = {}

    def module(self) -> nn.Module:
        """The whole of it, with its initial weights."""
        return self.build(**self.at)

    def build(self, **known: object) -> nn.Module:
        """The configured model, or of one that is cut the part that `known` says."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer(self._config.seed, "model"))
            module: nn.Module = build(
                self._config.model,
                directory=self._config.directory,
                input_shape=self._task.input_shape,
                num_classes=self._task.num_classes,
                vocab_size=self._task.vocab_size,
                padding_id=self._task.padding_id,
                goals=self._task.goals,
                auxiliary=getattr(self._trainer, "auxiliary_steps", 0) > 0,
                **self._smaller,
                **known,
            )
        return module

    def shrink(self, hidden: Sequence[int]) -> None:
        """Has as many hidden units from now on, where memory leaves no room for the configured ones."""
        self._smaller = {"hidden": hidden}

    @cached_property
    def at(self) -> dict[str, int]:
        """How many blocks of a model that is cut clients hold, where that has to be measured."""
        if not self._split:
            return {}
        count = self._config.num_clients
        clients = DEFAULT_NUM_CLIENTS if count == "auto" else count
        at = planned_cut(self.build, self._config, self._task, self._trainer, clients)
        return {} if at is None else {"at": at}

    def arrays(self) -> ArrayRecord:
        """The whole initial model."""
        return pack_model(arrays_of(self.module()))

    @cached_property
    def _travelling(self) -> tuple[dict[str, str], dict[str, Layout]]:
        """The section that each travelling array belongs to, and the sections' layouts."""
        module = self.module()
        travelling = {
            name: array
            for name, array in arrays_of(module).items()
            if any(fnmatchcase(name, pattern) for pattern in self._config.travel)
        }
        return sections_of(travelling, buffers_of(module))

    @property
    def array_count(self) -> int:
        """Arrays that travel."""
        return len(self._travelling[0])

    @property
    def sections(self) -> frozenset[str]:
        """The sections that the model's own arrays make."""
        return frozenset(self._travelling[0].values())

    @property
    def layouts(self) -> dict[str, Layout]:
        """Of each section."""
        return self._travelling[1]

    @property
    def size(self) -> int:
        """Parameters that travel."""
        return self.layouts[DELTA].size

    @cached_property
    def factors(self) -> Literal["both", "shared_a"] | None:
        """Which factors of its products the model trains, where it has low-rank adapters."""
        return getattr(self.module(), "factors", None)

    @cached_property
    def _by_goal(self) -> bool:
        """Whether the model has a head for each of the task's goals, so that a client trains its own."""
        names = self.layouts[DELTA].names
        return len(self._task.goals) > 1 and any(of_goal(name) is not None for name in names)

    def parts(self) -> ClientParts | None:
        """Who is sent and trains what of the model; None where it is the same for all."""
        ranks, config = None, self._config
        if config.ranks is not None:
            model = self.build(**self.at, **({"half": "lower"} if self._split else {}))
            ranks = planned_ranks(config, config.ranks, model, self._task, self._trainer)
        if ranks is None and not self._by_goal:
            return None
        return ClientParts(self._task.goal_of, self._by_goal, ranks)

    def for_clients(self) -> nn.Module | ModuleMaker:
        """What clients make their models with."""
        if self._split or self._config.ranks is not None or self._by_goal:
            return PartMaker(
                self.build,
                split=self._split,
                configured=self._config.model.arguments.get("split_point") != "auto",
            )
        return self.module()
