"""What conf/ holds: every file composes, presets give way to what is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fl_app.compose import build, compose, parse_overrides
from fl_app.config import catalogue
from fl_app.config.schema import Config

OF_THEIR_OWN = {"minilm", "lora", "lora_lm", "split_lora"}
"""Models that need a pretrained one, and that tests of their own build."""


def files() -> list[Path]:
    return sorted(catalogue.CONF.rglob("*.yaml"))


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(catalogue.CONF)))
def test_every_file_says_what_it_is_and_the_command_it_shows_composes_and_builds(
    file: Path,
) -> None:
    description, command = catalogue.header(file)[:2]
    assert description.endswith((".", ")"))
    assert len(description) <= 120
    program, verb, *overrides = parse_overrides(command)
    assert (program, verb) == ("trellis", "run")
    config = compose(overrides)
    if file.parent != catalogue.CONF:
        assert f"{file.parent.name}={file.stem}" in overrides
    assert_it_builds(config)


def assert_it_builds(config: Config) -> None:
    for node in (
        config.client,
        config.combiner,
        config.server,
        config.sampler,
        config.runtime.devices,
    ):
        build(node, population=10)
    if config.clip is not None:
        build(config.clip)
    if config.model.name not in OF_THEIR_OWN:
        shape, vocab_size = ((12,), 50) if config.model.name == "gru" else ((1, 28, 28), None)
        build(config.model, input_shape=shape, num_classes=10, vocab_size=vocab_size, padding_id=0)


@pytest.mark.slow
@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(catalogue.CONF)))
def test_a_command_makes_the_same_run_each_time(file: Path) -> None:
    overrides = parse_overrides(catalogue.header(file)[1])[2:]
    assert compose(overrides).identity_hash() == compose(overrides).identity_hash()


def test_every_choice_is_a_file_with_a_command() -> None:
    shown = {file: catalogue.header(file)[1] for file in files()}
    for group in catalogue.groups():
        for choice in catalogue.choices(group):
            assert shown[catalogue.CONF / group / f"{choice.name}.yaml"] == choice.command


def test_presets_of_strategies_choose_groups_and_set_no_values() -> None:
    for file in (catalogue.CONF / "strategy").glob("*.yaml"):
        assert "# @package _global_" in file.read_text().splitlines()
        assert list(yaml.safe_load(file.read_text())) == ["defaults"], file
        for entry in yaml.safe_load(file.read_text())["defaults"]:
            assert all(key.startswith("override /") for key in entry), file


def test_the_defaults_are_the_main_job() -> None:
    config = compose()
    assert (config.strategy, config.task.name, config.model.name, config.client.name) == (
        "fedavg",
        "mnist",
        "cnn",
        "sgd",
    )
    assert config.clip is None
    assert config.experiment is None
    assert config.task.federation.arguments["partition"] == "dirichlet"
    assert config.task.federation.arguments["alpha"] == 0.5


def test_a_strategy_chooses_its_parts() -> None:
    assert compose(["strategy=fedadam"]).server.name == "adam"
    assert compose(["strategy=fedprox"]).client.name == "proximal"
    scaffold = compose(["strategy=scaffold"])
    assert (
        scaffold.client.name,
        scaffold.server.name,
        scaffold.combiner.arguments["weighting"],
    ) == ("scaffold", "scaffold", "uniform")
    assert compose(["strategy=fedavgm"]).server.arguments["momentum"] == 0.9


@pytest.mark.parametrize(
    "overrides", [["strategy=fedadam", "server=yogi"], ["server=yogi", "strategy=fedadam"]]
)
def test_a_part_that_is_named_wins_over_the_strategys_in_either_order(overrides: list[str]) -> None:
    config = compose(overrides)
    assert (config.strategy, config.server.name) == ("fedadam", "yogi")
    assert config.server.target.endswith(".Yogi")


def test_an_experiment_chooses_a_strategy_and_gives_way_to_what_is_named() -> None:
    config = compose(["experiment=heterogeneous"])
    assert (config.experiment, config.strategy, config.server.name) == (
        "heterogeneous",
        "scaffold",
        "scaffold",
    )
    assert config.task.federation.arguments["alpha"] == 0.1
    other = compose(["experiment=heterogeneous", "strategy=fedadam", "task.alpha=2", "rounds=1"])
    assert (other.strategy, other.server.name, other.client.name, other.rounds) == (
        "fedadam",
        "adam",
        "sgd",
        1,
    )
    assert other.task.federation.arguments["alpha"] == 2.0
    assert other.client.arguments["local_epochs"] == config.client.arguments["local_epochs"]


def test_a_task_brings_its_model_and_gives_way_to_what_is_named() -> None:
    assert compose(["task=digits"]).model.name == "mlp"
    assert compose(["experiment=quickstart"]).model.name == "mlp"
    assert compose(["task=digits", "model=linear"]).model.name == "linear"


def test_heavy_tail_is_ten_of_a_hundred_unequal_devices() -> None:
    config = compose(["runtime=heavy_tail"])
    assert (config.num_clients, config.sampler.arguments["fraction"]) == (100, 0.1)
    assert (config.runtime.dropout, config.runtime.devices.arguments["speed_sigma"]) == (0.1, 1.0)
    assert compose(["runtime=heavy_tail", "num_clients=20"]).num_clients == 20


def test_null_and_a_plus_mean_what_they_mean_in_hydra() -> None:
    assert compose(["experiment=null"]) == compose()
    assert compose(["clip=fixed", "clip=null"]).clip is None
    assert compose(["+strategy=fedadam", "++rounds=3"]) == compose(["strategy=fedadam", "rounds=3"])


def test_a_later_override_wins() -> None:
    config = compose(["strategy=fedprox", "rounds=3", "strategy=fedadam", "rounds=4"])
    assert (config.strategy, config.rounds) == ("fedadam", 4)
