"""A device dies in each phase of a secure sum: the sum of the others is opened, and it is the right one.

The right one is computed without masks, on the engine, from the clients that had sent their uploads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

from fl_app.assembly import Assembly, engine_grid, make_strategy
from fl_app.compose import compose
from fl_app.engine import EngineGrid
from fl_app.flower.grid import GridAround
from tests.chaos.scene import SMALL, Scene, assert_whole

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.timeout(900),
]

CLIENTS, LOST = 4, 3
SECURE = ["strategy=secure", "collector.limit=4", "rounds=1"]
PHASES = {"keys": True, "shares": True, "upload": True, "unmask": False}
"""Whether a client that dies as it is asked for this is missing in the sum."""


class Without(GridAround):
    """An engine's grid that takes no message to some clients."""

    def __init__(self, grid: EngineGrid, lost: Iterable[int]) -> None:
        super().__init__(grid)
        self.clock, self.roster = grid.clock, grid.roster
        self._lost = {grid.roster[client] for client in lost}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return super().push_messages(
            [one for one in messages if one.metadata.dst_node_id not in self._lost]
        )


def in_clear(lost: Iterable[int]) -> dict[str, np.ndarray[Any, Any]]:
    """The model after one round of plain averaging without these clients."""
    chosen = ["task=digits", *SMALL, f"num_clients={CLIENTS}", "rounds=1", "runtime.workers=1"]
    assembly = Assembly(compose(chosen))
    strategy = make_strategy(assembly, CLIENTS)
    with engine_grid(assembly, CLIENTS, 0.0) as grid:
        assert isinstance(grid, EngineGrid)
        strategy.start(Without(grid, lost), assembly.network.arrays(), num_rounds=1)
    assert strategy.model is not None
    return strategy.model.arrays()


@pytest.mark.parametrize("phase", PHASES)
def test_the_sum_of_those_that_are_left_is_right(tmp_path: Path, phase: str) -> None:
    with Scene(tmp_path, CLIENTS, *SECURE) as scene:
        proxy = scene.proxies[LOST]
        # The request is there, and nothing goes back. Between the two words stand a protobuf's tags and lengths; the
        # app's own code, which passes here too, has letters or dots there.
        said = rb"step[\x00-\x1f*]{1,8}" + phase.encode()
        asked = proxy.catch(said, "down", lambda: proxy.set("hold"))
        run = scene.start()
        run.until(asked.is_set, f"phase {phase}")
        scene.nodes[LOST].kill()
        assert run.ended() == 0
        summary = scene.summary
        assert_whole(summary, 1)
        row = summary["history"][0]
        assert (row["clients_sampled"], row["clients_failed"], row["void"]) == (CLIENTS, 1, False)
        found = load_file(scene.run_folder / "model.safetensors")
    wanted = in_clear([LOST] if PHASES[phase] else [])
    other = in_clear([] if PHASES[phase] else [LOST])
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
        assert not np.allclose(found[name], other[name], atol=1e-4)  # the comparison can fail
