"""What annotations admit, and the words in which a refusal says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Len, Lt, MaxLen, MinLen, MultipleOf, Predicate
from hypothesis import given
from hypothesis import strategies as st

from fl_app.config.faults import ABSENT
from fl_app.config.parameters import (
    InadmissibleError,
    accepted,
    admit,
    convert,
    parameters_of,
    plain,
)

if TYPE_CHECKING:
    from nowhere import Unknown

Rate = Annotated[float, Gt(0)]
Share = Annotated[float, Gt(0), Le(1)]
Count = Annotated[int, Ge(1)]


def refusal(annotation: Any, value: Any) -> InadmissibleError:
    with pytest.raises(InadmissibleError) as caught:
        admit(annotation, value)
    return caught.value


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (Rate, -1, "must be greater than 0"),
        (Rate, 0.0, "must be greater than 0"),
        (Rate, "x", "must be a number greater than 0"),
        (Rate, math.nan, "must be a finite number greater than 0"),
        (float, math.inf, "must be a number"),
        (Share, 2, "must be greater than 0 and at most 1"),
        (Annotated[float, Ge(0), Lt(1)], "1.5", "must be a number of at least 0 and less than 1"),
        (Count, 0, "must be at least 1"),
        (Count, 1.5, "must be a whole number of at least 1"),
        (Count, True, "must be a whole number of at least 1: true and false are not numbers"),
        (float, False, "must be a number: true and false are not numbers"),
        (Annotated[int, MultipleOf(8)], 3, "must be a multiple of 8"),
        (Annotated[int, Ge(1), Le(4)], 9, "must be between 1 and 4"),
        (Rate | None, "x", "must be a number greater than 0, or null"),
        (Count | Literal["auto"], 0, "must be a whole number of at least 1, or auto"),
        (
            Literal["examples", "uniform"],
            "unifrom",
            "must be one of examples, uniform; did you mean uniform?",
        ),
        (Literal["examples", "uniform"], 7, "must be one of examples, uniform"),
        (bool, "perhaps", "must be true or false"),
        (str, None, "must be text"),
        (Path, 3, "must be a path"),
        (
            Annotated[Sequence[Count], MinLen(1)],
            [],
            "must be a list of whole numbers of at least 1 with at least 1 entry",
        ),
        (
            Annotated[list[str], Len(2, 3)],
            [],
            "must be a list of texts with at least 2 and at most 3 entries",
        ),
        (Annotated[list[Any], MaxLen(1)], [1, 2], "must be a list with at most 1 entry"),
    ],
)
def test_a_refusal_says_what_is_accepted(annotation: Any, value: Any, message: str) -> None:
    assert str(refusal(annotation, value)) == message


def test_a_refusal_inside_a_list_says_where() -> None:
    error = refusal(tuple[Count, ...], [64, -3])
    assert (error.path, error.value) == (("1",), -3)
    error = refusal(dict[str, list[int]] | None, {"a": [1, "x"]})
    assert (error.path, error.value) == (("a", "1"), "x")


def test_a_rule_without_words_speaks_for_itself() -> None:
    def odd(value: int) -> bool:
        return value % 2 == 1

    assert "odd" in str(refusal(Annotated[int, Predicate(odd)], 2))
    assert "'red'" in str(refusal(Colour, "blue"))
    assert "callable" in str(refusal(Callable[[int], int], 3))


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (float, "1e-3", 0.001),
        (float, 1, 1.0),
        (int, 1e3, 1000),
        (str, 12, "12"),
        (tuple[int, ...], [1, "2"], [1, 2]),
        (Path, "a/b", "a/b"),
        (Colour, "red", "red"),
        (bool | int, True, True),
        (Any, {"a": [1]}, {"a": [1]}),
    ],
)
def test_what_is_meant_is_taken(annotation: Any, value: Any, expected: Any) -> None:
    found = admit(annotation, value)
    assert found == expected
    assert type(found) is type(expected)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_survives_as_text(value: float) -> None:
    assert admit(float, repr(value)) == value


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(), st.none()))
def test_a_range_admits_just_what_lies_in_it(value: Any) -> None:
    try:
        number = float(value) if not isinstance(value, bool) and value is not None else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str):
        return  # which texts are numbers is pydantic's to say
    if math.isfinite(number) and 0 < number <= 1:
        assert admit(Share, value) == number
    else:
        refusal(Share, value)


def test_a_converted_value_has_the_constructors_type() -> None:
    assert convert(tuple[int, ...], [1, 2]) == (1, 2)
    assert convert(Path, "a") == Path("a")
    assert convert(Colour, "red") is Colour.RED


def test_a_default_without_a_plain_form_is_left_to_the_constructor() -> None:
    assert plain((1, Path("a"))) == [1, "a"]
    assert plain(object()) is ABSENT


@dataclass
class Point:
    x: int


def test_a_dataclass_brings_its_own_rules_and_a_strange_type_is_the_constructors_to_judge() -> None:
    assert admit(Point, {"x": "3"}) == {"x": 3}
    assert refusal(Point, {"x": "left"}).path == ("x",)
    assert admit(Annotated[int, []], "anything") == "anything"


class Plain:
    def __init__(self, data: Unknown, rate: Rate = 0.5, *names: str, size: Count) -> None: ...


class Open:
    def __init__(self, **others: int) -> None: ...


@dataclass
class Base:
    rate: Rate = 1.0
    later: Unknown | None = None


@dataclass
class Derived(Base):
    size: Count = 3


def test_parameters_are_read_from_the_constructor() -> None:
    found, others = parameters_of(Plain)
    assert list(found) == ["data", "rate", "size"]
    assert not others
    assert found["size"].default is ABSENT
    assert found["rate"].default == 0.5
    assert parameters_of(Open) == ({}, True)
    assert parameters_of(object) == ({}, False)


@pytest.mark.parametrize("constructor", [Plain, Derived])
def test_a_name_for_type_checkers_only_leaves_the_other_parameters_checked(
    constructor: type,
) -> None:
    found, _ = parameters_of(constructor)
    assert found["rate"].annotation == Rate
    assert found["size"].annotation == Count
    assert {item.annotation for name, item in found.items() if name in ("data", "later")} == {Any}


def test_a_positional_only_parameter_cannot_be_configured() -> None:
    class Awkward:
        def __init__(self, number: int, /) -> None: ...

    with pytest.raises(ValueError, match="by position only"):
        parameters_of(Awkward)


def test_types_without_words_have_none() -> None:
    assert accepted(Colour) is None
    assert accepted(Annotated[int, Ge(1)]) == "a whole number of at least 1"
