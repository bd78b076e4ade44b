"""The watcher: what of which updates it looks at, what it says, what it may be composed with, what lasts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.clustering import TaskClusters
from strategies.clustering.fingerprints import common, coordinates, fingerprints, trained
from strategies.collectors.masked import Masked
from strategies.combiners import Mean
from strategies.contract import Claim, ContractError, Visibility, check
from strategies.parts import widened
from strategies.privacy.central import Central
from strategies.samplers import Poisson
from strategies.stages import Clip
from strategies.update import DELTA, Layout, Section, Update

LAYOUT = Layout(
    (
        "adapters.0_query.A.weight",
        "adapters.0_query.B.weight",
        "adapters.1_query.A.weight",
        "adapters.1_query.B.weight",
        "head.weight",
    ),
    ((4, 30), (30, 4), (4, 30), (30, 4), (6, 30)),
)
GROUP_OF = np.arange(9) % 3


def part_of(rank: int) -> Layout:
    """What a client with adapters of this rank trains."""
    shapes = [
        (rank, 30) if ".A." in name else (30, rank) if ".B." in name else shape
        for name, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True)
    ]
    return Layout(LAYOUT.names, tuple(shapes))


def updates(round_number: int, apart: float = 1.5, clients=range(9), ranks=None) -> list[Update]:
    """Clients with one of three tasks, noise of deviation 1, and A and heads that say nothing of the task."""
    centres = apart * np.random.default_rng(99).standard_normal((3, LAYOUT.size))
    every = []
    for client in clients:
        rng = np.random.default_rng([round_number, client])
        whole = LAYOUT.views(rng.standard_normal(LAYOUT.size) + centres[GROUP_OF[client]])
        for name in whole:
            if not name.endswith(".B.weight"):
                whole[name][...] = 50 * rng.standard_normal(whole[name].shape)
        part = LAYOUT if ranks is None else part_of(ranks[client])
        views = {
            name: whole[name][: shape[0], : shape[1]]
            for name, shape in zip(part.names, part.shapes, strict=True)
        }
        section = widened(part.flatten(views), part, LAYOUT)
        every.append(Update({DELTA: section}, 1.0, (client,), round_number - 1))
    return every


def watched(part: TaskClusters, rounds=range(1, 5), **settings) -> TaskClusters:
    for number in rounds:
        part.observe(number, updates(number, **settings))
    return part


EXPECTED = [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("method", ["agglomerative", "k_means"])
def test_clients_with_the_same_task_are_one_group(method):
    report = watched(TaskClusters(method=method)).report()
    assert report["groups"] == EXPECTED
    assert report["p_value"] <= 0.05
    assert report["silhouette"] > 0.3
    assert report["method"] == method
    assert report["rounds"] == {str(client): 3 for client in range(9)}


def test_one_task_is_one_group():
    report = watched(TaskClusters(), apart=0.0).report()
    assert report["groups"] == [list(range(9))]
    assert report["p_value"] > 0.05
    assert sorted(client for group in report["candidates"] for client in group) == list(range(9))
    assert len(report["candidates"]) > 1


def test_only_b_is_looked_at():
    part, other = watched(TaskClusters()), TaskClusters()
    for number in range(1, 5):
        changed = []
        for update in updates(number):
            vector = update.delta.vector.copy()
            for name, view in LAYOUT.views(vector).items():
                if not name.endswith(".B.weight"):
                    view[...] = 7.0
            changed.append(update.with_section(DELTA, Section(vector, LAYOUT)))
        other.observe(number, changed)
    assert part.report() == other.report()


def test_the_warm_up_and_what_is_late_are_passed_over():
    part = TaskClusters(warmup=2, rounds=2)
    assert not watched(part, range(1, 3)).complete
    assert part.report()["rounds"] == {}
    assert not watched(part, range(3, 4)).complete
    assert watched(part, range(4, 5)).complete
    assert watched(part, range(5, 9), apart=0.0).report()["rounds"] == {str(c): 2 for c in range(9)}
    assert part.report()["groups"] == EXPECTED


def test_clients_that_miss_rounds_are_seen_later():
    part = TaskClusters(warmup=0, rounds=2)
    for number in range(1, 9):
        part.observe(number, updates(number, clients=[c for c in range(9) if (c + number) % 3]))
    assert part.complete
    assert part.report()["groups"] == EXPECTED


def test_few_clients_are_no_groups():
    part = TaskClusters(warmup=0)
    part.observe(1, updates(1, clients=range(5)))
    report = part.report()
    assert (report["groups"], report["p_value"], report["silhouette"]) == ([], None, None)
    assert TaskClusters().report()["groups"] == []


def test_unequal_ranks_make_no_groups():
    ranks = [4, 4, 4, 4, 4, 2, 2, 2, 2]
    report = watched(TaskClusters(), apart=0.0, ranks=ranks).report()
    assert report["groups"] == [list(range(9))]
    assert watched(TaskClusters(), apart=2.0, ranks=ranks).report()["groups"] == EXPECTED


def test_a_client_that_sent_nothing_is_not_seen():
    part = TaskClusters(warmup=0, rounds=1)
    nothing = Update({DELTA: Section(np.zeros(LAYOUT.size, np.float32), LAYOUT)}, 1.0, (9,), 0)
    part.observe(1, [*updates(1), nothing])
    assert "9" not in part.report()["rounds"]


def test_a_model_without_adapters_is_refused_in_words():
    layout = Layout(("weight",), ((3, 3),))
    update = Update({DELTA: Section(np.ones(9, np.float32), layout)}, 1.0, (0,), 0)
    with pytest.raises(ValueError, match="use model=lora"):
        TaskClusters(warmup=0).observe(1, [update])


def test_what_was_seen_lasts():
    through = watched(TaskClusters())
    first = watched(TaskClusters(), range(1, 3))
    second = TaskClusters()
    second.load_state_dict(first.state_dict())
    watched(second, range(3, 5))
    assert second.report() == through.report()
    empty = TaskClusters()
    empty.load_state_dict(TaskClusters().state_dict())
    assert empty.report() == TaskClusters().report()


@pytest.mark.parametrize(
    "broken",
    [
        lambda state: state["layout"].__setitem__("head.weight", 3),
        lambda state: state["clients"]["0"].__setitem__("total", np.ones(3)),
        lambda state: state["clients"]["0"].__setitem__("rounds", "many"),
    ],
)
def test_a_state_of_something_else_is_refused(broken):
    state = watched(TaskClusters()).state_dict()
    broken(state)
    with pytest.raises(ValueError, match="should"):
        TaskClusters().load_state_dict(state)


def test_sums_have_no_groups():
    with pytest.raises(ContractError, match="a sum of several tells nobody's direction"):
        TaskClusters().check(Claim(visibility=Visibility.SUM))
    with pytest.raises(ContractError, match="task clusters cannot be composed with"):
        check([Masked(), TaskClusters()], Claim(cohort=10))


def test_a_central_promise_refuses_it():
    parts = [
        Poisson(fraction=1.0, population=10),
        Clip(norm=1.0),
        TaskClusters(),
        Mean(weighting="uniform", denominator="cohort"),
        Central(noise_multiplier=1.0, population=10),
    ]
    with pytest.raises(ContractError, match="cannot be composed with task clusters"):
        check(parts, Claim(factors="shared_a"))
    check([part for part in parts if not isinstance(part, TaskClusters)])


@pytest.mark.parametrize(
    "settings", [{"rounds": 0}, {"most": 1}, {"level": 0.0}, {"method": "dbscan"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="TaskClusters"):
        TaskClusters(**settings)


@settings(deadline=None, max_examples=40)
@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_what_all_train_is_the_smallest_rank(ranks):
    sections = [widened(np.ones(part_of(r).size, np.float32), part_of(r), LAYOUT) for r in ranks]
    every = [trained(Update({DELTA: section}, 1.0, (0,), 0)) for section in sections]
    shared = common(every)
    assert set(shared.values()) == {min(ranks)}
    places = coordinates(LAYOUT, shared)
    assert len(places) == 2 * 30 * min(ranks)
    assert all((section.vector[places] == 1).all() for section in sections)


def test_fingerprints_have_length_one_and_nothing_in_common():
    rng = np.random.default_rng(0)
    directions = 5 + rng.standard_normal((7, 50)) * rng.uniform(0.1, 9, (7, 1))
    rows = fingerprints(directions)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    np.testing.assert_allclose(fingerprints(directions * 3.0), rows)
    assert (fingerprints(np.ones((3, 4))) == 0).all()
