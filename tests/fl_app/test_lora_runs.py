"""Adapters as a user runs them: ranks by device, groups of tasks, rules over products; resumed, refused."""

from __future__ import annotations

from itertools import chain

import pytest

from clients.lora.profile import memory_of
from fl_app.assembly import Assembly
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.portions import clients_profile
from tests.fl_app.test_run import assert_same_model, run
from tests.support.split import save_tiny


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    folder = save_tiny(tmp_path_factory.mktemp("lora") / "bert", "bert")
    return [
        "task=docstrings",
        "task.packages=[flwr,sklearn]",
        "task.max_per_package=15",
        "task.max_length=12",
        f"model.pretrained={folder}",
        "model.rank=4",
        "model.targets=[query,value]",
        "client.batch_size=8",
    ]


WHOLE = ["model=lora", "client=adamw", "num_clients=4"]
RANKS = ["ranks=devices", "ranks.choices=[2,4]"]


def budgets(small: list[str]) -> str:
    """One that half of the adapters' layers fit into at rank 2, and one for all at the model's rank, in MB."""
    assembly = Assembly(compose([*small, *WHOLE, "combiner=lora_mean"]))
    profile = clients_profile(assembly.module(), assembly.task, 8)
    some = dict.fromkeys(list(profile.layers)[len(profile.layers) // 2 :], 2)
    return f"ranks.budgets_mb=[{memory_of(profile, some) / 1e6 + 1e-4},100]"


@pytest.mark.parametrize(
    "rule",
    ["lora_svd"]
    + [
        pytest.param(rule, marks=pytest.mark.slow)
        for rule in ("lora_mean", "lora_partitioned", "lora_zero_pad")
    ],
)
def test_clients_of_unequal_ranks_make_one_model_and_a_restart_changes_nothing(
    tmp_path, small, rule
):
    chosen = [*small, *WHOLE, *RANKS, f"combiner={rule}", budgets(small)]
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=3")
    run(tmp_path / "parts", *chosen, "rounds=1")
    parts, _, _ = run(tmp_path / "parts", *chosen, "rounds=3", "runtime.workers=2")
    assert_same_model(whole, parts)
    text = (whole.summary_path.parent / "run.log").read_text()
    _, _, table = text.partition("ranks (rounds 1 to 1; batches of 8 x 12)")
    few, many = (line.split(": ")[1].split() for line in table.splitlines()[1:3])
    assert 0 < sum(map(int, few)) < sum(map(int, many)) == 4 * len(many)
    train = summary["history"][-1]["train"]
    assert train.keys() & {"lora_error", "lora_cross_term"}
    assert summary["rejections"] == {}


def test_two_tasks_have_a_head_each_and_their_groups_are_told(tmp_path, small):
    chosen = [*small, *WHOLE, "num_clients=6", "combiner=lora_mean", "task.goals=[package,kind]"]
    _, summary, _ = run(
        tmp_path, *chosen, "clusters=lora_b", "clusters.rounds=2", "rounds=3", "clusters.warmup=0"
    )
    assert summary["final"].keys() >= {"accuracy", "accuracy_package", "accuracy_kind"}
    told = summary["task_groups"]
    assert told["rounds"] == {str(client): 2 for client in range(6)}
    assert sorted(chain.from_iterable(told["groups"])) == list(range(6))
    assert 0 <= told["p_value"] <= 1
    assert summary["rejections"] == {}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=multi_krum"], "share_a"),
        (["combiner=mean", *RANKS, "ranks.budgets_mb=[100]"], "combiner=lora_mean"),
        (["combiner=lora_svd", "server=adam"], "server=sgd"),
        (["strategy=secure", "combiner=lora_svd"], "collector=plain"),
        (["strategy=secure", "task.goals=[package,kind]", "combiner=lora_mean"], "collector=plain"),
    ],
    ids=["distances of factors", "diluted", "another step", "products of sums", "parts in a sum"],
)
def test_what_adapters_cannot_bear_is_refused_with_the_mend(tmp_path, small, overrides, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, *small, *WHOLE, "num_clients=10", *overrides, "rounds=1")


def test_a_budget_below_the_model_is_refused_by_name(tmp_path, small):
    with pytest.raises(ConfigError, match=r"ranks = devices .* budget is 1\.0 MB"):
        run(tmp_path, *small, *WHOLE, *RANKS, "combiner=lora_mean", "ranks.budgets_mb=[1]")


def test_a_residual_travels_down_and_not_back(tmp_path, small):
    chosen = [*small, *WHOLE, "rounds=2", "evaluate.every=2"]
    _, plain, _ = run(tmp_path / "plain", *chosen, "combiner=lora_mean")
    _, exact, _ = run(tmp_path / "exact", *chosen, "combiner=lora_fedex", "model.residual_rank=16")
    first, second = exact["history"]
    assert first["upload_bytes"] == pytest.approx(plain["history"][0]["upload_bytes"], rel=0.05)
    assert first["download_bytes"] > 2 * plain["history"][0]["download_bytes"]
    assert second["train"]["lora_error"] < 1e-5


def test_a_model_with_one_head_has_all_goals_and_every_client_all_of_it(tmp_path):
    chosen = ["task=docstrings", "task.packages=[flwr,sklearn]", "task.max_per_package=15"]
    goals = ["task.goals=[package,kind]", "model=gru", "num_clients=4", "rounds=1"]
    _, summary, _ = run(tmp_path, *chosen, *goals)
    assert summary["final"].keys() >= {"accuracy_package", "accuracy_kind"}
    assert summary["rejections"] == {}
