"""A device's process whose battery may fall as it trains: what a SuperNode starts for a message, without the network.

    python -m tests.support.low_battery FOLDER BATTERY MARKS

The process answers one training request by the ClientApp and writes what it would send into MARKS/reply.json. Its task
leaves a mark of each batch in MARKS, and one in the second epoch, and waits there while MARKS/hold is there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from clients.tasks import Digits

MARKS = "LOW_BATTERY_MARKS"
BATCH, EPOCHS = 36, 4
PER_EPOCH = 9
"""Batches of 36 of the client's 324 examples."""
OVERRIDES = (
    "task=digits task._target_=tests.support.low_battery.MarkedDigits task.partition=iid model=mlp num_clients=4"
    f" client.batch_size={BATCH} client.local_epochs={EPOCHS} client.momentum=0.9"
)
ASKED, HOLD, PROGRESS, REPLY = "epoch-2", "hold", "batches", "reply.json"
_SLOW = 0.15
"""Seconds that a batch takes once it was held: what is left takes longer than the guard's two seconds between looks."""
_LONGEST = 120.0


class MarkedDigits(Digits):
    """Digits that mark their batches; their losses are those of the digits."""

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies, once training may go on."""
        # The step on four examples by which the device measures its memory is no batch.
        if torch.is_grad_enabled() and len(targets) > 4:
            _mark(Path(os.environ[MARKS]))
        return super().losses(output, targets)


def batches(marks: Path) -> int:
    """How many batches a process has trained on, or begun."""
    path = marks / PROGRESS
    return path.stat().st_size if path.exists() else 0


def _mark(marks: Path) -> None:
    with (marks / PROGRESS).open("ab") as file:
        file.write(b".")
    if (marks / ASKED).exists():
        time.sleep(_SLOW)
    elif (marks / HOLD).exists() and batches(marks) == PER_EPOCH + 3:
        (marks / ASKED).touch()
        deadline = time.monotonic() + _LONGEST
        while (marks / HOLD).exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def main(folder: str, battery: str, marks: str) -> None:
    """Answers one request."""
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    from clients.client import NUM_CLIENTS
    from fl_app.assembly import Assembly
    from fl_app.client_app import train
    from fl_app.compose import compose, parse_overrides
    from fl_app.engine.flwr_internals import claim_identity
    from strategies.wire import ARRAYS, CONFIG

    os.environ[MARKS] = marks
    claim_identity(1)
    model = Assembly(compose([*parse_overrides(OVERRIDES), "backend=flower"])).network.arrays()
    told = {"client": 0, "server-round": 1, "version": 0, "included": 0, NUM_CLIENTS: 4}
    request = Message(RecordDict({ARRAYS: model, CONFIG: ConfigRecord(told)}), 7, "train")
    node: dict[str, bool | float | int | str] = {
        "partition-id": 0,
        "client-folder": folder,
        "device-power-file": battery,
    }
    reply = train(request, Context(1, 7, node, RecordDict(), {"overrides": OVERRIDES}))
    said = reply.error.reason if reply.has_error() else _plain(reply.content)
    (Path(marks) / REPLY).write_text(json.dumps(said))


def _plain(content: object) -> dict[str, dict[str, object]]:
    """A reply's records by name: arrays as their bytes in hexadecimal, all else as it is."""
    from flwr.app import Array, RecordDict

    assert isinstance(content, RecordDict)
    return {
        name: {
            key: [value.dtype, list(value.shape), value.data.hex()]
            if isinstance(value, Array)
            else value
            for key, value in record.items()
        }
        for name, record in content.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
