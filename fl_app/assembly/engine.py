"""The engine's grid for a run: its pool of clients, how many processes hold it, and the mind behind its attackers.

The pool's clients are made in the workers, of an assembly that is forked with them, so whatever is measured or decided
once is so before. Must not know what the server does with the grid, nor when the run ends.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import ceil
from typing import Any

from flwr.serverapp import Grid

from fl_app.assembly.client import make_client, make_client_half
from fl_app.assembly.server import make_sampler
from fl_app.assembly.shared import Assembly
from fl_app.config.targets import build
from fl_app.encryption import compute_client
from fl_app.engine import AdversaryPool, ClientPool, EngineGrid, make_pool, resolve_workers
from fl_app.engine.allocator import keep_freed_memory
from strategies.contract import Claim
from strategies.secagg import MaskedClient

log = logging.getLogger(__name__)


def count_workers(assembly: Assembly, num_clients: int) -> int:
    """Processes that train the engine's clients: no more than a round of clients trained at once can keep busy."""
    config = assembly.config
    if assembly.encrypted and compute_client(config) is not None:
        return 1  # what a client is in the middle of computing is in one process
    count = resolve_workers(config.runtime.workers)
    if config.runtime.workers != "auto" or assembly.batching.size == 1:
        return count
    sampler = make_sampler(assembly, num_clients)
    cohort = sampler.check(Claim()).cohort or num_clients
    return min(count, ceil(cohort / assembly.batching.size))


@contextmanager
def engine_grid(assembly: Assembly, num_clients: int, begin: float) -> Iterator[Grid]:
    """The engine's grid with its pool of workers, ended with the context.

    Args:
        assembly: of the run.
        num_clients: that the grid has.
        begin: virtual seconds at which its clock starts.
    """
    config = assembly.config
    data = assembly.data(num_clients)
    epochs = getattr(assembly.trainer, "local_epochs", 1)
    devices = build(config.runtime.devices, dropout=config.runtime.dropout)

    keep_freed_memory()  # the workers, which are forked, do likewise
    log.info("clients are trained %s", assembly.batching)  # decided here, once, and forked too

    def factory() -> Any:
        return make_client(assembly, "engine").answer

    pool: ClientPool = make_pool(factory, count_workers(assembly, num_clients))
    if assembly.adversary is not None:
        attackers = assembly.adversary.attack.attackers(num_clients, config.seed)
        pool = AdversaryPool(pool, assembly.adversary, attackers)
    with closing(pool), _secrets_forgotten(assembly):
        pool.start()  # now, so that its faults and its time are not the first round's
        yield EngineGrid(
            pool,
            num_clients=num_clients,
            devices=devices,
            seed=config.seed,
            work=lambda client: float(data.sizes[client]) * epochs,
            together=assembly.batching.size,
            start=begin,
            whole_rounds=assembly.adversary is not None,
            batch_size=getattr(assembly.trainer, "batch_size", 1),
        )


@contextmanager
def _secrets_forgotten(assembly: Assembly) -> Iterator[None]:
    """Leaves no session's keys behind: nobody asks the engine's clients again, as a device's are by the next round."""
    try:
        yield
    finally:
        half = make_client_half(assembly, "engine")
        if isinstance(half, MaskedClient):
            half.forget()
