"""The jobs of a sweep: which there are, and that one wrong job stops them all before the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_app.compose import ConfigError, compose, expand
from fl_app.config import catalogue
from fl_app.engine import resolve_workers
from fl_app.sweep.plan import plan

SMALL = ["task=digits", "num_clients=2", "rounds=1", "model=linear"]


def faults(*overrides: str, at_once: int = 1) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        plan([*SMALL, *overrides], at_once)
    return {fault.place: fault.message for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("seed=1,2", ["seed=1", "seed=2"]),
        ("seed=choice(1,2)", ["seed=1", "seed=2"]),
        ("seed=range(1,4)", ["seed=1", "seed=2", "seed=3"]),
        ("client.lr=range(0,1,0.5)", ["client.lr=0.0", "client.lr=0.5"]),
        ("seed=sort(3,1,2,reverse=true)", ["seed=3", "seed=2", "seed=1"]),
        ("attack=nan,zero", ["attack=nan", "attack=zero"]),
        ("travel=[a],[b,c]", ["travel=[a]", "travel=[b,c]"]),
        ("client.x='a,b',c", ["client.x='a,b'", "client.x=c"]),
        ("seed=7", ["seed=7"]),
    ],
)
def test_values_are_listed_as_hydra_lists_them(written: str, values: list[str]) -> None:
    assert expand([written]) == [[value] for value in values]


def test_a_pattern_chooses_among_the_choices_of_a_group() -> None:
    assert expand(["strategy=glob(fed*,exclude=fedp*)"]) == [
        [f"strategy={name}"]
        for name in catalogue.names("strategy")
        if name.startswith("fed") and not name.startswith("fedp")
    ]


def test_shuffled_values_are_the_same_values() -> None:
    jobs = expand(["seed=shuffle(range(1,30))"])
    assert sorted(jobs) == sorted(expand(["seed=range(1,30)"]))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["fedavg", "fedprox", "scaffold"]), min_size=1, unique=True),
)
def test_jobs_are_every_combination_once_the_last_key_fastest(
    seeds: list[int], strategies: list[str]
) -> None:
    jobs = expand(
        [f"seed={','.join(map(str, seeds))}", "rounds=3", f"strategy={','.join(strategies)}"]
    )
    assert jobs == [
        [f"seed={seed}", "rounds=3", f"strategy={strategy}"]
        for seed in seeds
        for strategy in strategies
    ]


def test_of_two_that_set_the_same_key_the_later_counts() -> None:
    assert expand(["seed=1,2", "seed=3"]) == [["seed=3"]]
    assert expand(["seed=3", "seed=1,2"]) == [["seed=1"], ["seed=2"]]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("seed=interval(0,1)", "an interval has no list of values; write range"),
        ("seed=range(1,inf)", "it has more than 10,000 jobs"),
        ("seed=range(1,1000000000000)", "it has more than 10,000 jobs"),
        ("seed=range(0,3,0)", "must not be zero"),
        ("client.lr=range(0,1.5,0)", "Invalid range"),
        ("seed=range(3,3)", "lists no value at all"),
        ("strategy=glob(zzz*)", "lists no value at all"),
    ],
)
def test_values_that_have_no_list_are_refused(written: str, said: str) -> None:
    (message,) = faults(written).values()
    assert said in message


def test_a_single_run_says_how_several_values_are_run() -> None:
    with pytest.raises(ConfigError, match="add -m to run each of them"):
        compose(["seed=1,2"])


def test_a_plan_has_a_folder_for_each_job(tmp_path: Path) -> None:
    planned = plan([*SMALL, "strategy=fedavg,fedprox", "seed=1,2", f"output_dir={tmp_path}"])
    assert planned.output_dir == tmp_path
    assert [job.number for job in planned.jobs] == [1, 2, 3, 4]
    assert [job.told for job in planned.jobs][:2] == [
        ("strategy=fedavg", "seed=1"),
        ("strategy=fedavg", "seed=2"),
    ]
    assert len({job.folder for job in planned.jobs}) == 4
    assert list(tmp_path.iterdir()) == []
    for job in planned.jobs:
        assert compose(job.overrides).identity_hash() == job.config.identity_hash()


def test_a_fault_of_every_job_is_told_once() -> None:
    assert faults("seed=1,2", "client.lr=-1") == {
        "client.lr = -1": "must be greater than 0 [every job]"
    }
    assert faults("client.lr=-1") == {"client.lr = -1": "must be greater than 0"}


def test_a_fault_names_the_jobs_that_have_it() -> None:
    found = faults("strategy=fedavg,fedpox", "seed=1,2")
    assert list(found) == ["strategy = fedpox"]
    assert found["strategy = fedpox"].endswith(
        "[job 3: strategy=fedpox seed=1; job 4: strategy=fedpox seed=2, of 4]"
    )
    (message,) = faults("seed=range(0,9)", "client.lr=-1,0.1").values()
    assert message.endswith("; and 4 more, of 18]")


def test_the_contract_of_every_job_is_checked() -> None:
    (message,) = faults("server=sgd,scaffold").values()
    assert "cannot be composed" in message
    assert "[job 2: server=scaffold, of 2]" in message


def test_a_class_that_cannot_be_made_is_a_fault_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep_parts.py").write_text(
        "from clients.tasks import Digits\n"
        "class Broken(Digits):\n"
        "    def __init__(self, sound: bool = False) -> None:\n"
        "        super().__init__()\n"
        "        if not sound: raise OSError('no data here')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = faults("task._target_=sweep_parts.Broken", "task.sound=true,false")
    assert found == {
        "job": "its parts can't be made: OSError: no data here [job 2: task.sound=False, of 2]"
    }


def test_jobs_may_not_share_a_folder() -> None:
    assert faults("seed=1,2", "model=mlp,linear", "run_name=x") == {
        "run_name = x": "jobs 1, 2, 3, 4 would share this folder: leave run_name=auto, or tell them apart, "
        "as in run_name='${seed}-${model._target_}'"
    }
    ((place, message),) = faults("rounds=1,2").items()
    assert place.startswith("run_name = fedavg-digits-s0-")
    assert message.endswith("tell them apart, as in run_name='${rounds}'")
    ((_, message),) = faults("seed=1,1").items()
    assert message.endswith("leave one of them out")
    plan([*SMALL, "seed=1,2", "model=mlp,linear", "run_name='${seed}-${model._target_}'"])


def test_a_sweep_has_one_folder() -> None:
    (place,) = faults("output_dir=a,b", "run_name=x,y")
    assert place.startswith("output_dir = [")


def test_jobs_at_a_time_share_the_processors() -> None:
    cpus = resolve_workers("auto")
    (job,) = plan([*SMALL, "seed=1"], 2).jobs
    assert job.config.runtime.workers == max(1, cpus // 2)
    assert 1 <= job.threads <= max(1, cpus // 2)
    (job,) = plan([*SMALL, "seed=1", "runtime.workers=3"], 2).jobs
    assert job.config.runtime.workers == 3
    (job,) = plan([*SMALL, "seed=1"], 1).jobs
    assert job.config.runtime.workers == "auto"
    assert job.threads == min(cpus, torch.get_num_threads())


def test_flower_runs_one_job_after_another() -> None:
    ((place, message),) = faults("backend=flower", "seed=1,2", at_once=2).items()
    assert place == "--jobs = 2"
    assert "one after another" in message
    assert len(plan([*SMALL, "backend=flower", "seed=1,2"]).jobs) == 2
    (message,) = faults("backend=flower", "attack=none,zero").values()
    assert "attacks run on the engine only" in message
