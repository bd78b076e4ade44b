"""docs/attacks.md as it stands: every command run to its end; and what attacks do to a run on real data."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from fl_app.assembly import Assembly, check, make_client
from fl_app.cli.main import main
from fl_app.compose import compose
from fl_app.config import catalogue
from fl_app.config.faults import ConfigError
from strategies.attacks.omniscient import z_max

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = (REPOSITORY / "docs" / "attacks.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^trellis run .*$", DOCUMENT, flags=re.MULTILINE)
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", DOCUMENT, flags=re.DOTALL))
SMALL = ["task=digits", "num_clients=8", "rounds=2", "runtime.workers=1"]


def trellis(capsys, *words: str) -> dict:
    """A run by the command line, in this process: its summary."""
    assert main(["run", *words]) == 0
    return json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: command.removeprefix("trellis run ")[:60]
)
def test_every_command_of_the_guide_runs(tmp_path, monkeypatch, capsys, command):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    summary = trellis(capsys, *shlex.split(command)[2:], *SMALL)
    assert summary["status"] == "completed"
    assert summary["rounds_completed"] == 2
    assert not summary["rejections"]
    assert all(
        row["clients_sampled"] == 8 and not row["clients_failed"] for row in summary["history"]
    )


def test_the_guide_names_every_attack_and_the_table_of_z_is_right():
    for name in catalogue.names("attack"):
        assert name == "none" or f"`{name}`" in DOCUMENT
    table = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \|$", DOCUMENT, flags=re.MULTILINE)
    assert len(table) == 5
    for clients, attackers, z in table:
        assert f"{z_max(int(clients), int(attackers)):.2f}".rstrip("0").rstrip(".") == z


BACKDOOR = ["attack=backdoor", "attack.target=7", "attack.boost=4"]
FLIP = ["attack=label_flip", "attack.source=1", "attack.target=7"]


@pytest.mark.parametrize(
    ("settings", "metric", "together"),
    [
        (BACKDOOR, "backdoor_success", "off"),
        (BACKDOOR, "backdoor_success", "4"),
        (FLIP, "label_flip_success", "4"),
    ],
)
def test_success_is_in_the_summary_the_console_and_the_report(
    tmp_path, capsys, settings, metric, together
):
    """Half of the clients attack: the model gives way, whichever way its clients are trained."""
    runs = tmp_path / "runs"
    chosen = [
        *SMALL,
        f"output_dir={runs}",
        "rounds=4",
        "evaluate.every=2",
        f"runtime.batch_clients={together}",
    ]
    assert main(["run", *chosen, *settings, "attack.fraction=0.6", "client.local_epochs=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(Path(lines[-1]).read_text())
    rates = [row.get(metric) for row in summary["history"]]
    assert rates[0] is rates[2] is None
    assert summary["final"][metric] == rates[3] > 0.5
    label = metric.removesuffix("_success")
    assert any(f"{label} {rates[3]:.4f}" in line for line in lines)
    assert main(["report", str(runs), "--metric", metric, "--by", "attack"]) == 0
    with (runs / "report" / "runs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row[metric]) == pytest.approx(rates[3])


def test_without_an_attack_there_is_nothing_to_succeed(tmp_path, capsys):
    final = trellis(capsys, *SMALL, f"output_dir={tmp_path}", "attack=label_flip")["final"]
    assert not any("success" in name for name in final)


def test_only_attackers_train_on_poisoned_examples():
    assembly = Assembly(compose([*SMALL, "attack=label_flip", "attack.fraction=0.4"]))
    client, data = make_client(assembly, "engine"), assembly.data(8)
    attackers = assembly.attack.attackers(8, 0)
    assert len(attackers) == 3
    for number in range(8):
        honest, given = data.train(number), client._examples(data, number)
        expected = 9 - honest.targets if number in attackers else honest.targets
        assert given.targets.equal(expected)
    unattacked = make_client(assembly, "simulation")
    for number in attackers:
        assert unattacked._examples(data, number) is data.train(number)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["task=csv", "task.path=rows.csv", "task.target=kind", "attack=backdoor"],
            "a trigger needs images",
        ),
        (
            ["task=digits", "attack=backdoor", "attack.target=10"],
            "target=10: the classes of Digits are 0 to 9",
        ),
        (["task=digits", "attack=backdoor", "attack.size=9"], "8 × 8, choose less"),
        (["task=digits", "attack=label_flip", "attack.source=1"], "source and target go together"),
    ],
)
def test_what_a_task_cannot_bear_is_refused_before_the_run(
    tmp_path, monkeypatch, capsys, overrides, reason
):
    monkeypatch.chdir(tmp_path)
    lines = ["x,y,kind", *(f"{i},{i % 7},{'ab'[i % 2]}" for i in range(40))]
    Path("rows.csv").write_text("\n".join(lines))
    assert main(["run", *overrides, f"output_dir={tmp_path}"]) == 2
    captured = capsys.readouterr()
    assert "configuration refused" in captured.err + captured.out
    assert reason in captured.err + captured.out


@pytest.mark.parametrize("attack", [name for name in catalogue.names("attack") if name != "none"])
def test_every_attack_is_refused_on_flower(attack):
    with pytest.raises(ConfigError, match="attacks run on the engine only"):
        check(compose(["task=digits", f"attack={attack}", "backend=flower"]))
