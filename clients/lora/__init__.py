"""Low-rank adapters in frozen pretrained models, and which rank each of a client's layers gets."""

from clients.lora.adapters import adapted
from clients.lora.model import LoraClassifier
from clients.lora.ranks import RankPlan

__all__ = ["LoraClassifier", "RankPlan", "adapted"]
