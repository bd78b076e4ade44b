"""How nodes become clients: each says its logical id, and no two may say the same."""

from itertools import pairwise

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from strategies.exchange import HELLO, Exchange
from strategies.wire import CONFIG
from tests.support.grids import ScriptedGrid, hello_node, numbers

HASHES = {"code-hash": "abc"}


def greeted(nodes: dict, population: int | None = None) -> tuple[ScriptedGrid, Exchange]:
    grid = ScriptedGrid(nodes)
    return grid, Exchange(grid, hello=HASHES, population=population, hello_timeout=120.0)


def failing(message: Message) -> list[Message]:
    return [Message(Error(2, "the server's code differs"), reply_to=message)]


def silent(message: Message) -> list[Message]:
    return []


def says(content: RecordDict):
    return lambda message: [Message(content, reply_to=message)]


def test_nodes_are_known_by_the_ids_that_they_give():
    grid, exchange = greeted({50: hello_node(2), 60: hello_node(0)})
    assert exchange.clients() == [0, 2]
    assert (exchange.node_of(0), exchange.node_of(2)) == (60, 50)
    assert {message.metadata.message_type for message in grid.sent} == {HELLO}
    assert dict(grid.sent[0].content[CONFIG]) == HASHES


def test_a_node_is_asked_once():
    grid, exchange = greeted({50: hello_node(0)})
    for _ in range(5):
        exchange.clients()
    assert len(grid.sent) == 1


def test_a_node_that_comes_later_is_asked_then_and_one_that_left_is_forgotten():
    grid, exchange = greeted({50: hello_node(0)})
    exchange.clients()
    grid.nodes = {60: hello_node(1)}
    assert exchange.clients() == [1]
    grid.nodes[70] = hello_node(0)
    assert exchange.clients() == [0, 1]
    assert exchange.node_of(0) == 70


@pytest.mark.parametrize("claim", [True, False, -1, 1.0, "0", [0], None])
def test_an_id_that_is_no_whole_number_from_zero_is_refused(claim, caplog):
    _, exchange = greeted({50: hello_node(claim), 60: hello_node(3)})
    assert exchange.clients() == [3]
    assert f"node 50 gave {claim!r} for its logical id" in caplog.text


@pytest.mark.parametrize(
    "node",
    [
        failing,
        says(RecordDict()),
        says(numbers(1)),
        says(RecordDict({"other": ConfigRecord({"client": 0})})),
        says(RecordDict({CONFIG: ConfigRecord()})),
    ],
    ids=["an error", "nothing", "numbers", "another record", "an empty record"],
)
def test_a_node_that_gives_no_id_is_left_out_and_given_up_after_three_attempts(node):
    grid, exchange = greeted({50: node, 60: hello_node(0)})
    for _ in range(10):
        assert exchange.clients() == [0]
    assert [message.metadata.dst_node_id for message in grid.sent].count(50) == 3


def test_of_two_nodes_that_claim_one_client_the_first_keeps_it(caplog):
    _, exchange = greeted({50: hello_node(0), 60: hello_node(0)})
    assert exchange.clients() == [0]
    assert exchange.node_of(0) == 50
    assert "node 60 claims to be client 0, which another node already is" in caplog.text


def test_a_client_that_restarts_as_a_new_node_waits_until_its_old_one_is_gone():
    grid, exchange = greeted({50: hello_node(0), 60: hello_node(0)})
    for _ in range(10):
        assert exchange.clients() == [0]
    assert [message.metadata.dst_node_id for message in grid.sent] == [50, 60]
    del grid.nodes[50]
    assert exchange.clients() == [0]
    assert exchange.node_of(0) == 60


def test_of_two_nodes_that_wait_for_a_client_one_gets_it_and_the_other_waits_on():
    grid, exchange = greeted({50: hello_node(0), 60: hello_node(0), 70: hello_node(0)})
    for leaving, heir in ((50, 60), (60, 70)):
        exchange.clients()
        del grid.nodes[leaving]
        assert exchange.clients() == [0]
        assert exchange.node_of(0) == heir


def test_a_client_past_the_population_is_left_out_for_good(caplog):
    grid, exchange = greeted({50: hello_node(4), 60: hello_node(5)}, population=5)
    for _ in range(3):
        assert exchange.clients() == [4]
    assert "node 60 is client 5 of 5: it is left out" in caplog.text
    assert len(grid.sent) == 2


def test_a_node_that_never_answers_is_waited_for_three_times_and_then_no_more(caplog):
    grid, exchange = greeted({50: silent, 60: hello_node(0)})
    for _ in range(10):
        assert exchange.clients() == [0]
    assert grid.clock.now() == 3 * 120
    assert "node 50 did not answer a hello within 120 s" in caplog.text


def test_once_all_have_answered_nobody_is_waited_for():
    grid, exchange = greeted({50: hello_node(0), 60: failing})
    exchange.clients()
    assert grid.clock.now() == 0


def test_a_hello_that_comes_in_time_is_waited_for_no_longer_than_it_takes():
    grid, exchange = greeted({50: lambda m: [(7.0, next(iter(hello_node(1)(m))))]})
    assert exchange.clients() == [1]
    assert grid.clock.now() == 7


def test_a_second_introduction_and_one_that_nobody_asked_for_are_dropped():
    def twice(message: Message):
        yield from hello_node(0)(message)
        yield from hello_node(1)(message)

    grid, exchange = greeted({50: twice})
    stray = Message(RecordDict(), 9, HELLO)
    stray.metadata.__dict__["_message_id"] = "never given"
    grid.strays.append(Message(numbers(1), reply_to=stray))
    assert exchange.clients() == [0]


def test_a_node_that_vanishes_while_it_is_greeted_is_left_out():
    grid, exchange = greeted({50: hello_node(0), 60: hello_node(1)})
    grid.get_node_ids = lambda: [50, 55, 60]
    assert exchange.clients() == [0, 1]


def test_a_node_that_was_silent_for_long_is_asked_again_after_ever_longer_rests():
    grid, exchange = greeted({50: silent, 60: hello_node(0)})
    asked = []
    for _ in range(60):
        exchange.clients()
        times = [message.metadata.dst_node_id for message in grid.sent].count(50)
        if times > len(asked):
            asked.append(grid.clock.now())
        grid.clock.sleep(300)
    # Three times 120 s and the test's own 300 s between; then rests of 10, 20, 40 and 60 minutes, up to a step.
    rests = [later - earlier for earlier, later in pairwise(asked[2:])]
    for rest, wanted in zip(rests, (600, 1200, 2400, 3600, 3600), strict=False):
        assert wanted <= rest <= wanted + 420
    assert len(rests) >= 4
    grid.nodes[50] = hello_node(1)
    grid.clock.sleep(3600)
    assert exchange.clients() == [0, 1]
