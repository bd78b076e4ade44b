"""A device that waits for power: its round goes on without it, and nothing is held against it."""

from collections.abc import Iterator

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from strategies import Pipeline
from strategies.admission import Admission, is_wrong
from strategies.detection import Quarantine
from strategies.wire import Refused, failure_of, pack_model
from tests.strategies.test_strategy import INITIAL, learns, strategy
from tests.support.grids import ScriptedGrid, trellis_node

LOW = Refused("paused", "its battery is at 7 %")


def waiting(message: Message) -> Iterator[Message]:
    yield Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, LOW.told), reply_to=message)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (f"{LOW.told} (code 2)", "paused"),
        ("paused", "client_error"),
        ("OSError: paused: no", "client_error"),
        ("", "client_error"),
        (None, "client_error"),
    ],
)
def test_who_waits_is_told_from_who_fails(error, reason):
    assert failure_of(error).reason == reason
    assert not is_wrong(failure_of(error))


def test_a_round_goes_on_without_a_device_that_waits_and_strikes_nobody(caplog):
    caplog.set_level("INFO")
    nodes = {100 + client: trellis_node(learns) for client in range(4)}
    grid = ScriptedGrid({**nodes, 104: waiting})
    admission, quarantine, rows = Admission(), Quarantine(strikes=1), []
    one = strategy(
        pipeline=Pipeline(admission=admission, quarantine=quarantine), hooks=[rows.append]
    )
    one.start(grid, pack_model(INITIAL), num_rounds=3)
    assert [(row.failed, row.rejected, row.void) for row in rows] == [(1, 0, False)] * 3
    assert admission.refusals == {"paused": 3}
    assert not admission.strikes
    assert all(4 not in row.flagged for row in rows)
    assert "client 4 is paused" in caplog.text
    assert "7 %" not in caplog.text
