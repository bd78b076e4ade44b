"""How updates come out of a cohort."""

from strategies.collectors.plain import Plain

__all__ = ["Plain"]
