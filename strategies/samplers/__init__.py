"""Who is asked."""

from strategies.samplers.fair import Fair, jain_index
from strategies.samplers.poisson import Poisson
from strategies.samplers.spaced import Spaced
from strategies.samplers.uniform import Uniform

__all__ = ["Fair", "Poisson", "Spaced", "Uniform", "jain_index"]
