"""`trellis doctor`: each check with a fault that is really there, and a node that has none."""

import json
import os
import resource
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clients.power import FilePower
from fl_app.assembly import Assembly
from fl_app.checks import machine
from fl_app.checks.device import Device, NodeConfigError, parsed
from fl_app.cli.main import main
from fl_app.compose import compose
from tests.fl_app.test_doctor_link import Authority, pem, serving

NOW = datetime.now(UTC)
SMALL = ["task=digits", "num_clients=4"]


# ---- the machine ----


def test_versions_are_held_against_what_was_tested(tmp_path):
    assert machine.versions().state in ("ok", "warning")
    other = tmp_path / "constraints.txt"
    other.write_text("flwr==1.2.3\nnumpy==0.1  # old\nabsent-package==1\n")
    found = machine.versions(other)
    assert found.state == "warning"
    assert "not 1.2.3" in found.said
    assert "absent" not in found.said
    assert machine.versions(tmp_path / "none.txt").state == "ok"


def test_leftovers_of_the_dead_are_found_and_of_the_living_are_not(tmp_path):
    (tmp_path / ".flwr" / f"run-{os.getpid()}-alive").mkdir(parents=True)
    assert machine.leftovers([tmp_path]).state == "ok"
    dead = tmp_path / ".flwr" / "run-999999999-dead"
    dead.mkdir()
    found = machine.leftovers([tmp_path])
    assert found.state == "warning"
    assert str(dead) in found.mend


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert machine.port(number).state == "warning"
    assert machine.port(number).state == "ok"


def test_few_open_files_are_told():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert machine.descriptors().state == "warning"
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert machine.descriptors().state == "failed"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_in_the_place_of_a_folder_is_no_go(tmp_path):
    (tmp_path / "file").write_text("")
    assert machine.disks({"state": tmp_path / "file" / "below"}).state == "failed"
    assert machine.disks({"state": tmp_path / "below"}).state in ("ok", "warning")


def test_memory_is_held_against_what_a_client_takes():
    assert machine.memory(1_000_000).state == "ok"
    short = machine.memory(10**15)
    assert short.state == "failed"
    assert "client.batch_size" in short.mend
    assert machine.memory(None).state == "ok"


def test_a_low_battery_is_told(tmp_path):
    file = tmp_path / "battery.json"
    states = {
        '{"percent": 5, "plugged": false}': "warning",
        '{"percent": 5, "plugged": true}': "ok",
    }
    for text, state in states.items():
        file.write_text(text)
        assert machine.battery(FilePower(file)).state == state
    file.write_text("{}")
    assert machine.battery(FilePower(file)).state == "failed"


# ---- node config and data ----


def device(text: str, *overrides: str, folder: Path) -> Device:
    config = compose([*SMALL, f"output_dir={folder}", *overrides])
    return Device(Assembly(config), parsed(text))


def test_a_node_config_is_read_as_flower_reads_it(tmp_path):
    assert parsed("partition-id=3 client-folder='/var/lib/a b'") == {
        "partition-id": 3,
        "client-folder": "/var/lib/a b",
    }
    for text in ("partition-id 3", "partition-id=three", "partition-id=3 and more"):
        with pytest.raises(NodeConfigError):
            parsed(text)
    good = device(f'partition-id=1 client-folder="{tmp_path}"', folder=tmp_path).config()
    assert good.state == "ok"


@pytest.mark.parametrize(
    ("text", "state", "hint"),
    [
        ("partition-id=0 secagg-rooster=3", "failed", "secagg-roster"),
        ("partition-id=0 partition-ids=4", "warning", "partition-id"),
        ("partition_id=0", "failed", "partition-id"),
        ("partition-id=9", "failed", "partition-id"),
        ('partition-id=0 client-folder="here"', "failed", "node config"),
        ('partition-id=0 encrypted-key="/nowhere/owner.key"', "failed", "trellis keys encrypted"),
        ("partition-id=0 dp-epsilon=1.0", "failed", "another run"),
        ("partition-id=0 ckks-least-quorum=3", "failed", "another run"),
    ],
)
def test_slips_and_runs_that_the_operator_forbids_are_told(tmp_path, text, state, hint):
    found = device(text, folder=tmp_path).config()
    assert found.state == state, found
    assert hint in found.mend


def test_a_nodes_own_part_is_looked_at(tmp_path):
    found = device("partition-id=3 num-partitions=4", folder=tmp_path).data()
    assert found.state == "ok"
    assert "its own part has" in found.said


# ---- the command ----


def test_a_node_without_fault_is_a_go(tmp_path, capsys):
    authority = Authority(tmp_path)
    key = tmp_path / "key"
    key.write_bytes(
        pem(ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH)
    )
    key.chmod(0o600)
    with serving(certificate=authority.server()) as address:
        code = main(
            [
                "doctor",
                "--superlink",
                address,
                "--ca",
                str(authority.file),
                "--key",
                str(key),
                "--node-config",
                f'partition-id=1 client-folder="{tmp_path}/state"',
                "--json",
                *SMALL,
                f"output_dir={tmp_path / 'runs'}",
            ]
        )
    told = json.loads(capsys.readouterr().out)
    assert code == 0, told
    assert told["go"] is True
    states = {one["name"]: one["state"] for one in told["checks"]}
    names = ("authority", "node key", "superlink", "tls", "health", "clock", "node config", "data")
    assert {states[name] for name in names} == {"ok"}
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "state").exists()


def test_one_fault_is_a_no_go_and_what_needs_it_is_skipped(tmp_path, capsys):
    authority = Authority(tmp_path, ends=timedelta(days=-1))
    with serving() as address:
        code = main(["doctor", "--superlink", address, "--ca", str(authority.file), *SMALL])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert lines[-1].startswith("no-go")
    assert any(line.startswith("failed") and "authority" in line for line in lines)
    assert any(line.startswith("skipped") and "clock" in line for line in lines)


@pytest.mark.slow
def test_flowers_own_superlink_is_a_go(tmp_path, capsys):
    from fl_app.flower.link import SuperLink

    with SuperLink(Path(__file__).resolve().parents[2], simulation=True) as link:
        code = main(["doctor", "--superlink", link.port.address, "--json", *SMALL])
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    assert code == 0, told
    assert told["health"]["state"] == "ok"
    assert told["clock"]["state"] == "ok"
