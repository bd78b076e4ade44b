"""`runtime.batch_clients`: who is trained at once, said with the reason, and equal to one by one."""

import io
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from clients.models import Linear, Mlp
from clients.tasks import Digits
from clients.trainers import SGD
from fl_app.assembly import Assembly, count_workers
from fl_app.batching import AUTO, plan_batching
from fl_app.cli.console import PlainConsole
from fl_app.cli.main import main
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.run import run_engine

MANY = ["task=digits", "num_clients=100", "rounds=2", "task.alpha=10.0"]


def run(folder, *overrides):
    lines = io.StringIO()
    result = run_engine(compose([*MANY, f"output_dir={folder}", *overrides]), PlainConsole(lines))
    assert result.status == "completed"
    return load_file(result.summary_path.parent / "model.safetensors"), lines.getvalue(), result


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_the_number_of_workers_does_not_show_in_a_batched_run(tmp_path, strategy):
    models = [
        run(tmp_path / str(workers), f"strategy={strategy}", f"runtime.workers={workers}")[0]
        for workers in (1, 2, 3)
    ]
    for other in models[1:]:
        assert all(np.array_equal(models[0][name], other[name]) for name in models[0])


def test_batched_and_one_by_one_agree_up_to_rounding(tmp_path):
    together, told, result = run(tmp_path / "auto", "runtime.workers=1")
    alone, told_alone, _ = run(tmp_path / "off", "runtime.workers=1", "runtime.batch_clients=off")
    for name, tensor in together.items():
        np.testing.assert_allclose(tensor, alone[name], rtol=0, atol=1e-5)
    assert "up to 64 at once: small steps gain from it" in told
    assert "one by one: runtime.batch_clients=off" in told_alone
    log = (result.summary_path.parent / "run.log").read_text()
    assert "clients are trained up to 64 at once" in log


def test_a_model_that_can_not_be_stacked_is_trained_one_by_one_and_the_log_says_why(tmp_path):
    overrides = ["model._target_=tests.support.models.Dropped", "runtime.batch_clients=20"]
    _, told, result = run(tmp_path, "rounds=1", *overrides)
    why = "one by one: the model draws random numbers as it trains (dropout)"
    assert why in told
    assert why in (result.summary_path.parent / "run.log").read_text()
    assert json.loads(result.summary_path.read_text())["history"][0]["clients_failed"] == 0


@pytest.mark.parametrize(
    ("setting", "size", "why"),
    [
        ("off", 1, "runtime.batch_clients=off"),
        (1, 1, "runtime.batch_clients=1"),
        ("auto", AUTO, "small steps gain from it"),
        (7, 7, "runtime.batch_clients=7"),
    ],
)
def test_the_plan_says_how_many_and_why(setting, size, why):
    torch.manual_seed(0)
    plan = plan_batching(setting, SGD(), Mlp((1, 8, 8), 10), Digits())
    assert (plan.size, plan.why) == (size, why)


def test_a_number_is_obeyed_where_auto_would_not():
    large = Mlp((1, 8, 8), 10, hidden=(2_000,))
    assert plan_batching("auto", SGD(), large, Digits()).size == 1
    assert plan_batching(5, SGD(), large, Digits()).size == 5


def test_a_trainer_of_ones_own_is_left_alone():
    class Own:
        def fit(self, jobs, model, task):
            return []

    plan = plan_batching("auto", Own(), Linear((1, 8, 8), 10), Digits())
    assert str(plan) == "one by one: Own is not built on clients.trainers.SGD"


@pytest.mark.parametrize("value", ["0", "-3", "sometimes", "1.5"])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match=r"runtime\.batch_clients"):
        compose([f"runtime.batch_clients={value}"])


def test_the_command_line_takes_off_as_a_word(capsys):
    assert main(["run", "runtime.batch_clients=off", "--dry-run"]) == 0
    assert "batch_clients: 'off'" in capsys.readouterr().out


def test_auto_starts_no_more_workers_than_there_are_stacks_in_a_round(monkeypatch):
    monkeypatch.setattr(
        "fl_app.assembly.engine.resolve_workers", lambda asked: 4 if asked == "auto" else asked
    )

    def workers(*overrides):
        config = compose(["task=digits", *overrides])
        return count_workers(Assembly(config), config.num_clients)

    assert workers("num_clients=64") == 1
    assert workers("num_clients=65") == 2
    assert workers("num_clients=640") == 4
    assert workers("num_clients=640", "sampler.fraction=0.1") == 1
    assert workers("num_clients=64", "runtime.workers=3") == 3
    assert workers("num_clients=64", "runtime.batch_clients=off") == 4
