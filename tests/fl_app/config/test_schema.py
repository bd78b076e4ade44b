"""A configuration's identity, its difference from another one, and its folder."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fl_app.config.nodes import TargetNode, TaskNode
from fl_app.config.schema import Config, Runtime

ROOT = Path(__file__).resolve().parents[3]


def node(path: str, /, **arguments: Any) -> TargetNode:
    return TargetNode(target=f"some.{path}", arguments=arguments, name=path, path=path)


def config(**changes: Any) -> Config:
    task = TaskNode(
        target="some.Task",
        arguments={"fold": 1},
        name="digits",
        path="task",
        federation=node("cut", alpha=0.5),
    )
    values: dict[str, Any] = {
        "strategy": "fedavg",
        "task": task,
        "model": node("model", hidden=[64, 32]),
        "client": node("client", lr=0.05, inner=node("inner", a=1)),
        "collector": node("collector"),
        "combiner": node("combiner"),
        "server": node("server", lr=1.0),
        "sampler": node("sampler"),
        "scheduler": node("scheduler"),
        "runtime": Runtime(devices=node("devices", speed_sigma=0.0)),
    }
    return Config(**(values | changes))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), plain, max_size=6), st.randoms())
def test_the_hash_does_not_depend_on_the_order_of_keys(
    arguments: dict[str, Any], random: Any
) -> None:
    shuffled = list(arguments.items())
    random.shuffle(shuffled)
    first = config(client=node("client", **arguments))
    second = config(client=node("client", **dict(shuffled)))
    assert first.identity_hash() == second.identity_hash()
    assert first.difference(second) == []


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_the_hash_tells_apart_what_differs_in_the_last_bit(first: float, second: float) -> None:
    one, other = (config(client=node("client", lr=value)) for value in (first, second))
    same = repr(first) == repr(second)
    assert (one.identity_hash() == other.identity_hash()) is same
    assert bool(one.difference(other)) is not same


def test_the_hash_is_the_same_in_another_process() -> None:
    text = "import sys, pickle; print(pickle.loads(sys.stdin.buffer.read()).identity_hash())"
    done = subprocess.run(
        [sys.executable, "-c", text],
        input=pickle.dumps(config()),
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.decode().strip() == config().identity_hash()


def test_the_hash_of_this_configuration_has_not_changed() -> None:
    # Runs of an earlier version could not be resumed otherwise: change this only together with the schema.
    text = json.dumps(config().identity(), sort_keys=True, separators=(",", ":"))
    assert '"client.inner.a":1' in text
    assert '"client.lr":0.05' in text
    assert '"task.alpha":0.5' in text


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 99},
        {"output_dir": Path("/elsewhere")},
        {"resume": "never"},
        {"run_name": "mine"},
        {"experiment": "quickstart"},
        {"runtime": Runtime(workers=2, devices=node("devices", speed_sigma=0.0))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_and_how_long_it_runs_does_not_make_it_another_run(changes: dict[str, Any]) -> None:
    assert config(**changes).identity_hash() == config().identity_hash()
    assert config(**changes).difference(config()) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed: 0 → 1"),
        ({"clip": node("clip", norm=1.0)}, "clip: null → (not set)"),
        ({"client": node("client", lr=0.1, inner=node("inner", a=1))}, "client.lr: 0.05 → 0.1"),
        ({"strategy": "fedadam"}, "strategy: fedavg → fedadam"),
        (
            {"runtime": Runtime(dropout=0.5, devices=node("devices", speed_sigma=0.0))},
            "runtime.dropout: 0.0 → 0.5",
        ),
    ],
)
def test_what_else_differs_is_another_run_and_the_difference_is_shown(
    changes: dict[str, Any], line: str
) -> None:
    other = config(**changes)
    assert other.identity_hash() != config().identity_hash()
    assert line in config().difference(other)


def test_a_stored_configuration_can_be_compared() -> None:
    stored = yaml.safe_load(config(seed=4, rounds=3).to_yaml())
    assert config().difference(stored) == ["seed: 0 → 4"]
    assert config(seed=4).difference(stored) == []
    del stored["task"]
    assert config(seed=4).difference(stored) == [
        "task._target_: some.Task → (not set)",
        "task.alpha: 0.5 → (not set)",
        "task.fold: 1 → (not set)",
    ]


def test_the_resolved_yaml_holds_all_in_the_order_of_the_schema() -> None:
    told = yaml.safe_load(config(output_dir=Path("/a b/ü")).to_yaml())
    assert list(told) == list(Config.model_fields)
    assert told["task"] == {"_target_": "some.Task", "fold": 1, "alpha": 0.5}
    assert told["client"]["inner"] == {"_target_": "some.inner", "a": 1}
    assert told["output_dir"] == "/a b/ü"
    assert told["evaluate"] == {"every": 1, "federated_every": 0, "batch_size": 512}


def test_an_automatic_folder_tells_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = config(seed=7)
    assert found.folder_name == f"fedavg-digits-s7-{found.identity_hash()[:8]}"
    assert found.run_dir == tmp_path / "runs" / found.folder_name
    assert config(run_name="mine", output_dir=tmp_path / "x").run_dir == tmp_path / "x" / "mine"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "x" * 201, "a\nb", "é"])
def test_a_run_name_cannot_lead_out_of_the_output_folder(name: str) -> None:
    with pytest.raises(ValidationError):
        config(run_name=name)


def test_a_configuration_cannot_be_changed_nor_extended() -> None:
    with pytest.raises(ValidationError):
        config().seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config(colour="red")


def test_a_configuration_survives_a_process_boundary() -> None:
    assert pickle.loads(pickle.dumps(config())) == config()


def test_another_backend_is_another_run():
    assert config(backend="flower").identity_hash() != config().identity_hash()
