"""How updates come out of a cohort."""

from strategies.collectors.ckks import Ckks
from strategies.collectors.encrypted import Encrypted
from strategies.collectors.masked import Masked
from strategies.collectors.plain import Plain, PlainClient
from strategies.collectors.split import Split

__all__ = ["Ckks", "Encrypted", "Masked", "Plain", "PlainClient", "Split"]
