"""Errors of decrypted gradients against the model that bounds them, and the noise and the ledger that cover them."""

import tempfile
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from clients.encrypted.evaluation import Evaluation
from clients.encrypted.flooding import Flooding, Release
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ledger import ReleaseLedger
from clients.encrypted.network import PolynomialNet
from clients.encrypted.noise import ErrorModel, Magnitudes, switching
from clients.encrypted.owner import Owner
from clients.encrypted.plan import plan_of
from clients.encrypted.ring import Desk, Ring, centred
from clients.encrypted.spec import Spec
from clients.tasks import Mnist
from strategies.wire import Refused
from tests.support import encrypted as support

CROSS_ENTROPY = Spec((16, 8, 4))
SQUARED = Spec((16, 8, 4), loss="squared")
LOGISTIC = Spec((16, 4))


def one_step(spec, features, targets, arrays):
    """All that a step releases, (elements,), under a new key."""
    bench = support.Bench(spec)
    keys = OwnerKeys.generate(bench.plan.ring)
    relin, galois = keys.evaluation(bench.plan.galois).seal(bench.plan.ring)
    bench.owner = Owner(bench.plan, keys)
    bench.workers = [Evaluation(bench.plan, relin, galois) for _ in bench.units]
    found = bench.step(arrays, features, targets).gradients
    return np.concatenate([found[name].ravel() for name in sorted(found)])


def case(spec, seed=3):
    features, targets = support.batch(spec, spec.batch, 1)
    arrays = support.parameters(support.network(spec, seed, logit_scale=1.0))
    return features, targets, arrays


def errors(spec, keys):
    """Error norms of a step under so many keys, against their mean; what is public is in all of them alike."""
    rows = np.stack([one_step(spec, *case(spec)) for _ in range(keys)])
    return np.linalg.norm(rows - rows.mean(0), axis=1) * sqrt(keys / (keys - 1))


@pytest.mark.parametrize(
    "spec", [CROSS_ENTROPY, SQUARED, LOGISTIC], ids=["ce", "squared", "logistic"]
)
def test_errors_of_real_steps_are_within_the_bound_and_of_the_predicted_size(spec):
    # With four independent directions a key at the least, and three keys' freedom, the ratio to an exact model's
    # leaves (1/12, 6) less often than once in 10^4 (chi-square with 12 degrees of freedom).
    features, targets, arrays = case(spec)
    norms = errors(spec, 4)
    model = ErrorModel(plan_of(spec), Magnitudes.of(spec, arrays, features, targets))
    assert norms.max() < model.bound
    assert 1 / 12 < np.mean(norms**2) / model.energy < 6
    assert model.bound < 12 * sqrt(np.mean(norms**2))  # and it is not idle


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        CROSS_ENTROPY, SQUARED, LOGISTIC, Spec((16, 4), loss="squared"),
        Spec((16, 8, 4), activation="cubic"), Spec((12, 6, 6, 4), batch=1024),
    ],
    ids=str,
)  # fmt: skip
def test_over_many_keys_no_error_passes_the_bound(spec):
    # The bound: 2^-40 a part and step. The energy, now with 44 degrees of freedom: once in 10^5.
    norms = errors(spec, 12)
    features, targets, arrays = case(spec)
    model = ErrorModel(plan_of(spec), Magnitudes.of(spec, arrays, features, targets))
    assert norms.max() < model.bound
    assert 1 / 3 < np.mean(norms**2) / model.energy < 3


def switched(ring, encryptions):
    """Errors (encryptions, N) of coefficients that an automorphism's key switch adds at level 1, under one new key."""
    seal, desk, element = ring.seal, Desk(ring), 2 * ring.degree - 1
    keys = OwnerKeys.generate(ring)
    _, galois = keys.evaluation((element,)).seal(ring)
    evaluator, secret = seal.Evaluator(ring.context), keys.seal_key()
    encryptor, decryptor = (
        seal.Encryptor(ring.context, secret),
        seal.Decryptor(ring.context, secret),
    )

    def opened(ciphertext):
        plain = seal.Plaintext()
        decryptor.decrypt(ciphertext, plain)
        residues = desk.transformed(desk.plain_residues(plain, 1), back=True)[0]
        return centred(residues, ring.primes[0]).astype(float)

    zero, rows = seal.Plaintext(), []
    seal.CKKSEncoder(ring.context).encode(0.0, 2.0**30, zero)
    for _ in range(encryptions):
        before, after = seal.Ciphertext(), seal.Ciphertext()
        encryptor.encrypt_symmetric(zero, before)
        evaluator.apply_galois(before, element, galois, after)
        noise = opened(before)
        rows.append(opened(after) - np.concatenate([noise[:1], -noise[:0:-1]]))  # X -> 1 / X
    return np.stack(rows)


@pytest.mark.parametrize("bits", [(54, 55), (54, 50)], ids=["longer", "shorter"])
def test_a_key_switch_adds_as_much_as_is_said_and_its_mean_is_the_keys(bits):
    # The mean's energy has about two degrees of freedom a key: of twelve keys' its ratio leaves (1/5, 2.7) once in
    # 4 · 10^4 tests. The spread's, with 15 · 4096 a key, has a deviation of two in a thousand.
    ring = Ring(4096, bits)
    white, mean = switching(ring, 1)
    kept, spread = [], []
    for _ in range(12):
        rows = switched(ring, 16)
        spread.append(rows.var(axis=0, ddof=1).mean())
        kept.append(np.square(rows.mean(axis=0)).mean() - spread[-1] / len(rows))
    assert np.mean(spread) == pytest.approx(white, rel=0.05)
    assert 1 / 5 < np.mean(kept) / mean < 2.7


def test_larger_scales_have_smaller_errors():
    spec = Spec((64, 32, 10))
    plan, sizes = plan_of(spec), Magnitudes.assumed(spec)
    finer = replace(plan, scales=replace(plan.scales, packed=plan.scales.packed + 1))
    assert ErrorModel(finer, sizes).bound < ErrorModel(plan, sizes).bound


def test_a_mini_batch_that_is_not_full_has_larger_errors_and_bounds():
    plan, sizes = plan_of(CROSS_ENTROPY), Magnitudes.assumed(CROSS_ENTROPY)
    half = ErrorModel(plan, sizes, samples=CROSS_ENTROPY.batch // 2).bound
    assert half == pytest.approx(2 * ErrorModel(plan, sizes).bound)


@pytest.fixture(scope="module")
def keys():
    return OwnerKeys.generate(Ring(4096, (54, 55)))


def ledger_of(keys, folder):
    return ReleaseLedger(folder / "owner.key", keys.fingerprint)


def release(keys, folder, **settings):
    return Release(keys, ledger_of(keys, folder), Flooding(**settings), bound=1e-3)


def test_the_deviation_is_the_papers():
    assert Flooding(noise_bits=10, decryptions=100).deviation(2e-6, 7) == pytest.approx(
        sqrt(1200) * 32 * 2e-6
    )
    assert Flooding(multiple=8).deviation(3e-3, 9) == pytest.approx(8e-3)


def test_the_noise_is_gaussian_of_the_stated_deviation(keys, tmp_path):
    told = release(keys, tmp_path, noise_bits=4)({"a": np.zeros((300, 100))})["a"]
    sigma = sqrt(12 * 4096) * 4 * 1e-3
    # Both fail for a right implementation less often than once in 10^6.
    assert kstest(told.ravel() / sigma, "norm").pvalue > 5e-7
    assert abs(told.std() / sigma - 1) < 5 / sqrt(2 * told.size)


def test_a_step_sent_again_has_the_same_noise_and_is_charged_once(keys, tmp_path):
    once = release(keys, tmp_path, decryptions=1)
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2)}
    first, again = once(values), once(values)
    for name in values:
        np.testing.assert_array_equal(first[name], again[name])


@given(st.sampled_from(["value", "name", "shape", "deviation", "key"]))
def test_noise_is_never_used_for_another_release(changed):
    ring = Ring(4096, (54, 55))
    one = support.keys_of(ring)
    other = OwnerKeys.generate(ring) if changed == "key" else one
    values = {"a": np.arange(6.0)}
    theirs = {
        "value": {"a": np.arange(6.0) + 2.0**-50 * (np.arange(6) == 1)},
        "name": {"b": values["a"]},
        "shape": {"a": values["a"].reshape(2, 3)},
    }.get(changed, values)
    with tempfile.TemporaryDirectory() as folder:
        first = release(one, Path(folder))(values)["a"] - values["a"]
        multiple = 8 if changed == "deviation" else 1
        name = next(iter(theirs))
        second = release(other, Path(folder), multiple=multiple)(theirs)[name] - theirs[name]
    ratio = second.ravel() / first
    assert np.ptp(ratio) > 1e-3  # the same noise, at whatever scale, has a constant ratio


def test_a_key_tells_no_more_than_it_may_over_restarts_too(keys, tmp_path):
    for step in range(3):
        release(keys, tmp_path, decryptions=3)({"a": np.full(4, float(step))})
    with pytest.raises(Refused) as refused:
        release(keys, tmp_path, decryptions=3)({"a": np.full(4, 3.0)})
    assert refused.value.reason == "worn"
    release(keys, tmp_path, decryptions=3)({"a": np.full(4, 1.0)})  # was told before


def test_nothing_is_told_that_the_ledger_does_not_hold(keys, tmp_path):
    folder = tmp_path / "ledger"
    folder.write_text("")  # no folder can be made here
    with pytest.raises(OSError, match=r"exists|directory"):
        release(keys, folder)({"a": np.ones(3)})


def test_the_ledger_says_nothing_of_values_or_key(keys, tmp_path):
    values = {"a": np.full(4, 0.125)}
    release(keys, tmp_path)(values)
    other = OwnerKeys.generate(keys.ring)
    release(other, tmp_path)(values)
    lines = (tmp_path / "owner.key.ledger").read_text().split("\n")[1:]
    assert len({line.split()[2] for line in lines}) == 2  # under another key another word


@pytest.mark.parametrize("bound", [0.0, float("nan"), float("inf")])
def test_a_bound_that_covers_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="covers nothing"):
        Flooding().deviation(bound, 3)


def test_what_is_not_finite_is_not_told(keys, tmp_path):
    with pytest.raises(ValueError, match="finite"):
        release(keys, tmp_path)({"a": np.array([np.nan])})
    assert not list(tmp_path.rglob("ledger"))


@pytest.mark.parametrize("features", ["raw", "dct", "hog"])
def test_no_sample_of_a_mini_batch_is_longer_than_its_bound_covers(features):
    # By the assumed magnitudes alone one in twenty of MNIST's images was, in raw pixels.
    examples = Mnist().train().take(np.arange(512))
    module = PolynomialNet(Mnist.input_shape, 10, features=features)
    rows = module.featurise(examples.inputs).numpy()
    spec = Spec(module.sizes)
    covered = Magnitudes.assumed(spec).over(rows)
    longest = float(np.linalg.norm(rows, axis=1).max())
    assert covered.features >= longest
    plan, assumed = plan_of(spec), Magnitudes.assumed(spec)
    larger = ErrorModel(plan, covered).bound > ErrorModel(plan, assumed).bound
    assert larger == (longest > assumed.features)
