"""What is refused, in which words: every fault at once, each with its place and its mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_app.cli.main import main
from fl_app.compose import ConfigError, compose
from fl_app.config import catalogue


def faults(*overrides: str) -> dict[str, str]:
    """Message by place, in order."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return {fault.place: fault.message for fault in caught.value.faults}


def test_every_fault_is_told_at_once_in_the_order_of_the_overrides() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["client.lr=-1", "client.epochs=3", "strategy=fedavgg"])
    assert str(caught.value).splitlines() == [
        "configuration refused, 3 faults:",
        "  client.lr = -1      must be greater than 0",
        "  client.epochs       unknown key; did you mean client.local_epochs?",
        "  strategy = fedavgg  unknown choice; did you mean fedavg? "
        f"(choices: {', '.join(catalogue.names('strategy'))})",
    ]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("rounds=true", "rounds = true", "must be a whole number of at least 1: true and false are not numbers"),
        ("rounds=0", "rounds = 0", "must be at least 1"),
        ("rounds.x=1", "rounds = {x: 1}", "must be a whole number of at least 1"),
        ("rounds=null", "rounds = null", "must be a whole number of at least 1"),
        ("seed=1.5", "seed = 1.5", "must be a whole number between 0 and 4294967295"),
        ("seed=???", "seed", "must be given a value; ??? says that there is none yet"),
        ("client.lr=nan", "client.lr = nan", "must be a finite number greater than 0"),
        ("client.lr=inf", "client.lr = inf", "must be a finite number greater than 0"),
        ("num_clients=many", "num_clients = many", "must be a whole number of at least 1, or auto"),
        ("task.alpha=0", "task.alpha = 0", "must be greater than 0"),
        ("backend=ray", "backend = ray", "must be one of engine, flower"),
        ("resume=musst", "resume = musst", "must be one of auto, never, must; did you mean must?"),
        ("run_name=a/b", "run_name = a/b", "must be a folder's name of letters, digits and . _ = + -"),
        ("travel=[]", "travel = []", "must be a list of texts with at least 1 entry"),
        ("admission=3", "admission = 3", "must hold keys: max_examples, quorum, on_shortfall, max_attempts"),
        ("admission.quorom=3", "admission.quorom", "unknown key; did you mean admission.quorum?"),
        ("runtime.dropout=1.1", "runtime.dropout = 1.1", "must be between 0 and 1"),
        ("runtime.devices.latncy=1", "runtime.devices.latncy", "unknown key; did you mean runtime.devices.latency?"),
        ("runtime.devices.dropout=1", "runtime.devices.dropout = 1", "is filled in by the application"),
        ("runtime.devices=3", "runtime.devices = 3", "is no group that has choices: set its keys, runtime.devices.…="),
        ("model.num_classes=3", "model.num_classes = 3", "is filled in by the application"),
        ("lr=1", "lr", "unknown key; did you mean client.lr or server.lr?"),
        ("cleint.lr=1", "cleint.lr", "unknown key; did you mean client.lr?"),
        ("stratgy=fedavg", "stratgy", "unknown key; did you mean strategy?"),
        ("clip.norm=3", "clip.norm", "clip is none, which has no settings; choose one with clip="),
        ("hydra.run.dir=x", "hydra.run.dir", "unknown key; Hydra's own settings are not used here"),
        ("strategy.x=1", "strategy.x", "unknown key; strategy is a choice and has no settings: write strategy=…"),
        ("strategy={x: 1}", "strategy", "unknown key; strategy is a choice and has no settings: write strategy=…"),
        ("~clip", "~clip", "nothing is deleted here: set another value or choice, clip=…"),
        ("strategy@a=fedavg", "strategy@a=fedavg", "a group cannot be moved to another place: write group=choice"),
        ("rounds", "rounds", "not an override: write key=value"),
        ("=3", "=3", "not an override: write key=value"),
        ("a b=3", "a b=3", "not an override: write key=value, without spaces before the ="),
        ("client.lr=${zz}", "client.lr", "cannot be resolved: Interpolation key 'zz' not found"),
        ("client.lr=${client.lr}", "client.lr", "cannot be resolved: Recursive interpolation detected"),
        ("client.lr=${oc.env:NO_SUCH}", "client.lr", "cannot be resolved: "),
        ("client.x=${client}", "client.x", "cannot be resolved: Interpolation to parent node detected"),
        ("travel.7=x", "travel.7 = x", "cannot be resolved: list index out of range"),
        ("travel.x=x", "travel.x = x", "cannot be resolved: "),
    ],
)  # fmt: skip
def test_one_fault_is_told_with_its_place_and_its_mend(text: str, place: str, message: str) -> None:
    found = faults(text)
    assert [key for key in found if key.startswith(place)]
    assert next(iter(found.values())).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        "client.lr=[1",
        "client.lr==1",
        "client.lr=a=b",
        "travel=(a)",
        "client=foo(1)",
        "seed='1",
        "rounds=${seed",
    ],
)
def test_an_override_that_cannot_be_read_is_told_how_to_quote(text: str) -> None:
    key, _, value = text.partition("=")
    ((place, message),) = faults(text).items()
    assert place == f"{key} = {value}"
    assert message.startswith("cannot be read; a value with a comma")


@pytest.mark.parametrize("value", ["1,2", "choice(1,2)", "range(1,4)", "interval(0,1)", "glob(*)"])
def test_a_sweep_is_refused_because_a_run_takes_one_value(value: str) -> None:
    ((place, message),) = faults(f"client.lr={value}").items()
    assert place == f"client.lr = {value}"
    assert message.startswith("several values to sweep over, and a run takes one; ")


@pytest.mark.parametrize(
    "value", ["fedavgg", "FedAvgg", "fedavg.yaml", "1", "null", "[fedavg]", "../strategy/fedavg"]
)
def test_a_wrong_choice_lists_the_right_ones(value: str) -> None:
    ((place, message),) = faults(f"strategy={value}").items()
    assert place.startswith("strategy = ")
    assert message.startswith("unknown choice")
    assert message.endswith(f"(choices: {', '.join(catalogue.names('strategy'))})")


def test_a_wrong_choice_does_not_hide_the_other_faults_nor_invent_any() -> None:
    found = faults("client=proximall", "client.mu=0.1", "client.lr=-1", "rounds=0")
    assert list(found) == ["client = proximall", "client.lr = -1", "rounds = 0"]
    # Nothing is near, so nobody knows what keys there would be.
    assert list(faults("client=zzz", "client.mu=0.1", "rounds=0")) == ["client = zzz", "rounds = 0"]
    assert list(faults("strategy=zzz", "client.mu=0.1", "client.lr=-1", "rounds=0")) == [
        "strategy = zzz",
        "rounds = 0",
    ]
    assert list(faults("experiment=zzz", "strategy=qqq", "runtime.dropout=2")) == [
        "experiment = zzz", "strategy = qqq", "runtime.dropout = 2"
    ]  # fmt: skip


def test_values_that_do_not_go_together_are_refused() -> None:
    assert faults("num_clients=3", "admission.quorum=5") == {
        "admission.quorum = 5": "must be at most num_clients, 3"
    }
    assert compose(["admission.quorum=5"]).admission.quorum == 5


def test_mappings_that_contain_each_other_come_to_an_end() -> None:
    found = faults("client.x=${server}", "server.y=${client}")
    assert any("nests without end" in message for message in found.values())


@pytest.mark.parametrize(
    ("name", "told"),
    [("Unchecked", "check"), ("Forgetful", "its check() gives NoneType, not a claim")],
)
def test_a_part_that_does_not_fit_is_refused_by_a_dry_run_too(name, told, capsys):
    command = ["run", f"combiner._target_=tests.support.models.{name}", "task=digits", "--dry-run"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert told in error
    assert name in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=krum", "num_clients=10", "combiner.f=4"], "f = 4 needs at least 11 inputs a round and gets 10"),
        (["strategy=bulyan", "num_clients=20", "combiner.f=5"], "Bulyan with f = 5 needs at least 23 inputs a round"),
        (["strategy=trimmed_mean", "num_clients=10", "combiner.f=5"], "needs at least 11 inputs"),
        (["strategy=robust", "num_clients=10", "combiner.rule._target_=strategies.combiners.Krum", "combiner.f=4"],
         "nearest-neighbour mixing with f = 4 needs at least 11"),
        (["strategy=krum", "num_clients=2"], "Krum with f = 0 needs at least 3 inputs"),
        (["strategy=krum", "num_clients=100", "sampler.fraction=0.1", "combiner.f=4"], "gets 10"),
        (["combiner=fltrust"], "set task.root_examples=100"),
        (["combiner=nnm", "combiner.f=2", "combiner.rule.f=1"], "give f to one of them"),
        (["combiner=nnm", "combiner.rule=krum"], "as in combiner.rule._target_=package.module.Class"),
        (["combiner=krum", "combiner.f=-1"], "must be a whole number of at least 0, or null"),
        (["combiner=bucketing", "combiner.seed=3"], "is filled in by the application"),
        (["combiner=nnm", "combiner.rule._target_=strategies.combiners.Mean"], "rule is a Mean: take a robust rule"),
    ],
)  # fmt: skip
def test_a_robust_rule_that_cannot_work_is_refused_before_a_run(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = main(["run", "task=digits", f"output_dir={tmp_path}", *overrides])
    told = " ".join(capsys.readouterr().err.split())
    assert code == 2, told
    assert words in told
