"""Seeds of everything that may be repeated: from the run's seed, the round and the logical client.

Never from node ids, which differ from run to run. Noise and keys that privacy rests on do not come from here.
"""

from __future__ import annotations

import zlib

import numpy as np


def _sequence(seed: int, purpose: str, indices: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *indices])


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A generator of its own for each purpose and indices, such as `generator(seed, "sampler", round)`."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, indices)))


def integer(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for libraries that take one number."""
    return int(_sequence(seed, purpose, indices).generate_state(1, np.uint64)[0] >> np.uint64(1))
