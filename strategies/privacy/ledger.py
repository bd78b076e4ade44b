"""What has been spent, on the disk before it is spent: a file that a charge is added to and nothing is taken from.

    {"format": "trellis-privacy-ledger-1", "mechanism": "gaussian, unit client, …"}
    {"round": 1, "release": {"kind": "gaussian", "noise_multiplier": 1.0, …}}

One line each, synced before the round begins (`journal.py`): whatever was ever released has a whole line here. A whole
line counts, whatever became of its round: a round that is run again draws fresh noise and is charged again.
Privacy odometers assume no less (Rogers, Roth, Ullman & Vadhan 2016, "Privacy Odometers and Filters"): the account must
hold wherever the run stops.

One process at a time: a run's folder is locked by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strategies.privacy.events import Release, release_from_data, release_to_data
from strategies.privacy.journal import Journal

FORMAT = "trellis-privacy-ledger-1"

Charge = tuple[Release, int]
"""A release, and the round that it was charged for."""


class Ledger:
    """The charges of one mechanism.

    Args:
        path: of the file, made with the first charge; None keeps all in memory.
        mechanism: what the charges are for, as plain JSON: a file of another is refused.

    Raises:
        ValueError: the file is of another mechanism or format, or damaged.
        OSError: it can't be read.
    """

    def __init__(self, path: Path | None, mechanism: str | Mapping[str, Any]) -> None:
        named = mechanism if isinstance(mechanism, str) else dict(mechanism)
        header = {"format": FORMAT, "mechanism": named}
        self._journal = None if path is None else Journal(path, header)
        entries = [] if self._journal is None else self._journal.read()
        self._charges = [
            _from_data(entry, f"line {number} of {path}") for number, entry in enumerate(entries, 2)
        ]

    @property
    def charges(self) -> list[Charge]:
        """Each charge with its round, in the order in which they were made."""
        return list(self._charges)

    def charge(self, release: Release, round_number: int) -> None:
        """Adds a charge; when this returns it is on the disk, and the release may be made.

        Raises:
            OSError: it could not be written: the release must not be made.
        """
        self._append([(release, round_number)])

    def to_json(self) -> list[dict[str, Any]]:
        """The charges as plain JSON, for a checkpoint."""
        return [_to_data(charge) for charge in self._charges]

    def take_up(self, charges: Iterable[Charge | Mapping[str, Any]]) -> None:
        """Takes up what a checkpoint remembers where the file is missing or shorter: the longer list counts.

        Args:
            charges: as `charges` or `to_json` gave them.

        Raises:
            ValueError: neither list begins with the other: they are of two runs.
            OSError: what the file lacks could not be written.
        """
        remembered = [
            _from_data(charge, "the checkpoint") if isinstance(charge, Mapping) else charge
            for charge in charges
        ]
        for number, (told, known) in enumerate(zip(remembered, self._charges, strict=False), 1):
            if told != known:
                name = "the ledger" if self._journal is None else str(self._journal.path)
                raise ValueError(
                    f"charge {number} is {known} in {name} and {told} in the checkpoint: they are of two runs"
                )
        self._append(remembered[len(self._charges) :])

    def _append(self, charges: Sequence[Charge]) -> None:
        if self._journal is not None and charges:
            self._journal.add(map(_to_data, charges))
        self._charges.extend(charges)


def _to_data(charge: Charge) -> dict[str, Any]:
    release, round_number = charge
    return {"round": round_number, "release": release_to_data(release)}


def _from_data(data: Mapping[str, Any], place: str) -> Charge:
    round_number, release = data.get("round"), data.get("release")
    if not isinstance(round_number, int) or isinstance(round_number, bool):
        raise ValueError(f"{place} has no charge: a round can't be {round_number!r}")
    if not isinstance(release, Mapping):
        raise ValueError(f"{place} has no charge: a release can't be {release!r}")
    try:
        return release_from_data(release), round_number
    except ValueError as error:
        raise ValueError(f"{place} has no charge: {error}") from error
