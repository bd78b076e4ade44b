"""Robust strategies run as a user runs them: under attack, resumed, with any number of workers, short of replies."""

import pytest

from tests.fl_app.test_run import assert_same_model, rows, run

STRATEGIES = [
    "robust", "krum", "multi_krum", "bulyan", "median", "trimmed_mean", "geometric_median", "centered_clipping",
    "norm_bounding", "fltrust",
]  # fmt: skip
TEN = ["num_clients=10", "task.partition=iid"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_rounds_and_two_more_are_four_rounds_bit_for_bit_under_attack(tmp_path, strategy):
    chosen = [*TEN, f"strategy={strategy}", "attack=sign_flip", "attack.fraction=0.1"]
    chosen += ["task.root_examples=50"] if strategy == "fltrust" else []
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=4")
    run(tmp_path / "parts", *chosen, "rounds=2")
    parts, resumed, lines = run(tmp_path / "parts", *chosen, "rounds=4")
    assert_same_model(whole, parts)
    assert rows(summary) == rows(resumed)
    assert "goes on after round 2" in lines


def test_buckets_repeat_with_the_seed_and_for_any_number_of_workers(tmp_path):
    chosen = [*TEN, "combiner=bucketing", "combiner.f=2", "rounds=2"]
    one, _, _ = run(tmp_path / "one", *chosen)
    two, _, _ = run(tmp_path / "two", *chosen, "runtime.workers=2")
    assert_same_model(one, two)


@pytest.mark.parametrize(
    ("strategy", "attack"),
    [
        ("robust", "scaling"),
        ("robust", "alie"),
        ("krum", "nan"),
        pytest.param("robust", "nan", marks=pytest.mark.slow),
        pytest.param("krum", "scaling", marks=pytest.mark.slow),
        pytest.param("krum", "alie", marks=pytest.mark.slow),
    ],
)
def test_a_third_of_liars_does_not_stop_learning(tmp_path, strategy, attack):
    chosen = [*TEN, f"strategy={strategy}", f"attack={attack}", "attack.fraction=0.3"]
    _, summary, _ = run(tmp_path, *chosen, "rounds=6")
    accuracy = [row["accuracy"] for row in summary["history"]]
    assert summary["status"] == "completed"
    assert accuracy[-1] > accuracy[0] + 0.1
    assert not any(row["void"] for row in summary["history"])


@pytest.mark.parametrize("attack", ["scaling", "nan", "min_max"])
def test_more_liars_than_f_may_win_but_crash_nothing(tmp_path, attack):
    for strategy in ("robust", "multi_krum"):
        chosen = [*TEN, f"strategy={strategy}", "combiner.f=3", f"attack={attack}"]
        result, summary, _ = run(tmp_path, *chosen, "attack.fraction=0.4", "rounds=2")
        assert summary["rounds_completed"] == 2
        assert result.status in ("completed", "failed")


def test_a_round_with_too_few_replies_is_void_and_the_next_one_is_tried(tmp_path):
    """Krum with f = 3 needs 9 of 10: at a third of drop-outs some rounds have them and some do not."""
    chosen = [*TEN, "strategy=krum", "combiner.f=3", "runtime.dropout=0.15"]
    _, summary, _ = run(tmp_path, *chosen, "admission.on_shortfall=skip", "rounds=10")
    voids = [row["void"] for row in summary["history"]]
    assert any(voids)
    assert not all(voids)


def test_f_may_be_more_than_the_cohort_has_bad_luck_for(tmp_path):
    result, summary, _ = run(
        tmp_path, *TEN, "strategy=krum", "combiner.f=3", "runtime.dropout=1", "rounds=2"
    )
    assert result.exit_code == 1
    assert "no round had enough good updates" in summary["reason"]
