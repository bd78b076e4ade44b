"""A client's training between two turns, on its own disk.

A deployed client is a process a message: what it is in the middle of lies in one safetensors file for each logical
client, replaced as a whole. It belongs to one session of the server's and to no other; it holds the client's own
parameters and the moments of its optimiser, never an example or an activation. The next session's takes its place; one
that nobody takes up again goes by its age (`clients.leftovers`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clients.leftovers import take_up
from strategies import plain_json

log = logging.getLogger(__name__)


@dataclass
class HalfDone:
    """What a client is in the middle of.

    Attributes:
        session: the server's token of it.
        turn: the next turn whose answer is wanted.
        shapes: names and shapes of the client's parameters, in their order.
        parameters: as they are now, (d,) float32.
        moments: of the optimiser, as the trainer has them; None where it has none.
        pending: gradients of a turn whose step waits for the server's answer, (k, d) float32; None where none does.
        key: of the noise on activations, 32 bytes in hex: a turn that is asked for twice has the same noise twice, or
            the server could average it away.
        stride: mini-batches from one turn's first to the next one's; 0 before any is known. It stays what it was.
        figures: sums of what is reported at the end, and as `…/count` how many values each is of.
    """

    session: str
    turn: int
    shapes: Mapping[str, tuple[int, ...]]
    parameters: Tensor
    moments: Tensor | None
    pending: Tensor | None
    key: str
    figures: dict[str, float]
    stride: int = 0


class HalfDoneFolder:
    """The half-done trainings of logical clients under one folder.

    Args:
        root: the folder; it is made when the first is written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def load(self, client: int, session: str) -> HalfDone | None:
        """What the client is in the middle of; None where that is another session, or nothing that can be read."""
        path = self._path(client)
        take_up(path)
        try:
            with safe_open(path, framework="pt") as file:
                told = plain_json.loads((file.metadata() or {}).get("half-done", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if told.get("session") != session:
                return None
            return HalfDone(
                session,
                int(told["turn"]),
                {name: tuple(shape) for name, shape in told["shapes"].items()},
                tensors["parameters"],
                tensors.get("moments"),
                tensors.get("pending"),
                str(told["key"]),
                {key: float(value) for key, value in told["figures"].items()},
                int(told["stride"]),
            )
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("what client %d was in the middle of can't be read: %s", client, error)
            return None

    def save(self, client: int, state: HalfDone) -> None:
        """Writes it in the place of what was there. Not synced: after a power cut the client is out of one round."""
        self._root.mkdir(parents=True, exist_ok=True)
        path = self._path(client)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        told = {
            "session": state.session,
            "turn": state.turn,
            "shapes": {name: list(shape) for name, shape in state.shapes.items()},
            "key": state.key,
            "stride": state.stride,
            "figures": state.figures,
        }
        found = {
            "parameters": state.parameters,
            "moments": state.moments,
            "pending": state.pending,
        }
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        save_file(tensors, temporary, {"half-done": json.dumps(told)})
        temporary.replace(path)

    def _path(self, client: int) -> Path:
        return self._root / f"client-{int(client)}.turn.safetensors"
