"""The in-process engine: Flower's `Grid` over virtual devices, client code in resident workers.

A run on it is deterministic: it depends on the seed and the settings, not on the number of workers or the machine's
speed. Server code does not know it from Flower's own grids.
"""

from fl_app.engine.adversary import Adversary, AdversaryPool
from fl_app.engine.answering import Answer, one_by_one
from fl_app.engine.clock import VirtualClock
from fl_app.engine.devices import DeviceModel, Occasion
from fl_app.engine.grid import EngineGrid
from fl_app.engine.pool import ClientPool, Factory, InProcessPool
from fl_app.engine.process_pool import ProcessPool, make_pool, resolve_workers
from fl_app.engine.roster import Roster
from fl_app.engine.worker import WorkerError

__all__ = [
    "Adversary",
    "AdversaryPool",
    "Answer",
    "ClientPool",
    "DeviceModel",
    "EngineGrid",
    "Factory",
    "InProcessPool",
    "Occasion",
    "ProcessPool",
    "Roster",
    "VirtualClock",
    "WorkerError",
    "make_pool",
    "one_by_one",
    "resolve_workers",
]
