"""Clients that lie, for experiments on the engine: model poisoning, applied before an update is encoded."""

from strategies.attacks.agnostic import MinMax, MinSum
from strategies.attacks.attack import Attack, Attacker
from strategies.attacks.collusion import Collusion
from strategies.attacks.mimic import Mimic
from strategies.attacks.omniscient import LIE, Alie, Ipm, Memory, Omniscient, Sight
from strategies.attacks.poisoning import Gaussian, NotANumber, Scaling, SignFlip, Zero

__all__ = [
    "LIE",
    "Alie",
    "Attack",
    "Attacker",
    "Collusion",
    "Gaussian",
    "Ipm",
    "Memory",
    "Mimic",
    "MinMax",
    "MinSum",
    "NotANumber",
    "Omniscient",
    "Scaling",
    "Sight",
    "SignFlip",
    "Zero",
]
