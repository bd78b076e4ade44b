"""What work can give up for memory: first what costs only time, then, where that is allowed, what changes the model.

A lever knows how to take a step down and the same step up again. When to take one is the governor's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol


class Order(IntEnum):
    """What is given up first. The first three cost time; the others change what is learned."""

    CACHE = 1
    CHUNKS = 2
    WORKERS = 3
    BATCH = 4
    HIDDEN = 5


class Lever(Protocol):
    """Something that can be given up for memory, in one step or several.

    Attributes:
        name: in logs, and in `MemoryLimit.allow`.
        order: the lowest is shed first; any number, `Order` has the usual ones.
        needs_permission: it changes what is learned; pulled only where `MemoryLimit.allow` names it, at critical.
        immediate: may be pulled from the sampling thread, at any moment; others only inside `Governor.check`, in the
            thread of the work that calls it. That thread then waits: what a lever does must not need it to go on.
        returns_mb: what `restore` would take again, in MB; 0 where that isn't known.
    """

    @property
    def name(self) -> str:
        """What logs call it."""
        ...

    @property
    def order(self) -> int:
        """Its place."""
        ...

    @property
    def needs_permission(self) -> bool:
        """Whether it changes what is learned."""
        ...

    @property
    def immediate(self) -> bool:
        """Whether any thread may pull it."""
        ...

    @property
    def returns_mb(self) -> float:
        """MB that come back with it."""
        ...

    def shed(self) -> bool:
        """Gives one step up; False where there is nothing left."""
        ...

    def restore(self) -> bool:
        """Takes the last step back; False where it can't be."""
        ...


@dataclass
class Dial:
    """A lever that halves a number which work reads: chunks in flight, workers, examples of a batch, hidden units.

    Attributes:
        name: see `Lever`; likewise `order`, `needs_permission` and `immediate`.
        value: the number now. Work reads it at its next chunk.
        least: it goes no lower.
        unit_mb: memory of one of them, where that is known.
        changed: called with the new number, in the thread that pulls; None where reading it is enough.
    """

    name: str
    order: int
    value: int
    least: int = 1
    needs_permission: bool = False
    immediate: bool = False
    unit_mb: float = 0.0
    changed: Callable[[int], None] | None = None
    _before: list[int] = field(default_factory=list)

    @property
    def returns_mb(self) -> float:
        """MB of the step that would be taken back."""
        return self.unit_mb * (self._before[-1] - self.value) if self._before else 0.0

    def shed(self) -> bool:
        """Halves the number; False where it is the least."""
        lower = max(self.least, self.value // 2)
        if lower >= self.value:
            return False
        self._before.append(self.value)
        self._set(lower)
        return True

    def restore(self) -> bool:
        """The number before the last halving; False where it has all been given back."""
        if not self._before:
            return False
        self._set(self._before.pop())
        return True

    def _set(self, value: int) -> None:
        self.value = value
        if self.changed is not None:
            self.changed(value)
