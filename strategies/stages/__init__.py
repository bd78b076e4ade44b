"""Transformations of an update, each with its client half and its server half in one class."""

from strategies.stages.clip import Clip

__all__ = ["Clip"]
