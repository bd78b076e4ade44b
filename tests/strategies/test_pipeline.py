import numpy as np
import pytest
from flwr.app import ConfigRecord

from strategies.combiners import Mean
from strategies.contract import ContractError
from strategies.encoding import encode
from strategies.pipeline import Pipeline
from strategies.protocols import ClientContext, settings_of
from strategies.server_models import SGD, Scaffold, ServerModel
from strategies.stages import Clip
from strategies.update import CONTROL, DELTA
from strategies.wire import ARRAYS, unpack_model
from tests.support.updates import parameters, update

BOTH = frozenset({DELTA, CONTROL})


class Times:
    """A stage that multiplies on the client and divides on the server; remembers the context that it was given."""

    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor = name, factor
        self.context: ClientContext | None = None

    def check(self, claim):
        return claim

    def configure(self):
        return {"factor": self.factor, "shared": "value"}

    def encode(self, one, context):
        self.context = context
        return update(one.delta.vector * np.float32(context.settings["factor"]) + 1)

    def decode(self, one):
        return update((one.delta.vector - 1) / np.float32(self.factor))


def test_a_job_holds_the_model_the_settings_and_what_must_come_back():
    pipeline = Pipeline(stages=[Times("a", 2.0)], train_config={"lr": 0.1}, included={4: 2})
    arrays = {**parameters(1, 2), "norm.running_mean": np.zeros(1, np.float32)}
    model = ServerModel(arrays, SGD())
    model.skip()
    job = pipeline.job(model)
    assert (job.round, job.version, job.included) == (2, 1, {4: 2})
    assert set(job.layouts) == {"delta", "buffers"}
    assert job.config == {
        "lr": 0.1,
        "sections": ["buffers", "delta"],
        "buffers": ["norm.running_mean"],
        "a.factor": 2.0,
        "a.shared": "value",
    }
    assert list(unpack_model(job.records[ARRAYS])) == ["w", "norm.running_mean"]


def test_a_jobs_model_is_a_copy_that_later_rounds_do_not_change():
    pipeline = Pipeline()
    model = ServerModel(parameters(1, 2), pipeline.optimizer)
    job = pipeline.job(model)
    model.apply(update([1, 1]))
    np.testing.assert_array_equal(unpack_model(job.records[ARRAYS])["w"], [1, 2])


def test_vectors_that_an_optimiser_broadcasts_travel_beside_the_model():
    pipeline = Pipeline(optimizer=Scaffold(population=1))
    job = pipeline.job(ServerModel(parameters(1, 2), pipeline.optimizer))
    assert set(job.records) == {ARRAYS, CONTROL}
    np.testing.assert_array_equal(unpack_model(job.records[CONTROL])[CONTROL], [0, 0])


def test_servers_undo_in_reverse_what_clients_did_in_order():
    stages = [Times("a", 2.0), Times("b", 4.0)]
    pipeline = Pipeline(stages=stages)
    config = pipeline.job(ServerModel(parameters(0, 0, 0), SGD())).config
    sent = ConfigRecord({**config, "server-round": 5})
    encoded = encode(update([1, 2, 3]), stages, sent, client=9)
    np.testing.assert_array_equal(encoded.delta.vector, [13, 21, 29])
    np.testing.assert_array_equal(pipeline.decode(encoded).delta.vector, [1, 2, 3])
    assert stages[1].context == ClientContext(9, 5, {"factor": 4.0, "shared": "value"})


def test_a_request_without_its_round_is_an_error():
    with pytest.raises(TypeError, match="server-round should be a whole number, not '5'"):
        encode(update([1]), [Clip()], ConfigRecord({"server-round": "5"}), client=0)


def test_a_parts_settings_are_those_with_its_prefix():
    config = ConfigRecord({"clip.norm": 1.0, "clip.on": True, "clipper.norm": 2.0, "clip.l": ["a"]})
    assert settings_of(config, "clip") == {"norm": 1.0, "on": True}


def test_the_state_of_a_pipeline_names_clients_that_are_included():
    before, after = Pipeline(included={3: 7, 10: 2}), Pipeline(included={1: 1})
    after.load_state_dict(before.state_dict())
    assert after.included == {3: 7, 10: 2}
    with pytest.raises(ValueError, match="'admission' should be a mapping"):
        after.load_state_dict({})


def test_a_stage_may_not_stand_twice():
    with pytest.raises(ContractError) as caught:
        Pipeline(stages=[Clip(), Clip(norm=2.0)]).check()
    assert (caught.value.first, caught.value.second) == ("clip", "clip")


def test_a_section_that_nothing_reads_is_refused():
    with pytest.raises(
        ContractError, match="clients send a section control that no part of the"
    ) as caught:
        Pipeline(client_sections=BOTH, combiner=Mean(weighting="uniform")).check()
    assert (caught.value.first, caught.value.second) == ("the clients' trainer", "server SGD")
