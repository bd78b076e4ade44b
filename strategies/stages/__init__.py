"""Transformations of an update, each with its client half and its server half in one class."""

from strategies.stages.adaptive_clip import AdaptiveClip
from strategies.stages.clip import Clip
from strategies.stages.local_noise import LocalNoise

__all__ = ["AdaptiveClip", "Clip", "LocalNoise"]
