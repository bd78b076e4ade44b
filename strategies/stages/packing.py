"""What stages have in common that leave sections as bytes: each stands last, and only where the server sees each.

A coding may lengthen a vector that was clipped: rounding at random does, and so does what an error fed back adds. The
clip's bound holds all the same for whatever the combiner sees. Bytes are unpacked at the server's door, the server
halves run in reverse, and the clip's, which acts on each single update whatever its client did, comes after the
coding's: the noise of privacy=central hides a vector of that length, as without. What the server cuts off is not fed
back.

No ε minds what a client remembers either. The server's noise hides a contribution of any direction within the bound,
so also one that depends on the client's earlier rounds; and behind noise of the client's own, a coding and its memory
see nothing but what is private already.
"""

from __future__ import annotations

from strategies.contract import Claim, ContractError, Visibility, name_of


def packs(claim: Claim, part: object) -> Claim:
    """The claim behind a stage that leaves sections packed.

    Raises:
        ContractError: clients don't run their halves, sums are to be made of what they send, or it is packed already.
    """
    claim.need_client_half(part)
    claim.need_visibility(
        part,
        Visibility.EACH,
        why="bytes can't be summed under a mask or a key",
        instead="use compression=random_k, which leaves numbers, or collector=plain",
    )
    if claim.packed is not None:
        raise ContractError(
            claim.source("packed"),
            name_of(part),
            "what is packed is bytes, which no stage behind it can change",
            "leave one of the two out",
        )
    return claim.given(part, packed=str(getattr(part, "name", part)))


def without_bound(claim: Claim, part: object, section: str) -> Claim:
    """The claim behind a stage that may lengthen a section which a clip before it had bounded."""
    if section not in claim.bounds:
        return claim
    return claim.given(
        part, bounds={name: bound for name, bound in claim.bounds.items() if name != section}
    )
