"""What a data owner keeps of encrypted training between two messages, on its own disk.

    <folder>/client-3/turn-<session>.json            the round that it is in the middle of
    <folder>/client-3/party-<run>.json               what a run's compute party has of it, as far as it knows
    <folder>/client-3/<data>/batch-0.safetensors     a mini-batch's fresh ciphertexts, as they travel

A deployed client is a process a message, and an owner encrypts a mini-batch once: what a compute party has lost is sent
again as it was. `data` names examples, key and plan together, so other examples or another key never meet these
ciphertexts. Files are replaced as a whole; what can't be read counts as none. Folders are for this user only: the last
layer's mean errors are in clear in a turn's file. Turns and ciphertexts that nobody takes up again go by their age
(`clients.leftovers`). Nothing here knows a key or decrypts, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clients.leftovers import take_up
from strategies import plain_json

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[np.generic]]

_MOST_NOTES: Final = 8
"""Sessions and runs that are remembered; a device may be in several at once."""
_MOST_DATA: Final = 4
"""Sets of mini-batches that are kept: of the runs, or the keys, that were last used."""


@dataclass(frozen=True)
class HalfDone:
    """The round that an owner is in the middle of.

    Attributes:
        session: the server's token of it.
        turn: the last one that was answered.
        bias: the last layer's mean errors (K,), which the owner computes itself; None before the logits came.
        loss: mean cross-entropy of the mini-batch; None before.
        accuracy: share of the mini-batch that is classified right; None before.
    """

    session: str
    turn: int
    bias: tuple[float, ...] | None = None
    loss: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Acknowledged:
    """What a compute party has used, and therefore has.

    Attributes:
        party: its name.
        data: name of the owner's examples, key and plan.
        batches: numbers of mini-batches.
    """

    party: str = ""
    data: str = ""
    batches: tuple[int, ...] = ()

    def has(self, data: str, batch: int) -> bool:
        """Whether keys and mini-batch need not be sent."""
        return data == self.data and batch in self.batches

    def plus(self, party: str, data: str, batch: int) -> Acknowledged:
        """With one mini-batch more; another party, or other data, begin anew."""
        same = (party, data) == (self.party, self.data)
        known = set(self.batches) if same else set[int]()
        return Acknowledged(party, data, tuple(sorted(known | {batch})))


class OwnerFolder:
    """One logical client's own.

    Args:
        root: of all clients of this process.
        client: logical id.
        run: tells what is believed of one run's party from another's.

    Attributes:
        client: which.
        path: its folder, made when something is first written.
    """

    def __init__(self, root: Path, client: int, run: str = "") -> None:
        self.client = int(client)
        self._party = f"party-{hashlib.sha256(run.encode()).hexdigest()[:16]}.json"
        self.path = root / f"client-{int(client)}"

    def turn(self, session: str) -> HalfDone | None:
        """What the client is in the middle of; None where that is another session, or nothing that can be read."""
        name = f"turn-{session}.json"
        take_up(self.path / name)
        found = self._read(name)
        try:
            if found is None or found["session"] != session:
                return None
            bias = found["bias"]
            return HalfDone(
                session,
                int(found["turn"]),
                None if bias is None else tuple(map(float, bias)),
                found["loss"],
                found["accuracy"],
            )
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s can't be read: %s", self.path / f"turn-{session}.json", error)
            return None

    def save_turn(self, state: HalfDone) -> None:
        """Writes it. Not synced: after a power cut the client is out of one round."""
        self._write(f"turn-{state.session}.json", asdict(state))

    def acknowledged(self) -> Acknowledged:
        """What the compute party has; nothing where that can't be read."""
        found = self._read(self._party)
        try:
            if found is None:
                return Acknowledged()
            batches = tuple(map(int, found["batches"]))
            return Acknowledged(str(found["party"]), str(found["data"]), batches)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s can't be read: %s", self.path / self._party, error)
            return Acknowledged()

    def acknowledge(self, state: Acknowledged) -> None:
        """Writes what the compute party has."""
        if state != self.acknowledged():
            self._write(self._party, asdict(state))

    def ciphertexts(self, data: str, batch: int) -> dict[str, NDArray[np.generic]] | None:
        """A mini-batch's fresh ciphertexts, as they travel; None where they have to be made."""
        path = self._batch(data, batch)
        take_up(path.parent)
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
                told = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s is made again: %s", path, error)
            return None
        if _digest(arrays) != told:
            log.warning("%s is made again: its checksum is another", path)
            return None
        return arrays

    def has_ciphertexts(self, data: str, batch: int) -> bool:
        """Whether they are there, whole or not."""
        return self._batch(data, batch).exists()

    def keep_ciphertexts(self, data: str, batch: int, arrays: Arrays) -> None:
        """Writes a mini-batch's fresh ciphertexts, down to the disk, and lets go of data that were not used of late."""
        path = self._batch(data, batch)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(dict(arrays), temporary, {"sha256": _digest(arrays)})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        kept = sorted(
            (one for one in self.path.iterdir() if one.is_dir()),
            key=lambda one: one.stat().st_mtime_ns,
        )
        for old in kept[:-_MOST_DATA]:
            shutil.rmtree(old, ignore_errors=True)

    def _batch(self, data: str, batch: int) -> Path:
        return self.path / data / f"batch-{int(batch)}.safetensors"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = plain_json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s can't be read: %s", self.path / name, error)
            return None
        return found if isinstance(found, dict) else None

    def _write(self, name: str, content: Mapping[str, object]) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.path / name
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
        kind = name.split("-", 1)[0]
        with suppress(FileNotFoundError):  # another run's process tidies up here as well
            found = self.path.glob(f"{kind}-*.json")
            for old in sorted(found, key=lambda one: one.stat().st_mtime_ns)[:-_MOST_NOTES]:
                old.unlink(missing_ok=True)


def _digest(arrays: Arrays) -> str:
    """SHA-256 over names, shapes and numbers."""
    hashed = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        hashed.update(f"{name} {array.dtype} {array.shape}\0".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()
