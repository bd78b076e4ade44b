"""One sum a model: what a server must remember so that clients that insist on it go on with it.

Clients join no second sum on a model, unless the server says that the first session came to nothing. And a server that
is interrupted after it has opened a sum, and before its new model is on the disk, would find no client for another: it
keeps the sums of the present model, and takes them up itself.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from strategies.protocols import Event, Reply, Request
from strategies.secagg.terms import ID_BYTES
from strategies.state import State
from strategies.update import Layout, Section, Update
from strategies.wire import Refused

log = logging.getLogger(__name__)


class Once:
    """The run's id, and of the present model the void sessions and the sums.

    Args:
        path: of the file of sums; without one they last as long as this object.

    Attributes:
        run: 16 bytes, the same in all processes of a run.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.run = os.urandom(ID_BYTES)
        self._path = path
        self._void: tuple[bytes, list[bytes]] = (b"", [])
        self._key = ""
        self._sums: list[Update] = []

    def void(self, model: bytes) -> list[bytes]:
        """Ids of the sessions on this model that came to nothing, to be added to."""
        if self._void[0] != model:
            self._void = (model, [])
        return self._void[1]

    def keep(self, model: bytes, update: Update) -> None:
        """Adds a sum on this model; those on another are forgotten."""
        known = self._key == self._key_of(model)
        self._sums = [*(self._sums if known else ()), update]
        self._key = self._key_of(model)
        if self._path is not None:
            self._write(self._path)

    def recall(self, model: bytes, layouts: Mapping[str, Layout]) -> list[Update]:
        """The sums on this model, none where there was none, or where the file can't be read."""
        key = self._key_of(model)
        if self._key != key and self._path is not None and self._path.exists():
            self._read(self._path, key, layouts)
        return list(self._sums) if self._key == key else []

    def state_dict(self) -> State:
        """The run's id and the void sessions; the sums have their own file."""
        model, void = self._void
        return {"run": self.run.hex(), "model": model.hex(), "void": b"".join(void).hex()}

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier process of the run."""
        void = bytes.fromhex(str(state["void"]))
        ids = [void[begin : begin + ID_BYTES] for begin in range(0, len(void), ID_BYTES)]
        self.run = bytes.fromhex(str(state["run"]))
        self._void = (bytes.fromhex(str(state["model"])), ids)

    def _key_of(self, model: bytes) -> str:
        return f"{self.run.hex()} {model.hex()}"

    def _write(self, path: Path) -> None:
        about = [
            {"weight": one.weight, "members": one.members, "version": one.version, "metrics": dict(one.metrics)}
            for one in self._sums
        ]  # fmt: skip
        tensors = {
            f"{number}/{name}": section.vector
            for number, one in enumerate(self._sums)
            for name, section in one.sections.items()
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"model": self._key, "sums": json.dumps(about)})
        temporary.replace(path)

    def _read(self, path: Path, key: str, layouts: Mapping[str, Layout]) -> None:
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                if about.get("model") != key:
                    return
                self._sums = [
                    Update(
                        {
                            name: Section(file.get_tensor(f"{number}/{name}"), layout)
                            for name, layout in layouts.items()
                        },
                        one["weight"], tuple(one["members"]), one["version"], one["metrics"],
                    )
                    for number, one in enumerate(json.loads(about["sums"]))
                ]  # fmt: skip
                self._key = key
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the sums in %s can't be read and are left out: %s", path, error)


class Recalled:
    """A session over sums that are there already: nobody is asked.

    Args:
        sums: of an earlier session on the same model.
    """

    def __init__(self, sums: list[Update]) -> None:
        self._sums = sums
        self.done = False

    def start(self) -> list[Request]:
        """No requests."""
        log.info(
            "the sum on this model was opened before: it is taken up, and nobody is asked for another"
        )
        return []

    def receive(self, reply: Reply) -> list[Event]:
        """Refuses: nobody was asked."""
        raise Refused("duplicate", f"client {reply.request.client} was not asked")

    def expire(self) -> list[Event]:
        """The sums."""
        self.done = True
        return list(self._sums)
