"""Secure aggregation as a user runs it: the plain run's model, whatever drops out, resumed, and what is refused."""

import json
import os

import numpy as np
import pytest
from torch import nn

from fl_app.cli.main import main
from fl_app.engine import EngineGrid
from strategies.collectors import Masked
from strategies.collectors.masked_session import MaskedSession
from strategies.contents import Contents
from strategies.secagg.vault import Vault
from strategies.strategy import PipelineStrategy
from tests.fl_app.test_run import assert_same_model, model_of, rows, run

SECURE = ["strategy=secure", "num_clients=8"]


def learned(summary) -> list[tuple[float, float]]:
    return [(row["loss"], row["accuracy"]) for row in summary["history"]]


@pytest.mark.parametrize(
    "chosen",
    [
        ["strategy=fedavg"],
        ["strategy=fedprox", "clip=fixed", "clip.norm=0.5"],
        ["strategy=fedadam", "combiner=uniform_mean", "collector.max_weight=null"],
        ["strategy=scaffold", "collector.max_weight=null"],
        ["strategy=fedavg", "travel=[layers.1.*]"],
    ],
    ids=["fedavg", "fedprox and clip", "fedadam, uniform", "scaffold", "part of the model"],
)
def test_the_masked_model_is_the_plain_one(tmp_path, chosen):
    plain_only = [one for one in chosen if not one.startswith("collector.")]
    plain, told, _ = run(tmp_path / "plain", *plain_only, "num_clients=8", "rounds=2")
    masked, hidden, _ = run(
        tmp_path / "masked", *chosen, "collector=masked", "num_clients=8", "rounds=2"
    )
    for name, array in model_of(plain).items():
        np.testing.assert_allclose(model_of(masked)[name], array, rtol=0, atol=2e-6)
    np.testing.assert_allclose(learned(hidden), learned(told), rtol=1e-4)
    train = hidden["history"][-1]["train"]
    assert train["saturated"] == 0
    if (
        "collector.max_weight=null" not in chosen
    ):  # its mean is over clients, the plain one's over examples
        loss = told["history"][-1]["train"]["train_loss"]
        assert train["train_loss"] == pytest.approx(loss, rel=1e-3)


def test_two_rounds_and_two_more_are_four_rounds_bit_for_bit(tmp_path):
    """Fresh keys each time, another machine's luck, and the same sum of integers."""
    chosen = [*SECURE, "runtime.dropout=0.1", "sampler.fraction=0.75"]
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=4")
    run(tmp_path / "parts", *chosen, "rounds=2")
    parts, resumed, _ = run(tmp_path / "parts", *chosen, "rounds=4", "runtime.workers=2")
    assert_same_model(whole, parts)
    assert learned(summary) == learned(resumed)


def test_drop_outs_in_every_phase_are_borne_and_what_is_too_much_is_void_with_its_reason(tmp_path):
    chosen = [*SECURE, "num_clients=10", "admission.on_shortfall=skip", "runtime.dropout=0.35"]
    result, summary, lines = run(tmp_path, *chosen, "rounds=12")
    history = summary["history"]
    whole, void = ([row for row in history if row["void"] is flag] for flag in (False, True))
    assert result.status == "completed"
    assert any(row["clients_failed"] for row in whole)
    assert void
    assert all(
        "are left" in row["void_reason"] or "are needed" in row["void_reason"] for row in void
    )
    assert history[-1]["accuracy"] > 0.5
    said = "\n".join(lines)
    assert all(f"at phase {phase}" in said for phase in range(4))


def opened_sums(result) -> list[tuple[str, ...]]:
    """(run, model, session) of every sum that client 0 gave shares for."""
    ledger = result.summary_path.parent / "clients" / "secagg" / "client-0" / "ledger"
    words = [tuple(line.split()) for line in ledger.read_text().splitlines()]
    return [entry[1:] for entry in words if entry[:1] == ("opened",)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Three rounds in one go."""
    return run(tmp_path_factory.mktemp("whole"), *SECURE, "rounds=3")[:2]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("moment", ["shares are given", "the sum is kept", "the model is new"])
def test_a_run_that_is_killed_at_any_moment_goes_on_and_opens_no_second_sum(
    undisturbed, tmp_path, monkeypatch, number, moment
):
    """Clients that gave shares join no second sum on the model: the server must know what it had."""
    whole, summary = undisturbed
    owner, name = {
        "shares are given": (MaskedSession, "_open"),
        "the sum is kept": (Contents, "update"),
        "the model is new": (PipelineStrategy, "_central"),
    }[moment]
    calls, original = [], getattr(owner, name)

    def dies(self, *given):
        calls.append(name)
        if len(calls) < number:
            return original(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        stopped, _, _ = run(tmp_path / "killed", *SECURE, "rounds=3")
    assert stopped.reason == "interrupted"
    again, resumed, _ = run(tmp_path / "killed", *SECURE, "rounds=3")
    assert_same_model(whole, again)
    assert learned(resumed) == learned(summary)
    assert resumed["rejections"] == {}
    taken_up = "it is taken up" in (again.summary_path.parent / "run.log").read_text()
    assert taken_up is (moment == "the model is new")
    sums = opened_sums(again)
    assert len({run_id for run_id, _, _ in sums}) == 1
    # Three models, three sums; where none had come of the first session, its shares were given in vain.
    assert len(sums) == (3 if taken_up else 4)


def test_a_group_that_is_lost_is_made_up_for_on_the_same_model(tmp_path):
    chosen = ["strategy=secure_grouped", "combiner=krum", "combiner.f=1", "num_clients=15"]
    _, summary, lines = run(tmp_path, *chosen, "runtime.dropout=0.15", "rounds=8")
    history = summary["history"]
    assert any("it is taken up" in line for line in lines)
    assert not history[-1]["void"]
    assert sum(not row["void"] for row in history) >= 5


def test_no_secret_outlives_a_run_and_the_ledger_does(tmp_path):
    result, _, _ = run(tmp_path, *SECURE, "rounds=2", "runtime.dropout=0.2")
    folder = result.summary_path.parent / "clients" / "secagg"
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert left == {"ledger", "lock"}
    assert all(path.stat().st_mode & 0o77 == 0 for path in folder.rglob("*"))


def test_nothing_that_is_one_clients_own_travels_in_clear(tmp_path, monkeypatch):
    seen = []
    take = EngineGrid.pull_messages

    def pull(self, ids):
        for message in take(self, ids):
            if message.has_content():
                seen.append(message.content)
            yield message

    monkeypatch.setattr(EngineGrid, "pull_messages", pull)
    run(tmp_path, *SECURE, "rounds=1")
    assert len(seen) == 8 * 4
    assert all(not content.metric_records for content in seen)
    told = {key for content in seen for key in content.config_records["secagg"]}
    assert told == {"keys", "to", "sealed", "commitment", "layouts", "seeds", "masking"}


def test_grouped_sums_bear_a_liar(tmp_path):
    chosen = ["strategy=secure_grouped", "num_clients=20", "task.partition=iid", "rounds=3"]
    _, honest, _ = run(tmp_path, *chosen)
    _, summary, lines = run(tmp_path, *chosen, "attack=scaling", "attack.fraction=0.05")
    assert any("1 of 20 clients" in line for line in lines)
    assert summary["history"][-1]["accuracy"] > honest["history"][-1]["accuracy"] - 0.05


def test_groups_repeat_with_the_seed_for_any_number_of_workers(tmp_path):
    chosen = ["strategy=secure_grouped", "num_clients=15", "rounds=2"]
    one, summary, _ = run(tmp_path / "one", *chosen)
    two, other, _ = run(tmp_path / "two", *chosen, "runtime.workers=2")
    assert_same_model(one, two)
    assert [row["train"] for row in rows(summary)] == [row["train"] for row in rows(other)]


def test_the_malicious_mode_with_a_roster(tmp_path, capsys):
    keys = tmp_path / "keys"
    assert main(["keys", "identities", str(keys), "--clients", "8"]) == 0
    assert {path.stat().st_mode & 0o777 for path in keys.glob("*.pem")} == {0o600}
    pinned = [f"collector.roster={keys}/roster.json", f"collector.identities={keys}"]
    plain, _, _ = run(tmp_path, *SECURE, "rounds=2")
    guarded, summary, _ = run(tmp_path, *SECURE, "collector.malicious=true", *pinned, "rounds=2")
    assert summary["rejections"] == {}
    assert_same_model(plain, guarded)


class Normed(nn.Module):
    """A network with running statistics."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        size = int(np.prod(input_shape))
        self.layers = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(size), nn.Linear(size, num_classes)
        )

    def forward(self, inputs):
        return self.layers(inputs)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["num_clients=2"], "2 clients cannot hide"),
        (["quarantine=strikes"], "a sum of several names nobody"),
        (
            ["combiner=krum"],
            "compares updates with one another, and the server sees their sum only",
        ),
        (["combiner=uniform_mean"], "collector.max_weight=null"),
        (["collector.max_weight=null"], "use combiner=uniform_mean"),
        (["attack=alie"], "knows the updates of the honest, which nobody sees under masks"),
        (["collector.malicious=true"], "needs a roster of identity keys"),
        (
            ["collector.malicious=true", "num_clients=20", "sampler.fraction=0.25"],
            "who take part in sums of 10 or more",
        ),
        (["evaluate.federated_every=1"], "set evaluate.federated_every=0"),
        (
            ["strategy=secure_grouped", "num_clients=25", "evaluate.federated_every=5"],
            "would come in clear",
        ),
        (["strategy=ckks_mean", "evaluate.federated_every=1"], "would come in clear"),
        (["collector.dropouts=0.6"], "assume fewer drop-outs or colluders"),
        (["collector.limit=0"], "collector.limit"),
        (["collector.limitt=1"], "did you mean collector.limit?"),
        (["collector.max_weight=1000000000"], "do not fit 31 bits"),
        (
            ["strategy=secure_grouped", "num_clients=20", "combiner=krum", "combiner.f=2"],
            "at least 7 inputs a round and gets 5",
        ),
        (
            ["strategy=secure_grouped", "num_clients=12"],
            "ask 15 clients a round or more, or make fewer groups",
        ),
        (["collector.roster=roster.json"], "set collector.malicious=true"),
        (["strategy=ckks_mean", "collector.key=nosuch.key"], "there is no file"),
        (["strategy=secure_grouped", "collector.max_weight=10"], "leave max_weight out"),
        ([f"model._target_={__name__}.Normed"], "use GroupNorm instead of BatchNorm"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:40],
)
def test_what_is_unsound_is_refused_before_anything_runs(tmp_path, capsys, chosen, said):
    strategy = [] if any("strategy" in one for one in chosen) else ["strategy=secure"]
    code = main(["run", "task=digits", *strategy, *chosen, f"output_dir={tmp_path}"])
    assert code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))


def test_a_full_disk_of_the_client_is_that_clients_failure(tmp_path, monkeypatch):
    keep = Vault.keep_upload

    def full(self, session, upload):
        if self._folder.name == "client-3":
            raise OSError(28, os.strerror(28))
        keep(self, session, upload)

    monkeypatch.setattr(Vault, "keep_upload", full)
    _, summary, _ = run(tmp_path, *SECURE, "rounds=1", "runtime.workers=1")
    (row,) = summary["history"]
    assert (row["clients_failed"], row["void"]) == (1, False)


def test_keys_are_made_where_there_are_none_and_never_replaced(tmp_path, capsys):
    key, roster = tmp_path / "client-3.pem", tmp_path / "roster.json"
    assert main(["keys", "identity", str(key)]) == 0
    public = capsys.readouterr().out.strip()
    assert (
        main(["keys", "roster", str(roster), f"3={public}", f"4={'ab' * 32}", f"5={'cd' * 32}"])
        == 0
    )
    assert json.loads(roster.read_text()) == {"3": public, "4": "ab" * 32, "5": "cd" * 32}
    for arguments, said in [
        (["identity", str(key)], "is there already"),
        (
            ["roster", str(tmp_path / "new.json"), "1=00"],
            "identity key of client 1 is not 32 bytes",
        ),
        (["roster", str(roster), f"1={public}"], "is there already"),
        (["roster", str(tmp_path / "new.json"), "one=00"], "is not CLIENT=KEY"),
        (
            ["roster", str(tmp_path / "new.json"), f"1={public}", f"2={public}"],
            "the same identity key",
        ),
        (["roster", str(tmp_path / "new.json"), f"1={public}"], "three or more"),
        (["identities", str(tmp_path / "few"), "--clients", "2"], "three or more"),
    ]:
        assert main(["keys", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["keys"]) == 2


def test_the_numbers_of_the_protocol_are_told(tmp_path):
    _, _, lines = run(tmp_path, *SECURE, "rounds=1")
    said = "\n".join(lines)
    assert Masked(max_weight=1000).describe(8) in said
    assert "one that lies can spoil the sum" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_one_clients_disk_that_fails_is_its_own_drop_out(tmp_path, workers):
    """The others of its chunk go on: a ledger that can't be written, in the first phase."""
    spoilt = tmp_path / "spoilt" / "clients" / "secagg" / "client-3" / "ledger"
    spoilt.mkdir(parents=True)
    chosen = [*SECURE, "run_name=spoilt", "rounds=1", f"runtime.workers={workers}"]
    result, summary, _ = run(tmp_path, *chosen)
    assert (result.status, summary["rounds_completed"]) == ("completed", 1)
    (row,) = summary["history"]
    assert (row["void"], row["clients_failed"]) == (False, 1)
