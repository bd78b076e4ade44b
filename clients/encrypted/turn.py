"""One turn of a data owner: from what came and what lies on its disk, to what goes back.

Which key and which mini-batch; what of them the party lacks; with cross-entropy the errors of the logits; and from the
packed means, at last, what may be told: flooded, and charged to the key's ledger. What comes is hostile until checked,
and no number that was decrypted, or is of the data, stands in an error that may travel.

How anything is computed on ciphertexts is not known here, nor what becomes of an update.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from numpy.typing import NDArray
from torch import nn

from clients.encrypted.encryptor import WORTH, EncryptionError, Pending, encrypt_all, fresh
from clients.encrypted.evaluation import Value
from clients.encrypted.flooding import Release
from clients.encrypted.half_done import Acknowledged, HalfDone
from clients.encrypted.holder import KeyHolder
from clients.encrypted.ledger import ReleaseLedger
from clients.encrypted.network import ACTIVATIONS, PolynomialNet
from clients.encrypted.noise import ErrorModel, Magnitudes
from clients.encrypted.notes import BATCH, KEYS, LOGITS, NOTE, WANT, note, read_means, read_note
from clients.encrypted.owner import LOSS, WrapAroundError
from clients.encrypted.plan import HEADROOM, plan_of
from clients.encrypted.ranges import FEATURE_RMS, MOST_ERROR
from clients.encrypted.schedule import batch_of_round, batches
from clients.encrypted.spec import LOSSES, Mode, Spec
from clients.tasks import Examples
from clients.trainers.sgd import FitJob, TrainingDivergedError
from strategies.ckks.streams import CiphertextError
from strategies.collectors.encrypted import (
    ENCRYPTED,
    MODE,
    SESSION,
    TURN,
)
from strategies.wire import Refused, integer_in, unpack_model

log = logging.getLogger(__name__)

SPEC: Final = "encrypted.spec"
"""The setting by which a compute party says what it trains: `Spec.digest`."""

_RUN: Final = "config-hash"
"""The setting that tells one run from another."""
_ACCURACY: Final = "accuracy"
_MOST_TURNS: Final = 6
"""That an owner answers in a session; four is the most that an honest party needs."""
_TOKEN: Final = re.compile(r"[0-9a-f]{8,64}")

Arrays = Mapping[str, NDArray[np.generic]]


def spec_of(module: nn.Module, batch_size: int, mode: Mode) -> Spec:
    """What both ends train, by the configured model and mini-batches.

    Args:
        module: a `PolynomialNet`.
        batch_size: examples of a mini-batch, at most; slots are the next power of two.
        mode: the collector's.

    Raises:
        ValueError: the model is another, or its sizes can't be trained.
    """
    if not isinstance(module, PolynomialNet):
        raise ValueError(f"{type(module).__name__} is no polynomial: use model=encrypted_mlp")
    kind: Any = next(k for k, found in ACTIVATIONS.items() if found == module.coefficients)
    slots = 1 << (batch_size - 1).bit_length()
    return Spec(module.sizes, kind, LOSSES[mode], slots)


@dataclass(frozen=True)
class Told:
    """Where a request stands in a session."""

    session: str
    turn: int
    round: int

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Told:
        """By a request's settings; raises `Refused` (`terms`, `malformed`) where they say nothing of the kind."""
        session, turn = settings.get(SESSION), settings.get(TURN)
        if not isinstance(session, str) or not _TOKEN.fullmatch(session):
            raise Refused("terms", f"{SESSION}={session!r:.40} is no session")
        if type(turn) is not int or turn < 0:
            raise Refused("terms", f"{TURN}={turn!r:.40} is no turn")
        config = ConfigRecord(dict(settings))  # type: ignore[arg-type]
        number = integer_in(config, "server-round")
        if number < 1:
            raise Refused("malformed", f"round {number}")
        return cls(session, turn, number)

    def receipt(self, client: int) -> dict[str, bool | int | str]:
        """The same, for the reply."""
        return {"client": client, "round": self.round, "turn": self.turn}


class OwnerTurn:
    """One owner at one request."""

    def __init__(self, trainer: KeyHolder, job: FitJob, module: nn.Module) -> None:
        self._trainer, self._job = trainer, job
        self._told = Told.of(job.settings)
        spec = spec_of(module, trainer.batch_size, trainer.mode)
        for name, ours in ((MODE, trainer.mode), (SPEC, spec.digest)):
            theirs = job.settings.get(name, ours)
            if theirs != ours:
                raise Refused("terms", f"{name} is {theirs!r:.40} there, and {ours!r} here")
        assert isinstance(module, PolynomialNet)  # spec_of has looked
        self._module, self._plan = module, plan_of(spec)
        self._folder = trainer.own(job.client, str(job.settings.get(_RUN, "")))
        self._keys, self._owner = trainer.owner(job.client, self._plan)
        targets = job.examples.targets.numpy()
        self._cut = batches(targets, trainer.batch_size, trainer.seed, job.client)
        count = len(self._cut)
        self._batch = batch_of_round(self._told.round, count, trainer.seed, job.client)
        self._rows = self._cut[self._batch]
        self._arrays = arrays_of(job)

    @property
    def receipt(self) -> dict[str, bool | int | str]:
        """Whose turn it is."""
        return self._told.receipt(self._job.client)

    @cached_property
    def _data(self) -> str:
        """By which the party knows the mini-batches: under the key, or it could be held against guesses of the data."""
        plan, trainer, job = self._plan, self._trainer, self._job
        told = (
            plan.spec.digest,
            plan.ring.degree,
            plan.ring.bits,
            plan.scales,
            self._module.features.digest,
        )
        hashed = hashlib.sha256(repr((told, trainer.batch_size, trainer.seed, job.client)).encode())
        for tensor in (job.examples.inputs, job.examples.targets):
            hashed.update(np.ascontiguousarray(tensor.numpy()).data)
        return self._keys.derive("mini-batches", hashed.digest(), 16).hex()

    def reply(self) -> tuple[Arrays, bool]:
        """What goes to the party, and whether means alone are wanting then."""
        told = self._told
        state = HalfDone(told.session, 0) if told.turn == 0 else self._state()
        answer = read_note(self._arrays)
        squared = self._plan.spec.loss == "squared"
        if told.turn == 0:
            arrays: Arrays = {}
            last = squared and self._folder.acknowledged().has(self._data, self._batch)
        elif WANT in answer:
            arrays, last = self._wanted(answer[WANT]), squared
        elif (
            squared
        ):  # the party has what this owner did not know it to have: it is asked again, for means
            self._acknowledge(answer)
            arrays, last = {}, True
        else:
            self._acknowledge(answer)
            arrays, state = self._errors(answer, state)
            last = True
        self._folder.save_turn(replace(state, turn=told.turn))
        return {**arrays, NOTE: self._note()}, last

    def conclude(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
        """Mean gradients by name, and what the round came to."""
        state, answer = self._state(), read_note(self._arrays)
        if WANT in answer:  # it was believed to have them
            self._folder.acknowledge(Acknowledged())
        bias = None if state.bias is None else np.array(state.bias)
        if bias is None and self._plan.spec.loss == "cross_entropy":
            raise Refused("phase", "means of a mini-batch whose logits have not come")
        try:
            found = self._owner.gradients(read_means(self._arrays), len(self._rows), bias)
        except CiphertextError as error:
            raise Refused("malformed", str(error)) from error
        except WrapAroundError as error:
            raise TrainingDivergedError(f"client {self._job.client}: {error}") from error
        self._acknowledge(answer)
        if state.loss is not None:
            found[LOSS] = np.asarray(state.loss)
            found[_ACCURACY] = np.asarray(state.accuracy)
        told = self._released(found)
        if not told[LOSS] <= MOST_ERROR**2 / 2:  # what the party's bounds rest on
            raise TrainingDivergedError(
                f"client {self._job.client}: the squared loss is larger than ciphertexts hold: lower server.lr, or"
                " start from smaller weights (model.hidden_scale, model.logit_scale)"
            )
        metrics = {"train_loss": float(told.pop(LOSS))}
        if _ACCURACY in told:
            metrics["train_accuracy"] = float(np.clip(told.pop(_ACCURACY), 0, 1))
        largest = max(float(np.abs(gradient).max()) for gradient in told.values())
        return told, {**metrics, "largest_gradient": largest}

    def _released(self, found: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """What may be told of what was decrypted, metrics of it too; raises `Refused` (`worn`)."""
        trainer, plan = self._trainer, self._plan
        key = trainer.key_of(self._job.client, plan)
        if not key.exists():  # moved or deleted while the run goes on, and the ledger with it
            raise Refused("key", f"{key} is gone, and with it the ledger of what it has told")
        ledger = ReleaseLedger(key, self._keys.fingerprint)
        if trainer.flooding is None:
            ledger.charge_exact()
            return found
        batch = self._job.examples.take(self._rows)
        sizes = Magnitudes.assumed(plan.spec).over(self._module.featurise(batch.inputs).numpy())
        bound = ErrorModel(plan, sizes, len(self._rows)).bound
        return Release(self._keys, ledger, trainer.flooding, bound)(found)

    def _state(self) -> HalfDone:
        told = self._told
        state = self._folder.turn(told.session)
        if state is None or told.turn - state.turn not in (0, 1) or told.turn > _MOST_TURNS:
            raise Refused("phase", f"turn {told.turn} of a session that this owner is not in")
        return state

    def _acknowledge(self, answer: Mapping[str, Any]) -> None:
        """Remembers that the party had all that it needed."""
        party = str(answer.get("party", ""))[:64]
        known = self._folder.acknowledged()
        self._folder.acknowledge(known.plus(party, self._data, self._batch))

    def _note(self) -> NDArray[np.uint8]:
        told = {"fingerprint": self._keys.fingerprint, "data": self._data}
        return note({**told, "batch": self._batch})

    def _wanted(self, wants: object) -> Arrays:
        """What the party lacks."""
        if not isinstance(wants, list) or not wants or not all(w in (KEYS, BATCH) for w in wants):
            raise Refused("malformed", f"the compute party wants {wants!r:.40}")
        arrays: dict[str, NDArray[np.generic]] = {}
        if KEYS in wants:
            keys = self._keys.evaluation(self._plan.galois).to_arrays()
            arrays |= {f"{KEYS}.{name}": array for name, array in keys.items()}
        if BATCH in wants:
            arrays |= self._ciphertexts()
        return arrays

    def _ciphertexts(self) -> Arrays:
        """The mini-batch, encrypted once and for all."""
        held = self._folder.ciphertexts(self._data, self._batch)
        if held is not None:
            return held
        if self._plan.inputs < WORTH:
            held = fresh(self._owner, self._plan, self._pending(self._batch))
            self._folder.keep_ciphertexts(self._data, self._batch, held)
            return held
        try:
            key = self._trainer.key_of(self._job.client, self._plan)
            encrypt_all(self._plan, key, self._folder, self._data, self._next())
        except EncryptionError as error:
            raise Refused("key", str(error)) from error
        held = self._folder.ciphertexts(self._data, self._batch)
        assert held is not None  # encrypt_all has written it
        return held

    def _next(self) -> list[Pending]:
        """The mini-batch, and the next ones that are not encrypted yet: as many as processors."""
        trainer, count = self._trainer, len(self._cut)
        rounds = range(self._told.round, self._told.round + count)
        order = [batch_of_round(r, count, trainer.seed, self._job.client) for r in rounds]
        wanted = [
            number
            for number in dict.fromkeys(order)
            if number == self._batch or not self._folder.has_ciphertexts(self._data, number)
        ]
        left = len(wanted)
        log.info(
            "client %d encrypts: %d of %d mini-batches are left", self._job.client, left, count
        )
        return [self._pending(number) for number in wanted[: os.cpu_count() or 1]]

    def _pending(self, number: int) -> Pending:
        """A mini-batch's features (n, d), and its classes (n,)."""
        batch: Examples = self._job.examples.take(self._cut[number])
        features = self._module.featurise(batch.inputs).numpy()
        size = float(np.sqrt(np.mean(np.square(features, dtype=np.float64))))
        if size > FEATURE_RMS:
            log.warning("client %d: features' root mean square is %.3g", self._job.client, size)
            raise ValueError(  # which may travel: no number of the data is in it
                f"client {self._job.client}: features have a larger root mean square than the {FEATURE_RMS:g} that"
                " ciphertexts hold: standardise the data"
            )
        return Pending(number, features, batch.targets.numpy())

    def _errors(self, answer: Mapping[str, Any], state: HalfDone) -> tuple[Arrays, HalfDone]:
        """Encrypted errors of the logits that came, and what is kept of them."""
        logits, scale = self._arrays.get(LOGITS), answer.get("scale")
        shape = (self._plan.spec.sizes[-1], 2, 1, self._plan.ring.degree)
        if logits is None or logits.shape != shape or logits.dtype != np.uint64:
            raise Refused("shape", f"logits are residues {shape}, and others came, or none")
        if not isinstance(scale, float) or not 1 <= scale < 2.0**200:
            raise Refused("malformed", f"a scale of {scale!r:.40}")
        targets = self._job.examples.targets.numpy()[self._rows]
        try:
            found = self._owner.answer(Value(logits.astype(np.uint64, copy=False), scale), targets)
        except CiphertextError as error:
            raise Refused("malformed", str(error)) from error
        if not found.loss < 2.0 ** (self._plan.room(scale) - HEADROOM):
            log.warning("client %d: a mean loss of %.3g", self._job.client, found.loss)
            raise TrainingDivergedError(  # which may travel: no decrypted number is in it
                f"client {self._job.client}: the training has diverged, or logits have wrapped round; lower server.lr,"
                " or start from smaller weights (model.logit_scale)"
            )
        bias = tuple(map(float, found.bias))
        return found.arrays, replace(state, bias=bias, loss=found.loss, accuracy=found.accuracy)


def arrays_of(job: FitJob) -> Arrays:
    """What came beside the request's settings."""
    return unpack_model(job.records.get(ENCRYPTED, ArrayRecord()))
