"""Which part of a model each end of a run holds: clients' own ranks, and the two halves of one that is cut.

Clients make their part from the names and shapes of what they are sent, and from the cut that a request tells them, so
that a device never loads what it has no part of. The server makes its half here and hands it to the collector.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

from torch import nn

from clients.resident import Shapes
from clients.split.planner import NoCutFitsError
from clients.split.server import UpperServer
from clients.split.trainer import SplitTrainer
from clients.tasks import Task
from clients.trainers import SGD
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import Config
from fl_app.config.targets import locate
from fl_app.services.files import write_atomically
from strategies import plain_json
from strategies.collectors import Split
from strategies.wire import Refused

log = logging.getLogger(__name__)

AT: Final = "split.at"
"""The setting of a request that says how many blocks clients hold."""

CUT: Final = "cut.json"
"""In a run's folder: where `split_point=auto` has cut the model."""

Build = Callable[..., nn.Module]
"""The configured model, given what else of its constructor's parameters are known."""


def is_split(config: Config) -> bool:
    """Whether a run is one of a split model.

    Raises:
        ConfigError: a part of it is for split models, and another is for whole ones.
    """
    found = {
        "model": hasattr(locate(config.model.target), "clients_names"),
        "client": _is(config.client.target, SplitTrainer),
        "collector": _is(config.collector.target, Split),
    }
    if len(set(found.values())) == 1:
        return found["model"]
    for_split = sorted(group for group, split in found.items() if split)
    others = sorted(group for group, split in found.items() if not split)
    chosen = ", ".join(f"{group}={getattr(config, group).name}" for group in others)
    told = (
        f"{', '.join(for_split)} cut a model in two, and {chosen} knows whole ones: strategy=split_lora chooses "
        "model, client and collector together"
    )
    raise ConfigError([Fault(others[0], told)])


def _is(target: str, kind: type) -> bool:
    found: Any = locate(target)
    return isinstance(found, type) and issubclass(found, kind)


class PartMaker:
    """Makes a client's part of the model from what it is sent.

    Args:
        build: the configured model.
        split: whether clients have a half of it.
        configured: whether the configuration says where the cut is; otherwise the server does.
    """

    def __init__(self, build: Build, *, split: bool, configured: bool = True) -> None:
        self._build, self._split, self._configured = build, split, configured

    def key(self, shapes: Shapes, settings: Mapping[str, object]) -> Hashable:
        """Names, shapes and the cut."""
        return tuple(shapes.items()), settings.get(AT)

    def __call__(self, shapes: Shapes, settings: Mapping[str, object]) -> nn.Module:
        """The part with these arrays; raises `Refused` (`terms`) where the request does not say where the cut is."""
        known: dict[str, Any] = {"ranks": ranks_of(shapes)}
        if self._split:
            at = settings.get(AT)
            if type(at) is not int or at < 1:
                raise Refused("terms", f"{AT}={at!r} is no number of blocks")
            known |= {"half": "lower"} if self._configured else {"at": at, "half": "lower"}
        module = self._build(**known)
        own = getattr(module, "at", None)
        if self._split and own != settings[AT]:
            # What activations tell depends on the cut: where it is configured, it is no server's to move.
            raise Refused("terms", f"{AT}={settings[AT]}, and this client is configured for {own}")
        return module


def ranks_of(shapes: Shapes) -> dict[str, int]:
    """Each adapted layer's rank, by the layer's name with `_` for its dots, of arrays' names and shapes."""
    end = ".B.weight"
    return {
        name.removeprefix("adapters.").removesuffix(end): shape[1]
        for name, shape in shapes.items()
        if name.startswith("adapters.") and name.endswith(end) and len(shape) == 2
    }


def planned_cut(build: Build, config: Config, task: Task, trainer: SGD, clients: int) -> int | None:
    """How many blocks clients hold, where that is to be measured; the log explains it. None where it is set.

    Args:
        build: the configured model.
        config: of the run.
        task: a batch of whose examples is measured.
        trainer: of the clients.
        clients: that the server serves in turn.

    Raises:
        ConfigError: no cut is within the limits.
    """
    if config.model.arguments["split_point"] != "auto":
        return None
    if (earlier := _earlier_cut(config)) is not None:
        return earlier
    arguments = config.collector.arguments
    model: Any = build(at=1, half="lower")
    try:
        plan = model.planned(
            task.train().inputs[: trainer.batch_size],
            arguments["precision"],
            batches=arguments["batches_per_exchange"],
            clients=clients,
            copies=clients if arguments["variant"] == "v1" else 1,
        )
    except NoCutFitsError as error:
        raise ConfigError([Fault("model.limits", str(error))]) from error
    bound = f" ({', '.join(plan.bound_by)} forbids a faster cut)" if plan.bound_by else ""
    told = "the earlier the cut, the more of their texts activations tell"
    log.info("split_point=auto: clients hold %d blocks%s; %s\n%s", plan.at, bound, told, plan.table)
    if config.run_dir.is_dir():
        write_atomically(config.run_dir / CUT, json.dumps({"at": plan.at}).encode())
    return int(plan.at)


def _earlier_cut(config: Config) -> int | None:
    """Where a run that is resumed was cut: measured again, it could be elsewhere, nearer to the texts."""
    if config.resume == "never":
        return None
    try:
        at = plain_json.loads((config.run_dir / CUT).read_text())["at"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return at if type(at) is int and at >= 1 else None


def upper_server(
    build: Build, config: Config, task: Task, trainer: SGD, at: Mapping[str, int]
) -> UpperServer:
    """The server's half of the configured model, with the cut at `at`."""
    assert isinstance(trainer, SplitTrainer)
    arguments = config.collector.arguments
    module: Any = build(half="upper", **at)
    whole: Any = build(**at)
    own = trainer.with_lr(arguments.get("lr"))
    return UpperServer(
        module,
        whole.clients_names(),
        task,
        own,
        arguments["precision"],
        most_batches=arguments["batches_per_exchange"],
    )
