"""Finding clients that lie, and keeping them out for a while; independent of the rule that combines."""

from strategies.detection.detector import Detector
from strategies.detection.quarantine import Quarantine

__all__ = ["Detector", "Quarantine"]
