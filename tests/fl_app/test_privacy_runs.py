"""Private runs as a user starts them: what they promise, what they spend, where they stop, and what is refused."""

import json
import re

import numpy as np
import pytest
from torch import nn

from fl_app.cli.main import main
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.services.checkpoint import read
from strategies.privacy.accountants import make_accountant
from strategies.privacy.events import GaussianRelease
from tests.fl_app.test_run import (
    SMALL,
    assert_same_model,
    model_of,
    read_until_round,
    rows,
    run,
    trellis,
)

DP = ["strategy=dp", "num_clients=20"]
STOPS = [*DP, "privacy.noise_multiplier=2", "privacy.target_epsilon=3", "rounds=50"]


def ledger_of(result) -> list[dict]:
    lines = (result.summary_path.parent / "privacy" / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def epsilon_of(rounds: int, z: float, rate: float = 0.5, delta: float = 1e-5) -> float:
    account = make_accountant("pld", "add_or_remove_one")
    account.step(GaussianRelease(z, rate, "poisson"), rounds)
    return account.epsilon(delta)


# ---- what a run promises ----


def test_a_planned_run_uses_its_budget_up_and_says_so(tmp_path):
    result, summary, lines = run(tmp_path, *DP, "rounds=4", "privacy.target_epsilon=6")
    assert (summary["status"], result.exit_code) == ("completed", 0)
    privacy = summary["privacy"]
    assert set(privacy) == {
        "unit", "epsilon", "delta", "accountant", "adjacency", "protects", "mechanism", "noise_multiplier",
        "target_epsilon", "sampling", "releases",
    }  # fmt: skip
    assert (privacy["unit"], privacy["adjacency"]) == ("client", "add_or_remove_one")
    assert (privacy["accountant"], privacy["delta"]) == ("pld", 1e-5)
    assert (privacy["mechanism"], privacy["releases"]) == ("gaussian", 4)
    assert privacy["sampling"] == "poisson sampling, rate 0.5"
    assert 0.95 * 6 <= privacy["epsilon"] <= 6
    spent = [row["epsilon"] for row in summary["history"]]
    expected = [epsilon_of(count, privacy["noise_multiplier"]) for count in range(1, 5)]
    assert spent == pytest.approx(expected)
    assert spent[-1] == privacy["epsilon"]
    assert [line["round"] for line in ledger_of(result)] == [1, 2, 3, 4]
    assert any(f"z = {privacy['noise_multiplier']:.4g}" in line for line in lines)
    assert not any("train" in row for row in summary["history"])


@pytest.mark.parametrize(
    ("chosen", "unit", "adjacency", "mechanism"),
    [
        (
            ["strategy=dp_ftrl", "num_clients=20", "sampler.separation=2", "sampler.fraction=0.5"],
            "client", "zero_out", "banded matrix factorisation",
        ),
        (["strategy=dp_local", "num_clients=5"], "client update", "replace_one", "local gaussian"),
        (["strategy=dp_local", "num_clients=5", "combiner=median"], "client update", "replace_one", "local gaussian"),
        (["strategy=dp_distributed", "num_clients=6"], "client", "replace_one", "distributed noise"),
        (
            ["strategy=dp_distributed", "num_clients=6", "privacy.noise=skellam", "clip=adaptive", "sampler=poisson",
             "sampler.fraction=1"],
            "client", "zero_out", "distributed noise",
        ),
        ([*DP, "clip=adaptive"], "client", "add_or_remove_one", "gaussian"),
        ([*DP, "sampler=uniform", "privacy.accountant=rdp"], "client", "replace_one", "gaussian"),
        (
            [*DP, "collector=masked", "collector.max_weight=null", "collector.metrics=[]"],
            "client", "zero_out", "gaussian",
        ),
    ],
    ids=["ftrl", "local", "local, median", "distributed", "skellam, adaptive", "adaptive", "fixed", "masked"],
)  # fmt: skip
def test_each_way_of_adding_noise_runs_and_keeps_to_its_budget(
    tmp_path, chosen, unit, adjacency, mechanism
):
    result, summary, _ = run(tmp_path, *chosen, "rounds=3", "privacy.target_epsilon=20")
    assert (summary["status"], summary["rounds_completed"]) == ("completed", 3)
    privacy = summary["privacy"]
    assert (privacy["unit"], privacy["adjacency"]) == (unit, adjacency)
    assert privacy["mechanism"] == mechanism
    assert 0.95 * 20 <= privacy["epsilon"] <= 20
    spent = [row["epsilon"] for row in summary["history"]]
    assert spent == sorted(spent)
    assert 0 < spent[0] < spent[-1] == privacy["epsilon"]
    assert len(ledger_of(result)) == privacy["releases"]
    assert summary["rejections"] == {}
    assert all(np.isfinite(array).all() for array in model_of(result).values())
    if mechanism == "distributed noise":
        assert 0 < privacy["epsilon_models"] <= privacy["epsilon"]


def test_little_noise_on_many_clients_still_learns(tmp_path):
    chosen = ["num_clients=100", "privacy.noise_multiplier=0.5", "privacy.target_epsilon=null"]
    _, summary, _ = run(tmp_path, "strategy=dp", *chosen, "rounds=15", "server.lr=4")
    assert summary["final"]["accuracy"] > 0.5


def test_clients_that_protect_their_own_examples_tell_the_largest_epsilon_of_them(tmp_path):
    result, summary, _ = run(tmp_path, "client=dp_sgd", "rounds=2", "client.target_epsilon=6")
    privacy = summary["privacy"]
    assert (privacy["unit"], privacy["mechanism"]) == ("example", "dp-sgd")
    assert (privacy["clients"], privacy["target_epsilon"]) == (4, 6)
    assert 0.9 * 6 <= privacy["epsilon"] <= 6
    spent = [row["epsilon"] for row in summary["history"]]
    assert 0 < spent[0] < spent[1] == privacy["epsilon"]
    assert not any("train" in row for row in summary["history"])
    assert not (result.summary_path.parent / "privacy").exists()


def test_sums_hide_what_clients_have_spent_and_the_budget_is_told_instead(tmp_path):
    masks = ["collector=masked", "collector.max_weight=null", "collector.metrics=[]"]
    chosen = ["client=dp_sgd", "client.target_epsilon=6", *masks]
    _, summary, _ = run(tmp_path, *chosen, "rounds=1")
    assert summary["privacy"]["epsilon"] == summary["history"][0]["epsilon"] == 6


def test_noise_that_repeats_gives_the_same_model_and_promises_nothing(tmp_path):
    chosen = [*DP, "privacy.reproducible_noise=true", "rounds=2"]
    one, summary, _ = run(tmp_path / "one", *chosen)
    two, other, _ = run(tmp_path / "two", *chosen, "runtime.workers=2")
    assert_same_model(one, two)
    assert rows(summary) == rows(other)
    assert summary["privacy"] is None
    assert [row["epsilon"] for row in summary["history"]] == [None, None]
    three, _, _ = run(tmp_path / "three", *DP, "rounds=2")
    four, _, _ = run(tmp_path / "four", *DP, "rounds=2")
    first, second = model_of(three), model_of(four)
    assert not any(np.array_equal(first[name], second[name]) for name in first)


# ---- where it stops ----


def test_a_run_stops_before_its_budget_is_passed_and_keeps_the_last_model_that_was_paid_for(
    tmp_path,
):
    result, summary, _ = run(tmp_path, *STOPS)
    assert (result.status, result.exit_code) == ("stopped", 3)
    assert (summary["status"], summary["reason"]) == ("stopped", "privacy budget")
    done = summary["rounds_completed"]
    assert 0 < done < 50
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon_of(done, 2.0))
    assert summary["privacy"]["epsilon"] <= 3
    assert epsilon_of(done + 1, 2.0) > 3
    assert len(ledger_of(result)) == done
    newest = sorted((result.summary_path.parent / "checkpoints").iterdir())[-1]
    last = read(newest)["strategy"]["model"]
    assert last["version"] == done
    whole = np.concatenate([array.ravel() for array in model_of(result).values()])
    np.testing.assert_allclose(np.sort(whole), np.sort(np.float32(last["vectors"]["delta"])))

    before = {path: path.read_bytes() for path in result.summary_path.parent.rglob("ledger.jsonl")}
    model = model_of(result)
    again, other, _ = run(tmp_path, *STOPS)
    assert (again.exit_code, other["reason"]) == (3, "privacy budget")
    assert other["privacy"] == summary["privacy"]
    assert rows(other) == rows(summary)
    assert before == {path: path.read_bytes() for path in before}
    for name, array in model_of(again).items():
        np.testing.assert_array_equal(array, model[name])


def test_a_budget_that_no_round_fits_into_stops_before_the_first(tmp_path):
    result, summary, _ = run(
        tmp_path, *DP, "privacy.noise_multiplier=0.3", "privacy.target_epsilon=1"
    )
    assert (result.exit_code, summary["reason"]) == (3, "privacy budget")
    assert summary["rounds_completed"] == 0
    assert summary["privacy"]["epsilon"] == 0.0
    assert not (result.summary_path.parent / "privacy" / "ledger.jsonl").exists()


def test_a_run_whose_clients_took_part_as_often_as_they_may_stops(tmp_path):
    apart = ["sampler.separation=2", "sampler.participations=2", "sampler.fraction=0.5"]
    chosen = ["strategy=dp_ftrl", "num_clients=6", *apart]
    result, summary, _ = run(tmp_path, *chosen, "rounds=9")
    assert (result.exit_code, summary["reason"]) == (3, "participation limit")
    assert summary["rounds_completed"] == 4


# ---- what lasts ----


def test_a_killed_run_pays_again_for_what_it_runs_again(tmp_path):
    command = [*DP, "privacy.noise_multiplier=2", "privacy.target_epsilon=null"]
    process = trellis("run", *SMALL, f"output_dir={tmp_path}", *command, "rounds=100000")
    read_until_round(process, 2)
    process.kill()
    process.communicate(timeout=60)
    (path,) = tmp_path.glob("*/summary.json")
    reached = json.loads(path.read_text())["rounds_completed"]
    charged = len((path.parent / "privacy" / "ledger.jsonl").read_bytes().splitlines()) - 1
    assert charged >= reached
    result, summary, _ = run(tmp_path, *command, f"rounds={reached + 2}")
    assert summary["status"] == "completed"
    charges = ledger_of(result)
    assert len(charges) == summary["privacy"]["releases"] >= charged + 2 - (charged - reached)
    assert len(charges) >= summary["rounds_completed"] == reached + 2
    assert {line["round"] for line in charges} == set(range(1, reached + 3))
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon_of(len(charges), 2.0))


def test_a_charge_that_no_checkpoint_knows_of_counts(tmp_path):
    """As a process leaves it that is killed within a round: paid for, and nothing has come of it."""
    command = [*DP, "privacy.noise_multiplier=2", "privacy.target_epsilon=null"]
    first, _, _ = run(tmp_path, *command, "rounds=2")
    ledger = first.summary_path.parent / "privacy" / "ledger.jsonl"
    last = ledger.read_text().splitlines()[-1]
    with ledger.open("a") as file:
        file.write(last.replace('"round": 2', '"round": 3') + "\n")
    again, summary, _ = run(tmp_path, *command, "rounds=3")
    assert [line["round"] for line in ledger_of(again)] == [1, 2, 3, 3]
    assert summary["privacy"]["releases"] == 4
    assert summary["history"][-1]["epsilon"] == pytest.approx(epsilon_of(4, 2.0))


def bound_of(result) -> float:
    newest = sorted((result.summary_path.parent / "checkpoints").iterdir())[-1]
    return read(newest)["strategy"]["pipeline"]["stage clip"]["present"]


def test_an_adaptive_bound_goes_on_where_it_was(tmp_path):
    """All 40 clients are far beyond 0.01: it grows by exp(1/2) a round, less or more noise of exp(1/20)."""
    chosen = [*DP[:1], "num_clients=40", "sampler.fraction=1", "privacy.noise_multiplier=0.5"]
    chosen += ["privacy.target_epsilon=null", "clip=adaptive", "clip.norm=0.01", "clip.lr=1"]
    first, _, _ = run(tmp_path, *chosen, "rounds=2")
    early = bound_of(first)
    second, _, _ = run(tmp_path, *chosen, "rounds=3")
    assert early == pytest.approx(0.01 * np.exp(2 / 2), rel=0.6)
    assert np.exp(0.2) < bound_of(second) / early < np.exp(0.8)


def test_anothers_account_in_the_folder_is_refused_and_none_is_begun_beside_it(tmp_path):
    first, _, _ = run(tmp_path, *DP, "rounds=1", "privacy.noise_multiplier=2")
    folder = first.summary_path.parent
    ledger = folder / "privacy" / "ledger.jsonl"
    theirs = ledger.read_text().replace("gaussian, unit client", "lottery, unit client")
    ledger.write_text(theirs)
    before = first.summary_path.read_bytes()
    with pytest.raises(ConfigError, match=r"its mechanism is 'lottery.*another run_name"):
        run(tmp_path, *DP, "rounds=2", "privacy.noise_multiplier=2")
    assert ledger.read_text() == theirs
    assert first.summary_path.read_bytes() == before
    for path in (folder / "checkpoints").iterdir():  # nor is it overlooked where there is none
        path.unlink()
    with pytest.raises(ConfigError, match=r"its mechanism is 'lottery.*another run_name"):
        run(tmp_path, *DP, "rounds=2", "privacy.noise_multiplier=2")
    assert ledger.read_text() == theirs


def test_another_mechanism_in_a_runs_folder_is_another_run(tmp_path):
    run(tmp_path, *DP, "rounds=1", "run_name=mine")
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        run(tmp_path, "strategy=dp_local", "num_clients=20", "rounds=1", "run_name=mine")


def test_starting_anew_forgets_what_was_spent(tmp_path):
    run(tmp_path, *DP, "rounds=2", "privacy.noise_multiplier=2")
    again, summary, _ = run(tmp_path, *DP, "rounds=1", "privacy.noise_multiplier=2", "resume=never")
    assert summary["privacy"]["releases"] == len(ledger_of(again)) == 1


@pytest.mark.parametrize(
    ("chosen", "planned"),
    [
        (["privacy.target_epsilon=3"], True),
        (["privacy.noise_multiplier=2"], False),
        (["privacy.noise_multiplier=2", "privacy.target_epsilon=null"], False),
    ],
    ids=["planned", "noise and budget", "noise"],
)
def test_rounds_are_a_part_of_the_run_where_noise_is_found_for_them(chosen, planned):
    hashes = {compose([*SMALL, *DP, *chosen, f"rounds={n}"]).identity_hash() for n in (5, 6)}
    assert (len(hashes) == 2) is planned
    plain = {compose([*SMALL, f"rounds={n}"]).identity_hash() for n in (5, 6)}
    assert len(plain) == 1


# ---- what is refused ----


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
        (["strategy=krum", "privacy=central"], "one client can move the combined vector"),
        (
            ["strategy=secure", "privacy=central", "collector.max_weight=null"],
            "would be seen without noise; set collector.metrics=[]",
        ),
        (["strategy=dp", "collector=plain"], "use collector=bare"),
        (["strategy=dp", "clip=none"], "clip every section (clip=fixed)"),
        (["strategy=dp", "combiner=uniform_mean"], "use combiner=cohort_mean"),
        (["strategy=dp", "quarantine=strikes"], "use quarantine=none under a central ε"),
        (["strategy=dp", "admission.quorum=3"], "set admission.quorum=1"),
        (["strategy=dp", "evaluate.federated_every=1"], "set evaluate.federated_every=0"),
        (["strategy=dp_local", "evaluate.federated_every=1"], "set evaluate.federated_every=0"),
        (
            ["strategy=dp", f"model._target_={__name__}.Normed"],
            "use GroupNorm instead of BatchNorm",
        ),
        (["strategy=dp_local", f"model._target_={__name__}.Normed"], "use GroupNorm"),
        (["strategy=dp", "server=scaffold"], "client=scaffold"),
        (["strategy=dp", "privacy.target_epsilon=null"], "set target_epsilon"),
        (["strategy=dp", "privacy.target_epsilon=0"], "privacy.target_epsilon"),
        (["strategy=dp", "privacy.target_epsilonn=1"], "did you mean privacy.target_epsilon?"),
        (["strategy=dp", "privacy.ledger=elsewhere"], "privacy.ledger"),
        (["strategy=dp_ftrl", "sampler=poisson"], "use sampler=spaced"),
        (["strategy=dp_ftrl", "clip=adaptive", "num_clients=100"], "a moving bound forbids"),
        (["strategy=dp_local", "clip=adaptive"], "says nothing; use clip=fixed"),
        (["strategy=dp_distributed", "collector=masked"], "set collector.max_weight=null"),
        (["strategy=dp_distributed", "collector=bare"], "use collector=masked, or privacy=local"),
        (["strategy=dp_distributed", "privacy.accountant=pld"], "privacy.accountant"),
        (["collector=masked_whole", "combiner=uniform_mean"], "use collector=masked"),
        (["client=dp_sgd", "collector=plain"], "use collector=bare"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:40],
)
def test_what_no_noise_hides_is_refused_before_anything_runs(tmp_path, capsys, chosen, said):
    clients = [] if any("num_clients" in one for one in chosen) else ["num_clients=20"]
    code = main(["run", "task=digits", *clients, *chosen, f"output_dir={tmp_path}"])
    assert code == 2
    # The terminal breaks lines where it likes.
    told = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert said in told
    assert not list(tmp_path.rglob("summary.json"))


def test_beginning_anew_keeps_what_was_spent_on_record_and_says_so(tmp_path):
    noise = ["rounds=2", "privacy.noise_multiplier=2", "privacy.target_epsilon=null"]
    first, summary, _ = run(tmp_path, *DP, *noise)
    folder = first.summary_path.parent
    spent = (folder / "privacy" / "ledger.jsonl").read_text()
    _, again, lines = run(tmp_path, *DP, *noise, "resume=never")
    assert (folder / "spent-1" / "ledger.jsonl").read_text() == spent
    assert again["privacy"]["releases"] == 2
    told = f"ε = {summary['privacy']['epsilon']:.4g} was spent here before on the same clients"
    assert any(told in line for line in lines)


def test_two_promises_in_one_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="choose one of them"):
        run(tmp_path, *DP, "client=dp_sgd")
