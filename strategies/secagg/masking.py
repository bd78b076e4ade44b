"""An update as it is sent: fixed-point numbers modulo 2³² under masks; and a sum of those as numbers again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.contents import Contents
from strategies.secagg.fixed_point import FixedPoint
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
                rounding="stochastic" if terms.stochastic else "nearest",
            )
        except ValueError as error:
            raise Refused("not_finite", str(error)) from error
    tail = np.rint(contents.tail(update, saturated) * tail_scale).astype(np.int64)
    upload[contents.size :] = tail.astype(np.uint32)
    add_masks(upload, [own, *added], taken)
    return upload


def opened(
    total: Ring, contents: Contents, terms: Terms
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An unmasked sum of uploads as the sums of vectors, in their units, and of tails."""
    coding, tail_scale = codings(terms)
    tail = total[contents.size :].view(np.int32) / tail_scale
    return coding.decode(total[: contents.size]), tail


def codings(terms: Terms) -> tuple[FixedPoint, int]:
    """How a session's vectors are encoded, and steps per unit of their tails.

    The tail's steps are a multiple of w_max, so that a whole number of examples is exact.

    Raises:
        Refused: `range`, when there is no room for a single step.
    """
    largest = max(1, int(terms.max_weight))
    tail_scale = largest * ((2**31 - 1) // (terms.members * largest))
    try:
        if not tail_scale:
            raise ValueError(
                f"{terms.members} members of up to {largest} examples each are past 31 bits"
            )
        return FixedPoint(terms.limit, terms.members, terms.headroom), tail_scale
    except ValueError as error:
        raise Refused("range", str(error)) from error
