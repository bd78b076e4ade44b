"""What a client believes in the malicious mode only by the others' own signatures: keys, survivors, and masks.

Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", Algorithm 3. A server that may
lie could tell each client another story: of keys that are its own, of two sets of survivors, and, after the shares,
that all neighbours of one client are gone. That client's upload would be under its own mask alone, and the neighbours,
who know it to be alive, would give its seed away. So nobody helps to open an upload whose author has not signed that
the mask of the two is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from strategies.secagg.keys import verify
from strategies.secagg.policy import Roster
from strategies.secagg.statements import SIGNATURE_BYTES, agreement, inclusion, introduction
from strategies.secagg.terms import Said, Terms, are_ids
from strategies.wire import Refused


def introduced(
    roster: Roster,
    state: Mapping[str, Any],
    terms: Terms,
    said: Said,
    peers: list[int],
    rows: Sequence[bytes],
) -> tuple[list[int], list[int]]:
    """Those whom this client drew and those who drew it, each by its own signature.

    Args:
        roster: pinned identity keys, of all in the session at least.
        state: this client's, of the session.
        terms: of the session.
        said: the request, with each peer's signature and the neighbours that it drew.
        peers: neighbours.
        rows: their public keys.

    Raises:
        Refused: `malformed`, `neighbours` or `signature`.
    """
    client = state["client"]
    signatures = said.rows("signatures", len(peers), SIGNATURE_BYTES)
    flat, cohort = said.values.get("drawn"), set(state["cohort"])
    if not isinstance(flat, list) or len(flat) != len(peers) * terms.degree:
        raise Refused("malformed", "each neighbour's own neighbours are missing")
    theirs = []
    for index, (peer, row, signature) in enumerate(zip(peers, rows, signatures, strict=True)):
        drawn = flat[index * terms.degree : (index + 1) * terms.degree]
        if not are_ids(drawn):
            raise Refused("malformed", f"the neighbours of client {peer} are not ids of clients")
        if peer not in cohort:
            raise Refused("neighbours", f"client {peer} is not of this session")
        if not verify(roster.keys[peer], signature, introduction(terms, peer, row, drawn)):
            raise Refused("signature", f"the keys of client {peer} are not signed by it")
        if client in drawn:
            theirs.append(peer)
        elif peer not in state["drawn"]:
            raise Refused("neighbours", f"neither drew the other: client {peer}")
    if len(theirs) > 4 * terms.degree:
        raise Refused("neighbours", f"{len(theirs)} clients drew this one, at random few would")
    return [peer for peer in peers if peer in set(state["drawn"])], theirs


def agreed_upon(
    roster: Roster,
    state: Mapping[str, Any],
    terms: Terms,
    said: Said,
    alive: list[int],
    dropped: list[int],
) -> None:
    """Refuses unless a quorum signed the set of survivors that this client signed, and this request follows it.

    Raises:
        Refused: `survivors`, `malformed` or `signature`.
    """
    survivors = set(state["survivors"])
    held = {int(one) for one in state["held"]}
    if set(alive) != held & survivors or set(dropped) != held - survivors:
        raise Refused("survivors", "the survivors are not those that were agreed on")
    signers = said.clients("signers")
    signatures = said.rows("signatures", len(signers), SIGNATURE_BYTES)
    signed = agreement(terms, state["survivors"])
    valid = (
        signer
        for signer, signature in zip(signers, signatures, strict=True)
        if signer in survivors and verify(roster.keys[signer], signature, signed)
    )
    good = sum(1 for _ in islice(valid, terms.quorum))  # more of them prove no more
    if good < terms.quorum:
        raise Refused("signature", f"{good} of the survivors signed their set, {terms.quorum} must")


def included(
    roster: Roster, state: Mapping[str, Any], terms: Terms, said: Said, alive: Sequence[int]
) -> None:
    """Refuses unless each survivor has signed that its upload holds the mask with this client.

    Raises:
        Refused: `malformed` or `signature`.
    """
    client = state["client"]
    others = [one for one in alive if one != client]
    signatures = said.rows("included", len(others), SIGNATURE_BYTES)
    for other, signature in zip(others, signatures, strict=True):
        if not verify(roster.keys[other], signature, inclusion(terms, other, client)):
            raise Refused(
                "signature",
                f"client {other} has not signed that it masked its update with this one",
            )
