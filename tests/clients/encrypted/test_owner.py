"""The owner's half: fresh ciphertexts that hide and hold, and hostile answers that are refused by name."""

from dataclasses import replace

import numpy as np
import pytest

from clients.encrypted.evaluation import Packed, Value
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.owner import ERRORS, INPUTS, PACKED_ERRORS, Fresh, Owner, WrapAroundError
from clients.encrypted.packing import encode
from clients.encrypted.plan import plan_of
from clients.encrypted.ring import Desk, Ring
from clients.encrypted.spec import Spec, bias, weight
from strategies.ckks.streams import CiphertextError
from tests.support.encrypted import batch, keys_of, owner_of

SPEC = Spec((5, 3))
PLAN = plan_of(SPEC)
RING = PLAN.ring
DESK = Desk(RING)


def decrypted(residues, scale, ring=RING):
    """Slots (N / 2,) of a ciphertext."""
    plaintext = ring.seal.Plaintext()
    key = keys_of(ring).seal_key()
    ciphertext = Desk(ring).ciphertext(residues, scale)
    ring.seal.Decryptor(ring.context, key).decrypt(ciphertext, plaintext)
    return np.array(ring.seal.CKKSEncoder(ring.context).decode_complex(plaintext))


@pytest.fixture
def fresh():
    return owner_of(PLAN).inputs(batch(SPEC, 300)[0])


def test_inputs_are_repeated_features_and_ones_of_the_samples_that_are_there(fresh):
    owner, (features, _) = owner_of(PLAN), batch(SPEC, 300)
    whole = fresh.whole(DESK)
    assert whole.shape == (6, 2, 1, RING.degree)
    for row, column in zip(whole, (*features.T, np.ones(300)), strict=True):
        wanted = owner.slots.repeated(column)
        np.testing.assert_allclose(decrypted(row, 2.0**PLAN.scales.inputs), wanted, atol=1e-3)


def test_packed_features_and_labels_decrypt_to_what_they_were():
    spec = Spec((20, 3), loss="squared")
    plan, owner = plan_of(spec), owner_of(plan_of(spec))
    features, targets = batch(spec, 100)
    packs = owner.packed(features).whole(Desk(plan.ring))
    assert packs.shape == (2, 2, 1, plan.ring.degree)
    for index, row in enumerate(packs):
        wanted = owner.slots.packed(features[:, 16 * index : 16 * index + 16])
        found = decrypted(row, 2.0**plan.scales.packed, plan.ring)
        np.testing.assert_allclose(found, wanted, atol=0.05)
    labels = owner.labels(targets).whole(Desk(plan.ring))
    assert labels.shape == (3, 2, plan.formats["o"].level, plan.ring.degree)
    for label, row in enumerate(labels):
        wanted = owner.slots.repeated((targets == label).astype(float))
        found = decrypted(row, 2.0**plan.scales.labels, plan.ring)
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_seeds_are_expanded_as_seal_does_itself(tmp_path):
    ring, path = RING, str(tmp_path / "ciphertext")
    encryptor = ring.seal.Encryptor(ring.context, keys_of(ring).seal_key())
    plaintext = encode(ring, np.arange(ring.slots) / ring.slots + 0j, 2.0**24, 1)
    seeded = encryptor.encrypt_symmetric(plaintext)
    seeded.save(path)
    seals = ring.seal.Ciphertext()
    seals.load(ring.context, path)
    first, seed = DESK.fresh(seeded, 1)
    ours = Fresh(first, np.frombuffer(seed, np.uint8)[None]).whole(DESK)
    np.testing.assert_array_equal(ours[0], DESK.residues(seals))


def test_two_encryptions_of_the_same_have_nothing_in_common(fresh):
    again = owner_of(PLAN).inputs(batch(SPEC, 300)[0])
    assert len({seed.tobytes() for seed in (*fresh.seeds, *again.seeds)}) == 12
    # Equal residues by chance: 24,576 pairs, each with a chance of 2^-54.
    assert not (fresh.first == again.first).any()
    assert not (fresh.whole(DESK)[:, 1] == again.whole(DESK)[:, 1]).any()


def taken(arrays, level=1):
    return Fresh.from_arrays(arrays, INPUTS, RING, 6, level)


def test_fresh_ciphertexts_come_off_the_wire_as_they_went(fresh):
    again = taken(fresh.to_arrays(INPUTS))
    np.testing.assert_array_equal(again.first, fresh.first)
    np.testing.assert_array_equal(again.seeds, fresh.seeds)


@pytest.mark.parametrize("part", ["first", "seeds"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda array: None,
        lambda array: array[:-1],
        lambda array: array[None],
        lambda array: np.concatenate([array, array]),
        lambda array: array[..., :-1],
        lambda array: array.astype(np.int64),
        lambda array: array.astype(np.float64),
        lambda array: array.astype(object),
        lambda array: array.astype(">u4"),
        lambda array: np.zeros(0, array.dtype),
    ],
)
def test_hostile_arrays_are_refused_by_name(fresh, part, spoil):
    arrays = fresh.to_arrays(INPUTS)
    spoilt = spoil(arrays.pop(f"{INPUTS}.{part}"))
    if spoilt is not None:
        arrays[f"{INPUTS}.{part}"] = spoilt
    with pytest.raises(CiphertextError, match=rf"inputs\.{part} should be"):
        taken(arrays)


def test_residues_beyond_their_prime_and_of_another_level_are_refused(fresh):
    first = fresh.first.copy()
    first[3, 0, 17] = RING.primes[0]
    with pytest.raises(CiphertextError, match="inputs: a residue is not below its prime"):
        taken(replace(fresh, first=first).to_arrays(INPUTS))
    with pytest.raises(CiphertextError, match=r"inputs\.first should be"):
        taken(fresh.to_arrays(INPUTS), level=2)


def test_a_key_of_another_ring_is_refused_with_the_mend():
    keys = OwnerKeys.generate(Ring(4096, (50, 55)))
    with pytest.raises(ValueError, match="name another key file"):
        Owner(PLAN, keys)


@pytest.mark.parametrize("shape", [(513, 5), (10, 4), (10,)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="should be at most 512 by 5"):
        owner_of(PLAN).inputs(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = batch(SPEC, 10)[0]
    features[3, 2] = value
    for encrypt in (owner_of(PLAN).inputs, owner_of(PLAN).packed):
        with pytest.raises(ValueError, match="not finite"):
            encrypt(features)


def test_answers_are_softmax_less_the_label_their_means_and_the_loss():
    spec = Spec((4, 4, 3))
    plan, owner = plan_of(spec), owner_of(plan_of(spec))
    desk, rng = Desk(plan.ring), np.random.default_rng(0)
    logits, targets = rng.normal(size=(200, 3)) * 4, rng.integers(0, 3, 200)
    encryptor = plan.ring.seal.Encryptor(plan.ring.context, keys_of(plan.ring).seal_key())
    rows = []
    for column in logits.T:
        made = plan.ring.seal.Ciphertext()
        slots = owner.slots.repeated(column)
        encryptor.encrypt_symmetric(encode(plan.ring, slots, 2.0**46, 1), made)
        rows.append(desk.residues(made))
    answer = owner.answer(Value(np.stack(rows), 2.0**46), targets)
    raised = np.exp(logits)
    softmax = raised / raised.sum(1, keepdims=True)
    errors = softmax - np.eye(3)[targets]
    assert answer.loss == pytest.approx(-np.log(softmax[np.arange(200), targets]).mean(), abs=1e-6)
    assert answer.accuracy == np.mean(logits.argmax(1) == targets)
    np.testing.assert_allclose(answer.bias, errors.mean(0), atol=1e-6)
    form = plan.formats["delta"]
    fresh = Fresh.from_arrays(answer.arrays, ERRORS, plan.ring, 3, form.level).whole(desk)
    for row, column in zip(fresh, errors.T, strict=True):
        found = decrypted(row, 2.0**form.scale, plan.ring)
        np.testing.assert_allclose(found, owner.slots.repeated(column), atol=1e-4)
    packs = Fresh.from_arrays(answer.arrays, PACKED_ERRORS, plan.ring, 1, 1).whole(desk)
    found = decrypted(packs[0], 2.0**plan.scales.packed, plan.ring)
    np.testing.assert_allclose(found, owner.slots.packed(errors), atol=0.01)


def means(changed=None):
    """Three packed leaves of encrypted nothing, one of them changed."""
    seeded = owner_of(PLAN).packed(np.zeros((1, 5))).whole(DESK)[0]
    good = Packed(seeded, PLAN.packed_scale("means0"), 3)
    sums = Packed(seeded, PLAN.packed_scale("delta"), 2)
    found = {weight(0): [good], bias(0): [sums]}
    if changed is not None:
        found[weight(0)] = [replace(good, **changed)] if changed else []
    return found


def test_means_of_nothing_are_nothing():
    found = owner_of(PLAN).gradients(means(), 1)
    assert {name: array.shape for name, array in found.items()} == SPEC.shapes
    assert max(np.abs(array).max() for array in found.values()) < 1e-3


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "no mean gradients came"),
        ({"leaves": 0}, "no packed mean"),
        ({"scale": 2.0**-200}, "where the plan has"),
        ({"scale": float("nan")}, "where the plan has"),
        ({"scale": 0.0}, "where the plan has"),
        ({"leaves": 10**9}, "no packed mean"),
        ({"leaves": 4}, "no 3 by 5"),
        ({"leaves": 2}, "no 3 by 5"),
        ({"residues": np.zeros((3, 1, RING.degree), np.uint64)}, "no packed mean"),
        ({"residues": np.full((2, 1, RING.degree), 2**63, np.uint64)}, "not below its prime"),
    ],
)
def test_hostile_means_are_refused(changed, told):
    with pytest.raises(CiphertextError, match=told):
        owner_of(PLAN).gradients(means(changed), 1)


def test_a_mean_that_is_noise_is_told_as_wrapped_round():
    """Uniform coefficients: that all lie in the middle eighth is one chance in 10^13."""
    noise = np.random.default_rng(0).integers(0, RING.primes[0], (2, 1, RING.degree), np.uint64)
    with pytest.raises(WrapAroundError, match=r"layers\.0\.weight"):
        owner_of(PLAN).gradients(means({"residues": noise}), 512)
