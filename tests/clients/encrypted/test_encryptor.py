"""Mini-batches encrypted by processes of the owner's own: what they leave decrypts to what went in."""

from pathlib import Path

import numpy as np
import pytest

from clients.encrypted.encryptor import EncryptionError, Pending, encrypt_all
from clients.encrypted.half_done import OwnerFolder
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.owner import INPUTS, Fresh
from clients.encrypted.packing import Slots
from clients.encrypted.plan import plan_of
from clients.encrypted.ring import Desk
from clients.encrypted.spec import Spec

PLAN = plan_of(Spec((5, 3), batch=512))
DATA = "0" * 32


def pending(number: int, rng: np.random.Generator) -> Pending:
    return Pending(number, rng.normal(size=(500, 5)), rng.integers(0, 3, 500))


def test_processes_leave_ciphertexts_of_what_they_were_given(tmp_path: Path) -> None:
    keys, rng = OwnerKeys.generate(PLAN.ring), np.random.default_rng(0)
    keys.save(tmp_path / "key")
    folder = OwnerFolder(tmp_path / "owners", 2)
    batches = [pending(0, rng), pending(3, rng)]
    encrypt_all(PLAN, tmp_path / "key", folder, DATA, batches)

    ring, desk = PLAN.ring, Desk(PLAN.ring)
    decryptor = ring.seal.Decryptor(ring.context, keys.seal_key())
    for batch in batches:
        arrays = folder.ciphertexts(DATA, batch.number)
        assert arrays is not None
        whole = Fresh.from_arrays(arrays, INPUTS, ring, PLAN.inputs, ring.levels).whole(desk)
        plaintext = ring.seal.Plaintext()
        decryptor.decrypt(desk.ciphertext(whole[1], 2.0**PLAN.scales.inputs), plaintext)
        found = np.array(ring.seal.CKKSEncoder(ring.context).decode_double(plaintext))
        wanted = Slots(ring, PLAN.copies).repeated(batch.features[:, 1]).real
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_a_key_that_can_not_be_read_fails_all(tmp_path: Path) -> None:
    folder = OwnerFolder(tmp_path / "owners", 2)
    with pytest.raises(EncryptionError, match=r"mini-batches \[7\]"):
        encrypt_all(PLAN, tmp_path / "none", folder, DATA, [pending(7, np.random.default_rng(0))])
    assert folder.ciphertexts(DATA, 7) is None
