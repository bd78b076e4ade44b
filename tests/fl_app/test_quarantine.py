"""Watched runs on the engine, from the configuration to summary.json."""

import io
import json
from pathlib import Path

import pytest

from fl_app.assembly import check
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.run import run_engine

CHOSEN = [
    "task=digits", "model=linear", "num_clients=10", "runtime.workers=1", "quarantine=strikes",
]  # fmt: skip


def run(folder: Path, *overrides: str):
    lines = io.StringIO()
    result = run_engine(compose([*CHOSEN, f"output_dir={folder}", *overrides]), PlainConsole(lines))
    return result, json.loads(result.summary_path.read_text()), lines.getvalue()


def told(summary) -> tuple:
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in summary["history"]]
    return history, summary["quarantine"], summary["final"]


@pytest.mark.parametrize("combiner", ["mean", "median"])
def test_an_attacker_is_named_and_shut_out(tmp_path, combiner):
    result, summary, lines = run(
        tmp_path,
        "attack=scaling",
        "attack.factor=50",
        "attack.fraction=0.1",
        f"combiner={combiner}",
        "rounds=5",
    )
    assert result.status == "completed"
    (row,) = [row for row in summary["quarantine"] if row["times"]]
    liar = row["client"]
    assert (row["since"], row["until"], row["quarantined"]) == (4, 13, True)
    assert row["last_reasons"][0].startswith("excess ")
    assert [liar in each["clients_flagged"] for each in summary["history"]] == [True] * 3 + [
        False
    ] * 2
    assert [each["clients_sampled"] for each in summary["history"]] == [10, 10, 10, 9, 9]
    assert f"client {liar} is quarantined from round 4 to 13: flagged in 3 of its last 3" in lines
    log = (result.summary_path.parent / "run.log").read_text()
    assert f"round 1: client {liar} is flagged: excess " in log
    assert "clients_flagged" not in summary["final"]


def test_five_rounds_are_two_and_three_more(tmp_path):
    chosen = ("attack=sign_flip", "attack.scale=5", "attack.fraction=0.1")
    whole = run(tmp_path / "whole", "rounds=5", *chosen)[1]
    run(tmp_path / "parts", "rounds=2", *chosen)
    assert told(run(tmp_path / "parts", "rounds=5", *chosen)[1]) == told(whole)
    assert any(row["times"] for row in whole["quarantine"])


def test_a_run_that_is_not_watched_has_no_word_of_it(tmp_path):
    _, summary, _ = run(tmp_path, "quarantine=none", "attack=none", "rounds=1")
    assert "quarantine" not in summary
    assert "clients_flagged" not in summary["history"][0]


def test_too_few_clients_are_refused_before_the_run():
    with pytest.raises(ConfigError, match="a round asks 4 in all"):
        check(compose(["task=digits", "num_clients=4", "quarantine=strikes"]))


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"quarantine.max_fraction"):
        compose(["quarantine=strikes", "quarantine.max_fraction=2"])
