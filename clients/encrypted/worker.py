"""One worker of the compute party: a process of its own, since SEAL's bindings hold the interpreter's lock.

Started by `start_worker`, it takes calls of `Evaluation` from the process that started
it, over a pair of sockets that nobody else has, and reads evaluation keys and ciphertexts from that process's folders
by itself. It is never handed a secret key, and starts afresh instead of being forked from a process that may have one.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np

from clients.encrypted.evaluation import Evaluation, State, Value
from clients.encrypted.footprint import trim
from clients.encrypted.keyring import Keyring
from clients.encrypted.memory import BatchKey, StoredCiphertexts
from clients.encrypted.plan import Plan

MOST_KEYS: Final = 4
"""Owners whose keys stay loaded."""
MOST_STEPS: Final = 8
"""Steps that wait for their owners' errors; an older one is computed again."""


class KeysMissingError(LookupError):
    """An owner's evaluation keys have gone, or were torn; it must send them again."""


@dataclass(frozen=True)
class Setup:
    """What a worker is told at the start.

    Attributes:
        plan: of the steps.
        keys: folder of the owners' evaluation keys.
        ciphertexts: folder of their mini-batches.
        chunk: leaves of one tree.
    """

    plan: Plan
    keys: Path
    ciphertexts: Path
    chunk: int


class Worker:
    """What a worker knows between calls.

    Args:
        setup: what it is told at the start.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._keyring = Keyring(setup.keys, most_bytes=0)  # it only reads
        self._stored = StoredCiphertexts(setup.ciphertexts)
        self._evaluations: OrderedDict[str, Evaluation] = OrderedDict()
        self._waiting: OrderedDict[tuple[str, BatchKey, str], State] = OrderedDict()
        self._now: Evaluation | None = None

    def begin(self, fingerprint: str, inputs: BatchKey, version: str) -> None:
        """Starts a step on a stored mini-batch of an owner, with a version of the model; other steps wait."""
        self._select(fingerprint)
        evaluation = self._evaluation_now
        evaluation.begin(lambda *block: self._stored.columns(inputs, *block))
        self._waiting.pop((fingerprint, inputs, version), None)
        self._waiting[fingerprint, inputs, version] = evaluation.state
        while len(self._waiting) > MOST_STEPS:
            self._waiting.popitem(last=False)

    def resume(self, fingerprint: str, inputs: BatchKey, version: str) -> bool:
        """Goes on with a step, for the last time; False where it has to be computed again."""
        state = self._waiting.pop((fingerprint, inputs, version), None)
        if state is None:
            return False
        self._select(fingerprint)
        self._evaluation_now.state = state
        return True

    def _select(self, fingerprint: str) -> None:
        evaluation = self._evaluations.pop(fingerprint, None)
        if evaluation is None:
            evaluation = self._evaluation(fingerprint)
        self._evaluations[fingerprint] = self._now = evaluation
        while len(self._evaluations) > MOST_KEYS:
            self._evaluations.popitem(last=False)

    def _evaluation(self, fingerprint: str) -> Evaluation:
        setup = self._setup
        keys = self._keyring.load(fingerprint, setup.plan.ring, setup.plan.galois)
        if keys is None:
            raise KeysMissingError(f"the evaluation keys {fingerprint} are not there any more")
        relin, galois = keys.seal(setup.plan.ring)
        return Evaluation(setup.plan, relin, galois, setup.chunk)

    def stored(self, key: BatchKey, scale: float) -> Value:
        """A stored set of ciphertexts, whole."""
        units, parts, level, degree = self._stored.shape(key)
        residues = np.empty((units, parts, level, degree), np.uint64)
        for prime in range(level):
            residues[:, :, prime] = self._stored.columns(key, prime, 0, degree)
        return Value(residues, scale)

    def first_means(self, key: BatchKey, errors: Value | None) -> Any:
        """Mean gradients of the first layer, by the stored packed features."""
        scale = 2.0**self._setup.plan.scales.packed
        return self._evaluation_now.first_means(self.stored(key, scale), errors)

    def differences(self, outputs: Value, key: BatchKey) -> Value:
        """Errors of outputs by stored labels."""
        scale = 2.0**self._setup.plan.scales.labels
        return self._evaluation_now.differences(outputs, self.stored(key, scale))

    def rest(self, chunk: int) -> None:
        """Lets go of a step's ciphertexts and gives freed memory back; later trees have so many leaves at the most."""
        self._waiting.clear()
        for evaluation in self._evaluations.values():
            evaluation.state = State()
            evaluation.chunk = chunk
        trim()

    def trim(self) -> None:
        """Gives freed memory back."""
        trim()

    @property
    def _evaluation_now(self) -> Evaluation:
        if self._now is None:
            raise ValueError("no step has begun")
        return self._now

    def call(self, name: str, arguments: Sequence[Any]) -> Any:
        """A call by name: of this object where it has it, else of the step's evaluation."""
        own = getattr(self, name, None)
        return (own or getattr(self._evaluation_now, name))(*arguments)


def serve(connection: Connection) -> None:
    """Answers calls until the other end goes."""
    worker = Worker(connection.recv())
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer: tuple[bool, Any] = True, worker.call(name, arguments)
        except Exception as error:  # told to the caller, who raises it
            answer = False, error
        connection.send(answer)


def main(descriptor: int) -> None:
    """Serves over a socket that was handed down by its number."""
    # Ctrl-C is the parent's affair, which then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(descriptor))
