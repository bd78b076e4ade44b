import pytest

from fl_app.engine.flwr_internals import claim_identity


@pytest.fixture(autouse=True)
def _server_identity() -> None:
    """`Message()` asks for the identity of the process, which Flower's launchers set."""
    claim_identity(run_id=1)
