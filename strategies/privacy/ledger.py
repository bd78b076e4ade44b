"""What has been spent, on the disk before it is spent: a file that a charge is added to and nothing is taken from.

    {"format": "trellis-privacy-ledger-1", "mechanism": "gaussian, unit client, …"}
    {"round": 1, "release": {"kind": "gaussian", "noise_multiplier": 1.0, …}}

One JSON line each, written and synced (fsync) before the round begins. So whatever was ever released has a whole line
here, and what a line without its break was for, of a process killed as it wrote, was never released: it is cut off. A
whole line counts, whatever became of its round: a round that is run again draws fresh noise and is charged again.
Privacy odometers assume no less (Rogers, Roth, Ullman & Vadhan 2016, "Privacy Odometers and Filters"): the account must
hold wherever the run stops.

One process at a time: a run's folder is locked by whoever runs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strategies.privacy.accountants import release_from_data, release_to_data
from strategies.privacy.events import Release

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
        OSError: it can't be read, or what was cut off can't be removed.
    """

    def __init__(self, path: Path | None, mechanism: str | Mapping[str, Any]) -> None:
        self._path = path
        self._header = {
            "format": FORMAT,
            "mechanism": mechanism if isinstance(mechanism, str) else dict(mechanism),
        }
        self._charges: list[Charge] = []
        if path is not None:
            self._read(path)

    @property
    def charges(self) -> list[Charge]:
        """Each charge with its round, in the order in which they were made."""
        return list(self._charges)

    def charge(self, release: Release, round_number: int) -> None:
        """Adds a charge; when this returns it is on the disk, and the release may be made.

        Raises:
            OSError: it could not be written: the release must not be made. What came to the file is taken off again, or
                counts once the file is next read whole.
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
            _from_data(charge) if isinstance(charge, Mapping) else charge for charge in charges
        ]
        common = min(len(remembered), len(self._charges))
        for number in range(common):
            if remembered[number] != self._charges[number]:
                raise ValueError(
                    f"charge {number + 1} is {self._charges[number]} in {self._name} and {remembered[number]} in the"
                    f" checkpoint: they are of two runs"
                )
        self._append(remembered[common:])

    @property
    def _name(self) -> str:
        return "the ledger" if self._path is None else str(self._path)

    def _append(self, charges: Sequence[Charge]) -> None:
        if self._path is not None and charges:
            _write(self._path, self._header, charges)
        self._charges.extend(charges)

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        lines = whole.splitlines()
        if not lines:
            return  # killed as the header was written: nothing was released
        header = _object(lines[0], path, 1)
        if header != self._header:
            differing = sorted(
                key
                for key in header.keys() | self._header.keys()
                if header.get(key) != self._header.get(key)
            )
            raise ValueError(
                f"{path} is of another mechanism: "
                + "; ".join(
                    f"its {key} is {header.get(key)!r}, not {self._header.get(key)!r}"
                    for key in differing
                )
                + ": choose another folder, or the settings that it was made with"
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                self._charges.append(_from_data(_object(line, path, number)))
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is no charge: {error}") from error


def _write(path: Path, header: Mapping[str, Any], charges: Iterable[Charge]) -> None:
    """Adds whole lines and waits until they, and a new file's name, are on the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        length = os.fstat(handle).st_size
        lines = [*([header] if not length else []), *map(_to_data, charges)]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            written = os.write(handle, content)
            if written < len(content):
                raise OSError(f"{path}: {written} of {len(content)} bytes could be written")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, length)  # a piece of a line would spoil the next one
            raise
    finally:
        os.close(handle)
    if not length:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"line {number} of {path} is no JSON object")
    return content


def _to_data(charge: Charge) -> dict[str, Any]:
    release, round_number = charge
    return {"round": round_number, "release": release_to_data(release)}


def _from_data(data: Mapping[str, Any]) -> Charge:
    round_number, release = data.get("round"), data.get("release")
    if not isinstance(round_number, int) or isinstance(round_number, bool):
        raise ValueError(f"a charge's round can't be {round_number!r}")
    if not isinstance(release, Mapping):
        raise ValueError(f"a charge's release can't be {release!r}")
    return release_from_data(release), round_number
