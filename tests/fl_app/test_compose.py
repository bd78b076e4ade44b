"""From overrides to a configuration: values, classes of the user's own, overrides as text, Hydra left behind."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fl_app.compose import ConfigError, build, compose, join_overrides, override, parse_overrides
from fl_app.config import catalogue

PARTS = """
from __future__ import annotations
from typing import Annotated, Any, Literal
from annotated_types import Ge, Gt
from clients.tasks import Task
from clients.trainers import SGD

class Trainer:
    def __init__(self, rate: Annotated[float, Gt(0)] = 0.5, mode: Literal["fast", "slow"] = "fast",
                 steps: Annotated[int, Ge(1)] | None = None, inner: Any = None, untyped=None): ...
    def fit(self): ...

class Needy:
    def __init__(self, must: int): ...
    def fit(self): ...

class Digit(Task):
    def __init__(self, folder: str = "here") -> None:
        self.folder = folder
    def train(self): ...
    def test(self): ...

class Clash(Task):
    def __init__(self, alpha: float = 1.0) -> None: ...
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compose_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)


def faults(*overrides: str) -> dict[str, str]:
    """Message by place, in order."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return {fault.place: fault.message for fault in caught.value.faults}


def test_values_may_be_written_as_text_or_in_other_notations() -> None:
    config = compose(
        ["client.lr='1e-3'", "rounds=1e2", "client.amp=yes", "run_name=2024_01", "num_clients=7"]
    )
    assert (config.client.arguments["lr"], config.rounds, config.client.arguments["amp"]) == (
        0.001,
        100,
        True,
    )
    assert (config.run_name, config.num_clients) == ("2024_01", 7)


def test_a_folder_is_taken_as_it_is_written() -> None:
    assert compose(["output_dir=/tmp/é/a=b,c"]).output_dir == Path("/tmp/é/a=b,c")
    assert compose(["output_dir=12"]).output_dir == Path("12")
    assert compose([override("output_dir", "/x '\"\\ ${y} ü")]).output_dir == Path(
        "/x '\"\\ ${y} ü"
    )


def test_values_may_refer_to_others() -> None:
    config = compose(["client.lr=${server.lr}", "run_name=${strategy}-${seed}", "seed=5"])
    assert (config.client.arguments["lr"], config.run_name) == (1.0, "fedavg-5")


def test_a_setting_that_no_file_mentions_needs_no_plus() -> None:
    assert compose(["client.weight_decay=0.1"]).client.arguments["weight_decay"] == 0.1
    assert compose(["client={lr: 0.3, momentum: 0.9}"]).client.arguments["momentum"] == 0.9


@pytest.mark.parametrize("seed", range(6))
def test_the_hash_does_not_depend_on_the_order_of_overrides(seed: int) -> None:
    overrides = ["strategy=fedadam", "rounds=3", "client.lr=1e-3", "server=yogi", "task.alpha=1"]
    shuffled = random.Random(seed).sample(overrides, len(overrides))
    assert compose(shuffled).identity_hash() == compose(overrides).identity_hash()
    same = ["server=yogi", "client.lr=0.001", "rounds=9", "task.alpha=1.0", "strategy=fedadam"]
    assert compose(same).identity_hash() == compose(overrides).identity_hash()


@pytest.mark.usefixtures("parts")
def test_a_class_is_checked_by_its_own_signature() -> None:
    found = faults(
        "client._target_=compose_parts.Trainer",
        "client.rate=0",
        "client.mode=fats",
        "client.steps=x",
        "client.moed=fast",
    )
    assert found == {
        "client.rate = 0": "must be greater than 0",
        "client.mode = fats": "must be one of fast, slow; did you mean fast?",
        "client.steps = x": "must be a whole number of at least 1, or null",
        "client.moed": "unknown key; did you mean client.mode?",
    }


@pytest.mark.usefixtures("parts")
def test_a_class_that_is_named_takes_nothing_over_from_the_one_it_replaces() -> None:
    config = compose(["client.rate=2", "client._target_=compose_parts.Trainer"])
    assert (config.client.target, config.client.name) == ("compose_parts.Trainer", "trainer")
    assert config.client.arguments == {
        "rate": 2.0,
        "mode": "fast",
        "steps": None,
        "inner": None,
        "untyped": None,
    }


@pytest.mark.usefixtures("parts")
def test_a_task_of_the_users_own_keeps_the_partition() -> None:
    config = compose(["task._target_=compose_parts.Digit", "task.folder=/data", "task.alpha=0.2"])
    assert (config.task.target, config.task.name) == ("compose_parts.Digit", "digit")
    assert config.task.arguments == {"folder": "/data"}
    assert config.task.federation.arguments["alpha"] == 0.2
    assert config.task.federation.arguments["partition"] == "dirichlet"
    assert config.folder_name.startswith("fedavg-digit-s0-")
    assert build(config.task).folder == "/data"


@pytest.mark.usefixtures("parts")
def test_a_part_within_a_part_is_checked_too() -> None:
    inner = "client.inner={_target_: compose_parts.Trainer, rate: -1, mde: fast}"
    assert faults("client._target_=compose_parts.Trainer", inner) == {
        "client.inner.rate = -1": "must be greater than 0",
        "client.inner.mde": "unknown key; did you mean client.inner.mode?",
    }
    listed = "client.untyped=[{_target_: compose_parts.Trainer, rate: -1}]"
    assert list(faults("client._target_=compose_parts.Trainer", listed)) == [
        "client.untyped.0.rate = -1"
    ]
    config = compose(
        ["client._target_=compose_parts.Trainer", "client.inner={_target_: compose_parts.Trainer}"]
    )
    assert config.to_dict()["client"]["inner"]["_target_"] == "compose_parts.Trainer"


@pytest.mark.usefixtures("parts")
def test_classes_that_cannot_do_the_work_are_refused() -> None:
    assert faults("client._target_=compose_parts.Needy") == {
        "client.must": "missing; must be a whole number"
    }
    assert faults("client._target_=json.JSONDecoder") == {
        "client._target_ = json.JSONDecoder": "cannot stand for client: it has no fit"
    }
    assert faults("task._target_=subprocess.Popen") == {
        "task._target_ = subprocess.Popen": "must be a subclass of clients.tasks.Task"
    }
    assert faults("model._target_=os.system")["model._target_ = os.system"].startswith(
        "must be a class"
    )
    assert "nowhere" in faults("server._target_=nowhere.Server")["server._target_ = nowhere.Server"]
    assert faults("sampler._target_=3") == {
        "sampler._target_ = 3": "must be a class by its dotted name, as in package.module.Class"
    }
    assert list(faults("sampler._target_=null")) == ["sampler._target_"]
    assert faults("task._target_=compose_parts.Clash") == {
        "task._target_ = compose_parts.Clash": "its constructor may not take alpha: that is the partition's"
    }


plain_text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@given(st.lists(plain_text, max_size=5))
def test_overrides_in_one_string_come_apart_again(overrides: list[str]) -> None:
    assert parse_overrides(join_overrides(overrides)) == overrides


def test_overrides_are_split_as_a_shell_would() -> None:
    assert parse_overrides("") == []
    assert parse_overrides("""strategy=fedadam run_name='a b' output_dir="/x y" """) == [
        "strategy=fedadam", "run_name=a b", "output_dir=/x y"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be split: No closing quotation"):
        parse_overrides("run_name='a")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(blacklist_categories=["Cs"])).filter(lambda text: text != "???"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b_c", "d1"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
@example("\\")
@example("'\\'")
@example("${a}")
@example("\\\\${a}\\")
@example("a\nb\t\r")
@example(1e300)
@example(1e16)
def test_a_written_override_means_its_value(value: Any) -> None:
    parsed = OverridesParser.create().parse_override(override("some.key", value))
    tree = OmegaConf.create()
    OmegaConf.update(tree, parsed.key_or_group, parsed.value(), force_add=True)
    found = OmegaConf.to_container(tree, resolve=True)
    assert found == {"some": {"key": value}}


def test_hydras_global_state_is_left_as_it_was() -> None:
    assert not GlobalHydra.instance().is_initialized()
    compose(["strategy=fedadam"])
    faults("rounds=0")
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()
    assert not OmegaConf.has_resolver("hydra")


def test_it_works_within_a_hydra_application_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), job_name="mine", version_base="1.3"):
        assert compose(["strategy=fedadam"]).strategy == "fedadam"
        assert hydra.compose("mine", ["a=2"]) == {"a": 2}
    assert not GlobalHydra.instance().is_initialized()


def test_the_working_directory_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compose(["strategy=fedadam"]).identity_hash()
    monkeypatch.chdir(tmp_path)
    assert compose(["strategy=fedadam"]).identity_hash() == here


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(catalogue.CONF, conf)
    assert compose(["server=adam"], conf=conf).server.arguments["lr"] == 0.01
    file = conf / "server" / "adam.yaml"
    file.write_text(file.read_text().replace("lr: 0.01", "lr: 0.02"))
    assert compose(["server=adam"], conf=conf).server.arguments["lr"] == 0.02


def test_a_configuration_does_not_remember_the_one_before_it() -> None:
    compose(["client.lr=7", "client._target_=clients.trainers.Proximal"])
    assert compose().client.arguments["lr"] == 0.1
