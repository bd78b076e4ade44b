"""Which clients learn the same task: found from the directions of what they send, never acted upon here."""

from strategies.clustering.watcher import TaskClusters

__all__ = ["TaskClusters"]
