"""The primitives of secure aggregation beside flwr's SecAgg+: masks, key agreement, sharing, fixed point; one process.

    python benchmarks/secagg_primitives.py                       # everything, half a minute
    python benchmarks/secagg_primitives.py --neighbours 9 --size 100000

Both sides by turns, medians. flwr's side calls what its client and server modules call, in the same order and on what
they call it on: keys as PEM, shares of the mask's seed and of the private key one after the other. flwr pads each
secret and shares 16 bytes at a time; ours shares the two 32-byte secrets in one call.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from statistics import median

import numpy as np
from common import versions
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from strategies.secagg.fixed_point import FixedPoint
from strategies.secagg.keys import KeyPair, agree, context
from strategies.secagg.masks import BLOCK, ZEROS, add_masks
from strategies.secagg.shamir import combine, combine_many, share

SEED = 1
CLIENTS, THRESHOLD = 100, 51
RANGE = 1 << 32
"""flwr's `modulus_range` by default."""

Action = Callable[[], object]


def seconds(*actions: Action, runs: int) -> list[float]:
    """The median of each, by turns, after one that does not count."""
    taken: list[list[float]] = [[] for _ in actions]
    for run in range(runs + 1):
        for action, times in zip(actions, taken, strict=True):
            began = time.perf_counter()
            action()
            if run:
                times.append(time.perf_counter() - began)
    return [median(times) for times in taken]


def row(what: str, ours: float, theirs: float) -> None:
    """One line of the table."""
    print(
        f"| {what} | {ours * 1e3:,.3f} | {theirs * 1e3:,.3f} | {theirs / ours:,.1f}× |", flush=True
    )


def masks(size: int, neighbours: list[int]) -> None:
    """A client's own mask and one for each neighbour, on a vector that is quantised; then with the key agreements."""
    quantised = np.random.default_rng(SEED).integers(0, 1 << 22, size)
    vector, seed = quantised.astype(np.uint32), os.urandom(32)
    private, public = generate_key_pairs()
    private_pem, public_pem = private_key_to_bytes(private), public_key_to_bytes(public)
    pair, other, info = KeyPair.generate(), KeyPair.generate(), context("benchmark")

    def ours(keys: Iterable[bytes]) -> None:
        given = list(keys)
        add_masks(vector, [seed, *given[::2]], given[1::2])

    def theirs(keys: Iterable[bytes]) -> None:
        masked = parameters_addition([quantised], pseudo_rand_gen(seed, RANGE, [(size,)]))
        for place, key in enumerate(keys):
            change = parameters_addition if place % 2 else parameters_subtraction
            masked = change(masked, pseudo_rand_gen(key, RANGE, [(size,)]))
        parameters_mod(masked, RANGE)

    for count in neighbours:
        keys = [os.urandom(32) for _ in range(count)]
        alone = seconds(partial(ours, keys), partial(theirs, keys), runs=5)
        row(f"masks of {count} neighbours, d = {size:,}", *alone)
    for count in neighbours:

        def agreed(count: int = count) -> Iterator[bytes]:
            return (pair.agree(other.public, info) for _ in range(count))

        def flower(count: int = count) -> Iterator[bytes]:
            return (
                generate_shared_key(
                    bytes_to_private_key(private_pem), bytes_to_public_key(public_pem)
                )
                for _ in range(count)
            )

        both = seconds(lambda: ours(agreed()), lambda: theirs(flower()), runs=3)
        row(f"the same with {count} key agreements", *both)


def agreements() -> None:
    """One client's agreement with one neighbour."""
    private, public = generate_key_pairs()
    private_pem, public_pem = private_key_to_bytes(private), public_key_to_bytes(public)
    pair, other = KeyPair.generate(), KeyPair.generate()

    def info() -> bytes:
        return context("benchmark", round=1, one=pair.public, other=other.public)

    def theirs() -> bytes:
        return generate_shared_key(
            bytes_to_private_key(private_pem), bytes_to_public_key(public_pem)
        )

    many, once, flower = seconds(
        lambda: pair.agree(other.public, info()),
        lambda: agree(pair.private, other.public, info()),
        theirs,
        runs=300,
    )
    row("key agreement, one of many with the same private key", many, flower)
    row("key agreement, the private key read each time", once, flower)


def sharing() -> None:
    """Both secrets of a client among 100, and both from 51 of their shares."""
    seed, (private, _) = os.urandom(32), generate_key_pairs()
    pem, secret = private_key_to_bytes(private), os.urandom(64)

    def theirs() -> tuple[list[bytes], list[bytes]]:
        return create_shares(seed, THRESHOLD, CLIENTS), create_shares(pem, THRESHOLD, CLIENTS)

    ours_made, theirs_made = share(secret, THRESHOLD, CLIENTS), theirs()
    some = {place + 1: ours_made[place].tobytes() for place in range(THRESHOLD)}
    both = f"2 secrets, {THRESHOLD} of {CLIENTS}"
    row(
        f"sharing {both}",
        *seconds(lambda: share(secret, THRESHOLD, CLIENTS), theirs, runs=3),
    )
    row(
        f"combining {both}",
        *seconds(
            lambda: combine(some, THRESHOLD),
            lambda: [combine_shares(shares[:THRESHOLD]) for shares in theirs_made],
            runs=3,
        ),
    )
    points = range(1, THRESHOLD + 1)
    stack = np.repeat(ours_made[None, :THRESHOLD], CLIENTS, axis=0)
    (many,) = seconds(lambda: combine_many(points, stack), runs=9)
    print(f"\ncombining {CLIENTS} clients' at the same points: {many * 1e3:.2f} ms together")


def encoding(size: int) -> None:
    """float32 to integers: to the nearest, and stochastically as flwr does."""
    vector = np.random.default_rng(SEED).standard_normal(size, dtype=np.float32)
    out, point = np.empty(size, np.uint32), FixedPoint(8.0, CLIENTS)
    nearest, stochastic, flower = seconds(
        lambda: point.encode(vector, out),
        lambda: point.encode(vector, out, rounding="stochastic"),
        lambda: quantize([vector], 8.0, 1 << 22),
        runs=9,
    )
    row(f"fixed point to the nearest, d = {size:,}", nearest, flower)
    row(f"fixed point, stochastic, d = {size:,}", stochastic, flower)
    (masked,) = pseudo_rand_gen(os.urandom(32), RANGE, [(size,)])
    print(
        f"\nbytes an element on the wire: {out.itemsize}, flwr {masked.itemsize};"
        f" step at ±8 and {CLIENTS} clients: {point.step:.1e}, flwr {16 / (1 << 22):.1e}"
    )


def limit(size: int, neighbours: list[int]) -> None:
    """The ciphers alone, which every mask needs, by blocks that stay in L2: how far our masks are from them."""
    blocks = -(-size // BLOCK)
    stream = bytearray(4 * BLOCK)

    def alone(mode: modes.Mode) -> None:
        encryptor = Cipher(algorithms.AES256(os.urandom(32)), mode).encryptor()
        for _ in range(blocks):
            encryptor.update_into(ZEROS, stream)

    vector = np.zeros(size, np.uint32)
    for count in neighbours:
        keys = [os.urandom(32) for _ in range(count + 1)]
        gcm, ctr, ours, chacha = seconds(
            lambda: alone(modes.GCM(bytes(12))),
            lambda: alone(modes.CTR(bytes(16))),
            partial(add_masks, vector, keys[::2], keys[1::2]),
            partial(add_masks, vector, keys[::2], keys[1::2], cipher="chacha"),
            runs=9,
        )
        share_of_blocks = size / (blocks * BLOCK)
        print(
            f"{count} neighbours: AES-256-GCM alone {4 * BLOCK * blocks / gcm / 1e9:.1f} GB/s (AES-256-CTR"
            f" {4 * BLOCK * blocks / ctr / 1e9:.1f}), {gcm * share_of_blocks * (count + 1) * 1e3:.1f} ms; masks"
            f" {ours * 1e3:.1f} ms, {ours / (gcm * share_of_blocks * (count + 1)):.2f} times as long;"
            f" with ChaCha20 {chacha * 1e3:.1f} ms"
        )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/secagg_primitives.py --neighbours 9 49 --size 100000",
    )
    parser.add_argument("--size", type=int, default=1_000_000, help="elements of a vector")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[9, 49, 99])
    options = parser.parse_args()
    print(
        versions(),
        f"cryptography {version('cryptography')};",
        f"vectors seeded with {SEED}, keys the system's\n",
    )
    print("| | ours, ms | flwr, ms | speed |")
    print("| --- | --: | --: | --: |")
    masks(options.size, options.neighbours)
    agreements()
    sharing()
    print("\n| | ours, ms | flwr, ms | speed |")
    print("| --- | --: | --: | --: |")
    encoding(options.size)
    print()
    limit(options.size, options.neighbours)


if __name__ == "__main__":
    main()
