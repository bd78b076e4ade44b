"""A memory limit: how near to it a figure is, how a governor of it behaves, and the errors that name it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final

from annotated_types import Ge, Gt, Lt

from strategies.ranges import Ranged

CRITICAL_SHARE: Final = 0.95


class Tier(IntEnum):
    """How near to the limit."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2


class MemoryLimitError(RuntimeError):
    """The limit can't be met.

    Attributes:
        limit_mb: the limit.
        needed_mb: the least limit that would do.
    """

    def __init__(self, message: str, limit_mb: float, needed_mb: float) -> None:
        super().__init__(message, limit_mb, needed_mb)
        self.message, self.limit_mb, self.needed_mb = message, limit_mb, needed_mb

    def __str__(self) -> str:
        return self.message


class StepAbandonedError(RuntimeError):
    """A step can't be finished within the memory limit; something has been given up, and it can be begun again."""


@dataclass(frozen=True)
class MemoryLimit(Ranged):
    """Settings of a governor.

    Attributes:
        limit_mb: MB that the process and all its descendants may take; None for no limit, when only the peak is taken.
        warning: share of the limit from which levers are pulled that cost time only.
        critical: share from which all that are allowed are pulled, and work waits.
        hysteresis: share by which memory must fall below a line before its tier is left.
        interval: seconds between two looks.
        settle: seconds that an action is given to show before the next.
        quiet: seconds of normal tier before a lever is given back, one at a time, the last one first; twice as long
            each time that a lever must be pulled again.
        patience: seconds that work waits at critical when there is nothing left to shed.
        allow: names of levers that change what is learned and may be pulled all the same.
    """

    limit_mb: Annotated[float, Gt(0)] | None = None
    warning: Annotated[float, Gt(0), Lt(1)] = 0.80
    critical: Annotated[float, Gt(0), Lt(1)] = CRITICAL_SHARE
    hysteresis: Annotated[float, Ge(0), Lt(1)] = 0.05
    interval: Annotated[float, Gt(0)] = 0.5
    settle: Annotated[float, Ge(0)] = 0.5
    quiet: Annotated[float, Ge(0)] = 30.0
    patience: Annotated[float, Ge(0)] = 10.0
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hysteresis < self.warning < self.critical:
            raise ValueError(
                f"MemoryLimit: hysteresis = {self.hysteresis:g}, warning = {self.warning:g} and "
                f"critical = {self.critical:g} must rise in this order"
            )

    def tier(self, used_mb: float, before: Tier) -> Tier:
        """The tier of a figure, after one that was in the tier before."""
        if self.limit_mb is None:
            return Tier.NORMAL
        share = used_mb / self.limit_mb
        reached = Tier((share >= self.warning) + (share >= self.critical))
        share += self.hysteresis
        held = Tier((share >= self.warning) + (share >= self.critical))
        return max(reached, min(before, held))


def require(
    limit_mb: float | None, estimate_mb: float, told: str, critical: float = CRITICAL_SHARE
) -> None:
    """Refuses work before it begins where its memory would not stay below the critical line.

    Args:
        limit_mb: the limit in MB; None for none.
        estimate_mb: what the whole tree of processes takes at its peak, interpreters and libraries with it.
        told: what would fit, as a sentence for whoever set the limit.
        critical: share of the limit that may be used.

    Raises:
        MemoryLimitError: the estimate is not below the line; it names limit, estimate and what would fit.
    """
    if limit_mb is not None and not estimate_mb < critical * limit_mb:
        needed = math.floor(estimate_mb / critical) + 1
        raise MemoryLimitError(
            f"memory limit of {limit_mb:g} MB: this is estimated to take {estimate_mb:.0f} MB, and "
            f"{critical:.0%} of the limit may be used. Mend: raise limit_mb to at least {needed}, "
            f"or make it smaller. {told}",
            limit_mb,
            needed,
        )
