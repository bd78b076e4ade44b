"""Who is asked."""

from strategies.samplers.uniform import Uniform

__all__ = ["Uniform"]
