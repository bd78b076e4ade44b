"""What a client must remember from round to round, on its own disk.

A proposed state becomes the client's only once the server says that the model holds the update that went with it:
a lost or refused reply must not leave the client believing in a step that never happened. One safetensors file per
logical client, replaced atomically; on a device it stays so behind a power cut.

Which proposals are the last few is told by when they were written, not by their rounds: a server that went back to an
older checkpoint counts rounds anew, and what was proposed in the rounds that were lost has the highest numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clients.durable import replace_durably

log = logging.getLogger(__name__)

_PROPOSALS = 3
"""Proposals kept beside the state that holds, and the new one."""
_WRITTEN = "written"
"""Key in a file's metadata: rounds of its states, in the order in which they were written."""

State = Mapping[str, NDArray[np.float32]]


class ClientStore:
    """States of logical clients under one folder.

    Args:
        root: the folder; it is made when the first state is written.
        durable: each state is on the disk when `propose` returns.
    """

    def __init__(self, root: Path, *, durable: bool = False) -> None:
        self._root, self._durable = root, durable

    def load(self, client: int, included: int) -> dict[str, NDArray[np.float32]]:
        """The client's state as of the last update that the server took.

        Args:
            client: logical id.
            included: the last round whose update from this client the model holds; 0 when there is none.

        Returns:
            Named float32 vectors; empty for a client that has no state yet.
        """
        states = self._read(client)
        state = states.get(included)
        if state is None:
            if included:
                log.warning(
                    "client %d has no state of round %d (it has %s) and starts afresh",
                    client,
                    included,
                    sorted(states),
                )
            return {}
        return state

    def propose(
        self,
        client: int,
        included: int,
        round_number: int,
        state: State,
        kept: Iterable[int] = (),
    ) -> None:
        """Writes the state that holds if the server takes this round's update, beside the one that holds now.

        Proposals of other rounds stay too, the last few that were written: a reply may come late and be the one that is
        taken. So do the states of the rounds `kept`: the server may be sent back to a model that holds these.
        """
        before = self._read(client)
        before.pop(round_number, None)
        proposed = [number for number in before if number > included][-_PROPOSALS:]
        stay = {included, *kept, *proposed}
        states = {number: held for number, held in before.items() if number in stay}
        states[round_number] = dict(state)
        tensors = {
            f"{number}/{name}": v for number, held in states.items() for name, v in held.items()
        }
        told = {_WRITTEN: " ".join(map(str, states))}
        replace_durably(
            self._path(client), lambda file: save_file(tensors, file, told), durable=self._durable
        )

    def _read(self, client: int) -> dict[int, dict[str, NDArray[np.float32]]]:
        """States by the round that they belong to, in the order in which they were written."""
        path = self._path(client)
        states: dict[int, dict[str, NDArray[np.float32]]] = {}
        if not path.exists():
            return states
        try:
            with safe_open(path, framework="numpy") as file:
                told = (file.metadata() or {}).get(_WRITTEN, "")
                place = {int(number): index for index, number in enumerate(told.split())}
                for key in file.keys():  # noqa: SIM118 - the file is no mapping
                    number, _, name = key.partition("/")
                    states.setdefault(int(number), {})[name] = file.get_tensor(key)
        except (SafetensorError, ValueError, OSError) as error:
            log.warning(
                "the state of client %d in %s can't be read (%s): it starts afresh",
                client,
                path,
                error,
            )
            return {}
        # What is not told of, in a file of an earlier version, counts as older than what is.
        return {n: states[n] for n in sorted(states, key=lambda n: (place.get(n, -1), n))}

    def _path(self, client: int) -> Path:
        return self._root / f"client-{int(client)}.safetensors"
