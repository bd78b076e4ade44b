"""Parts of a configuration: the node that a `_target_` makes, and what the application asks of its class.

A node is a dotted name and plain settings, complete and checked; what class stands behind it, and what its constructor
takes, is `targets.py`' and `checking.py`'s. Must not know which groups a configuration has: that is `schema.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings: immutable, with no others and no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Part:
    """What the configuration needs to know of a part that a `_target_` names.

    Attributes:
        base: dotted name of the class that the target must be a subclass of; None where any class will do.
        needs: methods that the class must have.
        offered: constructor parameters that the application fills in, and a user therefore can't set.
        beside: dotted name of a class whose own settings stand among the part's; None where there is none.
        beside_offered: what the application fills in of that class's parameters.
    """

    base: str | None = None
    needs: tuple[str, ...] = ()
    offered: frozenset[str] = frozenset()
    beside: str | None = None
    beside_offered: frozenset[str] = frozenset()


class TargetNode(Settings):
    """A part of the run: a class and what its constructor is given.

    Attributes:
        target: dotted name of the class.
        arguments: its settings in plain JSON types, defaults included; another node where a part holds a part.
        name: the choice that was made in the part's group; the class's name where a class was named instead.
        path: where the node stands in the configuration.
    """

    target: str
    arguments: dict[str, Any]
    name: str
    path: str

    def to_dict(self) -> dict[str, Any]:
        """The node as it would stand in YAML: `_target_` and the settings beside it."""
        return {"_target_": self.target} | {
            key: plain_of(value) for key, value in self.arguments.items()
        }


class TaskNode(TargetNode):
    """The task, and how its training data are cut among the clients.

    Attributes:
        federation: the cut, a node of its own (`clients.tasks.FederatedData`).
    """

    federation: TargetNode

    def to_dict(self) -> dict[str, Any]:
        """As one mapping, as in YAML."""
        cut = self.federation.to_dict()
        return super().to_dict() | {key: value for key, value in cut.items() if key != "_target_"}


def plain_of(value: Any) -> Any:
    """Settings and nodes in plain JSON types, keys in the order of their declaration."""
    if isinstance(value, TargetNode):
        return value.to_dict()
    if isinstance(value, BaseModel):
        return {name: plain_of(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {key: plain_of(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_of(item) for item in value]
    return str(value) if isinstance(value, Path) else value
