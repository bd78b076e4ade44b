"""What both halves must say alike: the protocol's steps, the sizes of messages, what keys and signatures mean."""

from __future__ import annotations

from typing import Final

from strategies.secagg.keys import KEY_BYTES, derive
from strategies.secagg.sealing import OVERHEAD
from strategies.secagg.terms import Terms, ids_digest

KEYS, SHARES, UPLOAD, AGREE, UNMASK = "keys", "shares", "upload", "agree", "unmask"
SIGNATURE_BYTES: Final = 64
POINT_BYTES: Final = 2
SHARE_BYTES: Final = POINT_BYTES + 2 * KEY_BYTES
"""A share: its point, the seed's part, the masking key's part."""
SEALED_BYTES: Final = SHARE_BYTES + OVERHEAD


def introduction(terms: Terms, client: int, keys: bytes, drawn: list[int]) -> bytes:
    """What a client signs in its first reply: its keys and the neighbours that it drew."""
    named = b"".join(one.to_bytes(8, "big", signed=True) for one in drawn)
    return terms.context("introduction", client=client, keys=keys, drawn=named)


def inclusion(terms: Terms, client: int, holder: int) -> bytes:
    """What a client signs with its upload, for each holder of its shares: the mask of the two is in it."""
    return terms.context("inclusion", client=client, holder=holder)


def agreement(terms: Terms, survivors: list[int]) -> bytes:
    """What the survivors sign: who they are."""
    return terms.context("agreement", survivors=ids_digest(survivors), count=len(survivors))


def seed_commitment(terms: Terms, client: int, seed: bytes) -> bytes:
    """Tells the seed that shares give back from a wrong one, and nothing of the seed itself."""
    return derive(seed, terms.context("commitment", client=client))


def pair_context(terms: Terms, first: int, second: int) -> bytes:
    """What two clients' common mask is for, whichever of them asks."""
    return terms.context("pair mask", low=min(first, second), high=max(first, second))
