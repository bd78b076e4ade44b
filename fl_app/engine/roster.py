"""Which node is which client, by arithmetic: nothing is stored per client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

_FIRST: Final = 1 << 62
_PRIME: Final = (1 << 61) - 1
_FACTOR: Final = 0x1A85_EC53_C0FF_EE11 % _PRIME
_INVERSE: Final = pow(_FACTOR, -1, _PRIME)


class Roster(Mapping[int, int]):
    """Logical client id → node id, for clients 0 … num_clients − 1, in that order.

    Node ids look as unordered as Flower's and are never a logical id, so that code that mixes the two up fails here
    as it would in a deployment. The map i ↦ 2⁶² + (a · i mod p), with p = 2⁶¹ − 1 prime, is one to one.

    Raises:
        ValueError: fewer than one client.
    """

    def __init__(self, num_clients: int) -> None:
        if num_clients < 1:
            raise ValueError(f"num_clients={num_clients}: at least 1 client is needed")
        self._clients = range(num_clients)

    def __getitem__(self, client: int) -> int:
        if client not in self._clients:
            raise KeyError(client)
        return _FIRST + (client + 1) * _FACTOR % _PRIME

    def __iter__(self) -> Iterator[int]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)

    def client_of(self, node_id: int) -> int | None:
        """The logical id behind a node id, None if there is no such node."""
        if not 0 < node_id - _FIRST < _PRIME:
            return None
        client = (node_id - _FIRST) * _INVERSE % _PRIME - 1
        return client if client in self._clients else None
