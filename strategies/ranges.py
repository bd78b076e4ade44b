"""Ranges of settings, held where the settings are: a dataclass's own annotations, checked when one is made.

The same annotations are the configuration's schema; here they protect whoever builds parts in Python.
"""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen


class Ranged:
    """A dataclass whose `Annotated` bounds and `Literal` choices hold for every instance.

    Raises:
        ValueError: a setting is outside its range; the message names it, its value and the range.
    """

    def __post_init__(self) -> None:
        kind: type = type(self)
        hints = _hints(kind)
        for field in fields(self):  # type: ignore[arg-type]
            if field.init:
                _check(
                    f"{type(self).__name__}.{field.name}",
                    getattr(self, field.name),
                    hints[field.name],
                )


@cache  # reading them takes longer than all else, and a session's terms are made in each step of each client
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _check(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) in (Union, UnionType):
        if value is None and NoneType in get_args(hint):
            return
        arms = [arm for arm in get_args(hint) if arm is not NoneType]
        # A word beside numbers, such as `auto`: text is held against the words.
        words = [arm for arm in arms if isinstance(value, str) and get_origin(arm) is Literal]
        (hint,) = (words or arms)[:1]
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(
            f"{name} = {value!r}: choose one of {', '.join(map(repr, get_args(hint)))}"
        )
    if get_origin(hint) is Annotated:
        for bound in get_args(hint)[1:]:
            _hold(name, value, bound)


def _hold(name: str, value: Any, bound: object) -> None:
    if isinstance(bound, MinLen):
        if len(value) < bound.min_length:
            raise ValueError(f"{name} = {value!r}: needs at least {bound.min_length} entries")
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: must be a finite number")
    holds, words = True, ""
    match bound:
        case Gt(gt):
            holds, words = value > gt, f"greater than {gt}"
        case Ge(ge):
            holds, words = value >= ge, f"at least {ge}"
        case Lt(lt):
            holds, words = value < lt, f"less than {lt}"
        case Le(le):
            holds, words = value <= le, f"at most {le}"
        case _:
            return
    if not holds:
        raise ValueError(f"{name} = {value!r}: must be {words}")
