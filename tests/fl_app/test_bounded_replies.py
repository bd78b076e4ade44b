"""A reply that is too large is given up before it is in memory: on a real SuperLink, and in a simulation."""

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fl_app.assembly import Assembly, most_reply_arrays, most_reply_bytes
from fl_app.compose import compose
from fl_app.engine import EngineGrid, make_pool
from fl_app.engine.devices import DeviceModel
from fl_app.flower.bounded import BoundedGrid
from fl_app.flower.deployment import Deployment
from tests.support.tiny_app import write_tiny_app

CHECKOUT = Path(__file__).resolve().parents[2]
_COUNTING_SERVER = """
import time
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from fl_app.flower.bounded import BoundedGrid

app = ServerApp()

@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    client, asked = grid._runtime_client, []
    pull = client.PullObject
    client.PullObject = lambda request: (asked.append(request.object_id), pull(request))[1]
    bounded = BoundedGrid(grid, most_bytes=1_000_000, most_arrays=16)
    waiting = set(bounded.push_messages([Message(RecordDict(), node, "query") for node in nodes]))
    while waiting:
        for reply in bounded.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                print("TOLD", reply.error.reason, flush=True)
            else:
                count = len(reply.content["many"])
                print("TOLD", count, "arrays in", len(set(asked)), "objects", flush=True)
        time.sleep(0.1)
"""
_CLIENT_OF_MANY = """
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    count = 16 if context.node_config["partition-id"] else 1000
    tiny = [Array("uint8", (8,), "numpy.ndarray", n.to_bytes(8, "big")) for n in range(count)]
    many = ArrayRecord({str(place): array for place, array in enumerate(tiny)})
    return Message(RecordDict({"many": many}), reply_to=message)
"""


def _grow(messages):
    """Clients that send as many bytes as they are told to."""
    return [
        Message(
            RecordDict({"big": ConfigRecord({"data": b"x" * int(m.content["config"]["size"])})}),
            reply_to=m,
        )
        for m in messages
    ]


def test_what_is_in_memory_already_is_turned_away_and_the_other_replies_pass():
    pool = make_pool(lambda: _grow, 1)
    pool.start()
    try:
        engine = EngineGrid(pool, num_clients=3, devices=DeviceModel(), seed=0, work=lambda _: 1.0)
        grid = BoundedGrid(engine, most_bytes=1_000, most_arrays=1)
        sizes = [10, 5_000, 900]
        ids = grid.push_messages(
            [
                Message(RecordDict({"config": ConfigRecord({"size": size})}), node, "query.size")
                for node, size in zip(engine.get_node_ids(), sizes, strict=True)
            ]
        )
        engine.clock.sleep(60)
        found = {m.metadata.reply_to_message_id: m for m in grid.pull_messages(ids)}
    finally:
        pool.close()
    small, large, fitting = (found[message_id] for message_id in ids)
    assert small.has_content()
    assert fitting.has_content()
    assert "too large: it has 5,0" in large.error.reason


@pytest.mark.parametrize(
    ("overrides", "least", "most"),
    [
        ([], 64e6, 80e6),  # a small model
        (["collector=ckks"], 64e6, 160e6),
        (["experiment=encrypted"], 1e9, 1e9),
        (["admission.max_reply_mb=3"], 3e6, 3e6),
    ],
    ids=["plain", "ckks", "turns", "told"],
)
def test_what_a_reply_may_have_follows_from_the_model_and_the_collector(overrides, least, most):
    assert least <= most_reply_bytes(Assembly(compose(overrides))) <= most


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ([], 16),
        (["model=cnn"], 16),  # however many arrays the model has
        (["collector=masked"], 16),
        (["collector=ckks"], 16),
        (["model=linear", "collector.vanilla=true"], 16 + 2),  # weights come back array by array
        (["experiment=encrypted"], 64),
        (["strategy=split_lora", "collector.batches_per_exchange=32"], 16 + 4 * 32),
    ],
    ids=["plain", "larger", "masked", "ckks", "vanilla", "ciphertexts", "activations"],
)
def test_how_many_arrays_a_reply_may_have_follows_from_the_collector(overrides, most):
    assert most_reply_arrays(Assembly(compose(overrides))) == most


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
@pytest.mark.timeout(300)
def test_of_a_superlinks_reply_with_too_many_arrays_no_object_is_asked_for(tmp_path):
    project = write_tiny_app(tmp_path)
    (project / "tiny" / "server_app.py").write_text(_COUNTING_SERVER)
    (project / "tiny" / "client_app.py").write_text(_CLIENT_OF_MANY)
    lines: list[str] = []
    with Deployment(project, num_supernodes=2) as link:
        link.run([], echo=lines.append)
    told = [line.removeprefix("TOLD ") for line in lines if line.startswith("TOLD ")]
    # Of the one reply: two for each array, their record, what holds it, and the message. Of the other: none.
    refused = (
        "it has more than 48 objects, and 16 arrays were asked for at most"  # and 16 beside them
    )
    assert sorted(told) == ["16 arrays in 35 objects", f"the reply is too large: {refused}"]


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
@pytest.mark.timeout(300)
def test_a_superlinks_reply_is_not_read_where_one_of_its_objects_says_that_it_is_too_large(
    tmp_path,
):
    lines: list[str] = []
    with Deployment(CHECKOUT, num_supernodes=2) as link:
        code = link.run(
            [
                "task=digits",
                "model=mlp",
                "num_clients=2",
                "rounds=1",
                "admission.max_reply_mb=0.005",
                "admission.max_attempts=1",
                f"output_dir={tmp_path}",
                "run_name=big",
                "resume=never",
            ],
            echo=lines.append,
        )
    assert code == 1
    log = (tmp_path / "big" / "run.log").read_text()
    assert log.count("a reply is refused before it is read: one of its objects has ") == 2
    assert "0 of 2 clients sent a good update" in log
