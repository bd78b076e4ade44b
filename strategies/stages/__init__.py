"""Transformations of an update, each with its client half and its server half in one class."""

from strategies.stages.adaptive_clip import AdaptiveClip
from strategies.stages.clip import Clip
from strategies.stages.local_noise import LocalNoise
from strategies.stages.power_sgd import PowerSgd
from strategies.stages.quantize import Quantize
from strategies.stages.random_k import RandomK
from strategies.stages.sign import Sign
from strategies.stages.sparse import Sparse
from strategies.stages.top_k import TopK

__all__ = [
    "AdaptiveClip",
    "Clip",
    "LocalNoise",
    "PowerSgd",
    "Quantize",
    "RandomK",
    "Sign",
    "Sparse",
    "TopK",
]
