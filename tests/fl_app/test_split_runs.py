"""Split training as a user runs it, with a tiny model: resumed, with drop-outs, and what is refused."""

from __future__ import annotations

import pytest

from fl_app.assembly import Assembly, make_strategy
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from strategies.contract import ContractError
from tests.fl_app.test_own_tasks import DOCSTRINGS
from tests.fl_app.test_run import assert_same_model, rows, run
from tests.support.split import save_tiny

SPLIT = [
    *DOCSTRINGS, "strategy=split_lora", "task.partition=iid", "task.max_length=12", "client.batch_size=16",
    "num_clients=3",
]  # fmt: skip


@pytest.fixture
def chosen(tmp_path):
    folder = save_tiny(tmp_path / "bert", blocks=2)
    return [*SPLIT, f"model.pretrained={folder}", "model.split_point=1"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_round_and_one_more_are_two_bit_for_bit_whatever_the_workers(tmp_path, chosen, variant):
    chosen = [*chosen, f"collector.variant={variant}"]
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=2")
    run(tmp_path / "parts", *chosen, "rounds=1")
    more = ["rounds=2", *(["runtime.workers=2"] if variant == "v1" else [])]
    parts, resumed, _ = run(tmp_path / "parts", *chosen, *more)
    assert_same_model(whole, parts)
    assert [row["loss"] for row in rows(summary)] == [row["loss"] for row in rows(resumed)]
    assert (summary["status"], summary["rejections"]) == ("completed", {})
    assert set(summary["history"][-1]["train"]) >= {
        "train_loss",
        "activation_error",
        "gradient_error",
    }


def test_drop_outs_are_borne(tmp_path, chosen):
    result, summary, _ = run(
        tmp_path / "runs", *chosen, "num_clients=4", "rounds=2", "runtime.dropout=0.3",
        "admission.on_shortfall=skip", "collector.batches_per_exchange=4",
    )  # fmt: skip
    assert result.status == "completed"
    assert any(row["clients_failed"] for row in summary["history"])
    assert all(row["loss"] > 0 for row in summary["history"])


@pytest.mark.parametrize("others", ["client=sgd", "model=cnn", "collector=plain"])
def test_halves_go_together(chosen, others):
    chosen = [one for one in chosen if not one.startswith(f"{others.split('=')[0]}.")]
    with pytest.raises(ConfigError, match="strategy=split_lora"):
        assert not Assembly(compose([*chosen, others])).split


def test_figures_of_the_clients_own_examples_are_refused(chosen):
    assembly = Assembly(compose([*chosen, "evaluate.federated_every=1"]))
    with pytest.raises(ContractError, match="federated_every=0"):
        make_strategy(assembly, 3).pipeline.check()
