"""What a round of secure aggregation costs each client and the server, beside a plain mean of the same vectors.

    python benchmarks/secagg_round.py            # everything, ten minutes
    python benchmarks/secagg_round.py --quick    # up to 100 clients, a minute

Real client halves in a temporary folder and a real session, in one process: `rounds.py`. Those who drop out go when
they are asked for their upload, where it costs the server most. Nothing is trained: a client's seconds are its own half
of the protocol over all phases, the median over all clients that stayed. Processor seconds; wall too where the disk
counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

from common import versions
from rounds import LARGEST_WEIGHT, SEED, Cohort, Round, play

from strategies.collectors import Masked, Plain, PlainClient
from strategies.protocols import ClientOwn
from strategies.secagg.keys import Identity
from strategies.secagg.policy import Roster, identity_file

SETTINGS = ((0.05, 0.0), (0.05, 0.05), (0.3, 0.3))
"""Tolerated drop-outs, and how many there are."""
CLIENTS, SIZES = (10, 100, 500), (100_000, 1_000_000)
QUICK_CLIENTS = (10, 100)


def masked(
    cohort: Cohort, tolerated: float, gone: frozenset[int], *, malicious: bool = False
) -> Round:
    """One masked round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if malicious:
            _identities(folder, cohort.members)
        collector = Masked(
            dropouts=tolerated,
            limit=1.0,
            max_weight=LARGEST_WEIGHT,
            malicious=malicious,
            roster=folder / "roster.json" if malicious else None,
            identities=folder if malicious else None,
        )
        half = collector.client_half(ClientOwn(folder / "clients", {}, simulated=True))
        return play(cohort, collector, half, gone)


def plain(cohort: Cohort, gone: frozenset[int]) -> Round:
    """The same round in clear."""
    return play(cohort, Plain(), PlainClient(), gone)


def repeated(
    cohort: Cohort, tolerated: float, gone: frozenset[int], *, malicious: bool = False
) -> Round:
    """The round with the median server of three, or of one where 500 clients are measured already."""
    runs = 3 if cohort.members * cohort.size <= 10_000_000 else 1
    taken = [masked(cohort, tolerated, gone, malicious=malicious) for _ in range(runs)]
    return sorted(taken, key=lambda one: one.server.cpu)[runs // 2]


def costs(clients: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Seconds and bytes for each number of clients, length and drop-out."""
    print(
        "| clients | d | may drop out | drop out | neighbours | client, ms | wall, ms | plain, ms | server, s"
        " | plain, s | up, B/client | plain | down, B/client | plain |\n|" + " --: |" * 14
    )
    for members in clients:
        for size in sizes:
            cohort = Cohort(members, size)
            for tolerated, part in SETTINGS:
                gone = cohort.gone(part)
                one, other = repeated(cohort, tolerated, gone), plain(cohort, gone)
                degree = Masked(dropouts=tolerated).plan(members)[0].degree
                wall = median(w.wall for c, w in one.clients.items() if c not in gone)
                print(
                    f"| {members} | {size:,} | {tolerated:.0%} | {len(gone)} | {degree} |"
                    f" {1e3 * one.client(gone):.1f} | {1e3 * wall:.1f} | {1e3 * other.client(gone):.2f} |"
                    f" {one.server.cpu:.2f} | {other.server.cpu:.3f} | {_sum(one, 'up'):,.0f} |"
                    f" {_sum(other, 'up'):,.0f} | {_sum(one, 'down'):,.0f} | {_sum(other, 'down'):,.0f} |",
                    flush=True,
                )


def modes(members: int = 100, size: int = 100_000, tolerated: float = 0.05) -> None:
    """The two modes by phase."""
    cohort = Cohort(members, size)
    gone = cohort.gone(tolerated)
    print(f"\n{members} clients, d = {size:,}, {len(gone)} drop out of {tolerated:.0%}\n")
    print(
        "| | semi-honest: up, B | down, B | server, ms | malicious: up, B | down, B | server, ms |"
    )
    print("| --- |" + " --: |" * 6)
    both = [repeated(cohort, tolerated, gone, malicious=mode) for mode in (False, True)]
    for phase in ("keys", "shares", "upload", "agree", "unmask"):
        cells = [_cells(one, phase) for one in both]
        print(f"| {phase} | " + " | ".join(cells) + " |")
    said = [
        f"client {1e3 * one.client(gone):.1f} ms, server {one.server.cpu:.2f} s" for one in both
    ]
    print(f"\nsemi-honest: {said[0]}; malicious: {said[1]}")


def _cells(one: Round, phase: str) -> str:
    if phase not in one.up:
        return "– | – | –"
    up, down = one.bytes_a_client("up")[phase], one.bytes_a_client("down")[phase]
    return f"{up:,.0f} | {down:,.0f} | {1e3 * one.phases[phase].cpu:.1f}"


def _sum(one: Round, way: str) -> float:
    held: Mapping[str, float] = one.bytes_a_client(way)
    return sum(held.values())


def _identities(folder: Path, members: int) -> None:
    own = {client: Identity.generate() for client in range(members)}
    Roster({client: key.public for client, key in own.items()}).save(folder / "roster.json")
    for client, key in own.items():
        path = folder / identity_file(client)
        path.touch(mode=0o600)
        path.write_bytes(key.to_pem())


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/secagg_round.py --clients 50 --sizes 10000",
    )
    parser.add_argument("--quick", action="store_true", help="up to 100 clients only")
    parser.add_argument("--clients", type=int, nargs="+", default=None)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options = parser.parse_args()
    clients = tuple(options.clients or (QUICK_CLIENTS if options.quick else CLIENTS))
    print(
        versions(),
        f"cryptography {version('cryptography')}; vectors seeded with {SEED}, keys the system's;"
        f" load {os.getloadavg()[0]:.1f}\n",
        flush=True,
    )
    _warm_up()
    costs(clients, tuple(options.sizes))
    modes()


def _warm_up() -> None:
    """Imports and tables that are made at first use are nobody's."""
    cohort = Cohort(10, 1_000)
    masked(cohort, 0.05, frozenset())
    plain(cohort, frozenset())


if __name__ == "__main__":
    main()
