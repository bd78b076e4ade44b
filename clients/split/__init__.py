"""A model in parts, of which clients hold some and the server the others."""

from clients.split.cut import cut
from clients.split.halves import Bottom, Middle, Part, Top, seeded
from clients.split.loading import load_bottom, load_middle, load_tail, load_top
from clients.split.surgery import blocks_of

__all__ = [
    "Bottom",
    "Middle",
    "Part",
    "Top",
    "blocks_of",
    "cut",
    "load_bottom",
    "load_middle",
    "load_tail",
    "load_top",
    "seeded",
]
