"""From a configuration to objects: the one place that knows which class of one room meets which of another.

An `Assembly` makes what both ends of a run share; each end, and what holds them together, is made of one:

    shared.py    task, trainer, data, stages, promise, collector: the same at both ends
    network.py   the model: how it is made, whole and in parts, and what of it travels
    client.py    the clients of a process, of the engine's, a simulation's or a device's
    server.py    the strategy, what is measured of each model, what is served to clients
    engine.py    the engine's grid: its pool of clients, how many at once, its adversary
    checked.py   the server's end held against the contract: what a run refuses before it begins

`client.py` and `server.py` do not know one another. Nothing here knows a run's files, its console or its end.
"""

from fl_app.assembly.checked import check, check_for_flower, composed, refuse_attack
from fl_app.assembly.client import Place, make_client, make_client_half
from fl_app.assembly.engine import count_workers, engine_grid
from fl_app.assembly.network import Network
from fl_app.assembly.server import (
    forecast,
    make_evaluator,
    make_strategy,
    most_reply_arrays,
    most_reply_bytes,
)
from fl_app.assembly.shared import LEDGER, Assembly

__all__ = [
    "LEDGER",
    "Assembly",
    "Network",
    "Place",
    "check",
    "check_for_flower",
    "composed",
    "count_workers",
    "engine_grid",
    "forecast",
    "make_client",
    "make_client_half",
    "make_evaluator",
    "make_strategy",
    "most_reply_arrays",
    "most_reply_bytes",
    "refuse_attack",
]
