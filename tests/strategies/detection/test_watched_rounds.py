"""A federation that is watched: by the scheduler, and round by round through Flower's own face."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from strategies.admission import Admission
from strategies.combiners import Mean, MultiKrum
from strategies.detection import Quarantine
from strategies.pipeline import Pipeline
from strategies.samplers import Uniform
from strategies.strategy import PipelineStrategy
from strategies.update import DELTA
from strategies.wire import pack_model
from tests.support.grids import ScriptedGrid, trellis_node

HONEST, LIAR = 7, 7
MODEL = {"w": np.zeros((6, 8), np.float32)}
TRUTH = np.random.default_rng(0).standard_normal(48)


def change(client: int, number: int, arrays: object) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([client, number])
    step = TRUTH + 0.4 * rng.standard_normal(48)
    return {DELTA: np.float32(-20 * step if client == LIAR else step)}


def nodes(count: int = HONEST + 1) -> dict:
    return dict.fromkeys(range(count), trellis_node(change))


def watched(**keywords) -> tuple[PipelineStrategy, list]:
    keywords = {"quarantine": Quarantine(), "sampler": Uniform()} | keywords
    views: list = []
    one = PipelineStrategy(Pipeline(**keywords), federated_every=0, hooks=[views.append])
    return one, views


def start(one: PipelineStrategy, rounds: int, grid: ScriptedGrid | None = None):
    return one.start(grid or ScriptedGrid(nodes()), pack_model(MODEL), num_rounds=rounds)


@pytest.mark.parametrize("combiner", [Mean(), MultiKrum(f=1)], ids=["mean", "multi_krum"])
def test_a_liar_is_named_and_then_not_asked_whatever_the_rule(combiner):
    one, views = watched(combiner=combiner)
    start(one, 5)
    assert [view.flagged for view in views] == [(LIAR,)] * 3 + [()] * 2
    assert [view.sampled for view in views] == [8, 8, 8, 7, 7]
    (row,) = one.pipeline.quarantine.summary()
    assert (row["client"], row["since"], row["until"], row["times"]) == (LIAR, 4, 13, 1)


def test_a_round_that_nobody_watches_says_so():
    one, views = watched(quarantine=None)
    start(one, 2)
    assert [view.flagged for view in views] == [None, None]


def test_a_model_that_is_freed_of_its_liar_gets_where_the_honest_go():
    freed, _ = watched()
    start(freed, 13)
    lost, _ = watched(quarantine=None)
    start(lost, 13)
    assert freed.model.parameters @ TRUTH > 0 > lost.model.parameters @ TRUTH


def test_a_run_that_is_taken_up_is_the_run_that_went_on():
    whole, views = watched()
    start(whole, 5)
    first, _ = watched()
    start(first, 2)
    second, later = watched()
    second.load_state_dict(first.state_dict())
    start(second, 5)
    assert second.model.parameters.tobytes() == whole.model.parameters.tobytes()
    assert [view.flagged for view in later] == [view.flagged for view in views[2:]]
    np.testing.assert_equal(second.pipeline.state_dict(), whole.pipeline.state_dict())
    assert second.pipeline.quarantine.summary() == whole.pipeline.quarantine.summary()


def test_the_quorum_and_the_rule_keep_their_clients():
    for keywords in (
        {"admission": Admission(quorum=8)},
        {"combiner": MultiKrum(f=2), "sampler": Uniform(population=8, fraction=0.875)},
    ):
        one, views = watched(**keywords)
        start(one, 5)
        assert {view.sampled for view in views} <= {7, 8}
        assert one.pipeline.quarantine.summary()[0]["times"] == 0


def test_replies_that_are_refused_are_strikes():
    def broken(client, number, arrays):
        return {DELTA: np.full(48, np.nan, np.float32)}

    one, views = watched()
    start(one, 5, ScriptedGrid({**nodes(7), LIAR: trellis_node(broken)}))
    (row,) = one.pipeline.quarantine.summary()
    assert row["last_reasons"] == ["refused at the door: not_finite"]
    assert [view.sampled for view in views] == [8, 8, 8, 7, 7]
    assert [view.rejected for view in views] == [1, 1, 1, 0, 0]


def test_refusals_of_a_void_round_count_and_its_updates_do_not():
    def broken(client, number, arrays):
        return {DELTA: np.full(48, np.inf, np.float32)}

    admission = Admission(quorum=8, on_shortfall="skip")
    one, views = watched(admission=admission)
    start(one, 2, ScriptedGrid({**nodes(7), LIAR: trellis_node(broken)}))
    assert [(view.void, view.flagged) for view in views] == [(True, (LIAR,))] * 2
    assert one.pipeline.quarantine.records.keys() == {LIAR}


def test_flowers_own_loop_is_watched_as_well():
    one, _ = watched()
    grid, arrays = ScriptedGrid(nodes()), pack_model(MODEL)
    asked = []
    for number in range(1, 6):
        messages = list(one.configure_train(number, arrays, ConfigRecord(), grid))
        asked.append(len(messages))
        replies = grid.pull_messages(grid.push_messages(messages))
        arrays, _ = one.aggregate_train(number, replies)
    assert asked == [8, 8, 8, 7, 7]
    assert one.pipeline.quarantine.summary()[0]["client"] == LIAR


def test_flowers_own_loop_counts_refusals_of_void_rounds():
    one, _ = watched(admission=Admission(quorum=8), quarantine=Quarantine(strikes=1, window=1))

    def broken(client, number, arrays):
        return {DELTA: np.full(48, np.nan, np.float32)}

    grid = ScriptedGrid({**nodes(7), LIAR: trellis_node(broken)})
    messages = list(one.configure_train(1, pack_model(MODEL), ConfigRecord(), grid))
    assert one.aggregate_train(1, grid.pull_messages(grid.push_messages(messages))) == (None, None)
    assert one.pipeline.quarantine.summary()[0]["flags"] == 1
