"""The owner's secret key: its file, what of it is ever shown, and who refuses to be handed it."""

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clients.encrypted.keys import OwnerKeys, public_only
from clients.encrypted.ring import Desk, Ring
from strategies.ckks import KeyFileError, SecretKeyError, SharedKey
from strategies.ckks import public_only as no_private_context

ROOT = Path(__file__).resolve().parents[3]
RING = Ring(8192, (60, 52, 60))
SMALL = Ring(4096, (54, 55))
SCALE = 2.0**20


@pytest.fixture(scope="module")
def keys():
    return OwnerKeys.generate(RING)


@pytest.fixture(scope="module")
def small():
    return OwnerKeys.generate(SMALL)


@pytest.fixture(scope="module")
def other():
    return OwnerKeys.generate(SMALL)


def encrypt(keys, values):
    ring, plaintext = keys.ring, keys.ring.seal.Plaintext()
    ring.seal.CKKSEncoder(ring.context).encode(values.tolist(), SCALE, plaintext)
    encryptor = ring.seal.Encryptor(ring.context, keys.seal_key())
    ciphertext = ring.seal.Ciphertext()
    encryptor.encrypt_symmetric(plaintext, ciphertext)
    return Desk(ring).residues(ciphertext)


def decrypt(keys, residues):
    ring, plaintext = keys.ring, keys.ring.seal.Plaintext()
    ciphertext = Desk(ring).ciphertext(residues, SCALE)
    ring.seal.Decryptor(ring.context, keys.seal_key()).decrypt(ciphertext, plaintext)
    return np.array(ring.seal.CKKSEncoder(ring.context).decode_double(plaintext))


def test_a_key_that_was_read_back_decrypts_what_the_first_one_encrypted(tmp_path, keys):
    path = tmp_path / "deep" / "owner.key"
    keys.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["owner.key"]
    again = OwnerKeys.load(path)
    assert (again.ring, again.fingerprint) == (keys.ring, keys.fingerprint)
    values = np.random.default_rng(0).uniform(-1, 1, RING.slots)
    np.testing.assert_allclose(decrypt(again, encrypt(keys, values)), values, atol=0.01)


def test_another_key_decrypts_to_garbage_and_has_another_fingerprint(small, other):
    values = np.random.default_rng(0).uniform(-1, 1, SMALL.slots)
    assert np.abs(decrypt(other, encrypt(small, values))).min() > 100
    assert small.fingerprint != other.fingerprint
    assert len(small.fingerprint) == 32


def test_a_key_is_never_written_over_another(tmp_path, small, other):
    small.save(tmp_path / "key")
    with pytest.raises(FileExistsError):
        other.save(tmp_path / "key")
    assert OwnerKeys.load(tmp_path / "key").fingerprint == small.fingerprint


def test_a_key_that_others_can_read_is_refused(tmp_path, small):
    small.save(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        OwnerKeys.load(tmp_path / "key")


def altered(at, value):
    return lambda data: data[:at] + bytes([value]) + data[at + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:24],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data * 40,
        lambda data: b"x" + data[1:],
        altered(20, 0xFF),  # the degree
        altered(24, 0),  # the primes
        altered(24, 0xFF),
        altered(25, 53),  # their bits
        lambda data: data[:-40] + b"\0" * 8 + data[-32:],  # a residue
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),  # the checksum
    ],
)
def test_a_torn_or_altered_file_is_refused_by_name(tmp_path, small, spoil):
    small.save(tmp_path / "key")
    (tmp_path / "key").write_bytes(spoil((tmp_path / "key").read_bytes()))
    with pytest.raises(KeyFileError, match=r"key holds no owner's key.*trellis keys encrypted"):
        OwnerKeys.load(tmp_path / "key")


def test_a_key_of_encrypted_sums_is_none_of_training(tmp_path):
    SharedKey.generate().save(tmp_path / "shared.key")
    with pytest.raises(KeyFileError, match="does not begin as one"):
        OwnerKeys.load(tmp_path / "shared.key")


def test_a_missing_file_is_named_with_the_mend(tmp_path):
    with pytest.raises(KeyFileError, match=r"nowhere.*trellis keys encrypted"):
        OwnerKeys.load(tmp_path / "nowhere")


def test_residues_beyond_their_primes_are_no_key():
    with pytest.raises(ValueError, match="not below its prime"):
        OwnerKeys(SMALL, np.full((2, 4096), 2**63, np.uint64))
    with pytest.raises(ValueError, match="shape"):
        OwnerKeys(SMALL, np.zeros((3, 4096), np.uint64))


def test_a_key_of_another_ring_is_not_taken_for_the_runs(tmp_path, small):
    small.save(tmp_path / "key")
    with pytest.raises(KeyFileError, match=r"degree 4096.*--degree 8192"):
        OwnerKeys.load_or_make(tmp_path / "key", RING)


def test_processes_that_ask_for_one_file_at_once_have_one_key(tmp_path):
    """Several owners under one key, each in a process of its own."""
    program = (
        "import sys; from pathlib import Path\n"
        "from clients.encrypted.keys import OwnerKeys\n"
        "from clients.encrypted.ring import Ring\n"
        "ring = Ring(4096, (54, 55)); print('ready', flush=True); sys.stdin.readline()\n"
        "keys = OwnerKeys.load_or_make(Path(sys.argv[1]), ring)\n"
        "print(keys.fingerprint, OwnerKeys.load(Path(sys.argv[1])).fingerprint)\n"
    )
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "keys" / "owner.key")],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in asked:
        assert process.stdout.readline() == "ready\n"
    for process in asked:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0].split() for process in asked]
    assert [process.returncode for process in asked] == [0, 0]
    assert len({fingerprint for both in told for fingerprint in both}) == 1


def test_a_key_shows_nothing_of_itself(keys):
    assert keys.fingerprint in repr(keys)
    assert len(repr(keys)) < 150
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(keys)
    assert keys.derive("a") != keys.derive("b")
    assert keys.derive("a", b"x") != keys.derive("a", b"y")


def test_a_compute_party_refuses_whatever_can_decrypt(small, tmp_path):
    import tenseal

    seal, context = SMALL.seal, SMALL.context
    private = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])
    small.save(tmp_path / "key")
    for secret in (
        small,
        SharedKey.generate(),
        private,
        small.seal_key(),
        seal.KeyGenerator(context),
        seal.Decryptor(context, small.seal_key()),
        (tmp_path / "key").read_bytes(),
    ):
        with pytest.raises(SecretKeyError, match="secret key"):
            public_only(secret)
    private.make_context_public()
    evaluation = small.evaluation(())
    for public in (
        evaluation,
        evaluation.first,
        private,
        SMALL,
        seal.Evaluator(context),
        b"",
        None,
    ):
        public_only(public)


def test_servers_that_know_nothing_of_training_refuse_an_owners_key_too(small):
    with pytest.raises(SecretKeyError):
        no_private_context(small)
