"""Clients that lie, for experiments on the engine: model poisoning, applied before an update is encoded."""

from strategies.attacks.poisoning import Attack, Gaussian, NotANumber, Scaling, SignFlip, Zero

__all__ = ["Attack", "Gaussian", "NotANumber", "Scaling", "SignFlip", "Zero"]
