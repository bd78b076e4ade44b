"""How updates come out of a cohort."""

from strategies.collectors.plain import Plain, PlainClient

__all__ = ["Plain", "PlainClient"]
