"""When a phase has been waited for as long as any of those who are left may take by themselves."""

from dataclasses import dataclass, field
from math import inf

import pytest
from flwr.app import ConfigRecord, RecordDict

from strategies.protocols import Reply, Request
from strategies.schedulers.waiting import Waiting
from strategies.wire import CONFIG, TRAINS

LIMITS = {1: 2.0, 2: 5.0, 3: inf}


@dataclass
class Asking:
    """A session that asks these clients and is never done."""

    requests: list[Request]
    phased: bool = True
    done: bool = field(default=False, init=False)

    def start(self):
        return self.requests


def request(client: int, *, trains: bool = True) -> Request:
    content = RecordDict({CONFIG: ConfigRecord({TRAINS: trains})})
    return Request(client, "train", content, 1)


def waiting(*requests: Request, phased: bool = True) -> Waiting:
    def limits(clients):
        return [LIMITS[client] for client in clients]

    found = Waiting(Asking(list(requests), phased), 1.0, 0.0, limits)
    found.start(10.0)
    return found


def answered(room: Waiting, one: Request, now: float) -> None:
    room.answered(Reply(one, RecordDict()), now, good=True)


def test_the_slowest_of_those_who_are_left_says_how_long():
    first, second = request(1), request(2)
    room = waiting(first, second)
    assert room.hopeless == 15.0
    answered(room, second, 11.0)
    assert room.hopeless == 12.0
    answered(room, first, 11.5)
    assert room.hopeless == inf


def test_one_of_whom_nothing_is_known_is_waited_for_until_the_deadline():
    first, unknown = request(1), request(3)
    room = waiting(first, unknown)
    assert room.hopeless == inf
    answered(room, unknown, 11.0)
    assert room.hopeless == 12.0


@pytest.mark.parametrize(("phased", "until"), [(True, inf), (False, 12.0)])
def test_of_what_does_not_train_a_time_is_known_only_as_part_of_turns(phased, until):
    """Keys and shares are not measured; a client's turns are, all together from the first to the last."""
    first = request(1, trains=False)
    room = waiting(first, phased=phased)
    assert room.hopeless == until
    answered(room, first, 11.0)
    room.asked([request(1, trains=True)], 11.0)
    assert room.hopeless == (13.0 if phased else 12.0)
