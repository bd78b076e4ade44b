"""What may not follow, in the contract, from updates that are in a round because they came in time for it.

Two ways of not waiting for all: `Raced` takes the first of more than were needed, `Shortened` goes on with k of n. Both
make who is in a round depend on how soon others answered: whoever is added takes another's place, so that the sum of a
round changes by two contributions where one client more is asked, and no sensitivity, and no chance of being drawn, is
what it was claimed to be. A deadline in seconds does neither: a client that misses it is one that was not there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from strategies.contract import Claim, ContractError, Visibility, name_of

OVER_SELECTION = "scheduler.over_selection"
ENOUGH = "scheduler.enough"


class Raced(Claim):
    """A claim of updates that are in a round because they came first: nothing that fixes who is in may follow."""

    def given(self, part: object, **changes: object) -> Claim:
        """As every claim's.

        Raises:
            ContractError: sums of whole cohorts, or privacy, are to be made of the fastest.
        """
        if changes.get("visibility", Visibility.EACH) != Visibility.EACH:
            raise ContractError(
                OVER_SELECTION,
                name_of(part),
                "a sum is of all clients that were asked, and can't be cut to those that came first",
                "set scheduler.over_selection=0; a sum bears drop-outs, and scheduler.deadline ends each of its phases",
            )
        if changes.get("private") is not None:
            raise ContractError(
                OVER_SELECTION,
                name_of(part),
                "who is in a round would depend on who is fast, of which nothing can be claimed, and those left out"
                " would have spent their budget on nothing",
                "set scheduler.over_selection=0, or use privacy=none",
            )
        return super().given(part, **changes)

    @classmethod
    def of(cls, claim: Claim) -> Claim:
        """The claim, with nothing said of how who is in a round came to be."""
        drawn = claim.given(OVER_SELECTION, sampling="uncontrolled", rate=None)
        return cls(**{item.name: getattr(drawn, item.name) for item in fields(drawn)})


@dataclass(frozen=True)
class Shortened(Claim):
    """A claim of updates of whom a share makes the round: sums must bear that the others are missing.

    Attributes:
        enough: that share.
    """

    enough: float = 1.0

    def given(self, part: object, **changes: object) -> Claim:
        """As every claim's.

        Raises:
            ContractError: sums that do not bear so many drop-outs, or privacy, are to be made of the first.
        """
        if changes.get("visibility", Visibility.EACH) != Visibility.EACH:
            self._hold(part, getattr(part, "dropouts", None))
        if changes.get("private") is not None:
            raise ContractError(
                ENOUGH,
                name_of(part),
                "whether one client is in a round would depend on how soon others answered, so that one more client"
                " takes the place of another: no sensitivity and no draw is then what is claimed of it",
                "set scheduler.enough=1 and scheduler.deadline in seconds, or use privacy=none",
            )
        return super().given(part, **changes)

    def _hold(self, part: object, dropouts: float | None) -> None:
        """Refuses a collector whose sums need more clients than a phase may go on with."""
        if dropouts is None and not hasattr(part, "least_clients"):
            raise ContractError(
                ENOUGH,
                name_of(part),
                "it makes sums and does not say how many drop-outs they bear",
                "set scheduler.enough=1, or give the collector an attribute dropouts",
            )
        if dropouts is not None and self.enough < 1 - dropouts - 1e-9:
            raise ContractError(
                ENOUGH,
                name_of(part),
                f"its sums bear that {dropouts:g} of their clients drop out, and a phase that goes on with"
                f" {self.enough:g} of them leaves out more",
                f"use scheduler.enough={1 - dropouts:g}, or raise collector.dropouts",
            )

    @classmethod
    def of(cls, claim: Claim, enough: float) -> Claim:
        """The claim, with nothing said of how who is in a round came to be."""
        drawn = claim.given(ENOUGH, sampling="uncontrolled", rate=None)
        return cls(
            **{item.name: getattr(drawn, item.name) for item in fields(drawn)}, enough=enough
        )
