"""Compression of updates: milliseconds per million parameters, both ends, and the bytes of the whole reply.

    python benchmarks/compression_speed.py                     # a minute
    python benchmarks/compression_speed.py --law normal --runs 201

One process and one thread. Encoding is all that a client's stages do, its memory of the last round included; decoding
all that the server does with the bytes, to the vector that the combiner gets. Codings and a copy of the vector in
memory take turns, so that what else the machine does strikes them alike; medians over runs, each on another of a few
vectors. The clock is the thread's own: time that other processes are given does not count, but what they take of a
core's caches and of its second thread does. Freed memory is kept, as the engine's processes do.

The vector is 1,000 rows of 1,000, drawn from a bell curve or from Laplace's law, whose tails are as heavy as those of
many updates. Bytes are those of the whole serialised reply, over those of one that is not compressed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402 - the libraries read their number of threads as they are loaded
import zstandard  # noqa: E402
from common import versions  # noqa: E402
from flwr.app import ConfigRecord  # noqa: E402

from fl_app.engine.allocator import keep_freed_memory  # noqa: E402
from strategies.encoding import encode, packing_of, reshaped  # noqa: E402
from strategies.pipeline import Pipeline  # noqa: E402
from strategies.protocols import Packing, Stage  # noqa: E402
from strategies.replies import write_update  # noqa: E402
from strategies.sizes import count_bytes  # noqa: E402
from strategies.stages import PowerSgd, Quantize, RandomK, Sign, TopK  # noqa: E402
from strategies.update import DELTA, Layout, Section, Update, Vector  # noqa: E402

LAYOUT = Layout(("w",), ((1000, 1000),))
SEEDS = (1, 2, 3, 4, 5)
CODINGS: dict[str, TopK | RandomK | Quantize | PowerSgd | Sign] = {
    "top-k 1%, fp16, zstd": TopK(),
    "top-k 1%, fp16, no coder": TopK(codec="none"),
    "top-k 1%, fp32, zstd": TopK(values="float32"),
    "top-k 10%, fp16, zstd": TopK(ratio=0.1),
    "random-k 1%": RandomK(),
    "random-k 10%": RandomK(ratio=0.1),
    "8 bits, zstd": Quantize(bits=8),
    "8 bits, no coder": Quantize(bits=8, codec="none"),
    "4 bits, zstd": Quantize(bits=4),
    "4 bits, no coder": Quantize(bits=4, codec="none"),
    "2 bits, zstd": Quantize(bits=2),
    "2 bits, no coder": Quantize(bits=2, codec="none"),
    "PowerSGD rank 2, zstd": PowerSgd(rank=2),
    "PowerSGD rank 4, zstd": PowerSgd(rank=4),
    "signs": Sign(),
}


class Taken(NamedTuple):
    """Seconds of both ends, and bytes of the reply."""

    encoding: float
    decoding: float
    size: int


def drawn(law: str, seed: int) -> Vector:
    """A vector as an update may be: standard deviation about 0.001."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, LAYOUT.size) if law == "normal" else rng.laplace(0, 1, LAYOUT.size)
    return (values / 1000).astype(np.float32)


def remembered(stages: Sequence[Stage], vector: Vector) -> dict[str, Vector]:
    """What a client has in memory after its first round."""
    memory: dict[str, Vector] = {}
    encode(update_of(vector), stages, ConfigRecord({"server-round": 1}), 0, {}, memory)
    return memory


def update_of(vector: Vector) -> Update:
    """One client's update."""
    return Update({DELTA: Section(vector, LAYOUT)}, 100.0, (0,), 0, {"train_loss": 0.5})


def once(stages: Sequence[Stage], vector: Vector, memory: Mapping[str, Vector]) -> Taken:
    """One update's way to the combiner."""
    pipeline, update, config = (
        Pipeline(stages=stages),
        update_of(vector),
        ConfigRecord({"server-round": 2}),
    )
    layout = reshaped({DELTA: LAYOUT}, stages)[DELTA]
    packing: Packing | None = packing_of(stages)
    began = time.thread_time()
    sent = encode(update, stages, config, 0, memory, {})
    encoded = time.thread_time()
    section = sent.delta
    if packing is not None:
        assert section.packed is not None
        section = Section(packing.unpack(DELTA, section.packed, layout), layout)
    pipeline.decode(sent.with_section(DELTA, section))
    done = time.thread_time()
    size = count_bytes(write_update(sent, client=0, round_number=2))
    return Taken(encoded - began, done - encoded, size)


def main() -> None:
    """Prints one table a law."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--law", choices=("normal", "laplace"), help="one of the two only")
    parser.add_argument("--runs", type=int, default=101)
    arguments = parser.parse_args()
    keep_freed_memory()
    laws = (arguments.law,) if arguments.law else ("normal", "laplace")
    print(versions(), f"zstandard {zstandard.__version__}; {arguments.runs} runs, seeds {SEEDS};")
    for law in laws:
        print(f"load before: {os.getloadavg()[0]:.2f} processes a minute")
        table(law, arguments.runs)


def both_ends() -> dict[str, tuple[Sequence[Stage], Sequence[Stage]]]:
    """Each coding's stages, before and behind a clip."""
    return {name: coding.stages() for name, coding in CODINGS.items()}


def table(law: str, runs: int) -> None:
    """All codings on vectors of one law."""
    vectors = [drawn(law, seed) for seed in SEEDS]
    chains = {name: [*before, *behind] for name, (before, behind) in both_ends().items()}
    memories = {
        name: [remembered(stages, vector) for vector in vectors] for name, stages in chains.items()
    }
    found: dict[str, list[Taken]] = {name: [] for name in chains}
    copies, copy = [], np.empty(LAYOUT.size, np.float32)
    for run in range(runs + 1):
        index = run % len(SEEDS)
        began = time.thread_time()
        np.copyto(copy, vectors[index])
        copies.append(time.thread_time() - began)
        for name, stages in chains.items():
            found[name].append(once(stages, vectors[index], memories[name][index]))
    dense = count_bytes(write_update(update_of(vectors[0]), client=0, round_number=2))
    base = median(copies[1:])
    print(f"\n### {law}, 1,000,000 float32; a copy of them takes {1e3 * base:.2f} ms\n")
    print(
        "| coding | encode, ms | decode, ms | both, ms | the least | over a copy | bytes | times smaller |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for name, taken in found.items():
        encoding, decoding = (median(column) for column in list(zip(*taken[1:], strict=True))[:2])
        size = median(one.size for one in taken[1:])
        both, least = encoding + decoding, min(one.encoding + one.decoding for one in taken[1:])
        print(
            f"| {name} | {1e3 * encoding:.2f} | {1e3 * decoding:.2f} | {1e3 * both:.2f} "
            f"| {1e3 * least:.2f} "
            f"| {both / base:.0f} | {size:,.0f} | {dense / size:.1f} |"
        )
    print()


if __name__ == "__main__":
    main()
