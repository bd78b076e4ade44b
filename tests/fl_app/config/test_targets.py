"""Classes by their dotted names, and objects of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fl_app.config.faults import ConfigError
from fl_app.config.nodes import TargetNode
from fl_app.config.targets import TargetError, build, locate

PARTS = """
import math
from typing import Annotated, Sequence
from annotated_types import Gt

class Model:
    def __init__(self, input_shape, *, hidden: tuple[int, ...] = (8,), limit: Annotated[float, Gt(0)] = math.inf):
        if hidden and hidden[0] == 13:
            raise ValueError("a first layer of 13 is unlucky")
        self.input_shape, self.hidden, self.limit = input_shape, hidden, limit

class Bare:
    def __init__(self, inner=None, parts: Sequence[Model] = ()):
        self.inner, self.parts = inner, parts

class Open:
    def __init__(self, **settings):
        self.settings = settings

number = 3
"""


@pytest.fixture(autouse=True)
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "target_parts.py").write_text(PARTS)
    (tmp_path / "target_broken.py").write_text("import target_parts\n1 / 0\n")
    (tmp_path / "target_needy.py").write_text("import no_such_library\n")


def node(name: str, /, **arguments: Any) -> TargetNode:
    return TargetNode(target=f"target_parts.{name}", arguments=arguments, name=name, path="model")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Model", "dotted name"),
        ("target_parts.", "dotted name"),
        ("a b.C", "dotted name"),
        (
            "no_such_module.C",
            "there is no module no_such_module; it must lie in the working directory",
        ),
        ("target_parts.sub.C", "there is no module target_parts.sub"),
        ("target_needy.C", "target_needy needs no_such_library"),
        ("target_broken.C", "cannot be imported: ZeroDivisionError: division by zero"),
        ("target_parts.Modell", "target_parts has no Modell; did you mean target_parts.Model?"),
        ("target_parts.Zzzzz", "target_parts has no Zzzzz$"),
        ("target_parts.number", "must be a class; this is a int"),
    ],
)
def test_a_name_without_a_class_is_explained(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message.replace("?", r"\?")):
        locate(target)


def test_an_object_gets_its_settings_in_the_constructors_types() -> None:
    found = build(node("Model", hidden=[4, 2], limit=3.0), input_shape=(1, 8, 8))
    assert (found.input_shape, found.hidden, found.limit) == ((1, 8, 8), (4, 2), 3.0)


def test_a_default_that_nobody_could_write_is_handed_back_as_it_is() -> None:
    found = build(node("Model", hidden=[8], limit=float("inf")), input_shape=())
    assert (found.hidden, found.limit) == ((8,), float("inf"))


def test_what_a_constructor_does_not_ask_for_is_not_forced_on_it() -> None:
    assert build(node("Bare"), input_shape=(1,), num_classes=10).inner is None
    assert build(node("Open", a=1), b=2).settings == {"a": 1, "b": 2}


def test_parts_within_parts_are_built_too() -> None:
    model = node("Model", hidden=[1])
    found = build(node("Bare", inner=model, parts=[model, model]), input_shape=(5,))
    assert found.inner.input_shape == (5,)
    assert [part.hidden for part in found.parts] == [(1,), (1,)]


def test_a_constructors_own_refusal_is_a_fault_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="Model: a first layer of 13 is unlucky"):
        build(node("Model", hidden=[13]), input_shape=())
    with pytest.raises(ConfigError, match="unlucky"):
        build(node("Bare", inner=node("Model", hidden=[13])), input_shape=())
