"""The client half for vanilla train functions: weights in, an encoded update out."""

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict

from strategies.mod import kinds_of, pipeline_mod
from strategies.pipeline import Pipeline
from strategies.protocols import Reply
from strategies.server_models import SGD, Scaffold, ServerModel
from strategies.stages import Clip
from strategies.update import BUFFERS, CONTROL, COUNTERS, DELTA
from strategies.wire import ARRAYS, CONFIG, Refused, pack_model, unpack_model
from tests.support.grids import ScriptedGrid, numbers

MODEL = {
    "w": np.array([[3.0, 4.0]], np.float32),
    "norm.running_var": np.array([1.0], np.float32),
    "steps": np.array(0, np.int64),
}
CONTEXT = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def round_trip(pipeline: Pipeline, train, *, stages=(), model=None, kind: str = "train"):
    """One request of the pipeline through the mod and back through the collector; the update, or the reply."""
    model = model or ServerModel(MODEL, pipeline.optimizer)
    session = pipeline.collector.open(pipeline.job(model), [2])
    (request,) = session.start()
    message = Message(request.content, 1, kind)
    ScriptedGrid({1: lambda m: []}).push_messages([message])
    reply = pipeline_mod(stages)(message, CONTEXT, lambda m, c: train(m))
    if kind != "train" or reply.has_error():
        return reply
    (update,) = session.receive(Reply(request, reply.content))
    return update


def trains(examples: int = 8, **records: dict[str, np.ndarray]):
    """A train function that adds one to everything, and returns further records."""

    def train(message: Message) -> Message:
        arrays = unpack_model(message.content.array_records[ARRAYS])
        content = numbers(examples, loss=0.5)
        content[ARRAYS] = pack_model({name: array + 1 for name, array in arrays.items()})
        for name, extra in records.items():
            content[name] = pack_model(extra)
        return Message(content, reply_to=message)

    return train


def test_weights_become_the_change_of_every_section():
    update = round_trip(Pipeline(), trains())
    np.testing.assert_array_equal(update.delta.vector, [1, 1])
    np.testing.assert_array_equal(update.sections[BUFFERS].vector, [1])
    np.testing.assert_array_equal(update.sections[COUNTERS].vector, [1])
    assert (update.weight, update.members, update.version) == (8, (2,), 0)
    assert update.metrics == {"loss": 0.5}


def test_the_stages_client_halves_run_with_the_servers_settings():
    update = round_trip(Pipeline(stages=[Clip(norm=0.5)]), trains(), stages=[Clip(norm=99)])
    np.testing.assert_allclose(update.delta.vector, [0.5 / 2**0.5] * 2, rtol=1e-6)


@pytest.mark.parametrize("named", [True, False], ids=["array by array", "as one vector"])
def test_a_control_variate_comes_as_a_record_of_its_own(named):
    values = np.array([[5.0, 6.0]])
    control = {"w": values} if named else {"any name": values.ravel().astype(np.float32)}
    pipeline = Pipeline(optimizer=Scaffold(population=1))
    update = round_trip(pipeline, trains(control=control))
    np.testing.assert_array_equal(update.sections[CONTROL].vector, [5, 6])
    np.testing.assert_array_equal(update.delta.vector, [1, 1])


def test_a_control_variate_that_is_missing_is_an_error_with_the_mend():
    with pytest.raises(
        Refused, match="asks for a section 'control': return an ArrayRecord of that n"
    ):
        round_trip(Pipeline(optimizer=Scaffold(population=1)), trains())


def test_a_control_variate_of_another_size_is_an_error():
    control = {"c": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="a section of 2 elements"):
        round_trip(Pipeline(optimizer=Scaffold(population=1)), trains(control=control))


def test_buffers_that_the_server_names_are_told_from_parameters():
    arrays = {"w": MODEL["w"], "mean": np.zeros(1, np.float32)}
    model = ServerModel(arrays, SGD(), buffers=["mean"])
    update = round_trip(Pipeline(), trains(), model=model)
    assert set(update.sections) == {DELTA, BUFFERS}


def test_a_clients_error_passes_as_it_is():
    def fail(message: Message) -> Message:
        return Message(Error(2, "out of memory"), reply_to=message)

    reply = round_trip(Pipeline(), fail)
    assert (reply.error.code, reply.error.reason) == (2, "out of memory")


@pytest.mark.parametrize("kind", ["evaluate", "query.hello"])
def test_other_messages_pass_untouched(kind):
    reply = round_trip(Pipeline(), trains(), kind=kind)
    assert set(reply.content) == {ARRAYS, "metrics"}


def test_train_actions_by_name_are_encoded_too():
    message_type = "train.fine_tune"
    reply = round_trip(Pipeline(), trains(), kind=message_type)
    assert set(reply.content) == {"update", "metrics", "receipt"}


def test_a_request_of_another_server_is_refused():
    def ask(message: Message) -> Message:
        del message.content[CONFIG]["version"]
        return trains()(message)

    with pytest.raises(Refused, match="the request's 'version' should be a whole number, not None"):
        round_trip(Pipeline(), ask)


def test_integers_are_counters_and_floats_buffers_only_when_named():
    assert kinds_of(MODEL, []) == {"w": DELTA, "norm.running_var": DELTA, "steps": COUNTERS}
    assert kinds_of(MODEL, ["norm.running_var"])["norm.running_var"] == BUFFERS
