"""How many neighbours and which threshold: the smallest graph whose failure is as improbable as was asked for.

Of n clients, C = ⌊γn⌋ collude with the server and D = ⌊δn⌋ drop out. Where a server that may lie picks the n out of N,
C = ⌊γN⌋: all who collude may be among them. Each has `degree` neighbours, and `holders` =
degree + 1 have a share of its secrets: they and itself. A client is hidden unless

* the colluders among its neighbours hold `threshold` shares, P[H(n − 1, C, degree) ≥ threshold], H hypergeometric; or
* the clients that mask with one another, less colluders and drop-outs, fall apart, so that the sum of a part opens.

The round completes unless some client has fewer than `threshold` holders left; one that dropped out has lost its own
share too. All are union bounds over the clients, in logarithms.

**A server that follows the protocol** draws a circulant graph (`graph`), independently of who colludes and drops out.
**A malicious server** does not get to: each client draws its own out-neighbours, shares with them and itself, and masks
with them and all that drew it. The server says who dropped out after it has seen the graph, but all honest clients hold
it to one set of survivors, which `quorum` of them signed: two sets cannot both have so many, as an honest client signs
one. With at most c colluders near any client, a set S of honest survivors can be split off only if each of its members
has threshold − 1 − c of its out-neighbours in S, all others that survive being joined to it by a mask. So sums of at
most m honest clients open with probability at most

    Σₛ (n choose s) · P[H(n − 1, s − 1, degree) ≥ threshold − 1 − c]ˢ,    s = 1 … m,

and `least_honest` is one more than the largest m for which this is improbable enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from strategies.secagg.graph import log2_falls_apart, log2_splits_off
from strategies.secagg.tails import log2_tails

LEAST_MEMBERS = 3
"""Of two, each knows the other's update from the sum."""

LEAST_DEGREE = 10
"""No client is hidden among a handful: ⌊γn⌋ and ⌊δn⌋ of few clients are 0 or 1, and zeros prove anything."""

LEAST_SPARSE = 100
"""No sparse graph for fewer against a malicious server: little work is saved, and small sums could be opened."""


@dataclass(frozen=True)
class Parameters:
    """The numbers of a protocol, and what they achieve.

    Attributes:
        members: clients that begin the round, n.
        degree: neighbours that each client shares its secrets with (malicious: that it draws).
        threshold: how many of the holders open a secret.
        dropouts: the largest part of the members that may drop out, δ.
        colluders: the largest part of the members that may tell the server what they know, γ.
        malicious: whether the server may depart from the protocol.
        colluders_near: how many colluders any client may have among its neighbours, c; 0 where that is not needed.
        least_honest: every sum that opens holds at least so many honest clients.
        quorum: survivors without which no sum may be opened. In a sparse graph those that are assumed, or its odds
            would not hold; against a malicious server also the signatures that make a set of survivors the only one.
        log2_exposed: log₂ of a bound on the probability that a client is not hidden.
        log2_halted: log₂ of a bound on the probability that the round does not complete.
        population: clients that the members are picked from, of whom that part colludes.
    """

    members: int
    degree: int
    threshold: int
    dropouts: float
    colluders: float
    malicious: bool
    colluders_near: int
    least_honest: int
    quorum: int
    log2_exposed: float
    log2_halted: float
    population: int

    @property
    def holders(self) -> int:
        """Who has a share of a client's secrets: its neighbours and itself."""
        return self.degree + 1

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbour."""
        return self.degree == self.members - 1

    def describe(self) -> str:
        """One line for people."""
        others = f"{self.degree} others"
        if self.malicious and not self.complete:
            others = f"{self.degree} that it draws and all that draw it"
        of_all = "" if self.population == self.members else f" of {self.population}"
        against = "; against a malicious server, " if self.malicious else "; "
        return (
            f"each of {self.members} clients masks with {others}, {self.threshold} of its {self.holders}"
            f" shareholders open a mask{against}fails to hide with probability {_bound(self.log2_exposed)}, to complete"
            f" {_bound(self.log2_halted)} ({self.dropouts:.0%} drop out, {self.colluders:.0%}{of_all} collude);"
            f" every sum holds {self.least_honest} honest clients or more"
        )


def _bound(log2: float) -> str:
    return "0" if log2 == -math.inf else f"≤ 2^{math.ceil(log2)}"


@lru_cache(
    maxsize=256
)  # asked for by a session, and against a malicious server by each of its clients
def choose(
    members: int,
    *,
    dropouts: float,
    colluders: float,
    malicious: bool = False,
    complete: bool = False,
    population: int | None = None,
    privacy_bits: float = 40,
    correctness_bits: float = 20,
) -> Parameters:
    """The smallest degree for which a threshold will do, and its smallest threshold: it leaves most room to complete.

    Args:
        members: clients that begin the round.
        dropouts: the part of them that may drop out, 0 to 1.
        colluders: the part of the population that may collude with the server, 0 to 1.
        malicious: the server may depart from the protocol.
        complete: everybody masks with everybody.
        population: clients that the members are picked from by a server that may pick all who collude; None or fewer
            than the members: these are all.
        privacy_bits: a client is not hidden with probability at most 2 to minus this.
        correctness_bits: a round does not complete with probability at most 2 to minus this.

    Raises:
        ValueError: fewer than three members, a part outside 0 … 1, or no degree that will do.
    """
    if members < LEAST_MEMBERS:
        raise ValueError(
            f"{members} clients cannot hide: of two, each knows the other's update from the sum; needs 3 or more"
        )
    for name, part in (("dropouts", dropouts), ("colluders", colluders)):
        if not 0 <= part < 1:
            raise ValueError(f"{name} = {part!r}: must be at least 0 and less than 1")
    population = max(population or 0, members)
    # Whom the guarantee is for does not collude.
    colluding = min(_count(colluders, population), members - 1)
    crowd = _Crowd(members, colluding, _count(dropouts, members))
    shape_of = _malicious if malicious else _semi_honest

    def viable(degree: int) -> _Shape | None:
        shape = shape_of(crowd, degree, privacy_bits)
        return shape if shape and _log2_halted(crowd, shape) <= -correctness_bits else None

    whole = viable(members - 1)
    if whole is None:  # what the complete graph cannot do, no smaller one can
        raise ValueError(_refusal(crowd, dropouts, colluders, malicious))
    whole_only = complete or (malicious and members <= LEAST_SPARSE)
    sparse = () if whole_only else range(LEAST_DEGREE, members - 1, 1 if malicious else 2)
    shape = next(filter(None, map(viable, sparse)), whole)
    quorum, exposed = crowd.quorum, shape.log2_exposed
    if malicious:
        least, exposed = _least_honest(crowd, shape, privacy_bits)
    else:
        everybody = shape.degree == members - 1
        fewest = max(shape.threshold, crowd.colluding + 2)
        quorum = fewest if everybody else members - crowd.dropped
        least = quorum - crowd.colluding
    return Parameters(
        members=members,
        degree=shape.degree,
        threshold=shape.threshold,
        dropouts=dropouts,
        colluders=colluders,
        malicious=malicious,
        colluders_near=shape.colluders_near,
        least_honest=least,
        quorum=quorum,
        log2_exposed=exposed,
        log2_halted=_log2_halted(crowd, shape),
        population=population,
    )


class _Crowd(NamedTuple):
    members: int
    colluding: int
    dropped: int

    @property
    def honest(self) -> int:
        """Honest survivors, at the least."""
        return self.members - self.colluding - self.dropped

    @property
    def quorum(self) -> int:
        """Two sets of so many signatures have more signers in common than there are colluders."""
        return (self.members + self.colluding) // 2 + 1


class _Shape(NamedTuple):
    degree: int
    threshold: int
    colluders_near: int
    log2_exposed: float


def _count(part: float, members: int) -> int:
    """⌊part · members⌋, where 0.29 · 100 is 29."""
    return math.floor(part * members + 1e-9)


def _refusal(crowd: _Crowd, dropouts: float, colluders: float, malicious: bool) -> str:
    left = crowd.members - crowd.dropped
    lacking = f"no threshold above half of the shareholders and above {crowd.colluding} colluders is left among"
    if malicious:
        lacking = (
            f"{crowd.quorum} signatures, which make a set of survivors the only one, are more than"
        )
    return (
        f"{crowd.members} clients, dropouts = {dropouts}, colluders = {colluders}: {lacking} {left} survivors;"
        f" assume fewer drop-outs or colluders"
    )


def _semi_honest(crowd: _Crowd, degree: int, bits: float) -> _Shape | None:
    """The smallest threshold that hides all in a circulant graph: above half of the holders, and the colluders."""
    members, colluding, dropped = crowd
    exposed = math.log2(members) + log2_tails(members - 1, colluding, degree)
    exposed = np.logaddexp2(exposed, log2_falls_apart(members, degree, colluding + dropped))
    for threshold in range((degree + 1) // 2 + 1, degree + 2):
        if exposed[threshold] <= -bits and crowd.honest >= 2:
            return _Shape(degree, threshold, 0, float(exposed[threshold]))
    return None


def _malicious(crowd: _Crowd, degree: int, bits: float) -> _Shape | None:
    """The smallest threshold that two requests, for both secrets of one client, cannot both meet.

    Half the probability is for a client with more than c colluders near it; small sums have the rest.
    """
    exceeded = math.log2(crowd.members) + log2_tails(crowd.members - 1, crowd.colluding, degree)[1:]
    near = int(np.argmax(exceeded <= -bits - 1))
    threshold = (degree + 1 + near) // 2 + 1
    if near + 1 < threshold <= degree + 1 and crowd.quorum <= crowd.members - crowd.dropped:
        return _Shape(degree, threshold, near, float(exceeded[near]))
    return None


def _least_honest(crowd: _Crowd, shape: _Shape, bits: float) -> tuple[int, float]:
    """The smallest sum that can be opened but for 2^-bits, in honest clients; and log₂ of what is used of that."""
    least, exposed = crowd.quorum - crowd.colluding, shape.log2_exposed
    if shape.degree == crowd.members - 1:
        return least, exposed
    inside = shape.threshold - 1 - shape.colluders_near
    for honest in range(1, least):
        splits = log2_splits_off(crowd.members, shape.degree, inside, honest)
        following = float(np.logaddexp2(exposed, splits))
        if following > -bits:
            return honest, exposed
        exposed = following
    return least, exposed


def _log2_halted(crowd: _Crowd, shape: _Shape) -> float:
    """log₂ of a bound on P[some client has fewer than `threshold` holders left], after ⌊δn⌋ drop-outs."""
    members, _, dropped = crowd
    lost = shape.degree + 1 - shape.threshold  # holders that may go
    survivor = log2_tails(members - 1, dropped, shape.degree)[lost + 1]
    halted = math.log2(members - dropped) + survivor
    if dropped:  # one that dropped out is the first of its own holders to go
        absent = log2_tails(members - 1, dropped - 1, shape.degree)[lost]
        halted = np.logaddexp2(halted, math.log2(dropped) + absent)
    return float(halted)
