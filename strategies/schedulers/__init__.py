"""Loops over model versions: when who is asked, and when what came becomes a step."""

from strategies.schedulers.buffered import Buffered
from strategies.schedulers.compass import Compass
from strategies.schedulers.scheduler import Scheduler
from strategies.schedulers.staleness import Constant, Hinge, Polynomial, Staleness
from strategies.schedulers.synchronous import Synchronous

__all__ = [
    "Buffered",
    "Compass",
    "Constant",
    "Hinge",
    "Polynomial",
    "Scheduler",
    "Staleness",
    "Synchronous",
]
