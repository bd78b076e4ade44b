"""`runtime.batch_clients`: how many of the engine's clients are trained at once, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from torch import nn

from clients.tasks import Task
from clients.trainers.suitability import drawback, obstacle

AUTO: Final = 64
"""Clients at once where it is faster: larger stacks gain little, and leave less to share out among workers."""


@dataclass(frozen=True)
class Batching:
    """The decision.

    Attributes:
        size: clients at once, at most; 1 for one by one.
        why: in a few words, for the log.
    """

    size: int
    why: str

    def __str__(self) -> str:
        how = f"up to {self.size} at once" if self.size > 1 else "one by one"
        return f"{how}: {self.why}"


def plan_batching(
    setting: int | Literal["auto", "off"], trainer: object, module: nn.Module, task: Task
) -> Batching:
    """Decides; the module is used up.

    Args:
        setting: `runtime.batch_clients`.
        trainer: how a client fits.
        module: the network, on the CPU.
        task: gives the loss and two examples to try it with.
    """
    if setting == "off" or setting == 1:
        return Batching(1, f"runtime.batch_clients={setting}")
    why_not = obstacle(trainer, module, task)
    if why_not is None and setting == "auto":
        why_not = drawback(trainer, module, task)  # type: ignore[arg-type]  # obstacle() has checked it
    if why_not is not None:
        return Batching(1, why_not)
    if setting == "auto":
        return Batching(AUTO, "small steps gain from it")
    return Batching(setting, f"runtime.batch_clients={setting}")
