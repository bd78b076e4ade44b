"""The end of a budget: nothing here but exceptions, so that whoever catches them needs no accountant."""

from __future__ import annotations

from typing import ClassVar


class BudgetSpentError(RuntimeError):
    """The next release would spend more than the budget: it is not made.

    Attributes:
        reason: why a run ends by it, in a word.
    """

    reason: ClassVar[str] = "privacy budget"


class ParticipationSpentError(BudgetSpentError):
    """Every client has taken part as often as it may."""

    reason: ClassVar[str] = "participation limit"
