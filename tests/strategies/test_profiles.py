"""What a server learns of devices: words of a closed vocabulary, whatever a peer puts into its answer."""

import logging
from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies.exchange import HELLO, Exchange
from strategies.profiles import DEVICE, VOCABULARY, pack_profile, read_profile, told
from strategies.wire import CONFIG, pack_model
from tests.strategies.test_strategy import INITIAL, learns, strategy
from tests.support.grids import Node, ScriptedGrid, hello_node, trellis_node

PROFILE = {key: words[0] for key, words in VOCABULARY.items()}
CLASSES = st.fixed_dictionaries({}, optional={k: st.sampled_from(w) for k, w in VOCABULARY.items()})
SCALARS = st.one_of(
    st.text(max_size=8), st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.binary()
)


def telling(client: int, record: object) -> Node:
    """A node that answers a hello with a profile."""

    def answer(message: Message) -> Iterator[Message]:
        content = RecordDict({CONFIG: ConfigRecord({"client": client}), DEVICE: record})
        yield Message(content, reply_to=message)

    return answer


@given(profile=CLASSES)
def test_a_profile_arrives_as_it_was_told(profile):
    assert read_profile(RecordDict({DEVICE: pack_profile(profile)})) == profile


@given(
    true=CLASSES,
    junk=st.dictionaries(
        st.one_of(st.text(max_size=8), st.sampled_from(list(VOCABULARY))), SCALARS
    ),
)
def test_what_no_word_says_is_dropped(true, junk):
    found = read_profile(RecordDict({DEVICE: ConfigRecord({**true, **junk})}))
    assert all(word in VOCABULARY[key] for key, word in found.items())
    kept = {key: word for key, word in true.items() if key not in junk}
    assert kept.items() <= found.items()


@pytest.mark.parametrize("content", [{}, {DEVICE: MetricRecord({"cores": 4})}])
def test_a_device_that_tells_nothing_has_no_profile(content):
    assert read_profile(RecordDict(content)) == {}


@pytest.mark.parametrize(
    "profile", [{"cores": "4"}, {"serial": "1-2"}, {"cores": "9+", "ip": "::1"}]
)
def test_nothing_finer_than_a_class_is_ever_packed(profile):
    with pytest.raises(ValueError, match="which is no class of it"):
        pack_profile(profile)


def test_the_servers_table_is_of_who_told():
    large = ConfigRecord({**PROFILE, **{f"k{i}": "v" * 100 for i in range(1000)}})
    nodes = {
        50: telling(0, ConfigRecord(dict(PROFILE))),
        60: telling(1, large),
        70: telling(2, ConfigRecord({"cores": "1,000,000"})),
        80: hello_node(3),
    }
    exchange = Exchange(ScriptedGrid(nodes), hello={})
    assert exchange.clients() == [0, 1, 2, 3]
    assert exchange.profiles == {0: PROFILE, 1: PROFILE}


def test_a_device_that_comes_back_and_tells_nothing_has_no_profile_any_more():
    grid = ScriptedGrid({50: telling(0, ConfigRecord(dict(PROFILE)))})
    exchange = Exchange(grid, hello={})
    assert exchange.clients() == [0]
    grid.nodes = {}
    assert exchange.clients() == []
    grid.nodes = {60: hello_node(0)}
    assert exchange.clients() == [0]
    assert exchange.profiles == {}


def test_counts_are_told_by_class():
    profiles = [PROFILE, {"cores": "9+"}, {**PROFILE, "gpu": "yes"}]
    assert told(profiles) == (
        "cores 1-2: 2, 9+: 1; memory <2: 2; power mains: 2; network unmetered: 2; gpu none: 1, yes: 1"
    )
    assert told([]) == ""


def test_a_run_logs_how_many_devices_there_are_of_each_class_and_of_no_client(caplog):
    def node(client: int, cores: str) -> Node:
        tell, train = telling(client, ConfigRecord({"cores": cores})), trellis_node(learns)

        def answer(message: Message) -> Iterator[Message]:
            hello = message.metadata.message_type == HELLO
            yield from (tell if hello else train)(message)

        return answer

    cores = ["3-4", "9+", "3-4", "4"]
    grid = ScriptedGrid({50 + i: node(i, said) for i, said in enumerate(cores)})
    with caplog.at_level(logging.INFO, "strategies"):
        strategy(hello={}, min_clients=4).start(grid, pack_model(INITIAL), num_rounds=1)
    (line,) = [one for one in caplog.messages if "tell" in one]
    assert line == "3 devices tell: cores 3-4: 2, 9+: 1"
