"""The seams of a pipeline: what a part of each kind must offer. No behaviour lives here.

Parts that have a contract offer `check`; parts that must last through a restart offer `state_dict`. What a scheduler
must offer stands with the schedulers (`strategies.schedulers.Scheduler`), and a server's optimiser with the models.
"""

from strategies.protocols.collector import (
    ClientHalf,
    ClientOwn,
    Collector,
    ConfigValue,
    Event,
    Job,
    Refusal,
    Reply,
    Request,
    Session,
    Void,
)
from strategies.protocols.server import (
    Accumulator,
    Combiner,
    Informed,
    Learner,
    Parts,
    Persistent,
    Picker,
    Plan,
    Promise,
    Sampler,
)
from strategies.protocols.stage import (
    Bounding,
    ClientContext,
    Maker,
    Memory,
    Packing,
    Settings,
    Shaping,
    Stage,
    settings_of,
)

__all__ = [
    "Accumulator",
    "Bounding",
    "ClientContext",
    "ClientHalf",
    "ClientOwn",
    "Collector",
    "Combiner",
    "ConfigValue",
    "Event",
    "Informed",
    "Job",
    "Learner",
    "Maker",
    "Memory",
    "Packing",
    "Parts",
    "Persistent",
    "Picker",
    "Plan",
    "Promise",
    "Refusal",
    "Reply",
    "Request",
    "Sampler",
    "Session",
    "Settings",
    "Shaping",
    "Stage",
    "Void",
    "settings_of",
]
