"""Who is asked."""

from strategies.samplers.spaced import Spaced
from strategies.samplers.uniform import Uniform

__all__ = ["Spaced", "Uniform"]
