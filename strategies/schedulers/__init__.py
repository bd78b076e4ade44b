"""When rounds happen."""

from strategies.schedulers.synchronous import Synchronous

__all__ = ["Synchronous"]
