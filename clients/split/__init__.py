"""A model in parts, of which clients hold some and the server the others."""

from clients.split.cut import cut
from clients.split.halves import Bottom, Middle, Part, Top, seeded
from clients.split.loading import load_bottom, load_middle, load_tail, load_top
from clients.split.model import SplitLora
from clients.split.planner import Limits
from clients.split.surgery import blocks_of
from clients.split.trainer import SplitTrainer

__all__ = [
    "Bottom",
    "Limits",
    "Middle",
    "Part",
    "SplitLora",
    "SplitTrainer",
    "Top",
    "blocks_of",
    "cut",
    "load_bottom",
    "load_middle",
    "load_tail",
    "load_top",
    "seeded",
]
