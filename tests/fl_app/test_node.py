"""A device whose server is a stranger: its node config decides who it is and what it sends, whatever the run says."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.client import NUM_CLIENTS
from clients.power import FilePower, SystemPower
from fl_app.assembly import Assembly, make_client, make_client_half
from fl_app.cli.main import main
from fl_app.client_app import evaluate, hello, train
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.engine.flwr_internals import claim_identity
from fl_app.node import Node
from strategies.ckks import SharedKey
from strategies.collectors import Masked, PlainClient
from strategies.profiles import DEVICE, VOCABULARY
from strategies.protocols import ClientOwn
from strategies.wire import ARRAYS, CONFIG, TRAINS

CLEAR = ["strategy=fedavg"]
MASKED = ["strategy=secure"]
MALICIOUS = [*MASKED, "collector.malicious=true"]
CKKS = ["strategy=ckks_mean"]
RUNS = {"plain": CLEAR, "masked": MASKED, "malicious": MALICIOUS, "ckks": CKKS}


class Pretender(Masked):
    """Is called masked, and its half sends updates in clear."""

    def client_half(self, own: ClientOwn) -> Any:
        return PlainClient()


@pytest.fixture(autouse=True)
def _identity() -> None:
    claim_identity(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What operators hand out: a roster, identities and a shared key."""
    folder = tmp_path_factory.mktemp("keys")
    assert main(["keys", "identities", str(folder), "--clients", "5"]) == 0
    SharedKey.generate().save(folder / "shared.key")
    return folder


@pytest.fixture
def assembled(tmp_path: Path):
    def assemble(*overrides: str) -> Assembly:
        return Assembly(compose(["task=digits", f"output_dir={tmp_path}/run", *overrides]))

    return assemble


def pinned(files: Path) -> dict[str, Any]:
    return {
        "partition-id": 3,
        "secagg-roster": f"{files}/roster.json",
        "secagg-identity": f"{files}/client-3.pem",
    }


def keyed(files: Path) -> dict[str, Any]:
    return {"partition-id": 3, "ckks-key": f"{files}/shared.key"}


def own(files: Path, run: str) -> dict[str, Any]:
    """A node config that goes with a run."""
    found = {"malicious": pinned, "ckks": keyed}.get(run)
    return {"partition-id": 3} if found is None else found(files)


def request(assembly: Assembly, kind: str, client: int, **config: Any) -> Message:
    told = {"client": client, "server-round": 1, "version": 0, "included": 0, NUM_CLIENTS: 5}
    content = {ARRAYS: assembly.network.arrays(), CONFIG: ConfigRecord({**told, **config})}
    return Message(RecordDict(content), 1, kind)


@pytest.mark.parametrize("run", ["plain", "masked", "ckks"])
def test_a_pinned_roster_takes_part_in_the_malicious_mode_only(assembled, files, run):
    both = pinned(files) | keyed(files)
    with pytest.raises(ConfigError, match=r"collector\.malicious=true") as caught:
        make_client(assembled(*RUNS[run]), "device", both)
    assert "secagg-roster" in str(caught.value)
    make_client(assembled(*MALICIOUS), "device", both)


def test_a_device_with_a_shared_key_sends_nothing_in_clear(assembled, files):
    with pytest.raises(ConfigError, match=r"ckks-key keeps .* collector=masked or collector=ckks"):
        make_client(assembled(*CLEAR), "device", keyed(files))
    for run in (MASKED, CKKS):
        make_client(assembled(*run), "device", keyed(files))


def test_a_device_that_asks_anything_of_a_session_sends_nothing_in_clear(assembled):
    with pytest.raises(ConfigError, match="secagg-least-cohort keeps this device"):
        make_client(assembled(*CLEAR), "device", {"partition-id": 3, "secagg-least-cohort": 9})


def test_a_collector_that_nobody_knows_hides_nothing(assembled, files):
    """A subclass whose half is the plain one: what counts is what the half does."""
    target = "collector._target_=tests.fl_app.test_node.Pretender"
    for settings in (pinned(files), keyed(files)):
        with pytest.raises(ConfigError, match="keeps this device"):
            make_client(assembled(*MALICIOUS, target), "device", settings)


def test_a_device_with_nothing_pinned_goes_with_any_run(assembled, files):
    for run, overrides in RUNS.items():
        make_client(assembled(*overrides), "device", own(files, run))


@pytest.mark.parametrize("name", ["secagg-rooster", "ckks-keys"])
def test_a_slip_in_a_settings_name_does_not_leave_the_device_open(assembled, name):
    with pytest.raises(ConfigError, match=f"no setting {name}"):
        make_client(assembled(*CLEAR), "device", {"partition-id": 3, name: "x"})


@pytest.mark.parametrize(
    ("run", "says"), [("plain", True), ("masked", True), ("malicious", False), ("ckks", False)]
)
def test_what_is_pinned_keeps_metrics_from_travelling_in_clear(assembled, files, run, says):
    assembly = assembled(*RUNS[run])
    device = make_client(assembly, "device", own(files, run))
    (reply,) = device.answer([request(assembly, "evaluate", 3)])
    assert reply.has_content() is says
    assert says or "clear" in reply.error.reason


@pytest.mark.parametrize("run", RUNS)
def test_a_device_is_one_client_whatever_it_is_called(assembled, files, run):
    """One device that is asked as several clients would be a quorum by itself."""
    assembly = assembled(*RUNS[run])
    device = make_client(assembly, "device", own(files, run))
    kinds = [("train", {}), ("train", {TRAINS: False}), ("evaluate", {})]
    for kind, config in kinds:
        others = [request(assembly, kind, client, **config) for client in (0, 4, 1003, -3)]
        for reply in device.answer(others):
            assert reply.has_error()
            assert "client:" in reply.error.reason
    assert not (assembly.config.client_state_dir / "secagg").exists()


@pytest.mark.parametrize("run", RUNS)
def test_a_device_that_does_not_know_who_it_is_takes_no_part(assembled, files, run):
    assembly, settings = assembled(*RUNS[run]), own(files, run)
    for client in (None, "3", -1, True, 3.0):
        given = {**settings, "partition-id": client}
        if client is None:
            del given["partition-id"]
        with pytest.raises(ConfigError, match="partition-id"):
            make_client(assembly, "device", given)


def test_a_device_answers_as_itself(assembled):
    assembly = assembled(*CLEAR)
    device = make_client(assembly, "device", {"partition-id": 3})
    (reply,) = device.answer([request(assembly, "train", 3)])
    assert reply.has_content()


# ---- what a device remembers ----


def half_of(assembly: Assembly, settings: dict[str, Any]) -> Any:
    return make_client_half(assembly, "device", settings)


@pytest.mark.parametrize("run", ["masked", "malicious", "ckks"])
def test_a_device_remembers_where_its_operator_says_in_every_run(assembled, files, tmp_path, run):
    """A run that chose the folder would find an empty ledger under each new name, and ask for one more sum."""
    settings = own(files, run) | {"client-folder": f"{tmp_path}/own"}
    for name in ("one", "two"):
        half = half_of(assembled(*RUNS[run], f"run_name={name}"), settings)
        assert half._folder.parent == tmp_path / "own"


def test_a_device_has_one_folder_a_user_unless_it_is_told(assembled, monkeypatch, tmp_path):
    plain = {"partition-id": 3}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert half_of(assembled(*MASKED), plain)._folder.is_relative_to(tmp_path / "state" / "trellis")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        found = half_of(assembled(*MASKED, "run_name=other"), plain)._folder
        assert found.is_relative_to(tmp_path / "home" / ".local" / "state")
    named = plain | {"client-folder": "~/secrets"}
    assert half_of(assembled(*MASKED), named)._folder.parent == tmp_path / "home" / "secrets"


@pytest.mark.parametrize("value", ["", "secrets", 7])
def test_a_folder_that_depends_on_where_the_device_was_started_is_refused(assembled, value):
    with pytest.raises(ConfigError, match=r"client-folder is .* an absolute path"):
        half_of(assembled(*MASKED), {"partition-id": 3, "client-folder": value})


# ---- what a device asks of encrypted sums ----


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("collector.quorum=2", "ckks-least-quorum"),
        ("collector.noise_bits=0", "ckks-least-noise-bits"),
        ("collector.decryptions=1000000", "ckks-most-decryptions"),
    ],
)
def test_a_run_does_not_choose_how_little_protects_a_device(assembled, files, override, setting):
    with pytest.raises(ConfigError, match=setting):
        make_client(assembled(*CKKS, override), "device", keyed(files))
    low = {"ckks-least-quorum": 2, "ckks-least-noise-bits": 0, "ckks-most-decryptions": 1000000}
    assert half_of(assembled(*CKKS, override), keyed(files) | low)._wears
    assert not make_client_half(assembled(*CKKS, override), "engine")._wears


# ---- what a device asks of encrypted training ----

ENCRYPTED = ["strategy=encrypted", "num_clients=4"]


def encrypted(assembled, *overrides: str, **settings: Any) -> Any:
    given = {f"encrypted-{name.replace('_', '-')}": value for name, value in settings.items()}
    return make_client(assembled(*ENCRYPTED, *overrides), "device", {"partition-id": 3, **given})


@pytest.mark.parametrize(
    ("override", "settings", "said"),
    [
        ("client.flooding=null", {}, "no device does"),
        ("client.flooding.decryptions=5000", {}, "encrypted-most-decryptions=4096"),
        ("client.flooding.decryptions=9", {"most_decryptions": 8}, "encrypted-most-decryptions=8"),
        ("client.flooding.multiple=2", {"least_multiple": 3}, "encrypted-least-multiple=3"),
        ("rounds=1", {"least_noise_bits": 0}, "noise_bits=null .* encrypted-least-noise-bits=0"),
        ("client.flooding.noise_bits=9", {"least_noise_bits": 9.5}, "least-noise-bits=9.5"),
        ("rounds=1", {"most_decryptions": 8.0}, "whole number"),
        ("rounds=1", {"least_noise_bits": -1}, "least_noise_bits"),
        ("rounds=1", {"least_noise": 1}, "no setting encrypted-least-noise"),
    ],
)
def test_a_run_does_not_choose_how_much_a_devices_key_tells(assembled, override, settings, said):
    with pytest.raises((ConfigError, ValueError), match=said):
        encrypted(assembled, override, **settings)


@pytest.mark.parametrize(
    ("override", "settings"),
    [
        ("rounds=1", {}),
        ("client.flooding.decryptions=5000", {"most_decryptions": 5000}),
        ("client.flooding.noise_bits=9.5", {"least_noise_bits": 9.5, "least_multiple": 100}),
        ("client.flooding.multiple=3", {"least_multiple": 3}),
    ],
)
def test_a_run_that_meets_a_devices_conditions_trains_there(assembled, override, settings):
    client = encrypted(assembled, override, **settings)
    assert client._trainer.flooding is not None


def test_clients_on_the_servers_own_machine_may_tell_exact_values(assembled):
    exact = assembled(*ENCRYPTED, "client.flooding=null")
    for place in ("engine", "simulation"):
        assert make_client(exact, place)._trainer.flooding is None


# ---- what a refusal tells the server ----


@pytest.mark.parametrize("run", ["masked", "malicious", "ckks"])
def test_a_refusal_tells_the_server_nothing_of_the_device(assembled, files, tmp_path, caplog, run):
    """Neither where its files are, nor what is in its update: its own log has both."""
    assembly = assembled(*RUNS[run], f"run_name={tmp_path.name}")
    settings = own(files, run) | {"client-folder": f"{tmp_path}/own"}
    if run == "ckks":
        settings["ckks-key"] = f"{tmp_path}/gone.key"
    (reply,) = make_client(assembly, "device", settings).answer([request(assembly, "train", 3)])
    reason, _, phrase = reply.error.reason.partition(": ")
    assert reason.isidentifier()
    assert phrase == "this client takes no part, and its own log says why"
    assert reason in caplog.text


def test_a_disk_that_fails_does_not_say_where_it_is(assembled, tmp_path):
    (tmp_path / "own").write_text("no folder")
    assembly = assembled(*MASKED)
    settings = {"partition-id": 3, "client-folder": f"{tmp_path}/own"}
    session = ConfigRecord({"session": bytes(16), "step": "unmask"})
    asked = request(assembly, "train", 3, **{TRAINS: False})
    asked.content["secagg"] = session
    (reply,) = make_client(assembly, "device", settings).answer([asked])
    assert "directory" in reply.error.reason
    assert str(tmp_path) not in reply.error.reason


def test_a_run_that_a_device_rules_out_is_refused_in_a_word(files, caplog):
    config = {"partition-id": 3, "secagg-roster": f"{files}/none.json", "secagg-identity": "x"}
    overrides = "task=digits strategy=secure collector.malicious=true"
    context = Context(1, 7, config, RecordDict(), {"overrides": overrides})
    asked = Message(RecordDict({CONFIG: ConfigRecord({})}), 7, "train")
    for entry in (train, evaluate, hello):
        reply = entry(asked, context)
        assert reply.error.reason.startswith("configuration: this client takes no part")
    assert f"{files}/none.json is no roster" in caplog.text


PRIVATE = ["client=dp_sgd", "client.target_epsilon=3", "client.delta=1e-5"]


@pytest.mark.parametrize(
    ("run", "limits"),
    [
        (["client=sgd"], {"dp-epsilon": 3.0}),
        (PRIVATE, {"dp-epsilon": 2.9}),
        (PRIVATE, {"dp-delta": 1e-6}),
        ([*PRIVATE, "client.target_epsilon=null", "client.noise_multiplier=1"], {"dp-epsilon": 9}),
        ([*PRIVATE, "client.reproducible_noise=true"], {"dp-epsilon": 9}),
        (PRIVATE, {"dp-epsilon": "3"}),
        (PRIVATE, {"dp-epsilon": 0}),
        (PRIVATE, {"dp-epsilom": 3}),
    ],
    ids=["no noise", "epsilon", "delta", "no bound", "repeatable", "text", "zero", "a slip"],
)
def test_a_run_that_would_charge_a_devices_examples_more_than_its_operator_allows_is_refused(
    assembled, run, limits
):
    with pytest.raises((ConfigError, ValueError), match="node config"):
        make_client(assembled(*run), "device", {"partition-id": 0, **limits})


def test_a_run_within_a_devices_limits_trains_on_its_own_ledger(assembled, tmp_path):
    settings = {"partition-id": 0, "dp-epsilon": 3.0, "dp-delta": 1e-5}
    client = make_client(
        assembled(*PRIVATE), "device", {**settings, "client-folder": f"{tmp_path}/device"}
    )
    assert client._trainer._ledgers == tmp_path / "device"


# ---- what a device tells of itself, and when it waits ----


def introduced(settings: dict[str, Any]) -> RecordDict:
    context = Context(1, 7, settings, RecordDict(), {"overrides": "task=digits"})
    reply = hello(Message(RecordDict({CONFIG: ConfigRecord({})}), 7, "query.hello"), context)
    return reply.content


@pytest.mark.parametrize("settings", [{}, {"device-profile": False}])
def test_a_device_tells_nothing_of_itself_unless_its_operator_says_so(settings):
    content = introduced({"partition-id": 3, **settings})
    assert list(content) == [CONFIG]
    assert dict(content[CONFIG]) == {"client": 3}


def test_a_device_whose_operator_agrees_tells_classes_and_nothing_else():
    content = introduced({"partition-id": 3, "device-profile": True})
    assert content[DEVICE].keys() == VOCABULARY.keys()
    assert all(content[DEVICE][key] in words for key, words in VOCABULARY.items())


def test_a_simulation_never_tells_of_the_machine_that_plays_the_devices(monkeypatch):
    monkeypatch.setattr("fl_app.client_app.simulated", lambda: True)
    assert DEVICE not in introduced({"partition-id": 3, "device-profile": True})


def test_a_device_that_has_answered_removes_what_was_left_half_done_for_too_long(tmp_path):
    kept = tmp_path / "client-3.spent"
    days = {
        tmp_path / "runs" / name / "half-done" / "client-3.half-done": d
        for name, d in [("a", 1), ("b", 3), ("c", 8)]
    }
    for path, old in [*days.items(), (kept, 1_000)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - old * 86_400,) * 2)
    settings = {"partition-id": 3, "client-folder": str(tmp_path)}
    introduced(settings)
    assert [path.exists() for path in days] == [True, True, False]
    introduced({**settings, "device-half-done-days": 2})
    assert [path.exists() for path in days] == [True, False, False]
    assert kept.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device-profile": "yes"}, "device-profile is 'yes': true or false"),
        ({"device-profile": 1}, "device-profile is 1"),
        ({"device-profil": True}, "no setting device-profil"),
        ({"device-power-file": "battery.json"}, "device-power-file is 'battery.json'"),
        ({"device-least-battery": 101}, "device-least-battery is 101"),
        ({"device-least-battery": -1}, "device-least-battery is -1"),
        ({"device-least-battery": "15"}, "device-least-battery is '15'"),
        ({"device-least-battery": float("nan")}, "device-least-battery is nan"),
        ({"device-memory-mb": 0}, "device-memory-mb is 0"),
        ({"device-memory-mb": True}, "device-memory-mb is True"),
        ({"device-half-done-days": 0}, "device-half-done-days is 0"),
        ({"device-half-done-days": "7"}, "device-half-done-days is '7'"),
    ],
)
def test_a_slip_in_a_devices_setting_is_named_on_the_device(assembled, settings, said):
    with pytest.raises(ConfigError, match=said):
        make_client(assembled(*CLEAR), "device", {"partition-id": 3, **settings})


def test_a_devices_settings_are_what_its_operator_wrote(tmp_path):
    node = Node({"partition-id": 0, "device-power-file": f"{tmp_path}/b.json"})
    assert node.pause is not None
    assert (node.pause.least, node.power) == (15.0, FilePower(tmp_path / "b.json"))
    assert Node({"partition-id": 0, "device-least-battery": 0}).pause is None
    assert Node({"partition-id": 0, "device-memory-mb": 1.5}).memory == 1_500_000
    plain = Node({"partition-id": 0})
    assert (plain.memory, plain.tells_profile, plain.power) == (None, False, SystemPower())


def test_a_device_waits_and_goes_on_as_its_operator_wrote(assembled, tmp_path):
    """The same request is refused while the battery is low, and answered once it is not."""
    battery = tmp_path / "battery.json"
    battery.write_text('{"percent": 10, "plugged": false}')
    settings = {"partition-id": 3, "device-power-file": str(battery)}
    settings |= {"device-memory-mb": 500, "client-folder": f"{tmp_path}/own"}
    assembly = assembled(*CLEAR)
    device = make_client(assembly, "device", settings)
    (reply,) = device.answer([request(assembly, "train", 3)])
    assert reply.error.reason == "paused: this client takes no part, and its own log says why"
    battery.write_text('{"percent": 10, "plugged": true}')
    again = make_client(assembly, "device", settings)  # as after a restart: it looks at once
    (reply,) = again.answer([request(assembly, "train", 3)])
    assert reply.has_content()
