"""Who is asked."""

from strategies.samplers.poisson import Poisson
from strategies.samplers.spaced import Spaced
from strategies.samplers.uniform import Uniform

__all__ = ["Poisson", "Spaced", "Uniform"]
