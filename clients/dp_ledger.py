"""What a client's examples have been charged, on its own disk, before anything is made of them.

A privacy loss is a fact from the moment at which training starts: whether the update arrives, is taken or is asked for
again changes nothing. So a charge depends on no server, unlike a client's other state (`clients.store`), and each
attempt is one. The loss of all of them together is an accountant's to say; releases with other settings compose.

    <folder>/client-3.spent        a line of JSON for what the file is, then one for each charge; lines are only added
    <folder>/client-3.spent.lock   held while the file is read and a line is added

A line counts once it is whole and on the disk, and training starts after that (`strategies.privacy.journal`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from strategies.privacy.events import GaussianRelease
from strategies.privacy.journal import Journal

Charge = tuple[GaussianRelease, int]
"""A release, and how many of its kind."""

_HEADER = {
    "format": "trellis-client-ledger-1",
    "unit": "example",
    "relation": "add_or_remove_one",
}


class ClientLedger:
    """One logical client's charges.

    Args:
        folder: of all clients of this process; it is made when something is first charged.
        client: logical id.
    """

    def __init__(self, folder: Path, client: int) -> None:
        self._folder = folder
        self.path = folder / f"client-{int(client)}.spent"
        self._journal = Journal(self.path, _HEADER)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the file: two requests at once must not both find room for one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            yield

    def charges(self) -> list[Charge]:
        """All charges, in their order.

        Raises:
            ValueError: the file is another mechanism's, or damaged.
        """
        return [self._charge(entry) for entry in self._journal.read()]

    def add(self, release: GaussianRelease, count: int) -> None:
        """Adds a charge, and returns once it is on the disk.

        Args:
            release: of each.
            count: how many.

        Raises:
            ValueError: as `charges`.
            OSError: it could not be written; nothing may then be released.
        """
        self._journal.read()  # another request may have added to it
        self._journal.add([{**asdict(release), "count": count}])

    def _charge(self, entry: dict[str, Any]) -> Charge:
        try:
            count = int(entry.pop("count"))
            return GaussianRelease(**entry), count
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} has no charge at {entry}: {error}") from error
