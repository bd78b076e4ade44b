"""Grids around Flower's: handed on as it is, and one that a user's Ctrl-C reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fl_app.flower.bundle import stop_requested

if TYPE_CHECKING:
    from flwr.supercore.run import Run


class GridAround(Grid):
    """Another grid, handed on as it is: a base for grids that change one thing.

    Args:
        grid: the other.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Hand on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Of the other grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Hand on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Hand on."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Hand on; neither changed nor interrupted."""
        return self._grid.send_and_receive(messages, timeout=timeout)


class InterruptibleGrid(GridAround):
    """Another grid, that raises ``KeyboardInterrupt`` once the run is asked to stop.

    A signal cannot do that: a simulated ServerApp is a thread beside the main one. It raises where
    a ServerApp waits, that is, wherever it asks for replies or nodes.

    Args:
        grid: the grid that Flower handed over.
        stop: whether the run is asked to stop.
    """

    def __init__(self, grid: Grid, stop: Callable[[], bool] = stop_requested) -> None:
        super().__init__(grid)
        self._stop = stop

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes.

        Raises:
            KeyboardInterrupt: the run is asked to stop.
        """
        self._check()
        return super().get_node_ids()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have come.

        Raises:
            KeyboardInterrupt: the run is asked to stop.
        """
        self._check()
        return super().pull_messages(message_ids)

    def _check(self) -> None:
        if self._stop():
            raise KeyboardInterrupt
