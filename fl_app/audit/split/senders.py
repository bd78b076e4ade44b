"""Whose update is this? The nearest centroid, of rounds that it is not from.

Each sender's centroid is the mean direction of its updates in all rounds but one; an update of that round is taken for
the sender whose centroid it points most nearly to. The common part of a round's updates is the same for all senders and
is taken off first. Masks and sums hide who sent what; this says what they are needed for.

Arrays only: this file knows no model and no run. Ours; nearest centroids with a fold left out are no attack of a paper.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fl_app.audit.split.labels import directions


def told_apart(
    updates: NDArray[np.float64], senders: ArrayLike, rounds: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many updates of each round are given to their sender.

    Args:
        updates: (m, d).
        senders: (m,), a client or a group each.
        rounds: (m,).

    Returns:
        Hits and trials of each round, (rounds,) each. An update whose sender is in no other round is not tried.

    Raises:
        ValueError: fewer than two rounds or senders, or an update that is not finite.
    """
    who, when = np.asarray(senders), np.asarray(rounds)
    people, turns = np.unique(who), np.unique(when)
    if len(people) < 2 or len(turns) < 2:
        raise ValueError(f"{len(people)} senders in {len(turns)} rounds: two of each are needed")
    rows = np.array(updates, np.float64)
    for turn in turns:
        rows[when == turn] -= rows[when == turn].mean(axis=0)
    rows = directions(rows)
    hits, trials = [], []
    for turn in turns:
        others, these = when != turn, when == turn
        known = np.array([one for one in people if (others & (who == one)).any()])
        centroids = np.stack([rows[others & (who == one)].mean(axis=0) for one in known])
        guessed = known[(rows[these] @ directions(centroids).T).argmax(axis=1)]
        tried = np.isin(who[these], known)
        hits.append(int((guessed == who[these])[tried].sum()))
        trials.append(int(tried.sum()))
    return np.array(hits, np.int64), np.array(trials, np.int64)
