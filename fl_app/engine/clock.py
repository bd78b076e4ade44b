"""A clock that moves only when somebody sleeps, and then straight to the next event.

Satisfies `strategies.exchange.Clock`, so server code that waits for replies is the same on a wall clock and here.
"""

from __future__ import annotations

import heapq
import math


class VirtualClock:
    """Virtual time in seconds.

    Args:
        start: the time at which the clock begins; a resumed run may go on from where it was.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = float(start)
        self._events: list[float] = []

    def now(self) -> float:
        """The present moment in virtual seconds; it never goes back."""
        return self._now

    def expect(self, moment: float) -> None:
        """Notes that something happens at `moment`, so that `sleep` wakes there."""
        heapq.heappush(self._events, moment)

    def sleep(self, seconds: float) -> None:
        """Moves to the next event that is later than now, or on by `seconds`, whichever is sooner.

        Events that have already passed do not count, whether or not anybody looked at what they brought: a sleep of
        more than nothing always moves the clock. A negative time is nothing.

        Raises:
            ValueError: `seconds` is not a number.
            RuntimeError: `seconds` is infinite and no event is to come, so the sleep would never end.
        """
        if math.isnan(seconds):
            raise ValueError("sleep() was given NaN for its seconds")
        while self._events and self._events[0] <= self._now:
            heapq.heappop(self._events)
        end = self._now + max(0.0, seconds)
        moment = min(self._events[0], end) if self._events else end
        if moment == math.inf:
            raise RuntimeError(
                "nothing is on its way and no deadline was given: sleep would never end"
            )
        self._now = moment
