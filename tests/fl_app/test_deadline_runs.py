"""Runs in which a client dies, as a user starts them: what a round lasts then, and that a restart changes nothing."""

import numpy as np
import pytest

from tests.fl_app.test_run import assert_same_model, rows, run

DYING = [
    "num_clients=10",
    "runtime.devices._target_=tests.support.dying.OneDies",
    "runtime.devices.speed_sigma=0.5",
    "evaluate.every=0",
]
CHOSEN = {
    "auto": ["scheduler.deadline=auto", "breaker=circuit"],
    "enough": ["scheduler.deadline=auto", "scheduler.enough=0.6", "scheduler.grace=0.5"],
    "sums": [
        "collector=masked",
        "scheduler.deadline=auto",
        "scheduler.enough=0.8",
        "breaker=circuit",
    ],
    "buffered": [
        "strategy=fedbuff",
        "scheduler.buffer=4",
        "scheduler.deadline=20",
        "breaker=circuit",
    ],
}


def lasted(summary) -> list[float]:
    """Virtual seconds of each round."""
    return np.diff([0.0, *(row["virtual_seconds"] for row in summary["history"])]).tolist()


def test_a_client_that_dies_costs_a_deadline_and_with_a_breaker_only_now_and_then(tmp_path):
    """Round 4 is the first without it. The 9th of the ten sets the deadline, with twice its time."""
    _, plain, _ = run(tmp_path / "plain", *DYING, "rounds=5", "round_timeout=600")
    _, auto, _ = run(tmp_path / "auto", *DYING, "rounds=5", "scheduler.deadline=auto")
    _, rested, lines = run(tmp_path / "rested", *DYING, *CHOSEN["auto"], "rounds=9")
    before = lasted(plain)[0]
    assert lasted(plain) == pytest.approx([before] * 3 + [600.0] * 2)
    assert lasted(auto)[:3] == pytest.approx([before] * 3)
    assert max(lasted(auto)[3:]) <= 2 * before
    assert [row["clients_failed"] for row in auto["history"]] == [0, 0, 0, 1, 1]
    # three deadlines, and then nobody waits for it
    assert max(lasted(rested)[6:]) <= before
    assert [row["clients_sampled"] for row in rested["history"]] == [10] * 6 + [9] * 3
    assert rested["breaker"] == {"open": [3], "trips": 1}
    assert "breaker" not in auto
    told = "client 3 has failed 3 rounds in a row and is not asked from round 7 to 11"
    (log,) = (tmp_path / "rested").rglob("run.log")
    assert told in lines
    assert told in log.read_text()


@pytest.mark.parametrize(
    "name",
    [
        one if one in ("auto", "sums") else pytest.param(one, marks=pytest.mark.slow)
        for one in CHOSEN
    ],
)
def test_five_rounds_and_four_more_are_nine_bit_for_bit(tmp_path, name):
    chosen = [*DYING, *CHOSEN[name], "runtime.devices.jitter_sigma=0.3"]
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=9")
    run(tmp_path / "parts", *chosen, "rounds=5")
    parts, resumed, lines = run(tmp_path / "parts", *chosen, "rounds=9")
    assert "goes on after round 5" in lines
    assert_same_model(whole, parts)
    sent = {"download_bytes"} if name == "buffered" else set()  # who was at work is asked again
    for before, after in zip(rows(summary), rows(resumed), strict=True):
        assert {k: v for k, v in before.items() if k not in sent} == {
            k: v for k, v in after.items() if k not in sent
        }
    assert summary.get("breaker") == resumed.get("breaker")


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path):
    chosen = [*DYING, *CHOSEN["enough"], "rounds=6"]
    one, summary, _ = run(tmp_path / "one", *chosen)
    two, other, _ = run(tmp_path / "two", *chosen, "runtime.workers=2")
    assert_same_model(one, two)
    assert rows(summary) == rows(other)


def test_a_sum_of_eight_in_ten_waits_neither_for_the_dead_nor_for_the_slowest(tmp_path):
    """Without, each of the masked round's four phases may last until its deadline."""
    chosen = [*DYING, "collector=masked", "rounds=5", "round_timeout=600"]
    _, slow, _ = run(tmp_path / "slow", *chosen)
    _, quick, _ = run(tmp_path / "quick", *chosen, "scheduler.enough=0.8")
    assert lasted(slow)[3] > 600
    assert (
        lasted(quick)[3] <= lasted(slow)[0]
    )  # the eighth of nine is no later than the last of ten
    assert lasted(quick)[0] < lasted(slow)[0]
    assert not any(row["void"] for row in quick["history"])
    assert quick["rejections"] == {}
