"""What an owner tells is covered for its own data, and its key's ledger goes with the key, whatever the run."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest

from clients.encrypted.flooding import Flooding
from clients.encrypted.half_done import OwnerFolder
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.noise import ErrorModel, Magnitudes
from clients.encrypted.party import ComputeParty
from clients.encrypted.schedule import batch_of_round, batches
from clients.encrypted.trainer import EncryptedTrainer
from clients.tasks import Digits, Examples
from strategies.protocols import Refusal
from strategies.update import Update
from tests.support.owners import OwnersRun, Serving, network, plan_for

TRAINER = EncryptedTrainer(batch_size=512, flooding=None)
PLAN = plan_for(TRAINER)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    with ComputeParty(PLAN, tmp_path_factory.mktemp("party"), workers=1) as party:
        yield Serving(party)


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "keys" / "shared.key"
    OwnerKeys.generate(PLAN.ring).save(path)
    return path


@pytest.fixture
def owners(tmp_path, serving):
    def make(folder, flooding, **own):
        trainer = replace(TRAINER, flooding=flooding, key=own.pop("key", None))
        return OwnersRun(tmp_path / folder, trainer, serving, **own)

    return make


class Uneven(Digits):
    """Digits, a few of which are far darker than all others."""

    def train(self) -> Examples:
        examples = super().train()
        inputs = examples.inputs.clone()
        inputs[::16] *= 5
        return Examples(inputs, examples.targets)


def test_the_longest_sample_of_a_mini_batch_is_covered(owners):
    # Noise of 170 elements: its deviation is five of its own deviations away less often than once in 10^6.
    exact, flooded = (owners("own", f, task=Uneven()) for f in (None, Flooding(multiple=100)))
    before, after = exact.run()[0], flooded.run()[0]
    assert isinstance(before, Update), before
    assert isinstance(after, Update), after
    noise = after.delta.vector.astype(float) - before.delta.vector
    examples = exact.data().train(0)
    cut = batches(examples.targets.numpy(), 512, TRAINER.seed, 0)
    rows = cut[batch_of_round(1, len(cut), TRAINER.seed, 0)]
    features = network().featurise(examples.inputs[rows]).numpy()
    assumed = Magnitudes.assumed(PLAN.spec)
    longest = float(np.linalg.norm(features, axis=1).max())
    assert longest > 2 * assumed.features  # or nothing would be tested
    bound = ErrorModel(PLAN, replace(assumed, features=longest), len(rows)).bound
    elements = noise.size + 2  # and loss and accuracy
    expected = Flooding(multiple=100).deviation(bound, elements)
    assert bound > 1.5 * ErrorModel(PLAN, assumed, len(rows)).bound
    assert abs(noise.std() / expected - 1) < 5 / sqrt(2 * noise.size)


def test_a_key_that_outlives_runs_takes_what_it_told_with_it(owners, key):
    for folder in ("one", "two"):
        became = owners(folder, Flooding(decryptions=2), key=key).run()[0]
        assert isinstance(became, Update), became
    # Each run's folder is empty: the examples are encrypted anew, so errors are others, and each step is a new release.
    assert isinstance(owners("three", Flooding(decryptions=2), key=key).run()[0], Refusal)
    assert key.with_name("shared.key.ledger").is_file()


def test_a_key_that_told_exact_values_promises_nothing(owners, key, caplog):
    assert isinstance(owners("one", None, key=key).run()[0], Update)
    became = owners("two", Flooding(noise_bits=0), key=key).run()[0]
    assert isinstance(became, Refusal)
    assert "0 bits of statistical security are promised" in caplog.text


def test_an_owners_folder_that_lets_go_of_old_data_keeps_the_ledger(owners, tmp_path):
    run = owners("one", Flooding(decryptions=1))
    assert isinstance(run.run()[0], Update)
    folder = OwnerFolder(tmp_path / "one", 0)
    for number in range(6):
        folder.keep_ciphertexts(f"{number}", 0, {"a": np.zeros(1, np.uint64)})
    assert isinstance(run.run(2)[0], Refusal)


def test_a_ledger_that_cannot_be_kept_is_found_before_the_work(owners, key, caplog):
    key.with_name("shared.key.ledger").mkdir()
    run = owners("one", Flooding(), key=key)
    assert isinstance(run.run()[0], Refusal)
    assert not run.replies  # nothing was encrypted and sent
    assert "key: " in caplog.text
