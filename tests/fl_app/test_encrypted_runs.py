"""`strategy=encrypted` as a user runs it: beside its plaintext twin, killed and resumed, with one owner and more."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from clients.encrypted.flooding import Flooding
from clients.encrypted.footprint import tree_mb
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.plan import plan_of
from clients.encrypted.planner import Forecast
from clients.encrypted.spec import Spec
from clients.encrypted.trainer import EncryptedTrainer
from fl_app.assembly import Assembly, make_strategy
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.encryption import FITTED, is_encrypted, owning, planned, risks
from fl_app.node import Node
from tests.fl_app.test_run import model_of, read_until_round, run, trellis

ENCRYPTED = [
    "strategy=encrypted", "num_clients=1", "model.features=pool", "model.number=16", "model.hidden=[4]",
    "model.hidden_scale=0.5", "model.logit_scale=0.1", "client.batch_size=512", "compute.workers=1",
    "server=sgd", "server.lr=0.05",
]  # fmt: skip
TWIN = ["collector=plain", "client=fedsgd", "client.batch_size=512"]
EXACT = ["client.flooding=null"]
"""Nothing is added to what is decrypted."""
STEP = 2e-3
"""Of the largest change: what a round on ciphertexts may differ by from one on plaintexts."""


def assert_twins(one, other, start) -> None:
    """Both have gone the same way, to what ciphertexts leave of a number."""
    first, second, begun = model_of(one), model_of(other), start
    largest = max(np.abs(second[name] - begun[name]).max() for name in second)
    for name in second:
        assert np.abs(first[name] - second[name]).max() < STEP * largest, name


def initial(*overrides: str) -> dict[str, np.ndarray]:
    module = Assembly(compose(["task=digits", *ENCRYPTED, *overrides])).module()
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("mode", ["ce", pytest.param("strict", marks=pytest.mark.slow)])
def test_a_run_on_ciphertexts_is_its_plaintext_twin(tmp_path, mode):
    loss = {"ce": "cross_entropy", "strict": "squared"}[mode]
    chosen = [*ENCRYPTED, "rounds=4"]
    one, summary, lines = run(tmp_path / "a", *chosen, *EXACT, f"collector.mode={mode}")
    other, plain, _ = run(tmp_path / "b", *chosen, *TWIN, f"client.loss={loss}")
    assert_twins(one, other, initial())
    for row, twin in zip(summary["history"], plain["history"], strict=True):
        assert row["accuracy"] == pytest.approx(twin["accuracy"], abs=0.003)
        assert row["train"]["train_loss"] == pytest.approx(twin["train"]["train_loss"], rel=1e-3)
    assert (summary["status"], summary["rejections"]) == ("completed", {})
    assert "16-4-10, square" in lines[0]
    assert "the server holds the model and computes on ciphertexts" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_two_owners(tmp_path, shared):
    """Each under a key of its own, or both under one; by workers that can be either."""
    key = tmp_path / "owner.key"
    chosen = [*ENCRYPTED, "num_clients=2", "task.partition=iid", "rounds=3"]
    own = [f"client.key={key}"] if shared else []
    if shared:
        OwnerKeys.generate(Assembly(compose(["task=digits", *chosen])).serving.plan.ring).save(key)
    one, summary, _ = run(tmp_path / "a", *chosen, *EXACT, *own, "runtime.workers=2")
    other, _, _ = run(tmp_path / "b", *chosen, *TWIN)
    assert_twins(one, other, initial())
    assert summary["rejections"] == {}
    made = [path.parent.name for path in tmp_path.glob("a/*/clients/encrypted/*/owner-key-*[0-9]")]
    assert sorted(made) == ([] if shared else ["client-0", "client-1"])


def test_a_client_computes_in_the_servers_place(tmp_path):
    chosen = [*ENCRYPTED, "num_clients=2", "task.partition=iid", "rounds=2"]
    result, summary, lines = run(tmp_path, *chosen, "collector.compute_client=1")
    assert (summary["status"], summary["rejections"]) == ("completed", {})
    assert "client 1 holds the model" in lines[0]
    folder = result.summary_path.parent
    assert not (folder / "compute").exists()
    assert list((folder / "clients" / "compute" / "keys").iterdir())
    assert [path.name for path in folder.glob("clients/encrypted/client-*")] == ["client-0"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ce", "strict"])
def test_a_party_that_has_lost_its_folder_is_sent_all_again(tmp_path, mode):
    # One mini-batch, so that the owner believes that it is there.
    chosen = [*ENCRYPTED, *EXACT, "client.batch_size=2048", f"collector.mode={mode}"]
    result, before, _ = run(tmp_path / "a", *chosen, "rounds=2")
    kept = ciphertexts(result.summary_path.parent)
    shutil.rmtree(result.summary_path.parent / "compute")
    again, summary, _ = run(tmp_path / "a", *chosen, "rounds=4")
    whole, straight, _ = run(tmp_path / "b", *chosen, "rounds=4")
    assert_twins(again, whole, initial())
    uploads = [row["upload_bytes"] for row in summary["history"]]
    assert uploads[0] > 5 * uploads[1]
    assert uploads[2] > 0.9 * uploads[0]
    assert not any(row["void"] for row in summary["history"])
    assert kept == ciphertexts(result.summary_path.parent)
    assert summary["rejections"] == ({} if mode == "ce" else {"client_error": 1})
    assert len(before["history"]) == 2
    assert straight["rejections"] == {}


def ciphertexts(folder: Path) -> dict[str, bytes]:
    """What owners have encrypted, in a run's folder."""
    return {path.name: path.read_bytes() for path in folder.rglob("batch-*.safetensors")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run in a process of its own, looked into after its second round, and then killed."""
    folder = tmp_path_factory.mktemp("killed")
    process = trellis(
        "run", "task=digits", *ENCRYPTED, *EXACT, f"output_dir={folder}", "rounds=100000", "runtime.workers=2",
        "compute.workers=2",
    )  # fmt: skip
    try:
        read_until_round(process, 2)
        root = psutil.Process(process.pid)
        family = root.children(recursive=True)
        (path,) = folder.glob("*/clients/encrypted/client-0/owner-key-*[0-9]")
        words = words_of(path)
        crew = [one for one in family if "clients.encrypted" in " ".join(one.cmdline())]
        owners = [one for one in family if one not in crew and "worker" not in one.name()]
        found = {
            "server": holds(root, words),
            "crew": [holds(one, words) for one in crew],
            "owners": [holds(one, words) for one in owners],
        }
    finally:
        process.kill()
        process.communicate(timeout=60)
    _, left = psutil.wait_procs(family, timeout=20)
    left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return {"folder": folder, "left": left, **found}


def words_of(path: Path) -> list[bytes]:
    """Pieces of a key's residues as they lie in memory, of 64 bytes each."""
    keys = OwnerKeys.load(path)
    data = path.read_bytes()
    size = 8 * keys.ring.degree * len(keys.ring.bits)
    residues = data[-32 - size : -32]
    return [residues[at : at + 64] for at in range(0, size, size // 4)]


def holds(process: psutil.Process, words: list[bytes]) -> int:
    """How many of some words stand in a process's memory."""
    seen, proc = set[int](), Path(f"/proc/{process.pid}")
    with (
        (proc / "maps").open() as maps,
        (proc / "mem").open("rb", 0) as memory,
    ):
        for line in maps:
            begin, end, rights = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
            if not rights.startswith("rw"):  # nobody has written to it
                continue
            try:
                memory.seek(int(begin, 16))
                block = memory.read(int(end, 16) - int(begin, 16))
            except (OSError, ValueError, OverflowError):
                continue
            seen |= {index for index, word in enumerate(words) if word in block}
    return len(seen)


@pytest.mark.slow
@pytest.mark.xdist_group("killed encrypted")
def test_only_owners_have_the_secret_key_in_memory(killed):
    assert max(killed["owners"]) >= 2  # the search finds what is there
    assert killed["server"] == 0
    assert killed["crew"] == [0, 0]


@pytest.mark.slow
@pytest.mark.xdist_group("killed encrypted")
def test_a_killed_run_leaves_nobody_behind_and_goes_on(killed, tmp_path):
    assert killed["left"] == []
    (path,) = killed["folder"].glob("*/summary.json")
    reached = json.loads(path.read_text())["rounds_completed"]
    before = ciphertexts(path.parent)
    rounds = f"rounds={reached + 2}"
    again, summary, lines = run(killed["folder"], *ENCRYPTED, *EXACT, rounds)
    assert any(f"goes on after round {reached}" in line for line in lines)
    assert (summary["status"], summary["rejections"]) == ("completed", {})
    after = ciphertexts(path.parent)
    assert before.items() <= after.items()
    plain, _, _ = run(tmp_path, *ENCRYPTED, *TWIN, rounds)
    assert_twins(again, plain, initial())


def test_checkpoints_and_what_the_party_keeps_hold_nothing_of_the_key(tmp_path):
    result, _, _ = run(tmp_path, *ENCRYPTED, "rounds=1")
    folder = result.summary_path.parent
    (key,) = folder.glob("clients/encrypted/client-0/owner-key-*[0-9]")
    words = words_of(key)
    others = [path for path in folder.rglob("*") if path.is_file() and path != key]
    assert len(others) > 8
    for path in others:
        data = path.read_bytes()
        assert not any(word in data for word in words), path


def test_a_limit_that_can_not_be_met_is_refused_and_one_that_can_is_told_of(tmp_path):
    with pytest.raises(ConfigError, match=r"memory\.limit_mb.*raise limit_mb"):
        run(tmp_path, *ENCRYPTED, "memory.limit_mb=50")
    _, summary, lines = run(tmp_path, *ENCRYPTED, "memory.limit_mb=8000", "rounds=1")
    assert summary["status"] == "completed"
    assert any(line.startswith("ring  ") and "128-bit secure" in line for line in lines)
    assert any(line.startswith("memory  ") for line in lines)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["client=sgd"], "strategy=encrypted"),
        (["model=mlp"], "strategy=encrypted"),
        (["collector=plain"], "strategy=encrypted"),
        (["travel=['layers.1.*']"], "travel"),
        (["downlink=delta"], "downlink=none"),
        (["model.hidden=[4,4,4]"], "at most two hidden layers"),
        (["collector.compute_client=0"], "raise num_clients"),
        (["scheduler=buffered"], "scheduler=synchronous"),
    ],
)
def test_what_does_not_go_with_ciphertexts_is_refused_with_the_mend(tmp_path, chosen, said):
    groups = {one.split("=")[0] for one in chosen}
    kept = [one for one in ENCRYPTED if one.split(".")[0] not in groups or "=" not in one]
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(tmp_path, *kept, *chosen)


@pytest.mark.slow
def test_noise_of_the_owners_goes_with_it(tmp_path):
    private = [
        "privacy=local",
        "collector=encrypted",
        "collector.metrics=false",
        "privacy.noise_multiplier=2",
    ]
    _, summary, _ = run(tmp_path, *ENCRYPTED, *private, "num_clients=2", "rounds=1")
    assert summary["status"] == "completed"
    assert summary["privacy"]["epsilon"] > 0


@pytest.mark.slow
def test_a_key_tells_so_many_steps_and_no_more(tmp_path):
    result, summary, lines = run(
        tmp_path / "a", *ENCRYPTED, "client.flooding.decryptions=2", "rounds=4"
    )
    assert [row["void"] for row in summary["history"]] == [False, False, True, True]
    assert "worn" in (result.summary_path.parent / "run.log").read_text()
    assert "2 steps a key" in lines[0]
    twin, _, _ = run(tmp_path / "b", *ENCRYPTED, *TWIN, "rounds=2")
    one, other = model_of(result), model_of(twin)
    noise = np.concatenate([(one[name] - other[name]).ravel() for name in one])
    assert 1e-6 < np.abs(noise).max() < 1e-2


def test_a_smaller_model_is_taken_where_memory_leaves_no_room_and_a_resumed_run_keeps_to_it(
    tmp_path,
):
    wide = ["task=digits", *ENCRYPTED, "model.hidden=[512]", f"output_dir={tmp_path}"]
    plan = Assembly(compose(wide)).serving.plan
    small = replace(plan.spec, sizes=(16, 64, 10), batch=64)
    base = tree_mb(psutil.Process())
    least = [
        Forecast(plan_of(spec), replace(planned(compose(wide)), base_mb=base).least).memory_mb
        for spec in (small, plan.spec)
    ]
    limit = [f"memory.limit_mb={sum(least) / 2 / 0.95:.0f}"]
    with pytest.raises(ConfigError, match=r"memory\.allow"):
        make_strategy(Assembly(compose([*wide, *limit])), 1)
    allowed = compose([*wide, *limit, "memory.allow=[batch,'hidden units']"])
    allowed.run_dir.mkdir(parents=True)
    assembly = Assembly(allowed)
    make_strategy(assembly, 1)
    taken = assembly.serving.plan.spec
    assert (taken.sizes, taken.batch) != (plan.spec.sizes, plan.spec.batch)
    assert assembly.module().sizes == taken.sizes
    assert assembly.trainer.batch_size <= taken.batch
    (allowed.run_dir / FITTED).write_text('{"batch": 128, "hidden": [8]}')
    again = Assembly(allowed)
    make_strategy(again, 1)
    assert (again.module().sizes, again.trainer.batch_size) == ((16, 8, 10), 128)


def test_a_devices_operator_names_the_key_and_no_run_does():
    trainer = EncryptedTrainer(key=Path("/servers.key"))
    named = Node({"partition-id": 0, "encrypted-key": "/mine.key"})
    assert owning(trainer, None, None).key == Path("/servers.key")
    assert owning(trainer, named, None).key == Path("/mine.key")
    assert owning(trainer, Node({"partition-id": 0}), None).key is None
    with pytest.raises(ValueError, match=r"encrypted-key.*absolute"):
        _ = Node({"partition-id": 0, "encrypted-key": "mine.key"}).owner_key
    with pytest.raises(ValueError, match="no setting encrypted-kye"):
        Node({"partition-id": 0, "encrypted-kye": "/mine.key"})


def test_other_runs_are_none():
    assert not is_encrypted(compose([]))
    assert compose(["strategy=encrypted"]).num_clients == 1
    assert compose(["strategy=encrypted"]).client.name == "encrypted"


def test_what_a_shared_key_and_two_hidden_layers_cost_is_said(tmp_path):
    two = Spec((16, 8, 4, 10), batch=512)
    (shared,) = risks(EncryptedTrainer(key=tmp_path / "key"), Spec((16, 10), batch=512), 2)
    assert "2 owners share the key" in shared
    assert list(risks(EncryptedTrainer(), Spec((16, 4, 10), batch=512), 2)) == []
    (loud,) = risks(EncryptedTrainer(flooding=Flooding()), two, 1)
    assert "about as large as they are" in loud
