"""Which examples make which mini-batch, and which mini-batch a round is on.

Mini-batches are cut once and stay: an owner encrypts each of them a single time and goes through them again in every
epoch, in another order (sampling without replacement; M. Gürbüzbalaban, A. Ozdaglar and P. Parrilo, "Why Random
Reshuffling Beats Stochastic Gradient Descent", 2021, shuffle the examples instead, which would need new ciphertexts).
Both are pure functions of seed, client and round, so that the plaintext twin and the encrypted trainer, a process a
message, agree without a word. Nothing here is secret from the owner, and nothing of it is told to anybody else; neither
keys nor ciphertexts are known here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clients.tasks.folds import stratified_folds
from strategies.seeds import generator, integer


def batches(
    targets: NDArray[np.generic], batch_size: int, seed: int, client: int
) -> list[NDArray[np.int64]]:
    """Cuts a client's examples into mini-batches of sizes as equal as can be, each with a like share of every class.

    A last, short batch would give its few examples more weight than the others have, and its slots would cost as much:
    ⌈n / m⌉ batches share all examples instead, and a batch's mean is over those that it has.

    Args:
        targets: (n, …) of the client's examples. Only (n,) whole numbers are classes; others are dealt at random.
        batch_size: m, the most examples of one mini-batch.
        seed: of the cut; the run's own.
        client: logical id.

    Returns:
        Row numbers of each mini-batch, in rising order; sizes differ by at most one.

    Raises:
        ValueError: there are no examples, or `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if not len(targets):
        raise ValueError("there are no examples: a mini-batch of none has no mean gradient")
    classes = targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)
    dealt = stratified_folds(
        targets if classes else np.zeros(len(targets), np.int64),
        -(-len(targets) // batch_size),
        integer(seed, "mini-batches", client + 1),
    )
    order = np.argsort(dealt, kind="stable")
    return np.split(order, np.cumsum(np.bincount(dealt))[:-1])


def batch_of_round(round_number: int, count: int, seed: int, client: int) -> int:
    """The mini-batch that a round is on: each of them once in every `count` rounds.

    Args:
        round_number: from 1. A round that is asked for again has the same mini-batch.
        count: how many mini-batches the client has.
        seed: of the order; the run's own.
        client: logical id; -1 is the server's root data.

    Returns:
        0 … count - 1.

    Raises:
        ValueError: the round or the count is not positive.
    """
    if round_number < 1 or count < 1:
        raise ValueError(f"round {round_number} of {count} mini-batches: both count from 1")
    epoch, place = divmod(round_number - 1, count)
    return int(
        generator(seed, "order of mini-batches", client + 1, epoch).permutation(count)[place]
    )
