"""The grid against a model of it that fits on one screen, on random pushes, pulls and sleeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine_helpers import echo, make_grid, request
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.engine import DeviceModel, EngineGrid, InProcessPool, Occasion
from fl_app.engine.flwr_internals import ErrorCode
from tests.support.examples import many

NUM_CLIENTS = 6
ANSWERED = -1

ttls = st.sampled_from([0.5, 2.0, 10.0, 1e4])
pushes = st.tuples(
    st.just("push"),
    st.lists(
        st.tuples(st.integers(0, NUM_CLIENTS - 1), st.integers(1, 3), ttls), min_size=1, max_size=6
    ),
)
pulls = st.tuples(st.just("pull"), st.integers(1, 4))
sleeps = st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.3, 1.0, 4.0, 1e3]))
programs = st.lists(st.one_of(pushes, pulls, sleeps), max_size=30)
device_models = st.builds(
    DeviceModel,
    seconds_per_example=st.sampled_from([0.0, 0.05, 1.0]),
    speed_sigma=st.sampled_from([0.0, 1.0]),
    jitter_sigma=st.sampled_from([0.0, 0.5]),
    latency=st.sampled_from([0.0, 0.25]),
    dropout=st.sampled_from([0.0, 0.3]),
    detection_seconds=st.sampled_from([0.0, 1.0, 50.0]),
)


@dataclass
class Expected:
    """What must come for one request, as the device model says."""

    moment: float
    expiry: float
    client: int
    code: int
    dropped: bool = False

    def at(self, now: float) -> tuple[float, int, int] | None:
        """(moment, client, error code or ANSWERED) if something is there by now."""
        if self.dropped:
            return -math.inf, -1, ErrorCode.MESSAGE_UNAVAILABLE
        if now >= self.expiry:
            return self.expiry, self.client, ErrorCode.MESSAGE_UNAVAILABLE
        return (self.moment, self.client, self.code) if self.moment <= now else None


def expect(
    grid: EngineGrid, devices: DeviceModel, client: int, round_: int, ttl: float
) -> Expected:
    now, occasion = grid.clock.now(), Occasion(7, client, round_)
    if devices.drops_at(occasion) is not None:
        return Expected(
            now + devices.detection_seconds, now + ttl, client, ErrorCode.NODE_UNAVAILABLE
        )
    duration = devices.duration(occasion, examples=10.0 * (client + 1), down_bytes=0, up_bytes=0)
    return Expected(now + duration, now + ttl, client, ANSWERED)


def pull_and_check(grid: EngineGrid, expected: dict[str, Expected], ids: list[str]) -> None:
    now = grid.clock.now()
    due = sorted((*there, i) for i in ids if (there := expected[i].at(now)) is not None)
    due.sort(key=lambda item: (item[0], item[1], item[3]))
    replies = list(grid.pull_messages(ids))
    assert [reply.metadata.reply_to_message_id for reply in replies] == [i for *_, i in due]
    for reply, (_, client, code, message_id) in zip(replies, due, strict=True):
        del expected[message_id]
        assert code_of(reply) == code
        if code == ANSWERED:
            assert reply.metadata.src_node_id == grid.roster[client]
            assert reply.content.metric_records["metrics"]["client"] == client
    drop_expired(grid, expected)


def drop_expired(grid: EngineGrid, expected: dict[str, Expected]) -> None:
    """What expired before somebody asked for it comes first when it is asked for, in the order of pushing."""
    for one in expected.values():
        one.dropped |= one.expiry <= grid.clock.now()


def code_of(reply: Message) -> int:
    return reply.error.code if reply.has_error() else ANSWERED


@settings(max_examples=many(150), deadline=None)
@given(programs, device_models)
def test_every_request_is_answered_once_in_the_order_of_time_and_client(
    program: list[tuple[str, object]], devices: DeviceModel
) -> None:
    grid = make_grid(InProcessPool(echo), num_clients=NUM_CLIENTS, devices=devices)
    expected: dict[str, Expected] = {}
    for step in program:
        match step:
            case ("push", list(batch)):
                drop_expired(grid, expected)
                foreseen = [expect(grid, devices, *one) for one in batch]
                messages = [request(grid, c, round_number=r, ttl=t) for c, r, t in batch]
                ids = grid.push_messages(messages)
                expected.update(zip(ids, foreseen, strict=True))
            case ("pull", int(stride)):
                pull_and_check(grid, expected, list(expected)[::stride])
            case ("sleep", float(seconds)):
                before = grid.clock.now()
                grid.clock.sleep(seconds)
                assert before <= grid.clock.now() <= before + seconds
    while expected:
        pull_and_check(grid, expected, list(expected))
        if expected:
            grid.clock.sleep(math.inf)
