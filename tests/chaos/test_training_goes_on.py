"""A device is killed in the middle of its local training and comes back under its key: what was done is not done again.

But where training is noised: it begins anew, and its examples are charged once more.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from clients.dp_ledger import ClientLedger
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine
from strategies.privacy.accountants import make_accountant
from tests.chaos.scene import SMALL, Scene, assert_whole

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.timeout(900),
]

PER_EPOCH = 11
"""Batches of 128 of one client's digits, who has them all."""
LONG = ["client.local_epochs=4", "client.batch_size=128"]
EVERY = 30.0
"""Seconds between two writes of half-done work (`clients.half_done`)."""


def test_epochs_before_the_kill_are_not_done_again_and_the_model_is_the_same(
    tmp_path: Path, certificates: Path
) -> None:
    batch = 2 * PER_EPOCH + 5  # in the third epoch
    with Scene(tmp_path, 1, "rounds=2", *LONG, certificates=certificates) as scene:
        scene.held.hold(batch)
        run = scene.start()
        run.until(lambda: scene.held.at_work(scene.nodes[0]), "training")
        time.sleep(EVERY)
        scene.held.hold(batch + 1)  # a batch more, behind which what was done is written down
        run.until(lambda: scene.held.at_work(scene.nodes[0], batch + 1), "the next batch")
        done = steps_in_halves(tmp_path / "own-0")
        assert done > 2 * PER_EPOCH
        scene.nodes[0].kill()
        scene.held.go()
        scene.restart_node(0)  # refused until Flower has given the old one up
        assert run.ended() == 0
        assert_whole(scene.summary, 2)
        # The process that was killed, the one that went on from it, and the second round's. Each begins with a trial.
        killed, rest, whole = scene.held.batches()
        assert killed == batch + 1
        assert whole - rest == done
        assert not list((tmp_path / "own-0").glob("runs/*/half-done/client-*"))
        found = load_file(scene.run_folder / "model.safetensors")
    wanted = undisturbed(tmp_path / "calm", "rounds=2", *LONG)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_noised_training_begins_anew_and_is_charged_for_the_one_that_died(
    tmp_path: Path, certificates: Path
) -> None:
    noise = 2.0
    private = [
        "client=dp_sgd", f"client.noise_multiplier={noise}", "client.target_epsilon=null",
        "client.participations=2", "evaluate.federated_every=0",
    ]  # fmt: skip
    with Scene(tmp_path, 1, "rounds=2", *private, certificates=certificates) as scene:
        ledger = ClientLedger(tmp_path / "own-0", 0)
        scene.held.hold(10)  # of 21 batches: behind the trial
        run = scene.start()
        run.until(lambda: scene.held.at_work(scene.nodes[0]), "training")
        scene.nodes[0].kill()
        ((_, steps),) = ledger.charges()
        scene.held.go()
        scene.restart_node(0)
        assert run.ended() == 0
        assert_whole(scene.summary, 2)
        charges = ledger.charges()
        assert [count for _, count in charges] == [steps] * 3  # two rounds, and the one that died
        assert not list((tmp_path / "own-0").glob("runs/*/half-done/client-*"))
        spent = scene.summary["privacy"]["epsilon"]
    accountant = make_accountant("pld", "add_or_remove_one")
    (release,) = {release for release, _ in charges}
    assert release.noise_multiplier == noise
    accountant.step(release, 2 * steps)
    too_little = accountant.epsilon(1e-5)
    accountant.step(release, steps)
    assert spent == pytest.approx(accountant.epsilon(1e-5), rel=1e-6)
    assert spent > 1.1 * too_little


def steps_in_halves(folder: Path) -> int:
    """Local steps in the one half-done training of a device."""
    (path,) = folder.glob("runs/*/half-done/client-0.half-done")
    with safe_open(path, framework="numpy") as file:
        return int(json.loads(file.metadata()["half-done"])["figures"]["taken"])


def undisturbed(folder: Path, *overrides: str) -> dict[str, np.ndarray]:
    """The model of the same run on the engine, whose clients nobody kills."""
    chosen = ["task=digits", *SMALL, "num_clients=1", *overrides, f"output_dir={folder}"]
    result = run_engine(compose(chosen), PlainConsole(io.StringIO()))
    return load_file(result.summary_path.parent / "model.safetensors")
