"""Rules that make one update of many."""

from strategies.combiners.mean import Mean

__all__ = ["Mean"]
