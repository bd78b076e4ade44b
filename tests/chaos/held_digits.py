"""A task of a user's own: digits whose training says in which process it has begun, and waits while a file is there.

Its losses are those of the digits. Batches are counted, process by process, and the file may say at which one to wait.
The task is copied to where a deployment is started.
"""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from clients.tasks import Digits

_LONGEST = 300.0  # seconds, after which a test that has failed holds nobody any more


class HeldDigits(Digits):
    """Digits, held."""

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies, once training may go on."""
        if torch.is_grad_enabled():
            marks = Path(os.environ["CHAOS_MARKS"])
            with (marks / f"batches-{os.getpid()}").open("ab") as file:
                file.write(b".")
                batch = file.tell()
            deadline = time.monotonic() + _LONGEST
            while _held_at(marks) <= batch and time.monotonic() < deadline:
                (marks / f"at-{os.getpid()}").write_text(str(batch))
                time.sleep(0.05)
        return super().losses(output, targets)


def _held_at(marks: Path) -> float:
    """The first batch, from 1, that has to wait; infinite where none has."""
    try:
        return int((marks / "hold").read_text())
    except FileNotFoundError:
        return float("inf")
