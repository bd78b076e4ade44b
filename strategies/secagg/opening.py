"""The server's half of the arithmetic: secrets from shares, and a sum freed of the masks that did not cancel.

A survivor's own mask goes by its seed, a drop-out's masks with its surviving partners by its masking key. Work is one
mask of d elements for each survivor, and one for each surviving partner of each drop-out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from strategies.secagg.keys import KEY_BYTES, KeyPair, derive
from strategies.secagg.masking import Ring
from strategies.secagg.masks import add_masks
from strategies.secagg.shamir import combine_many
from strategies.secagg.statements import pair_context, seed_commitment
from strategies.secagg.terms import Terms

Shares = Mapping[int, bytes]
"""A secret's shares by their points."""


class CannotOpenError(Exception):
    """A secret that its shares do not give: too few came, or wrong ones."""


@dataclass(frozen=True)
class Member:
    """What the server knows of a client that has shared its secrets.

    Attributes:
        masking: public masking key.
        commitment: to its seed.
        partners: those it masks with.
    """

    masking: bytes
    commitment: bytes
    partners: AbstractSet[int]


def remove_masks(
    total: Ring,
    terms: Terms,
    members: Mapping[int, Member],
    seeds: Mapping[int, Shares],
    masking: Mapping[int, Shares],
) -> None:
    """Frees a sum of uploads of its masks, in place.

    Args:
        total: Σ of the survivors' uploads modulo 2³².
        terms: the session's.
        members: all who have shared their secrets.
        seeds: shares of each survivor's seed.
        masking: shares of the masking key of each member that dropped out.

    Raises:
        CannotOpenError: a secret can't be had; the total is then as it was.
    """
    found = dict(
        _secrets(seeds, terms, lambda client, seed: _is_seed(members, terms, client, seed))
    )
    keys = dict(_secrets(masking, terms, lambda client, key: _is_key(members, client, key)))
    plus: list[bytes] = []
    minus = [derive(seed, terms.context("self mask")) for seed in found.values()]
    for dropped, private in keys.items():
        pair = KeyPair.from_private(private)
        for partner in members[dropped].partners:
            if partner in found:
                mask = pair.agree(members[partner].masking, pair_context(terms, dropped, partner))
                # The survivor added it towards higher ids and took it off towards lower ones.
                (minus if partner < dropped else plus).append(mask)
    add_masks(total, plus, minus)


def _is_seed(members: Mapping[int, Member], terms: Terms, client: int, seed: bytes) -> bool:
    return seed_commitment(terms, client, seed) == members[client].commitment


def _is_key(members: Mapping[int, Member], client: int, private: bytes) -> bool:
    return KeyPair.from_private(private).public == members[client].masking


def _secrets(
    shares: Mapping[int, Shares], terms: Terms, right: Callable[[int, bytes], bool]
) -> Iterator[tuple[int, bytes]]:
    """Each client's secret. Those whose shares are of the same points are combined together."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for client, given in shares.items():
        if len(given) < terms.threshold:
            raise CannotOpenError(
                f"{len(given)} shares came of a secret of client {client}, {terms.threshold} are needed"
            )
        alike[tuple(sorted(given)[: terms.threshold])].append(client)
    for points, clients in alike.items():
        for client, secret in zip(clients, _combined(points, clients, shares), strict=True):
            if not right(client, secret):
                secret = _mended(shares[client], terms, client, right)
            yield client, secret


def _combined(
    points: Sequence[int], clients: Sequence[int], shares: Mapping[int, Shares]
) -> list[bytes]:
    rows = b"".join(shares[client][point] for client in clients for point in points)
    table = np.frombuffer(rows, np.uint8).reshape(len(clients), len(points), KEY_BYTES)
    return [row.tobytes() for row in combine_many(points, table)]


def _mended(given: Shares, terms: Terms, client: int, right: Callable[[int, bytes], bool]) -> bytes:
    """The secret out of other shares: each run of `threshold` of them in a circle, so that one wrong share is borne."""
    points = sorted(given)
    for first in range(len(points)):
        chosen = sorted((points + points)[first : first + terms.threshold])
        (secret,) = _combined(chosen, [client], {client: given})
        if right(client, secret):
            return secret
    raise CannotOpenError(f"the shares of a secret of client {client} do not fit: one is wrong")
