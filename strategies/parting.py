"""What can't be where clients have a part of the model only, or the server trains a part of each update itself.

The end of a pipeline's contract: parts that each have no objection, and do not go together where a model is cut,
adapters are of unequal ranks, or the aggregate takes the model to a point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import Maker, Packing, Shaping
from strategies.rounds import Rounds
from strategies.schedulers import Scheduler


class _Refusal(NamedTuple):
    """Two parts that don't go together, whether they are both there, why, and the mend."""

    clash: bool
    first: str
    second: object
    why: str
    instead: str


def check_parts(rounds: Rounds, scheduler: Scheduler, claim: Claim) -> None:
    """Refuses what parts of models, and halves of them, rule out.

    Raises:
        ContractError: a part works on whole updates, or promises what the server's part undoes.
    """
    for refusal in (*_of_parts(rounds, scheduler, claim), *_of_halves(rounds, scheduler, claim)):
        if refusal.clash:
            second = refusal.second
            told = second if isinstance(second, str) else name_of(second)
            raise ContractError(refusal.first, told, refusal.why, refusal.instead)


def _of_parts(rounds: Rounds, scheduler: Scheduler, claim: Claim) -> Iterator[_Refusal]:
    """Where clients train different parts, or the aggregate is a point."""
    downlink = rounds.downlink
    if downlink is not None:
        yield _Refusal(
            claim.replaced,
            name_of(downlink),
            claim.source("replaced"),
            "clients hold the model on a grid, and the way from there is not the way from the server's own",
            "set downlink=none",
        )
    yield _Refusal(
        claim.parts and claim.visibility < Visibility.EACH,
        claim.source("parts"),
        claim.source("visibility"),
        "it sums vectors of one length, and clients have parts of several",
        "use collector=plain, or give all clients one rank and one head",
    )
    yield _Refusal(
        claim.parts and getattr(scheduler, "mixing", None) is not None,
        claim.source("parts"),
        scheduler,
        "a step towards a client's model would take what it has no part of back to an older version",
        "set scheduler.mixing=null, or give all clients one rank and one head",
    )
    whole = [stage for stage in rounds.stages if isinstance(stage, Maker | Shaping | Packing)]
    for part in (*whole, *(() if downlink is None else (downlink,))):
        yield _Refusal(
            claim.parts or claim.served is not None,
            claim.source("served" if claim.served else "parts"),
            part,
            "it changes whole models and updates on their way, and clients have a part of theirs only",
            "leave it out; adapters are small already",
        )


def _of_halves(rounds: Rounds, scheduler: Scheduler, claim: Claim) -> Iterator[_Refusal]:
    """Where the server trains a part of each update."""
    source, shared = claim.source("served"), claim.served == "shared"
    yield _Refusal(
        shared and bool(getattr(scheduler, "over_selection", None)),
        source,
        scheduler,
        "those who are not taken would have trained the one upper part of those who are",
        "set collector.variant=v1, or scheduler.over_selection=0",
    )
    yield _Refusal(
        shared and bool(getattr(rounds.combiner, "by_head", None)),
        source,
        rounds.combiner,
        "with one upper part every update has all heads, and no group is told from another",
        "set collector.variant=v1, or combiner.by_head=false",
    )
    promise = rounds.privacy
    if promise is None:
        return
    yield _Refusal(
        # Noise that clients add: the server's half of an update has none.
        claim.served is not None and not promise.unconditional,
        source,
        promise,
        "noise on the client's half leaves the server's half bare, and no noise of it covers activations",
        "use privacy=central, which noises both halves, or privacy=none",
    )
    yield _Refusal(
        shared,
        source,
        promise,
        "one upper part learns of all clients before anything is clipped, and its gradients tell of others",
        "set collector.variant=v1",
    )
