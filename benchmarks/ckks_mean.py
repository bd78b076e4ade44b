"""What a sum under CKKS costs beside the plain mean and beside masks: CPU-seconds, traffic, error.

    python benchmarks/ckks_mean.py                      # 10 clients, 1,000,000 parameters, five rounds each
    python benchmarks/ckks_mean.py --parameters 100000 --clients 4 --rounds 1

Each collector's own two halves, message by message, in one process and thread: no training, no network. A client's
seconds are all that its half does in the phase that trains, the server's all that its session does, by the number of
clients; bytes are those of the records as they travel. The error is the largest of the mean's elements, against the
mean in float64.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from common import versions
from flwr.app import RecordDict

from strategies.collectors import Ckks, Masked, Plain
from strategies.protocols import ClientHalf, ClientOwn, Collector, Job, Reply, Request
from strategies.sizes import count_bytes
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import ARRAYS, TRAINS, config_of, pack_model

COLLECTORS: dict[str, Collector] = {
    "plain": Plain(),
    "masked": Masked(),
    "ckks, N = 4096": Ckks(),
    "ckks, N = 8192": Ckks(degree=8192, bits=(60, 60)),
}


@dataclass
class Spent:
    """One round's figures.

    Attributes:
        clients: CPU-seconds of all clients.
        openers: of those, what opening the sum took.
        server: CPU-seconds of the session.
        up: bytes that clients sent.
        down: bytes that they were sent beside the model.
        error: largest error of the mean.
    """

    clients: float = 0.0
    openers: float = 0.0
    server: float = 0.0
    up: int = 0
    down: int = 0
    error: float = 0.0
    means: list[Update] = field(default_factory=list)


def job_of(size: int, number: int) -> Job:
    """A round on a model of one vector, another one each time."""
    rng = np.random.default_rng(number)
    model = {"w": rng.normal(size=size).astype(np.float32)}
    return Job(
        round=number,
        version=number - 1,
        records={ARRAYS: pack_model(model)},
        config={},
        included={},
        layouts={DELTA: Layout.of(model)},
        kinds={"w": DELTA},
    )


def one_round(collector: Collector, half: ClientHalf, job: Job, clients: int) -> Spent:
    """A session from its first request to its sum."""
    layout = job.layouts[DELTA]
    rng = np.random.default_rng(job.round)
    vectors = [rng.normal(0, 0.05, layout.size).astype(np.float32) for _ in range(clients)]
    spent, events = Spent(), []
    began = time.process_time()
    session = collector.open(job, range(clients))
    events += session.start()
    spent.server += time.process_time() - began
    model = count_bytes(RecordDict(dict(job.records)))
    while events:
        event = events.pop(0)
        if not isinstance(event, Request):
            if isinstance(event, Update):
                spent.means.append(event)
                continue
            raise RuntimeError(str(event))
        update = Update(
            {DELTA: Section(vectors[event.client], layout)}, 1.0, (event.client,), job.version
        )
        spent.down += count_bytes(event.content) - (model if ARRAYS in event.content else 0)
        trains = config_of(event.content).get(TRAINS, True)
        began = time.process_time()
        if trains:
            half.prepare(event.content)
            content = half.reply(update, event.content)
        else:
            content = half.answer(event.content)
        took = time.process_time() - began
        spent.clients += took
        spent.openers += 0 if trains else took
        spent.up += count_bytes(content)
        began = time.process_time()
        events += session.receive(Reply(event, content))
        spent.server += time.process_time() - began
    exact = np.mean(vectors, axis=0, dtype=np.float64)
    mean = sum(one.weight * one.sections[DELTA].vector.astype(np.float64) for one in spent.means)
    mean /= sum(one.weight for one in spent.means)
    spent.error = float(np.abs(mean - exact).max())
    return spent


def row(name: str, collector: Collector, size: int, clients: int, rounds: int) -> str:
    """The medians over some rounds, after one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        half = collector.client_half(ClientOwn(Path(folder), {}, simulated=True))
        one_round(collector, half, job_of(size, 1), clients)
        found = [one_round(collector, half, job_of(size, 2 + i), clients) for i in range(rounds)]
    uploads = median((one.clients - one.openers) / clients for one in found)
    opening = median(one.openers for one in found)
    server = median(one.server / clients for one in found)
    up = median(one.up / clients / size for one in found)
    down = median(one.down / clients / size for one in found)
    error = max(one.error for one in found)
    return f"| {name} | {uploads:.3f} | {opening:.3f} | {server:.3f} | {up:.2f} | {down:.2f} | {error:.1e} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"{versions()} {options.parameters:,} parameters, {options.clients} clients\n")
    print(
        "| collector | client, CPU s | further phases, all clients, CPU s | server, CPU s a client"
        " | MB up a client and million | MB down beside the model | largest error |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, collector in COLLECTORS.items():
        print(row(name, collector, options.parameters, options.clients, options.rounds), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
