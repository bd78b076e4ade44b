"""Plans: secure rings, and levels, scales and room that are those of a real step."""

from itertools import product
from math import log2

import numpy as np
import pytest

from clients.encrypted.plan import HEADROOM, Plan, plan_of
from clients.encrypted.ring import MOST_BITS
from clients.encrypted.spec import Spec, bias, weight
from tests.support.encrypted import (
    Bench,
    batch,
    coefficients,
    descended,
    images,
    network,
    parameters,
    shadow,
)

LOSSES = ("cross_entropy", "squared")
DEPTHS = {0: (7, 3), 1: (7, 4, 3), 2: (7, 4, 4, 3)}


@pytest.mark.parametrize("hidden", DEPTHS)
@pytest.mark.parametrize("activation", ["square", "cubic"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_ring_is_secure_and_holds_its_step(hidden, activation, loss):
    for size, features in product([1 << power for power in range(14)], (0, 300)):
        sizes = (features, *DEPTHS[hidden][1:]) if features else DEPTHS[hidden]
        plan = plan_of(Spec(sizes, activation, loss, size))
        ring = plan.ring
        seal = ring.seal
        assert sum(ring.bits) <= MOST_BITS[ring.degree]
        assert sum(prime.bit_length() for prime in ring.primes) == sum(ring.bits)
        most = seal.CoeffModulus.MaxBitCount(ring.degree, seal.SEC_LEVEL_TYPE.TC128)
        assert sum(ring.bits) <= most
        assert ring.slots >= size
        assert plan.copies * size == ring.slots
        assert max(form.level for form in plan.formats.values()) == ring.levels
        assert min(form.level for form in plan.formats.values()) == 1


@pytest.mark.parametrize(
    ("spec", "degree", "levels"),
    [
        (Spec((64, 10)), 4096, 1),
        (Spec((64, 10), loss="squared"), 8192, 2),
        (Spec((64, 32, 10)), 8192, 2),
        (Spec((64, 32, 10), loss="squared"), 8192, 3),
        (Spec((64, 32, 10), "cubic"), 8192, 3),
        (Spec((64, 32, 10), "cubic", "squared"), 16384, 4),
        (Spec((64, 16, 8, 10)), 16384, 4),
        (Spec((64, 16, 8, 10), loss="squared"), 16384, 5),
    ],
)
def test_rings_are_as_small_as_their_depth_allows(spec, degree, levels):
    ring = plan_of(spec).ring
    assert (ring.degree, ring.levels) == (degree, levels)


def test_automorphisms_are_the_trees_and_where_features_are_paired_the_conjugation():
    plan = plan_of(Spec((64, 32, 10)))
    assert plan.copies == 8
    assert plan.galois == tuple((1 << level) + 1 for level in range(5, 14))
    paired = plan_of(Spec((300, 32, 10)))
    assert paired.galois == (*plan.galois, 2 * 8192 - 1)
    assert (plan.inputs, paired.inputs) == (65, 151)
    assert [plan.packs(units) for units in (1, 16, 17, 784)] == [1, 1, 2, 49]


class Seen:
    """What SEAL's evaluator is given to square, multiply and rescale: levels and scales."""

    def __init__(self, evaluator, notes):
        self._evaluator, self._notes = evaluator, notes

    def __getattr__(self, name):
        return getattr(self._evaluator, name)

    def _note(self, what, item):
        level, scale = item.coeff_modulus_size(), log2(item.scale)
        self._notes.setdefault(what, set()).add((level, round(scale, 5)))

    def square(self, item, found):
        self._note("squared", item)
        self._evaluator.square(item, found)

    def multiply(self, first, second, found):
        self._note("multiplied", first)
        self._note("multiplied", second)
        self._evaluator.multiply(first, second, found)

    def rescale_to_next_inplace(self, item):
        self._note("before", item)
        self._evaluator.rescale_to_next_inplace(item)
        self._note("behind", item)


def specs(*sizes):
    """With all activations and losses; the deepest take their time."""
    return [
        pytest.param(
            Spec(each, activation, loss),
            marks=[pytest.mark.slow] if len(each) > 3 else [],
            id=f"{'-'.join(map(str, each))} {activation} {loss}",
        )
        for each, activation, loss in product(sizes, ("square", "cubic"), LOSSES)
        if len(each) > 2 or activation == "square"
    ]


@pytest.mark.parametrize("spec", specs(*DEPTHS.values()))
def test_formats_are_the_levels_and_scales_of_a_real_step(spec, monkeypatch):
    from tenseal import sealapi

    real, notes = sealapi.Evaluator, {}
    monkeypatch.setattr(sealapi, "Evaluator", lambda context: Seen(real(context), notes))
    plan, last = plan_of(spec), spec.layers - 1
    start = {name: array / 2 for name, array in parameters(network(spec)).items()}
    step = Bench(spec).step(start, *batch(spec, 40))
    forms = {name: (f.level, round(f.scale, 5)) for name, f in plan.formats.items()}
    for name, value in step.values.items():
        assert (value.level, round(log2(value.scale), 5)) == forms.pop(name), name
    rescaled = {name for name in plan.formats if name.endswith("*")}
    assert notes.get("before", set()) == {forms[name] for name in rescaled}
    ends = {name[:-1]: plan.formats[name[:-1]] for name in rescaled}
    assert notes.get("behind", set()) == {(f.level, round(f.scale, 5)) for f in ends.values()}
    squared = {forms[name] for name in forms if name[0] == "z"}
    errors = plan.formats["delta"]
    squared |= {(errors.level, round(errors.scale, 5))} if spec.loss == "squared" else set()
    assert notes.get("squared", set()) == squared
    scales = {scale for _, scale in notes.get("multiplied", set())}
    assert {forms[name][1] for name in forms if name[0] == "e"} <= scales
    for layer in range(last + 1):
        scale = plan.formats[f"means{layer}"].scale
        for mean in step.means[weight(layer)]:
            assert mean.residues.shape[:2] == (2, 1)
            assert log2(mean.scale) == pytest.approx(scale + plan.lift(2.0**scale), abs=1e-5)
    if spec.loss == "cross_entropy":
        assert bias(last) not in step.means or not last


def left(plan: Plan, values: dict[str, np.ndarray]) -> dict[str, float]:
    """Bits between the largest coefficient of each value and half its modulus."""
    found, largest = {}, {}
    for name, numbers in values.items():
        form = plan.formats.get(name)
        if form is None:  # no mask where the owner packs errors itself
            continue
        if name.startswith("means") and not name.endswith("*"):
            lift = plan.lift(2.0**form.scale)
            found[name] = plan.room(2.0 ** (form.scale + lift)) - log2(np.abs(numbers).max())
            continue
        if id(numbers) not in largest:  # before and behind rescaling it is the same
            padded = np.zeros((numbers.shape[1], plan.spec.batch))
            padded[:, : len(numbers)] = numbers.T
            slots = np.repeat(padded, plan.copies, axis=1).astype(complex)
            largest[id(numbers)] = float(np.abs(coefficients(plan.ring, slots)).max())
        found[name] = form.room - log2(largest[id(numbers)])
    return found


@pytest.mark.parametrize("spec", specs((64, 10), (64, 32, 10), (64, 16, 8, 10)))
def test_values_stay_below_their_room_at_the_start_and_after_training(spec):
    plan = plan_of(spec)
    normal, real = batch(spec, spec.batch), images("dct", 64)
    first = tuple(part[: spec.batch] for part in real)
    # One digit alone has the largest mean gradients.
    order = np.argsort(real[1], kind="stable")[:300]
    alone = tuple(part[order] for part in real)
    start = parameters(network(spec))
    cases = {
        "normal": (start, normal),
        "images": (start, first),
        "one digit": (start, alone),
        "trained": (descended(spec, *real, steps=40), first),
    }
    if spec == Spec((64, 16, 8, 10), "cubic", "squared"):
        # z^9 of a Gaussian: mean gradients above 100, which an owner refuses (test_evaluation).
        del cases["normal"]
    for name, (arrays, examples) in cases.items():
        bits = left(plan, shadow(spec, arrays, *examples))
        assert set(bits) | {f"{n}*" for n in bits} >= set(plan.formats), "a value without a shadow"
        least = min(bits, key=bits.__getitem__)
        assert bits[least] >= HEADROOM, f"{name}: {least} has {bits[least]:.1f} bits left"
