"""What a step of training on ciphertexts costs, part by part, and how near it is to what key switching alone takes.

    python benchmarks/encrypted_step.py                    # 64-32-10 and 784-32-10, both losses; two minutes
    python benchmarks/encrypted_step.py --sizes 64 32 10 --loss squared --steps 5

CPU seconds of one process with one thread; medians. The limit is what SEAL needs for the key switches that a step can't
do without: relinearisations and automorphisms, counted on the way, times one of each at the level where it is done.
Nothing of the party is changed: the classes of SEAL's evaluator and of packing are looked at from outside.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import versions
from tenseal import sealapi

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients.encrypted import evaluation
from clients.encrypted.evaluation import Evaluation
from clients.encrypted.owner import Fresh, Owner
from clients.encrypted.packing import Packer
from clients.encrypted.plan import plan_of
from clients.encrypted.ring import Desk
from clients.encrypted.spec import Spec
from tests.support.encrypted import Bench, batch, evaluation_keys, network, parameters

SAMPLES = 512
ONCE = ", once"
SWITCHES = ("relinearize_inplace", "apply_galois", "complex_conjugate")


class Clock:
    """CPU seconds by part: each second is the innermost one's, but for what is done once for many steps."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.switches: Counter[tuple[str, int]] = Counter()
        self._open: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside is this part's."""
        self._turn()
        once = bool(self._open) and self._open[-1].endswith(ONCE)
        self._open.append(self._open[-1] if once else name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **settings: Any) -> Any:
            with self.part(name):
                return function(*args, **settings)

        return timed


class Counted:
    """SEAL's evaluator, whose key switches are counted by kind and level."""

    def __init__(self, evaluator: Any, clock: Clock) -> None:
        self._evaluator, self._clock = evaluator, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._evaluator, name)
        if name not in SWITCHES:
            return found

        def counted(item: Any, *rest: Any) -> Any:
            kind = "product" if name == "relinearize_inplace" else "automorphism"
            self._clock.switches[kind, item.coeff_modulus_size()] += 1
            return found(item, *rest)

        return counted


PARTS = {
    (evaluation, "matmul"): "matrix products",
    (Evaluation, "_activate"): "activations",
    (Evaluation, "_product"): "slopes",
    (Evaluation, "_leaf"): "leaves",
    (Evaluation, "pack"): "packing of errors",
    (Packer, "pack"): "tree",
    (Desk, "ciphertext"): "residues in and out",
    (Desk, "residues"): "residues in and out",
    (Owner, "inputs"): "owner, once",
    (Owner, "packed"): "owner, once",
    (Owner, "labels"): "owner, once",
    (Fresh, "whole"): "expansion, once",
    (Owner, "answer"): "owner",
    (Owner, "gradients"): "owner",
}


def step(spec: Spec, steps: int) -> tuple[dict[str, float], Counter[tuple[str, int]]]:
    """Median seconds of each part, and the key switches of a step."""
    clocks, arrays, examples = [], parameters(network(spec)), batch(spec, SAMPLES)
    for _ in range(steps):
        clock = Clock()
        real = sealapi.Evaluator
        patches = [
            patch.object(owner, name, clock.of(part, getattr(owner, name)))
            for (owner, name), part in PARTS.items()
        ]
        patches.append(
            patch.object(sealapi, "Evaluator", lambda c, k=clock, r=real: Counted(r(c), k))
        )
        for each in patches:
            each.start()
        try:
            with clock.part("rest"):
                Bench(spec).step(arrays, *examples)
        finally:
            for each in patches:
                each.stop()
        clocks.append(clock)
    parts = dict.fromkeys((*PARTS.values(), "rest"), 0.0)
    return (
        {part: median(clock.seconds[part] for clock in clocks) for part in parts},
        clocks[-1].switches,
    )


def one(spec: Spec, kind: str, level: int, runs: int = 40) -> float:
    """CPU seconds of SEAL's key switch at a level."""
    plan = plan_of(spec)
    ring, (relin, galois) = plan.ring, evaluation_keys(plan)
    evaluator, desk = ring.seal.Evaluator(ring.context), Desk(ring)
    bench = Bench(spec)
    features = batch(spec, 8)[0]
    whole = bench.owner.inputs(features).whole(desk)[0, :, :level]
    item, found = desk.ciphertext(whole, 2.0**10), ring.seal.Ciphertext()
    squared = [ring.seal.Ciphertext() for _ in range(runs)]
    for each in squared:
        evaluator.square(item, each)
    began = time.process_time()
    for each in squared:
        if kind == "product":
            evaluator.relinearize_inplace(each, relin)
        else:
            evaluator.apply_galois(item, plan.galois[-1], galois, found)
    return (time.process_time() - began) / runs


def report(spec: Spec, steps: int) -> None:
    """The table of one model."""
    parts, switches = step(spec, steps)
    ring = plan_of(spec).ring
    whole = sum(seconds for part, seconds in parts.items() if not part.endswith(ONCE))
    limit = sum(count * one(spec, *key) for key, count in switches.items())
    sizes = "-".join(map(str, spec.sizes))
    print(f"\n{sizes}, {spec.loss}, {SAMPLES} samples; N {ring.degree}, bits {list(ring.bits)}")
    print("| part | CPU s | share |\n|---|---|---|")
    for part, seconds in parts.items():
        share = "" if part.endswith(ONCE) else f"{seconds / whole:.0%}"
        print(f"| {part} | {seconds:.3f} | {share} |")
    told = ", ".join(f"{n} {kind}s at level {level}" for (kind, level), n in switches.items())
    print(
        f"| a step | {whole:.3f} | |\n| its key switches alone | {limit:.3f} | {limit / whole:.0%} |"
    )
    print(f"Key switches: {told}.", flush=True)


def main() -> None:
    """Reads the command line."""
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--sizes", type=int, nargs="+")
    reader.add_argument("--loss", choices=["cross_entropy", "squared"])
    reader.add_argument("--steps", type=int, default=3)
    options = reader.parse_args()
    load = os.getloadavg()[0]
    print(versions(), f"tenseal {version('tenseal')}; load {load:.1f} at the start")
    for sizes in [options.sizes] if options.sizes else [(64, 32, 10), (784, 32, 10)]:
        for loss in [options.loss] if options.loss else ["cross_entropy", "squared"]:
            report(Spec(tuple(sizes), loss=loss), options.steps)


if __name__ == "__main__":
    main()
