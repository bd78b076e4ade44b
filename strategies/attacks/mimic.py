"""All attackers copy one honest client, so that what is over-represented looks like a consensus.

Karimireddy, He and Jaggi 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", the mimic attack:
over the rounds of a warm-up the adversary finds the direction z in which the honest differ most, and the honest client
that lies furthest along it. No copy can be told from an honest update by what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from strategies.attacks.attack import lied
from strategies.attacks.omniscient import Memory, Omniscient, Sight, against, blocks, length
from strategies.seeds import generator
from strategies.state import array_in, integer_in, mapping_in
from strategies.update import DELTA, Update, Vector


@dataclass(frozen=True)
class Mimic(Omniscient):
    """Copies of the honest client that keeps the direction of the greatest variance.

    In round t of the warm-up, with x_i the deltas of the honest and c_i = x_i − μ_t:

        μ_t = (1 − 1/t)·μ_{t−1} + (1/t)·mean_i x_i
        g   = Σ_i ⟨c_i, z_{t−1}⟩·c_i                    a step of the power iteration on their covariance
        z_t ∝ (1 − 1/t)·z_{t−1} + (1/t)·g / ‖g‖         of length 1; z_0 is drawn at random
        s_i = s_i + ⟨x_i, z_t⟩

    The client copied is the one with the largest |s_i|, over the rounds in which it answered. The paper's clients
    answer in every round; where cohorts are sampled, s_i is a mean, and a round without that client has the next one
    copied.

    Attributes:
        warmup: rounds in which z and s are learnt; attackers copy whoever leads so far.
    """

    warmup: Annotated[int, Ge(1)] = 5

    def plot(self, seen: Sight, memory: Memory) -> dict[str, Vector]:
        """Every float section of the client that is copied."""
        rounds = integer_in(memory, "rounds") if memory else 0
        if rounds < self.warmup:
            memory |= _learn(seen.rows(DELTA), memory, rounds + 1, seen.seed)
            memory["scores"] = _scored(seen, memory)
            memory["rounds"] = rounds + 1
        model = _leader(seen, memory)
        return {name: model.sections[name].vector for name in lied(model)}


def _learn(rows: Sequence[Vector], memory: Memory, t: int, seed: int) -> Memory:
    """Mean and direction after one more round, each (d,) float64."""
    size = rows[0].size
    if t == 1:
        mean, direction = np.zeros(size), generator(seed, "mimic").standard_normal(size)
    else:
        mean, direction = (array_in(memory, key, (size,)) for key in ("mean", "direction"))
    along = np.zeros(len(rows))
    for part, block in blocks(rows):
        mean[part] += (block.mean(0) - mean[part]) / t
        along += against(block - mean[part], direction[part])
    step = np.empty(size)
    for part, block in blocks(rows):
        step[part] = against((block - mean[part]).T, along)
    # Where the honest agree, no direction is better than another.
    if norm := length(step):
        direction += (step / norm - direction) / t
    if norm := length(direction):
        direction /= norm
    return {"mean": mean, "direction": direction}


def _scored(seen: Sight, memory: Memory) -> Memory:
    """By client: the sum of ⟨x, z⟩ over its rounds, and their number."""
    before = mapping_in(memory, "scores") if "scores" in memory else {}
    scores: Memory = dict(before)
    for update, value in zip(seen.honest, _reach(seen, memory), strict=True):
        total, count = _entry(before, update.members[0])
        scores[str(update.members[0])] = np.array([total + value, count + 1])
    return scores


def _leader(seen: Sight, memory: Memory) -> Update:
    """The honest update to copy; of clients that the warm-up has not met, this round counts."""
    scores = mapping_in(memory, "scores")
    known = [_entry(scores, update.members[0]) for update in seen.honest]
    now = [0.0] * len(known) if all(count for _, count in known) else _reach(seen, memory)
    means = [
        total / count if count else value for (total, count), value in zip(known, now, strict=True)
    ]
    return seen.honest[int(np.argmax(np.abs(means)))]


def _entry(scores: Mapping[str, object], client: int) -> tuple[float, int]:
    entry = scores.get(str(client))
    return (float(entry[0]), int(entry[1])) if isinstance(entry, np.ndarray) else (0.0, 0)


def _reach(seen: Sight, memory: Memory) -> list[float]:
    """⟨x_i, z⟩ of each honest client."""
    rows = seen.rows(DELTA)
    direction: NDArray[np.float64] = array_in(memory, "direction", (rows[0].size,))
    found = np.zeros(len(rows))
    for part, block in blocks(rows):
        found += against(block, direction[part])
    return [float(value) for value in found]
