"""Down-link compression: what has changed since the model that a client holds, in the model's place.

`grid` puts a model where differences are whole numbers, `coding` writes them, `sender` is the server's half and `held`
the client's; `messages` is what travels between them.
"""

from strategies.downlink.held import HeldModels
from strategies.downlink.sender import Downlink

__all__ = ["Downlink", "HeldModels"]
