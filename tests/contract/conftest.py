from tests.strategies.conftest import _server_identity

__all__ = ["_server_identity"]
