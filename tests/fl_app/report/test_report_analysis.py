"""Groups, pairs and baselines: which runs are compared with which."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import write_run

from fl_app.config.faults import ConfigError
from fl_app.report.analysis import Report, analyse, lower_is_better
from fl_app.report.collect import Collection, Run, canonical, collect
from fl_app.report.grouping import REPLICATES, default_keys, grouped, matched
from fl_app.report.tables import notes


def run_of(name: str, accuracy: float = 0.5, **config) -> Run:
    keys = {"strategy": "fedavg", "task": "digits", "seed": 0, "task.fold": 0}
    dotted = {key.replace("__", "."): value for key, value in config.items()}
    return Run(
        name,
        keys | dotted,
        {"accuracy": accuracy},
        [(1, {"accuracy": accuracy / 2}), (2, {"accuracy": accuracy})],
        10,
        20,
        1.0,
    )


def report_of(*runs: Run, **options) -> Report:
    return analyse(Collection(Path("/runs"), runs, ()), **options)


def test_groups_are_what_tells_settings_apart() -> None:
    runs = [
        run_of(
            f"{strategy}{seed}{lr}", strategy=strategy, client=strategy, seed=seed, client__lr=lr,
            output_dir=str(seed),
        )
        for strategy in ("a", "b") for seed in (1, 2) for lr in (0.1, 0.2)
    ]  # fmt: skip
    assert default_keys(runs) == ["strategy", "client.lr"]  # client follows from the strategy
    assert default_keys(runs[:1]) == ["strategy"]
    report = report_of(*runs)
    assert [" ".join(row.group.labels) for row in report.rows] == [
        "a 0.1",
        "a 0.2",
        "b 0.1",
        "b 0.2",
    ]
    assert (report.along, report.within) == (("client",), ())
    report = report_of(*runs, by=["strategy"])
    assert [row.metric.n for row in report.rows] == [4, 4]
    assert (report.along, report.within) == (("client",), ("client.lr",))


def test_replicates_are_matched_by_seed_fold_and_what_else_varies() -> None:
    runs = [
        run_of("a1", 0.5, strategy="a", seed=1), run_of("a2", 0.6, strategy="a", seed=2),
        run_of("a3", 0.9, strategy="a", seed=3),
        run_of("b2", 0.8, strategy="b", seed=2, client__mu=0.1),
        run_of("b1", 0.6, strategy="b", seed=1, client__mu=0.1),
        run_of("b4", 0.1, strategy="b", seed=4, client__mu=0.1),
    ]  # fmt: skip
    report = report_of(*runs, by=["strategy"])
    first, second = report.rows
    assert (first.difference, first.baseline) == (None, None)
    assert second.baseline is first.group
    assert second.difference is not None
    assert second.difference.pairs == 2
    assert second.difference.mean == pytest.approx(0.15)
    # t(1, 97.5%) = 12.706, deviation 0.1/√2, over √2
    assert second.difference.high == pytest.approx(0.15 + 12.7062 * 0.05, abs=1e-4)
    assert "b against a: 2 of 3 runs have a partner." in notes(report)


def test_folds_are_replicates_too() -> None:
    runs = [
        run_of(f"{strategy}{fold}", 0.1 * fold + bonus, strategy=strategy, task__fold=fold)
        for strategy, bonus in (("a", 0.0), ("b", 0.25)) for fold in (0, 1, 2)
    ]  # fmt: skip
    row = report_of(*runs).rows[1]
    assert row.difference is not None
    assert (row.difference.pairs, row.difference.mean) == (3, pytest.approx(0.25))


def test_other_seeds_are_no_pairs() -> None:
    runs = [run_of("a", strategy="a", seed=1), run_of("b", strategy="b", seed=2)]
    report = report_of(*runs)
    row = report.rows[1]
    assert row.difference is not None
    assert (row.difference.pairs, row.difference.mean) == (0, None)
    assert row.unmatched == "no two of them agree in seed"


def test_a_key_that_varies_in_one_group_only_is_named() -> None:
    runs = [
        run_of("a", strategy="a", client__mu=0.5), run_of("b1", strategy="b", client__mu=0.1),
        run_of("b2", strategy="b", client__mu=0.2),
    ]  # fmt: skip
    row = report_of(*runs, by=["strategy"]).rows[1]
    assert row.unmatched == "client.mu varies within one of the two only: add it to --by"


def test_one_pair_has_no_interval() -> None:
    report = report_of(run_of("a", 0.5, strategy="a"), run_of("b", 0.75, strategy="b"))
    difference = report.rows[1].difference
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == (0.25, None, None)
    assert report.rows[1].metric.deviation is None
    assert "A group of one run has no standard deviation." in notes(report)


GRID = [
    run_of(f"{strategy}{alpha}", strategy=strategy, task__alpha=alpha)
    for strategy in ("a", "b")
    for alpha in (0.1, 1.0)
]


@pytest.mark.parametrize(
    ("baseline", "against"),
    [
        ([], [None, ("a", "0.1"), ("a", "0.1"), ("a", "0.1")]),
        (["b"], [("b", "0.1"), ("b", "1.0"), None, None]),
        (["strategy=b"], [("b", "0.1"), ("b", "1.0"), None, None]),
        (["task.alpha=1"], [("a", "1.0"), None, ("b", "1.0"), None]),
        (["b", "1e-1"], [("b", "0.1"), ("b", "0.1"), None, ("b", "0.1")]),
    ],
)
def test_a_baseline_of_some_keys_is_the_group_that_agrees_in_the_others(
    baseline: list[str], against: list
) -> None:
    report = report_of(*GRID, by=["strategy", "task.alpha"], baseline=baseline)
    assert [row.baseline and row.baseline.labels for row in report.rows] == against


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "acuracy"}, "no run has this figure; did you mean accuracy? (there are accuracy)"),
        ({"by": ["task.alhpa"]}, "no run has this key; did you mean task.alpha? (runs differ in strategy, task.alpha)"),
        ({"baseline": ["c"]}, "no group is that (there are strategy=a, strategy=b, task.alpha=0.1, task.alpha=1.0)"),
        ({"baseline": ["a", "b"]}, ""),
        ({"baseline": ["strategy=c"]}, "no group is that"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_with_what_is(options: dict, said: str) -> None:
    if not said:  # the later of two values of one key counts
        assert report_of(*GRID, **options).rows[0].baseline is not None
        return
    with pytest.raises(ConfigError) as caught:
        report_of(*GRID, **options)
    assert said in str(caught.value)


def test_a_value_of_two_keys_must_say_which() -> None:
    runs = [run_of("a", x=1, y=2), run_of("b", x=2, y=1)]
    with pytest.raises(ConfigError, match="may be any of x, y: write KEY=1"):
        report_of(*runs, by=["x", "y"], baseline=["1"])


def test_rounds_to_a_target_count_the_runs_that_reach_it() -> None:
    runs = [run_of("a", 0.9, seed=1), run_of("b", 0.5, seed=2), run_of("c", 2.0, seed=3)]
    (row,) = report_of(*runs, target=0.9).rows
    assert row.rounds is not None
    assert (row.rounds.n, row.rounds.mean) == (2, 1.5)
    assert report_of(*runs).rows[0].rounds is None


def test_a_loss_is_reached_from_above(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.2, 0.6, 0.9])
    (row,) = analyse(collect(tmp_path), metric="loss", target=0.45).rows
    assert row.rounds is not None
    assert row.rounds.mean == 2


def test_runs_without_the_metric_are_left_out_by_name() -> None:
    runs = [run_of("a"), Run("b", run_of("b", seed=1).config, {"loss": 1.0}, [], 0, 0, 0.0)]
    report = report_of(*runs)
    assert [row.metric.n for row in report.rows] == [1]
    assert [(item.name, item.status) for item in report.collection.left_out] == [
        ("b", "unmeasured")
    ]


def test_numbers_are_the_same_whether_whole_or_not() -> None:
    assert canonical(1) == canonical(1.0) != canonical(True)
    assert canonical("1") != canonical(1)
    values = [None, "b", 2, True, "a", 10.0, False, -1]
    groups = grouped([run_of(str(value), x=value) for value in values], ["x"])
    assert [group.values[0] for group in groups] == [None, False, True, -1, 2, 10.0, "a", "b"]


settings = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from("ab"),
        "seed": st.integers(0, 3),
        "task__fold": st.integers(0, 1),
        "client__lr": st.sampled_from([0.1, 0.2]),
    }
)


@given(
    st.lists(
        settings,
        min_size=1,
        max_size=24,
        unique_by=lambda item: tuple(sorted(map(str, item.items()))),
    )
)
def test_every_run_is_in_one_group_and_in_one_pair_at_most(found: list[dict]) -> None:
    runs = [run_of(str(number), **config) for number, config in enumerate(found)]
    by = ["strategy"]
    groups = grouped(runs, by)
    assert sorted(run.name for group in groups for run in group.runs) == sorted(
        run.name for run in runs
    )
    for group in groups:
        for other in groups:
            pairs, why = matched(group, other, by)
            assert bool(pairs) != bool(why)
            for side in zip(*pairs, strict=True):
                assert len({run.name for run in side}) == len(pairs)
            for mine, theirs in pairs:
                assert all(mine.config[key] == theirs.config[key] for key in REPLICATES)
            back, _ = matched(other, group, by)
            assert sorted((b.name, a.name) for a, b in back) == sorted((a.name, b.name) for a, b in pairs)  # fmt: skip
        if len({run.config["client.lr"] for run in group.runs}) > 1:
            assert len(matched(group, group, by)[0]) == len(group.runs)


def test_a_baseline_is_never_a_value_that_is_none() -> None:
    runs = [
        run_of(f"{attack}{seed}", 0.5 + 0.1 * seed, attack=attack, seed=seed)
        for attack in (None, "Scaling")
        for seed in (1, 2)
    ]
    report = report_of(*runs, by=["attack"], baseline=["attack=Scaling"])
    none, scaling = report.rows
    assert none.baseline is scaling.group
    with pytest.raises(ConfigError, match="no group is that"):
        report_of(*runs, by=["attack"], baseline=["attack=Typo"])
    report = report_of(*runs, by=["strategy", "attack"], baseline=["fedavg"])
    assert report.rows[0].baseline is report.rows[0].group or report.rows[0].baseline is None


def test_an_interval_without_width_is_told_of_when_nothing_differs() -> None:
    runs = [
        run_of(f"{strategy}{seed}", 0.5 + 0.1 * seed, strategy=strategy, seed=seed)
        for strategy in ("a", "b")
        for seed in (1, 2, 3)
    ]
    assert any("no width" in note for note in notes(report_of(*runs)))


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("accuracy", False), ("loss", True), ("backdoor_success", True), ("label_flip_success", True)],
)
def test_an_attackers_success_is_nobody_elses(metric, lower):
    assert lower_is_better(metric) is lower
