"""One sum a model: what a server must remember so that clients that insist on it go on with it.

Clients join no second sum on a model, unless the server says that the first session came to nothing. So a server that
is killed, at any moment, must know afterwards which sessions it had begun, and which sums it had opened: it writes down
each before the next step. Without that its clients would refuse it for ever.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from strategies import plain_json
from strategies.protocols import Event, Reply, Request
from strategies.secagg.terms import ID_BYTES
from strategies.state import State
from strategies.update import Layout, Section, Update
from strategies.wire import Refused

log = logging.getLogger(__name__)

MODELS: Final = 16
"""Models that are remembered: a checkpoint that is torn sends a run back to the one before, and where sums of several
versions are under way at once, each is still to be written down."""
_BOOK: Final = "sessions.json"


@dataclass
class _Model:
    """What became of the sessions on one model.

    Attributes:
        begun: their ids, hexadecimal.
        spent: of those, the ones of which the server has, or may have, a sum.
        sums: that were opened; None where they have not been read yet.
    """

    begun: list[str] = field(default_factory=list)
    spent: list[str] = field(default_factory=list)
    sums: list[Update] | None = None


class Once:
    """The run's id, and of the last models the sessions and the sums.

    Args:
        folder: where they are kept; without one they last as long as this object, and its state.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._run = b""
        self._models: dict[str, _Model] = {}
        self._live: set[str] = set()

    @property
    def run(self) -> bytes:
        """16 bytes, the same in all processes of a run."""
        if not self._run:
            self._read_book()
        if not self._run:
            self._run = os.urandom(ID_BYTES)
        return self._run

    def void(self, model: bytes) -> bytes:
        """Ids of the sessions on this model that came to nothing, one after the other."""
        known = self._known(model)
        open_yet = self._live.union(known.spent)
        return b"".join(bytes.fromhex(one) for one in known.begun if one not in open_yet)

    def begin(self, model: bytes, session: bytes, *, beside: bool = False) -> None:
        """Notes a session before anybody is asked; one that goes on beside others is not void before it is `over`."""
        self._known(model).begun.append(session.hex())
        if beside:
            self._live.add(session.hex())
        self._write_book()

    def over(self, session: bytes) -> None:
        """Notes that a session will ask nobody any more: unless its sum is kept or seen, it is void."""
        self._live.discard(session.hex())

    def seen(self, model: bytes, session: bytes) -> None:
        """Notes that the server may know the sum of a session: it is never void."""
        known = self._known(model)
        if session.hex() not in known.spent:
            known.spent.append(session.hex())
            self._write_book()

    def keep(self, model: bytes, session: bytes, update: Update) -> None:
        """Keeps a sum before anything is made of it."""
        known = self._known(model)
        known.sums = [*(known.sums or ()), update]
        if self._folder is not None:
            self._write_sums(self._folder, model, known.sums)
        self.seen(model, session)

    def recall(self, model: bytes, layouts: Mapping[str, Layout]) -> list[Update]:
        """The sums on this model; none where there was none, or where their file can't be read."""
        known = self._known(model)
        if known.sums is None:
            known.sums = self._read_sums(model, layouts) if known.spent else []
        return list(known.sums)

    def state_dict(self) -> State:
        """The run's id and its sessions; the sums have files of their own."""
        return {"run": self.run.hex(), "models": json.dumps(self._book())}

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier process of the run; what the folder knows of it is newer."""
        run = bytes.fromhex(str(state["run"]))
        if self.run != run:
            self._run = run
            self._models = _models(plain_json.loads(str(state["models"])))

    def _known(self, model: bytes) -> _Model:
        _ = self.run
        if model.hex() not in self._models:
            self._models[model.hex()] = _Model()
            for old in list(self._models)[:-MODELS]:
                del self._models[old]
                if self._folder is not None:
                    self._file(self._folder, old).unlink(missing_ok=True)
        return self._models[model.hex()]

    def _book(self) -> dict[str, Any]:
        return {
            model: {"begun": known.begun, "spent": known.spent}
            for model, known in self._models.items()
        }

    def _write_book(self) -> None:
        if self._folder is None:
            return
        text = json.dumps({"run": self.run.hex(), "models": self._book()})
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{_BOOK}.{os.getpid()}.part"
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _name(temporary, self._folder / _BOOK)

    def _read_book(self) -> None:
        path = None if self._folder is None else self._folder / _BOOK
        if path is None or not path.exists():
            return
        try:
            book = plain_json.loads(path.read_text())
            self._run, self._models = bytes.fromhex(book["run"]), _models(book["models"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s can't be read, and clients may refuse to go on: %s", path, error)

    def _write_sums(self, folder: Path, model: bytes, sums: Sequence[Update]) -> None:
        about = [
            {"weight": one.weight, "members": one.members, "version": one.version, "metrics": dict(one.metrics)}
            for one in sums
        ]  # fmt: skip
        tensors = {
            f"{number}/{name}": section.vector
            for number, one in enumerate(sums)
            for name, section in one.sections.items()
        }
        path = self._file(folder, model.hex())
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_file(tensors, temporary, {"sums": json.dumps(about)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _name(temporary, path)

    def _read_sums(self, model: bytes, layouts: Mapping[str, Layout]) -> list[Update]:
        if self._folder is None:
            return []
        path = self._file(self._folder, model.hex())
        try:
            with safe_open(path, framework="numpy") as file:
                return [
                    Update(
                        {
                            name: Section(file.get_tensor(f"{number}/{name}"), layout)
                            for name, layout in layouts.items()
                        },
                        one["weight"], tuple(one["members"]), one["version"], one["metrics"],
                    )
                    for number, one in enumerate(plain_json.loads((file.metadata() or {})["sums"]))
                ]  # fmt: skip
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the sums in %s can't be read and are left out: %s", path, error)
            return []

    @staticmethod
    def _file(folder: Path, model: str) -> Path:
        return folder / f"{model[:16]}.safetensors"


def _name(temporary: Path, path: Path) -> None:
    """Gives a file that is on the disk its name there: after a power cut clients must not know more than the server."""
    temporary.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _models(book: Mapping[str, Any]) -> dict[str, _Model]:
    return {
        model: _Model(list(known["begun"]), list(known["spent"])) for model, known in book.items()
    }


class Settled:
    """A session whose outcome is there already: nobody is asked.

    Args:
        events: sums that were opened before, or the reason why none can be.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = list(events)
        self.done = False

    def start(self) -> list[Request]:
        """No requests."""
        if any(isinstance(event, Update) for event in self._events):
            log.warning(
                "a sum on this very model was opened before: it is taken up, and nobody is asked for another"
            )
        return []

    def receive(self, reply: Reply) -> list[Event]:
        """Refuses: nobody was asked."""
        raise Refused("duplicate", f"client {reply.request.client} was not asked")

    def expire(self) -> list[Event]:
        """The outcome."""
        self.done = True
        return self._events
