"""What the engine's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fl_app.engine import Answer, ProcessPool


@pytest.fixture
def pool_of() -> Iterator[Callable[..., ProcessPool]]:
    pools = []

    def make(factory: Callable[[], Answer], workers: int = 2, **more: Any) -> ProcessPool:
        pools.append(ProcessPool(factory, workers, **more))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
