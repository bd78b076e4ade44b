"""Half of all clients are lost in every round: the rounds that still can be had are had, and the others say why not."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

pytestmark = pytest.mark.chaos

CLIENTS, ROUNDS = 20, 4
SMALL = [
    "task=digits", "task.partition=iid", "model=linear", "client.lr=0.5", f"num_clients={CLIENTS}",
    f"rounds={ROUNDS}", "runtime.workers=1", "runtime.dropout=0.5", "run_name=half",
]  # fmt: skip

SURVIVABLE = {
    "fedavg": ["strategy=fedavg"],
    # Two liars are assumed: Krum needs 2f + 3 = 7 of 20, and 6 or fewer are left once in 17 attempts.
    "krum": ["strategy=krum", "combiner.f=2"],
    # Sums are opened with 11 survivors, which 2 of 5 attempts have: three attempts have them in 4 of 5 rounds.
    "secure": ["strategy=secure", "collector.dropouts=0.45", "collector.colluders=0"],
}


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    config = compose([*SMALL, *overrides, f"output_dir={folder}"])
    result = run_engine(config, PlainConsole(io.StringIO()))
    summary: dict[str, Any] = json.loads(result.summary_path.read_text())
    return summary


@pytest.mark.parametrize("strategy", SURVIVABLE)
def test_rounds_go_on_with_the_half_that_is_left(tmp_path: Path, strategy: str) -> None:
    summary = run(tmp_path, *SURVIVABLE[strategy])
    rows = summary["history"]
    assert summary["status"] == "completed"
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert set(summary["rejections"]) == {"client_error"}  # lost, and nothing else wrong with them
    asked, failed = (sum(row[key] for row in rows) for key in ("clients_sampled", "clients_failed"))
    # Within five standard deviations of one half: a false alarm in 1.7 million seeds.
    assert abs(failed - asked / 2) < 5 * (asked / 4) ** 0.5
    good = [row for row in rows if not row["void"]]
    assert len(good) >= ROUNDS / 2
    assert good[-1]["accuracy"] > 0.8
    for before, row in pairwise(rows):
        assert (row["loss"] == before["loss"]) == row["void"]  # a void round leaves the model alone


def test_a_rule_that_can_not_bear_it_says_so_in_every_round(tmp_path: Path) -> None:
    summary = run(tmp_path, "strategy=krum", "combiner.f=6", "rounds=2")
    assert summary["status"] == "failed"
    assert all(row["void"] for row in summary["history"])
    assert "the rule needs 15" in summary["reason"]
