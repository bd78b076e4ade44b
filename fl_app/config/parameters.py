"""What a value may be, read from type annotations: of a constructor's parameters, or of a settings model's fields.

Ranges stand in the annotations (`Annotated[float, Gt(0)]`, from annotated_types), so a class is the one place where
its settings, their defaults and their ranges are written down.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError

from fl_app.config.faults import ABSENT, nearest, shown

_RULES = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True, coerce_numbers_to_str=True)
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Collection)
_GENERICS = (*_LISTS, dict, collections.abc.Mapping)
_NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


@dataclass(frozen=True)
class Parameter:
    """One setting.

    Attributes:
        name: of the keyword.
        annotation: its type with its range, `Any` where none is written.
        default: `ABSENT` where a value must be given.
    """

    name: str
    annotation: Any = Any
    default: Any = ABSENT


def parameters_of(constructor: type) -> tuple[dict[str, Parameter], bool]:
    """The keyword parameters of a class, in order, and whether it takes any others too (`**kwargs`).

    Raises:
        ValueError: the constructor has a parameter that cannot be given by name.
    """
    signature = inspect.signature(constructor)
    hints = _hints(constructor)
    found, others = {}, False
    for name, item in signature.parameters.items():
        if item.kind is item.VAR_KEYWORD:
            others = True
        elif item.kind is item.POSITIONAL_ONLY:
            raise ValueError(f"{constructor.__qualname__} takes {name} by position only")
        elif item.kind is not item.VAR_POSITIONAL:
            default = ABSENT if item.default is item.empty else item.default
            found[name] = Parameter(name, hints.get(name, Any), default)
    return found, others


def _hints(constructor: type) -> dict[str, Any]:
    # A dataclass's generated __init__ knows the names of its own module only; the class knows each base's.
    source = constructor if is_dataclass(constructor) else constructor.__init__  # type: ignore[misc]
    try:
        return typing.get_type_hints(source, include_extras=True)
    except (NameError, AttributeError, TypeError):
        # Names imported under TYPE_CHECKING don't exist now: those parameters go unchecked, the others don't.
        return _hints_one_by_one(constructor)


def _hints_one_by_one(constructor: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for owner in reversed(constructor.__mro__):
        namespace = vars(inspect.getmodule(owner) or types.ModuleType("nowhere"))
        written = {**vars(owner).get("__annotations__", {})} if is_dataclass(owner) else {}
        written |= getattr(vars(owner).get("__init__"), "__annotations__", {})
        for name, annotation in written.items():
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                hints |= typing.get_type_hints(holder, namespace, include_extras=True)
            except (NameError, AttributeError, TypeError):
                hints[name] = Any
    return hints


def fields_of(model: type[BaseModel]) -> dict[str, Parameter]:
    """The fields of a settings model, in order."""
    hints = typing.get_type_hints(model, include_extras=True)
    return {
        name: Parameter(
            name,
            hints[name],
            ABSENT if field.is_required() else field.get_default(call_default_factory=True),
        )
        for name, field in model.model_fields.items()
    }


class InadmissibleError(ValueError):
    """A value that its annotation does not admit.

    Attributes:
        path: where inside the value the matter lies; empty for the value itself.
        value: what stands there.
    """

    def __init__(self, message: str, path: tuple[str, ...], value: Any) -> None:
        super().__init__(message)
        self.path, self.value = path, value


def admit(annotation: Any, value: Any) -> Any:
    """The value as its type would have it ("1e-3" is a number where one is meant), in plain JSON types.

    Numbers must be finite, and true is not 1.

    Raises:
        InadmissibleError: it is of another type, or out of range; the message says what is accepted.
    """
    adapter = _adapter(annotation)
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError as error:
        raise _refusal(annotation, value, error) from None


def convert(annotation: Any, value: Any) -> Any:
    """The Python value that a constructor is given for a plain value that `admit` let pass."""
    return _adapter(annotation).validate_python(value)


def plain(value: Any) -> Any:
    """A default in plain JSON types, `ABSENT` when it has no such form."""
    try:
        return _ANYTHING.dump_python(value, mode="json")
    except PydanticSerializationError:
        return ABSENT


def marked(annotation: Any, marker: type) -> bool:
    """Whether an annotation, or a branch of it, carries a marker of this class (`Annotated[str, Marker()]`)."""
    return any(isinstance(rule, marker) for _, rules in _branches(annotation) for rule in rules)


def _refusal(annotation: Any, value: Any, error: ValidationError) -> InadmissibleError:
    first = error.errors(include_url=False)[0]
    path: tuple[str, ...] = ()
    inner: Any = value
    for step in first["loc"]:
        # Pydantic's path also names the branch of a union that it tried; only real keys lead into the value.
        leads = (
            step in inner
            if isinstance(inner, Mapping)
            else isinstance(inner, list) and isinstance(step, int)
        )
        if leads:
            inner = inner[step]
            path += (str(step),)
    wanted = accepted(annotation, value)
    own_words = (
        first["type"] in {"value_error", "assertion_error", "predicate_failed"} or wanted is None
    )
    if own_words:
        said = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return InadmissibleError(f"must be {wanted}: {said}" if wanted else said, path, inner)
    return InadmissibleError(f"must be {wanted}", path, inner)


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


def _strict(annotation: Any) -> Any:
    """The annotation with every `int` and `float` in it closed to booleans."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        return Annotated[annotation, BeforeValidator(_refuse_bool)]
    if origin is Annotated:
        base, *rest = arguments
        closed = [BeforeValidator(_refuse_bool)] if base in (int, float) else []
        return Annotated[(base if closed else _strict(base), *rest, *closed)]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_strict, arguments))]  # noqa: UP007
    if origin in _GENERICS:
        return origin[tuple(map(_strict, arguments))]
    return annotation


@cache
def _cached(annotation: Any) -> TypeAdapter[Any]:
    closed = _strict(annotation)
    try:
        return TypeAdapter(closed, config=_RULES)
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":
            raise
        return TypeAdapter(closed)  # a dataclass or the like, which brings its own rules


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return _cached(annotation)
    except (PydanticUserError, TypeError):
        # Pydantic has no idea of the type (or it is unhashable): the constructor itself must judge the value.
        return TypeAdapter(Any)


def accepted(annotation: Any, value: Any = ABSENT) -> str | None:
    """What an annotation admits, in words: "a whole number of at least 1, or auto".

    Args:
        annotation: with its ranges.
        value: what was given. Where it is a number and one is meant, the range alone says it.

    Returns:
        A clause that goes after "must be"; None where there are no words for the type.
    """
    branches = _branches(annotation)
    documented = [
        rule.documentation
        for _, rules in branches
        for rule in rules
        if isinstance(rule, at.DocInfo)
    ]
    if documented:
        return documented[0]
    words = [word for base, rules in branches for word in _words(base, rules)]
    if any(word is None for word in words):
        return None
    choices = [
        shown(item)
        for base, _ in branches
        if get_origin(base) is Literal
        for item in get_args(base)
    ]
    if len(choices) > 1 and len(branches) == 1:
        guess = nearest(str(value), choices) if value is not ABSENT else None
        return f"one of {', '.join(choices)}" + (f"; did you mean {guess}?" if guess else "")
    if len(branches) == 1 and isinstance(value, int | float) and not isinstance(value, bool):
        base, rules = branches[0]
        if base in (int, float) and _range(rules) and (base is float or float(value).is_integer()):
            finite = value == value and abs(value) != float("inf")
            return _range(rules) if finite else f"a finite number {_range(rules)}"
    *some, last = typing.cast("list[str]", words)
    return f"{', '.join(some)}, or {last}" if some else last


def _branches(annotation: Any, rules: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *more = get_args(annotation)
        return _branches(base, (*more, *rules))
    if origin in (Union, types.UnionType):
        return [branch for item in get_args(annotation) for branch in _branches(item, rules)]
    return [(annotation, rules)]


def _words(base: Any, rules: tuple[Any, ...]) -> Sequence[str | None]:
    """The ways to say one branch of a union; None for one that cannot be said."""
    origin = get_origin(base) or base
    if origin is Literal:
        return [shown(item) for item in get_args(base)]
    if base in (None, type(None)):
        return ["null"]
    if origin in _LISTS:
        inner = [item for item in get_args(base) if item is not Ellipsis]
        entry, entry_rules = _branches(inner[0])[0] if inner else (Any, ())
        noun = f"a list of {_PLURALS[entry]}" if entry in _PLURALS else "a list"
        return [f"{_within(noun, entry_rules)} {_length(rules)}".strip()]
    return [_within(_NOUNS[base], rules) if base in _NOUNS else None]


def _within(noun: str, rules: tuple[Any, ...]) -> str:
    bounds = _range(rules)
    return f"{noun} {'of ' if bounds.startswith('at ') else ''}{bounds}".strip()


def _range(rules: tuple[Any, ...]) -> str:
    """A range in words; empty where there is none."""
    bounds: dict[str, Any] = {}
    for rule in rules:
        for name in ("gt", "ge", "lt", "le", "multiple_of"):
            limit = getattr(rule, name, None)
            if limit is not None:
                bounds[name] = limit
    if "ge" in bounds and "le" in bounds:
        return f"between {bounds['ge']} and {bounds['le']}"
    words = {
        "gt": "greater than",
        "ge": "at least",
        "lt": "less than",
        "le": "at most",
        "multiple_of": "a multiple of",
    }
    return " and ".join(f"{words[name]} {bounds[name]}" for name in words if name in bounds)


def _length(rules: tuple[Any, ...]) -> str:
    """A length in words; empty where none is asked."""
    least = max(
        (rule.min_length for rule in rules if isinstance(rule, at.MinLen | at.Len)), default=0
    )
    most = [
        rule.max_length
        for rule in rules
        if isinstance(rule, at.MaxLen | at.Len) and rule.max_length is not None
    ]
    words = [f"at least {least}" if least else "", f"at most {min(most)}" if most else ""]
    said = " and ".join(filter(None, words))
    return f"with {said} {'entry' if said.endswith(' 1') else 'entries'}" if said else ""
