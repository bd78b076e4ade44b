"""An update as it is sent: fixed-point numbers modulo 2³² under masks; and a sum of those as numbers again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.contents import Contents
from strategies.secagg.fixed_point import FixedPoint, Rounding
from strategies.secagg.masks import add_masks
from strategies.secagg.terms import Terms
from strategies.update import Update
from strategies.wire import Refused

Ring = NDArray[np.uint32]


def masked(
    update: Update,
    contents: Contents,
    terms: Terms,
    own: bytes,
    added: Sequence[bytes],
    taken: Sequence[bytes],
) -> Ring:
    """A client's upload, (contents.size + contents.tail_size,) uint32, 4 bytes an element.

    Args:
        update: encoded by the stages.
        contents: the order of the vector.
        terms: the session's.
        own: key of the client's own mask.
        added: keys of the masks with partners of higher id.
        taken: keys of the masks with partners of lower id.

    Raises:
        Refused: `range`, when members times range do not fit the ring; `not_finite`; as `Contents.vectors`.
    """
    coding, tail_scale = codings(terms)
    factor = contents.factor(update)
    upload = np.empty(contents.size + contents.tail_size, np.uint32)
    saturated = 0
    for place, vector in contents.vectors(update):
        try:
            saturated += coding.encode(
                vector,
                upload[place],
                factor=factor,
                rounding=rounding(terms),
            )
        except ValueError as error:
            raise Refused("not_finite", str(error)) from error
    tail = np.rint(contents.tail(update, saturated) * tail_scale).astype(np.int64)
    upload[contents.size :] = tail.astype(np.uint32)
    add_masks(upload, [own, *added], taken)
    return upload


def opened(
    total: Ring, contents: Contents, terms: Terms, members: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """An unmasked sum of so many uploads as sums of vectors, in their units, and of tails; the noise of one vector.

    Raises:
        Refused: `corrupt`, when the members are counted otherwise: noise in place of an upload is right once in 2³².
    """
    coding, tail_scale = codings(terms)
    steps = total[contents.size :].view(np.int32)
    if int(steps[-1]) != members * tail_scale:
        raise Refused("corrupt", f"the sum of {members} clients counts {steps[-1] / tail_scale:g}")
    noise = coding.noise(rounding=rounding(terms))
    return coding.decode(total[: contents.size]), steps / tail_scale, noise


def rounding(terms: Terms) -> Rounding:
    """How a session's elements are rounded."""
    return "stochastic" if terms.stochastic else "nearest"


def codings(terms: Terms) -> tuple[FixedPoint, int]:
    """How a session's vectors are encoded, and steps per unit of their tails.

    Raises:
        Refused: `range`, as `room` says.
    """
    try:
        return room(terms.members, terms.limit, terms.headroom, int(terms.max_weight))
    except ValueError as error:
        raise Refused("range", str(error)) from error


def room(members: int, limit: float, headroom: float, max_weight: int) -> tuple[FixedPoint, int]:
    """What 32 bits leave for vectors, and for tails: these have steps that divide an example.

    A whole number of examples is exact, since the tail's steps per unit are a multiple of w_max (0: weights alike).

    Raises:
        ValueError: there is no room for a single step.
    """
    largest = max(1, max_weight)
    steps = largest * ((2**31 - 1) // (members * largest))
    if not steps:
        raise ValueError(f"{members} members of up to {largest:,} examples each do not fit 31 bits")
    return FixedPoint(limit, members, headroom), steps
