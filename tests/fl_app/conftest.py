"""Runs leave blank pictures here: to lay two of them out takes as long as a small run takes to train."""

from collections.abc import Generator
from pathlib import Path

import pytest
from matplotlib.figure import Figure

HERE = Path(__file__).parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The files are written as ever, with nothing on them, but for tests that are marked `pictures`.

    A hook, not a fixture: it holds for the fixtures of whole modules, and ends with each test.
    """
    if HERE not in item.path.parents or item.get_closest_marker("pictures"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda figure, renderer: None)
        return (yield)
