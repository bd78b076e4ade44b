"""The sums that were opened on the present model, kept until the next model: there is never a second one.

Clients give shares for one sum a model. A server that is interrupted after it has opened a sum, and before its new
model is on the disk, would find no client for another: it takes up the sum itself.
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
from strategies.update import Layout, Section, Update
from strategies.wire import Refused

log = logging.getLogger(__name__)


class Journal:
    """Opened sums of one model at a time.

    Args:
        path: of the file; without one the sums last as long as this object.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._model = ""
        self._sums: list[Update] = []

    def keep(self, run: bytes, model: bytes, update: Update) -> None:
        """Adds a sum on this model; those on another are forgotten."""
        known = self._model == _key(run, model)
        self._sums = [*(self._sums if known else ()), update]
        self._model = _key(run, model)
        if self._path is not None:
            self._write(self._path)

    def recall(self, run: bytes, model: bytes, layouts: Mapping[str, Layout]) -> list[Update]:
        """The sums on this model, none where there was none, or where the file can't be read."""
        if self._model != _key(run, model) and self._path is not None and self._path.exists():
            self._read(self._path, _key(run, model), layouts)
        return list(self._sums) if self._model == _key(run, model) else []

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
        save_file(tensors, temporary, {"model": self._model, "sums": json.dumps(about)})
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
                self._model = key
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the sums in %s can't be read and are left out: %s", path, error)


def _key(run: bytes, model: bytes) -> str:
    return f"{run.hex()} {model.hex()}"


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
