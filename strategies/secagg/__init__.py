"""Secure aggregation: a sum of vectors that nobody sees one of.

The primitives are pure functions, one a module: `shamir` (over `field`), `keys`, `masks`, `sealing`, `fixed_point`,
`graph`, `parameters` (over `tails`). Over them lies the protocol, without a network or a clock: `terms`, `statements`
(what both halves say), `masking`, `opening` (the server's arithmetic), `member` with its `vault` and `policy` (the
client's half). `strategies.collectors.Masked` is the server's half, and the only one that knows of rounds.
"""

from strategies.secagg.keys import Identity
from strategies.secagg.member import MaskedClient
from strategies.secagg.policy import Policy, Roster

__all__ = ["Identity", "MaskedClient", "Policy", "Roster"]
