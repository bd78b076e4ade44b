"""A server that sends anything at all gets a reply or a refusal from a client, in every phase of every protocol.

The requests of a real round are recorded, then played to clients that are new, with changed ones in between: records
that are missing, of another kind, or of other bytes, settings of any type and size, another kind of message. A client
answers each; nothing that a server sends ends its process.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.client import Client
from fl_app.assembly import Assembly, make_client
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.config.schema import Config
from fl_app.engine.flwr_internals import claim_identity
from fl_app.run import run_engine
from tests.fuzz.mutations import changed, mutations
from tests.support.examples import many

RUNS = {
    "plain": [],
    "stages": ["clip=fixed", "compression=top_k", "downlink=delta", "rounds=2"],
    "masked": ["strategy=secure"],
    "ckks": ["strategy=ckks_mean"],
    "local noise": ["strategy=dp_local"],
    "control variates": ["strategy=scaffold"],
}
SMALL = ["task=digits", "model=linear", "num_clients=4", "rounds=1", "runtime.workers=1"]

JUNK = st.sampled_from(
    [
        True,
        0,
        -1,
        1,
        2**31,
        2**62,
        -(2**63),
        10**9,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "x" * 5_000,
        "../../x",
        b"",
        b"\xff" * 33,
        [],
        [1, 2, 2**62],
        [-1],
        [0.5],
        ["a", "a"],
        [b"", b"k" * 32],
    ]
)
KINDS = st.sampled_from(["train", "train.x", "evaluate", "query", "query.hello"])


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def recorded(request, tmp_path_factory):
    """A run's configuration, and all that its clients were sent, in order."""
    folder = tmp_path_factory.mktemp("run")
    config = compose([*SMALL, *request.param, f"output_dir={folder}", "run_name=run"])
    sent: list[Message] = []
    answer = Client.answer

    def watched(client: Client, messages):
        sent.extend(messages)
        return answer(client, messages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "answer", watched)
        assert run_engine(config, PlainConsole(io.StringIO())).status == "completed"
    assert sent
    return config, sent


def new_clients(config: Config, folder: Path) -> Client:
    """Clients that have never been asked anything."""
    own = folder / os.urandom(6).hex()
    return make_client(Assembly(config.model_copy(update={"output_dir": own})), "simulation")


@st.composite
def hostile(draw, message: Message) -> Message:
    """The message, changed."""
    content = RecordDict({name: record.copy() for name, record in message.content.items()})
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(content)) if content else st.just("none"))
        change: Callable[[], None] = draw(
            st.sampled_from([_dropped, _of_another_kind, _settings_changed, _bytes_changed])
        )
        change(draw, content, name)
    kind = message.metadata.message_type
    return Message(content, 1, draw(st.just(kind) | KINDS))


def _dropped(draw, content, name):
    content.pop(name, None)


def _of_another_kind(draw, content, name):
    content[name] = draw(
        st.sampled_from(
            [
                ConfigRecord({"client": draw(JUNK)}),
                MetricRecord({"a": 1.0}),
                ArrayRecord({"a": Array("float32", (2,), "numpy.ndarray", b"junk")}),
                ArrayRecord(),
            ]
        )
    )


def _settings_changed(draw, content, name):
    records = [record for record in content.values() if isinstance(record, ConfigRecord)]
    if records:
        record = draw(st.sampled_from(records))
        key = draw(st.sampled_from([*sorted(record), "client", "num-clients", "local-steps"]))
        record[key] = draw(JUNK)
        if draw(st.booleans()):
            record.pop(draw(st.sampled_from(sorted(record))))


def _bytes_changed(draw, content, name):
    record = content.get(name)
    if isinstance(record, ArrayRecord) and len(record):
        key = draw(st.sampled_from(sorted(record)))
        data = changed(record[key].data, draw(mutations))
        record[key] = Array(record[key].dtype, record[key].shape, record[key].stype, data)


@settings(
    max_examples=many(20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_client_answers_whatever_a_server_sends(recorded, data, caplog, tmp_path):
    caplog.set_level(logging.CRITICAL)
    claim_identity(1)
    config, sent = recorded
    client = new_clients(config, tmp_path)
    for message in sent[: data.draw(st.integers(1, len(sent)))]:
        fresh = Message(message.content, 1, message.metadata.message_type)
        for one in (data.draw(hostile(message)), fresh):
            (reply,) = client.answer([one])
            assert reply.has_content() or reply.has_error()
            if reply.has_error():
                assert len(reply.error.reason) < 2_000
                assert str(Path.home()) not in reply.error.reason


def test_what_is_recorded_is_answered_when_nothing_is_changed(recorded, tmp_path):
    """At least its first phase: later ones hold what other clients drew, which new ones draw anew."""
    config, sent = recorded
    claim_identity(1)
    client = new_clients(config, tmp_path)
    replies = [client.answer([Message(m.content, 1, m.metadata.message_type)])[0] for m in sent]
    assert all(reply.has_content() for reply in replies[:4])
