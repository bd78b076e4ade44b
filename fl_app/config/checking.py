"""The whole configuration held against the schema and the constructors, every fault collected on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from fl_app.config import catalogue
from fl_app.config.faults import ABSENT, Fault, unknown_key
from fl_app.config.nodes import Part, TargetNode, TaskNode
from fl_app.config.parameters import (
    InadmissibleError,
    Parameter,
    accepted,
    admit,
    fields_of,
    parameters_of,
    plain,
)
from fl_app.config.schema import Config
from fl_app.config.targets import TargetError, locate

Namer = Callable[[str, str], str]
"""Gives the name of a part from its path and its target."""


class Checker:
    """One pass over one configuration.

    Args:
        name_of: what a part is called, from its path and its target.
        skipped: groups whose choice is unknown, with nothing near it: their keys can't be judged.
    """

    def __init__(self, name_of: Namer, skipped: Iterable[str] = ()) -> None:
        self._name_of = name_of
        self._skipped = frozenset(skipped)
        self._faults: list[Fault] = []
        self._unknown: list[tuple[str, list[str], str]] = []
        self._known: set[str] = set()

    def check(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a `Config`, from the resolved mapping; complete only when `faults` are none."""
        return self._fields(fields_of(Config), raw, "")

    @property
    def faults(self) -> list[Fault]:
        """All that was found."""
        unknown = [
            unknown_key(path, siblings, self._known, leaf) for path, siblings, leaf in self._unknown
        ]
        return self._faults + unknown

    def _refuse(self, path: str, message: str, value: Any = ABSENT) -> None:
        self._faults.append(Fault(path, message, value))

    def _fields(
        self,
        parameters: Mapping[str, Parameter],
        raw: Mapping[str, Any],
        path: str,
        *,
        others: bool = False,
        beside: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Holds a mapping against what may stand in it; `beside` are names that are known at the same place."""
        self._known |= {_join(path, name) for name in parameters}
        clean: dict[str, Any] = {}
        for key, value in raw.items():
            place = _join(path, key)
            if place in self._skipped:
                continue
            if key in parameters or others:
                known = self._value(parameters.get(key, Parameter(key)), value, place)
                clean |= {} if known is ABSENT else {key: known}
            else:
                self._unknown += [
                    (place, [*parameters, *beside], leaf) for leaf in _leaves(place, value)
                ]
        for name, parameter in parameters.items():
            place = _join(path, name)
            if name not in raw and parameter.default is ABSENT and place not in self._skipped:
                wanted = accepted(parameter.annotation)
                self._refuse(place, "missing" + (f"; must be {wanted}" if wanted else ""))
        return clean

    def _value(self, parameter: Parameter, value: Any, path: str) -> Any:
        """The plain value, or a node; `ABSENT` when it is refused."""
        part = part_of(parameter.annotation)
        if part is not None:
            return self._part(parameter, part, value, path)
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, BaseModel):
            return self._group(parameter.annotation, value, path)
        if isinstance(value, Mapping) and "_target_" in value:
            return self._node(Part(), value, path) or ABSENT
        if isinstance(value, list) and any(
            isinstance(item, Mapping) and "_target_" in item for item in value
        ):
            return [
                self._value(Parameter(parameter.name), item, f"{path}.{i}")
                for i, item in enumerate(value)
            ]
        if is_dataclass(parameter.annotation) and not isinstance(value, Mapping):
            mend = f"{path}._target_=package.module.Class"
            self._refuse(path, f"must hold a _target_ and its settings, as in {mend}", value)
            return ABSENT
        try:
            return admit(parameter.annotation, value)
        except InadmissibleError as refusal:
            self._refuse(".".join((path, *refusal.path)), str(refusal), refusal.value)
            return ABSENT

    def _group(self, model: type[BaseModel], value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            self._refuse(path, f"must hold keys: {', '.join(model.model_fields)}", value)
            return ABSENT
        return self._fields(fields_of(model), value, path)

    def _part(self, parameter: Parameter, part: Part, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            told = (
                "must be a choice of the group, or hold a _target_ and its settings"
                if path in catalogue.groups()
                else f"is no group that has choices: set its keys, {path}.…="
            )
            self._refuse(path, told, value)
            return ABSENT
        settings = [key for key in value if key != "_target_"]
        if value.get("_target_") is None:
            if parameter.default is None and not settings:
                return None
            if parameter.default is None:
                for key in settings:
                    for leaf in _leaves(_join(path, key), value[key]):
                        self._refuse(
                            leaf, f"{path} is none, which has no settings; choose one with {path}="
                        )
                return ABSENT
            self._refuse(f"{path}._target_", "missing; names the class, as in package.module.Class")
            return ABSENT
        return self._node(part, value, path) or ABSENT

    def _node(self, part: Part, value: Mapping[str, Any], path: str) -> TargetNode | None:
        """A part whose class is known, its settings held against the constructor; None when it has no class."""
        target = value["_target_"]
        place = f"{path}._target_"
        if not isinstance(target, str):
            self._refuse(
                place, "must be a class by its dotted name, as in package.module.Class", target
            )
            return None
        try:
            constructor = locate(target)
            base = locate(part.base) if part.base else object
            parameters, others = parameters_of(constructor)
        except (TargetError, ValueError) as error:
            self._refuse(place, str(error), target)
            return None
        if not issubclass(constructor, base):
            self._refuse(place, f"must be a subclass of {part.base}", target)
            return None
        lacks = [name for name in part.needs if not hasattr(constructor, name)]
        if lacks:
            self._refuse(
                place, f"cannot stand for {path}: it has no {' and no '.join(lacks)}", target
            )
            return None
        own = self._open(parameters, part.offered, value, path)
        filled = {"_target_", *(part.offered & parameters.keys())}
        given = {key: item for key, item in value.items() if key not in filled}
        node = {"target": target, "name": self._name_of(path, target), "path": path}
        if part.beside is None:
            return TargetNode(**node, arguments=self._arguments(own, given, path, others=others))
        shared = self._open(parameters_of(locate(part.beside))[0], part.beside_offered, {}, path)
        for name in sorted(own.keys() & shared.keys()):
            self._refuse(
                place, f"its constructor may not take {name}: that is the partition's", target
            )
        cut = self._arguments(
            shared, {key: item for key, item in given.items() if key in shared}, path
        )
        rest = {key: item for key, item in given.items() if key not in shared}
        arguments = self._arguments(own, rest, path, others=others, beside=shared)
        federation = TargetNode(
            target=part.beside, arguments=cut, name=part.beside.rpartition(".")[2], path=path
        )
        return TaskNode(**node, arguments=arguments, federation=federation)

    def _open(
        self,
        parameters: Mapping[str, Parameter],
        offered: frozenset[str],
        given: Mapping[str, Any],
        path: str,
    ) -> dict[str, Parameter]:
        """The parameters that a user may set; setting one that the application fills in is a fault."""
        for name in sorted(offered & given.keys() & parameters.keys()):
            self._refuse(_join(path, name), "is filled in by the application", given[name])
        return {name: item for name, item in parameters.items() if name not in offered}

    def _arguments(
        self,
        parameters: Mapping[str, Parameter],
        given: Mapping[str, Any],
        path: str,
        *,
        others: bool = False,
        beside: Iterable[str] = (),
    ) -> dict[str, Any]:
        """A constructor's arguments, defaults included, so that a hash over them covers the defaults too."""
        clean = self._fields(parameters, given, path, others=others, beside=beside)
        defaults = {name: plain(item.default) for name, item in parameters.items()}
        return {name: item for name, item in (defaults | clean).items() if item is not ABSENT}


def together(clean: Mapping[str, Any]) -> list[Fault]:
    """Faults of values that are right alone and wrong together."""
    clients = clean.get("num_clients", "auto")
    quorum = (clean.get("admission") or {}).get("quorum", 1)
    if isinstance(clients, int) and quorum > clients:
        return [Fault("admission.quorum", f"must be at most num_clients, {clients}", quorum)]
    return []


def part_of(annotation: Any) -> Part | None:
    """What a field's annotation says of the part that it holds; None for plain values."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((item for item in get_args(annotation)[1:] if isinstance(item, Part)), None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _leaves(path: str, value: Any) -> list[str]:
    """The dotted paths of all that lies under a value."""
    if isinstance(value, Mapping) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(f"{path}.{key}", item)]
    return [path]
