"""Asynchronous runs as a user starts them: the same bits after a restart and for any number of workers."""

from __future__ import annotations

import pytest

from fl_app.config.faults import ConfigError
from tests.fl_app.test_run import assert_same_model, rows, run

BUSY = ["num_clients=12", "scheduler.buffer=3", "scheduler.concurrency=8"]
UNEVEN = ["runtime.devices.speed_sigma=1", "runtime.dropout=0.1"]
LEARNED = ("loss", "accuracy", "virtual_seconds", "staleness", "updates_rejected", "void")
CHOSEN = {
    "fedbuff": ["strategy=fedbuff", *BUSY],
    "fedasync": ["strategy=fedasync", "num_clients=12", "scheduler.concurrency=5"],
    "adam, damped": ["strategy=fedbuff", "server=adam", "scheduler.damp=true", *BUSY],
    "paced": [
        "strategy=fedbuff",
        *BUSY,
        "+scheduler.pace._target_=strategies.schedulers.Compass",
        "+scheduler.pace.least_steps=2",
        "+scheduler.pace.most_steps=20",
    ],
    "error feedback": ["strategy=fedbuff", "compression=top_k", "compression.ratio=0.1", *BUSY],
    "robust, held models": [
        "strategy=fedbuff",
        "combiner=multi_krum",
        "scheduler.buffer=5",
        "scheduler.concurrency=8",
        "num_clients=12",
        "downlink=delta",
        "attack=sign_flip",
    ],
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("fedbuff", "paced", "error feedback")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in CHOSEN
    ],
)
def test_two_versions_and_three_more_are_five_bit_for_bit(tmp_path, name):
    chosen = [*CHOSEN[name], *UNEVEN]
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=5")
    run(tmp_path / "parts", *chosen, "rounds=2")
    parts, resumed, lines = run(tmp_path / "parts", *chosen, "rounds=5")
    assert_same_model(whole, parts)
    for before, after in zip(rows(summary), rows(resumed), strict=True):
        assert {key: before.get(key) for key in LEARNED} == {key: after.get(key) for key in LEARNED}
    assert "goes on after round 2" in lines


@pytest.mark.parametrize("name", ["error feedback", pytest.param("paced", marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_nothing(tmp_path, name):
    chosen = [*CHOSEN[name], *UNEVEN, "rounds=3"]
    one, summary, _ = run(tmp_path / "one", *chosen)
    two, other, _ = run(tmp_path / "two", *chosen, "runtime.workers=2")
    assert_same_model(one, two)
    assert rows(summary) == rows(other)


def test_evaluation_on_clients_loses_no_reply_of_those_at_work(tmp_path):
    """Everybody is asked for figures after each version, those who train too; their updates come all the same."""
    chosen = [*CHOSEN["fedbuff"], "runtime.devices.speed_sigma=1", "rounds=8"]
    _, summary, _ = run(tmp_path, *chosen, "evaluate.federated_every=1")
    history = summary["history"]
    assert all(0 <= row["federated"]["accuracy"] <= 1 for row in history)
    assert [row["clients_failed"] for row in history] == [0] * 8
    assert summary["rejections"] == {}
    asked = sum(row["clients_sampled"] for row in history)
    assert 3 * 8 <= asked <= 3 * 8 + 8


def test_a_run_says_how_old_its_updates_were_and_learns(tmp_path):
    _, summary, lines = run(tmp_path, *CHOSEN["fedbuff"], *UNEVEN, "rounds=30")
    assert summary["final"]["accuracy"] > 0.5
    assert any("buffered: 8 clients busy, a step every 3 updates" in line for line in lines)


@pytest.mark.parametrize(
    ("chosen", "said", "mend"),
    [
        (["strategy=dp"], "coins", "sampler=spaced"),
        (["strategy=scaffold"], "SCAFFOLD", "server=sgd"),
        (["strategy=ckks_mean"], "ckks", "use"),
        (["clip=adaptive"], "clip", "clip=fixed"),
        (["scheduler.buffer=30", "num_clients=20"], "30 different clients", "num_clients"),
        (["scheduler.concurrency=30", "num_clients=20"], "30 clients are to be kept busy", "lower"),
    ],
    ids=["poisson", "scaffold", "ckks", "adaptive clip", "small population", "too many busy"],
)
def test_what_does_not_go_with_buffers_is_refused_with_the_mend(tmp_path, chosen, said, mend):
    overrides = ["num_clients=20", *chosen, "scheduler=buffered"]
    with pytest.raises(ConfigError) as refused:
        run(tmp_path, *overrides, "rounds=1")
    told = str(refused.value)
    assert said in told
    assert mend in told.rpartition(";")[2]


PRIVATE = [  # a client stays away for ten buffers of three
    "strategy=dp_ftrl",
    "scheduler=buffered",
    "scheduler.buffer=3",
    "scheduler.concurrency=6",
    "num_clients=40",
]


def test_a_private_run_charges_each_version_and_takes_three_places_for_each(tmp_path):
    chosen = [*PRIVATE, "privacy.target_epsilon=20", "rounds=4"]
    _, summary, _ = run(tmp_path, *chosen, "runtime.devices.speed_sigma=1")
    spent = [row["epsilon"] for row in summary["history"]]
    assert spent == sorted(spent)
    assert spent[0] > 0
    assert spent[-1] <= 20
    assert summary["privacy"]["epsilon"] == spent[-1]
