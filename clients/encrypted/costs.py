"""What a step on ciphertexts takes: how many operations of which kind, and how long each takes on this machine.

The counts follow from the plan alone: they are those of `evaluation` and `packing`, unit by unit and leaf by leaf. By
far the dearest is the switch of a key, one for each product of two ciphertexts and each automorphism; its cost grows
with the square of the level (Halevi, Polyakov, Shoup 2019, "An Improved RNS Variant of the BFV Homomorphic Encryption
Scheme", §4, for the same technique), which is why steps come down to level 1 before they pack.

Times are measured, in about half a second, with a key that is made for it and thrown away: it has encrypted nothing but
zeros. Measurements are kept in this process only, since another machine, or another neighbour on it, has other ones.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, log2
from multiprocessing import Pipe
from typing import Any, Final

import numpy as np

from clients.encrypted.linear import EXACT_BITS, matmul
from clients.encrypted.packing import Slots, encode
from clients.encrypted.plan import MEANS_LEVEL, Plan
from clients.encrypted.ring import Desk, Ring

MULTIPLY, SWITCH, TURN, RESCALE = "products", "relinearisations", "automorphisms", "rescalings"
PLAIN, LOAD, UNLOAD, ENCODE = "plaintext products", "loads", "stores", "encodings"
ENCRYPT, DECRYPT = "encryptions", "decryptions"

Operation = tuple[str, int]
"""A kind, and the level at which it is done."""
_COLUMNS: Final = 1024
_TIMES: Final = 3
_MOVED: Final = 2**21


@dataclass(frozen=True)
class Product:
    """A linear layer of one worker, modulo all primes of a level.

    Attributes:
        outputs: its own units.
        inputs: ciphertexts of the layer below.
        level: primes.
        bits: of a row of weights in fixed point.
    """

    outputs: int
    inputs: int
    level: int
    bits: int

    def flops(self, ring: Ring) -> float:
        """Floating-point operations."""
        limbs = sum(
            ceil(prime.bit_length() / (EXACT_BITS - self.bits))
            for prime in ring.primes[: self.level]
        )
        return 4.0 * self.outputs * self.inputs * ring.degree * limbs


@dataclass
class Work:
    """What is done in a step.

    Attributes:
        operations: how many.
        products: linear layers.
        moved: bytes between processes.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    products: list[Product] = field(default_factory=list)
    moved: int = 0

    def add(self, kind: str, level: int, number: int) -> None:
        """So many operations of a kind."""
        self.operations[kind, level] += number

    def seconds(self, machine: Machine) -> float:
        """Of one core."""
        times = sum(number * machine.seconds(*one) for one, number in self.operations.items())
        return (
            times + sum(map(machine.product, self.products)) + self.moved * machine.seconds_a_byte
        )


class Machine:
    """Seconds that each operation takes here, measured when it is first asked for.

    Args:
        ring: of the ciphertexts.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring, self._seal = ring, ring.seal
        self._desk, self._slots = Desk(ring), Slots(ring, 1)
        generator = self._seal.KeyGenerator(ring.context)
        self._secret = generator.secret_key()
        self._relin, self._galois = self._seal.RelinKeys(), self._seal.GaloisKeys()
        public = self._seal.PublicKey()
        generator.create_public_key(public)
        generator.create_relin_keys(self._relin)
        generator.create_galois_keys([2 * ring.degree - 1], self._galois)
        self._encryptor = self._seal.Encryptor(ring.context, public, self._secret)
        self._evaluator = self._seal.Evaluator(ring.context)
        self._known: dict[Operation | Product, float] = {}
        self.seconds_a_byte = _moving()

    def seconds(self, kind: str, level: int) -> float:
        """Of one operation at a level."""
        known = self._known.get((kind, level))
        if known is None:
            known = self._known[kind, level] = _least(self._operation(kind, level))
        return known

    def product(self, product: Product) -> float:
        """Of a linear layer, extrapolated from some of its columns."""
        known = self._known.get(product)
        if known is None:
            known = sum(
                self._columns(product, prime) for prime in self._ring.primes[: product.level]
            )
            self._known[product] = known
        return known

    def _columns(self, product: Product, prime: int) -> float:
        from threadpoolctl import threadpool_limits

        random = np.random.default_rng(0)
        most = max(1, (1 << product.bits) // product.inputs)
        weights = random.integers(-most, most + 1, (product.outputs, product.inputs))
        columns = random.integers(0, prime, (product.inputs, _COLUMNS), np.uint64)
        with threadpool_limits(1):  # as workers are held to
            seconds = _least(lambda: matmul(weights, columns, prime))
        return seconds * 2 * self._ring.degree / _COLUMNS

    def _operation(self, kind: str, level: int) -> Callable[[], Any]:
        seal, evaluator = self._seal, self._evaluator
        plain = encode(self._ring, np.ones(self._ring.slots, complex), 2.0**10, level)
        one, out = self._encryptor.encrypt_symmetric(plain), seal.Ciphertext()
        residues = self._desk.fresh(one, level)
        one = self._desk.ciphertext(residues[0], 2.0**10, seed=residues[1])
        whole = self._desk.residues(one)
        product = seal.Ciphertext()
        evaluator.multiply(one, one, product)

        def turned() -> None:
            evaluator.add(one, one, out)
            evaluator.apply_galois(out, 2 * self._ring.degree - 1, self._galois, product)
            evaluator.add_inplace(product, one)

        chosen: dict[str, Callable[[], Any]] = {
            MULTIPLY: lambda: evaluator.multiply(one, one, out),
            SWITCH: lambda: evaluator.relinearize(product, self._relin, out),
            TURN: turned,
            RESCALE: lambda: evaluator.rescale_to_next(one, out),
            PLAIN: lambda: evaluator.multiply_plain(one, plain, out),
            LOAD: lambda: self._desk.ciphertext(whole, 2.0**10),
            UNLOAD: lambda: self._desk.residues(one),
            ENCODE: lambda: encode(self._ring, self._slots.second, 1.0, level),
            ENCRYPT: lambda: self._desk.fresh(
                self._encryptor.encrypt_symmetric(
                    encode(self._ring, self._slots.second, 1.0, level)
                ),
                level,
            ),
            DECRYPT: lambda: self._decrypted(one),
        }
        return chosen[kind]

    def _decrypted(self, one: Any) -> None:
        plain = self._seal.Plaintext()
        self._seal.Decryptor(self._ring.context, self._secret).decrypt(one, plain)
        self._seal.CKKSEncoder(self._ring.context).decode_double(plain)


@lru_cache(maxsize=4)
def machine_of(ring: Ring) -> Machine:
    """This machine's times, measured once a process."""
    return Machine(ring)


def _least(run: Callable[[], Any]) -> float:
    """Seconds of the fastest run: what others do on the machine only slows."""
    run()
    times = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def _moving() -> float:
    """Seconds a byte takes to another process."""
    ours, theirs = Pipe()
    block = np.zeros(_MOVED // 8, np.uint64)

    def move() -> None:
        sender = threading.Thread(target=theirs.send, args=(block,))
        sender.start()
        ours.recv()
        sender.join()

    with ours, theirs:
        return _least(move) / _MOVED


def step(plan: Plan, workers: int, chunk: int) -> tuple[Work, Work]:
    """What all workers do in a step together, and what the first alone."""
    counted = _Step(plan, workers, chunk)
    counted.run()
    return counted.shared, counted.alone


def owner(plan: Plan) -> tuple[Work, Work]:
    """What an owner does for a mini-batch once, and in each step."""
    spec, classes = plan.spec, plan.spec.sizes[-1]
    once, each = Work(), Work()
    once.add(ENCRYPT, plan.ring.levels, plan.inputs)
    once.add(ENCRYPT, 1, plan.packs(spec.sizes[0]))
    if spec.loss == "squared":
        once.add(ENCRYPT, plan.formats["o"].level, classes)
    else:
        each.add(DECRYPT, 1, classes)
        each.add(ENCRYPT, plan.formats["delta"].level, classes)
        if spec.layers > 1:
            each.add(ENCRYPT, 1, plan.packs(classes))
    each.add(DECRYPT, 1, trees(plan, 1, 512))
    return once, each


def trees(plan: Plan, workers: int, chunk: int) -> int:
    """Packed ciphertexts that go back in a step."""
    counted = _Step(plan, workers, chunk)
    counted.run()
    return counted.trees


class _Step:
    """Follows a step, as `party.ComputeParty` has it done."""

    def __init__(self, plan: Plan, workers: int, chunk: int) -> None:
        self.plan, self.spec = plan, plan.spec
        self.workers, self.most = workers, min(chunk, Slots(plan.ring, plan.copies).most_leaves)
        self.shared, self.alone, self.trees = Work(), Work(), 0

    def run(self) -> None:
        """Up, down, and the means."""
        spec, squared = self.spec, self.spec.loss == "squared"
        last = spec.layers - 1
        for layer in range(spec.layers):
            self.forward(layer)
        if squared:
            self.errors()
        elif last:
            self.alone.moved += self.bytes(spec.sizes[-1], self.level("delta"))
        for layer in range(last, 0, -1):
            if layer < last or squared:
                self.pack(layer)
            self.means(layer)
            self.backward(layer - 1)
        self.first_means()

    def level(self, name: str) -> int:
        return self.plan.formats[name].level

    def bytes(self, units: int, level: int) -> int:
        return 16 * units * level * self.plan.ring.degree

    def product(self, outputs: int, inputs: int, level: int, scale: int, rows: int = 1) -> None:
        """A linear layer of each worker; its rows of weights have a norm of about one."""
        own = rows * ceil(outputs / self.workers)
        bits = ceil(scale + log2(max(inputs, 2)) / 2)
        self.shared.products += [Product(own, inputs, level, bits)] * min(self.workers, outputs)

    def forward(self, layer: int) -> None:
        spec, plan, add = self.spec, self.plan, self.shared.add
        units, last = spec.sizes[layer + 1], layer == spec.layers - 1
        name = "o" if last else f"z{layer}"
        level = self.level(name)
        if layer:
            self.product(units, spec.sizes[layer] + 1, level, plan.scales.weights)
            self.shared.moved += self.workers * self.bytes(spec.sizes[layer], level)
        else:
            self.product(units, plan.inputs, level, plan.scales.first, 2 if plan.paired else 1)
            if plan.paired:
                for kind, number in ((LOAD, 2), (PLAIN, 1), (TURN, 1), (UNLOAD, 1)):
                    add(kind, level, number * units)
        self.shared.moved += self.bytes(units, self.level(name if last else f"h{layer}"))
        if last:
            return
        add(LOAD, level, units)
        squares = (f"s{layer}*", f"h{layer}*") if spec.power == 3 else (f"h{layer}*",)
        for product in squares:
            self.multiplied(self.level(product), units)
        add(UNLOAD, self.level(f"h{layer}"), units)

    def multiplied(self, level: int, number: int) -> None:
        for kind in (MULTIPLY, SWITCH, RESCALE):
            self.shared.add(kind, level, number)

    def backward(self, layer: int) -> None:
        spec = self.spec
        above, level = spec.sizes[layer + 2], self.level(f"e{layer}")
        units = spec.sizes[layer + 1]
        self.product(units, above, level, self.plan.scales.back)
        self.shared.add(LOAD, level, units)
        self.multiplied(self.level(f"g{layer}*"), units)
        self.shared.add(UNLOAD, self.level(f"g{layer}"), units)
        moved = self.workers * self.bytes(above, level) + self.bytes(units, self.level(f"g{layer}"))
        self.shared.moved += moved

    def errors(self) -> None:
        classes, level = self.spec.sizes[-1], self.level("o")
        self.alone.add(LOAD, level, 3 * classes)
        self.alone.add(ENCODE, level, classes)
        self.alone.add(PLAIN, level, classes)
        self.alone.add(UNLOAD, level, classes)
        self.alone.add(MULTIPLY, level, classes)
        self.alone.add(SWITCH, level, 1)
        self.alone.moved += 4 * self.bytes(classes, level)
        self.packed(1, self.alone)
        self.sums(classes, self.alone)

    def pack(self, layer: int) -> None:
        spec = self.spec
        units, level = spec.sizes[layer + 1], self.level(f"mask{layer}")
        held = self.level("delta" if layer == spec.layers - 1 else f"g{layer}")
        self.alone.add(LOAD, held, units)
        self.alone.add(ENCODE, level, units)
        self.alone.add(PLAIN, level, units)
        self.alone.moved += self.bytes(units, held)
        if layer < spec.layers - 1:
            self.alone.add(LOAD, held, units)
            self.alone.moved += self.bytes(units, held)
            self.sums(units, self.alone)

    def means(self, layer: int) -> None:
        spec, plan = self.spec, self.plan
        packs = plan.packs(spec.sizes[layer + 1])
        sent = layer == spec.layers - 1 and spec.loss != "squared"
        packed = 1 if sent else self.level(f"mask{layer}")
        level = min(self.level(f"h{layer - 1}"), packed, MEANS_LEVEL)
        self.shared.add(LOAD, packed, packs * self.workers)
        self.shared.moved += self.workers * self.bytes(packs, packed)
        self.leaves(layer - 1, packs, level)

    def first_means(self) -> None:
        spec, plan = self.spec, self.plan
        packs = plan.packs(spec.sizes[0])
        self.shared.add(LOAD, 1, packs * self.workers)
        self.leaves(0, packs, 1)
        for own in self.shares(0):
            self.sums(own, self.shared)

    def shares(self, layer: int) -> list[int]:
        """Units of each worker."""
        return [len(share) for share in self.spec.share(layer, self.workers) if len(share)]

    def leaves(self, layer: int, packs: int, level: int) -> None:
        """Products of a layer's units with packed ciphertexts, and their trees."""
        number = self.spec.sizes[layer + 1] * packs
        self.shared.add(MULTIPLY, level, number)
        self.shared.add(SWITCH, level, number)
        if level > 1:
            self.shared.add(RESCALE, level, number * (level - 1))
        self.shared.add(PLAIN, 1, number)
        for own in self.shares(layer):
            self.packed(own * packs, self.shared)

    def sums(self, units: int, work: Work) -> None:
        work.add(PLAIN, 1, ceil(1.5 * units))
        work.add(ENCODE, 1, 1)
        self.packed(ceil(units / 2), work)

    def packed(self, leaves: int, work: Work) -> None:
        """Trees over so many leaves."""
        for start in range(0, leaves, self.most):
            count = min(self.most, leaves - start)
            work.add(TURN, 1, (1 << (count - 1).bit_length()) - 1)  # as many as for a full tree
            work.add(PLAIN, 1, count - 1)
            work.add(ENCODE, 1, 1)
            work.add(UNLOAD, 1, 3)
            work.moved += self.bytes(1, 1)
            self.trees += 1
