"""The run that is audited: what its folder says of it, and the objects that made it, made again.

A run's config.yaml is held against the schema as any configuration is, and its hash against that of summary.json: an
audit that trains with other settings than the run did would audit something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fl_app.assembly import Assembly
from fl_app.config.checking import Checker
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.nodes import TargetNode
from fl_app.config.schema import Config, Evaluation
from fl_app.services.checkpoint import Checkpoints
from fl_app.services.summary import NAME, read_summary

Arrays = Mapping[str, NDArray[np.generic]]

MODEL, CONFIG, FOLDER = "model.safetensors", "config.yaml", "audit"

Unit = Literal["client", "example"]
"""Whose presence an attack tells: a client with all its data, or one example."""

UNCLAIMED_DELTA = 1e-5
"""δ of a bound on the ε of a run that promises none."""


@dataclass(frozen=True)
class Promise:
    """What summary.json says under `privacy`.

    Attributes:
        unit: whose data are hidden: a whole client's, or one example.
        epsilon: spent by the run.
        delta: δ.
        adjacency: which inputs are neighbours.
        noise_multiplier: z, where the run says it.
    """

    unit: str
    epsilon: float
    delta: float
    adjacency: str
    noise_multiplier: float | None = None

    def covers(self, unit: Unit) -> bool:
        """Whether it bounds what can be learnt of such a unit.

        A promise for a client's updates, noised before they are sent, holds for whatever is made of them.
        """
        return self.unit == unit or (unit == "client" and self.unit == "client update")

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "unit": self.unit,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "adjacency": self.adjacency,
        }


@dataclass(frozen=True)
class Target:
    """A run that has ended, with all that an audit needs of it.

    Attributes:
        path: its folder, absolute.
        summary: content of summary.json.
        config: as it ran.
        num_clients: as it ran.
        rounds: versions of the model that it released.
        promise: of privacy; None where it makes none.
    """

    path: Path
    summary: Mapping[str, Any]
    config: Config
    num_clients: int
    rounds: int
    promise: Promise | None

    @property
    def folder(self) -> Path:
        """Where the audit writes; nothing beside it in the run's folder is touched."""
        return self.path / FOLDER

    @cached_property
    def assembly(self) -> Assembly:
        """Task, data and network of the run."""
        return Assembly(self.config)

    def model(self) -> dict[str, NDArray[np.generic]]:
        """The released model's arrays by name.

        Raises:
            ConfigError: the file is no safetensors file.
        """
        try:
            return load_file(self.path / MODEL)
        except (SafetensorError, OSError) as error:
            raise _refused(self.path / MODEL, f"can't be read ({error})") from error

    def delta(self, unit: Unit) -> float:
        """δ of bounds for a unit: the promise's where it covers that unit."""
        promise = self.promise
        return UNCLAIMED_DELTA if promise is None or not promise.covers(unit) else promise.delta

    def trained_anew(self, name: str, **changes: Any) -> Config:
        """The run's configuration for another training, in a folder of its own below `folder`.

        Its noise is the run's own: found anew for more clients, it would be another.

        Args:
            name: of the folder.
            changes: fields of the configuration that are otherwise.
        """
        own = {
            "output_dir": self.folder,
            "run_name": name,
            "rounds": self.rounds,
            "evaluate": Evaluation(every=0, federated_every=0),
            "attack": None,
            "resume": "never",
        }
        return self.config.model_copy(update={**own, **self._same_noise(), **changes})

    def _same_noise(self) -> dict[str, TargetNode]:
        node = getattr(self.config, "privacy", None)
        if not isinstance(node, TargetNode) or self.promise is None:
            return {}
        z = self.promise.noise_multiplier
        fixed = {"target_epsilon": None, "noise_multiplier": z, "delta": self.promise.delta}
        known = {key: value for key, value in fixed.items() if key in node.arguments}
        if z is None or "noise_multiplier" not in known:
            return {}
        return {"privacy": node.model_copy(update={"arguments": {**node.arguments, **known}})}


def load(folder: Path) -> Target:
    """Reads a run's folder.

    Raises:
        ConfigError: it holds no run, one without a model, one of Flower's back end, or one that this version of Trellis
            or the data that are there now would make otherwise.
    """
    path = folder.expanduser().resolve()
    summary = read_summary(path / NAME)
    if summary is None or not (path / CONFIG).is_file():
        raise _refused(path, f"it holds no run: {NAME} and {CONFIG} are missing or torn")
    if not (path / MODEL).is_file():
        status = summary.get("status", "unknown")
        raise _refused(
            path,
            f"there is no {MODEL}: the run is {status}, and only one that made a model can be audited",
        )
    config = _config(path, str(summary.get("task", "")))
    if config.backend != "engine":
        raise _refused(
            path,
            f"it ran with backend={config.backend}: audits train on the engine; run it with backend=engine",
        )
    if config.identity_hash() != summary.get("config_hash"):
        raise _refused(
            path,
            "this version of Trellis reads its config.yaml otherwise: run it again, and audit that",
        )
    rounds, clients = summary.get("rounds_completed"), summary.get("num_clients")
    if not isinstance(rounds, int) or not isinstance(clients, int) or rounds < 1 or clients < 1:
        raise _refused(path, f"{NAME} does not say how many rounds and clients there were")
    target = Target(path, summary, config, clients, rounds, _promise(path, summary.get("privacy")))
    found = Checkpoints(path / "checkpoints").newest()
    if found is not None and found.state.get("data_hash") != target.assembly.data_hash:
        raise _refused(path, "the task's data are not those that the run was trained on")
    return target


def _config(path: Path, task: str) -> Config:
    try:
        raw = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _refused(path / CONFIG, f"can't be read ({error})") from error
    if not isinstance(raw, dict):
        raise _refused(path / CONFIG, "is no mapping")

    def name_of(place: str, dotted: str) -> str:
        return task if place == "task" else dotted.rpartition(".")[2].lower()

    checker = Checker(name_of)
    # A part that was chosen as none stands there as null.
    clean = checker.check({key: value for key, value in raw.items() if value is not None})
    if checker.faults:
        raise ConfigError(checker.faults)
    return Config.model_validate(clean)


def _promise(path: Path, found: Any) -> Promise | None:
    if found is None:
        return None
    try:
        z = found.get("noise_multiplier")
        return Promise(
            unit=str(found["unit"]),
            epsilon=float(found["epsilon"]),
            delta=float(found["delta"]),
            adjacency=str(found["adjacency"]),
            noise_multiplier=None if z is None else float(z),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refused(path / NAME, f"its privacy can't be read ({error!r})") from error


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError([Fault(str(path), reason)])
