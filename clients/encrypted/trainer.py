"""The data owner as a Flower client: it is sent ciphertexts, and never the model.

Its update is minus the mean gradient of one mini-batch, as FedSGD's (McMahan et al. 2017, §2), which the compute party
evaluates on the owner's ciphertexts (K. Nandakumar et al. 2019, "Towards Deep Neural Network Training on Encrypted
Data"). A round is a few turns: which key and which mini-batch; what of them the other side lacks; with cross-entropy
the errors of the logits; and at last the packed means, whose decryption is an ordinary update, clipped, noised and
combined like all others.

Each turn is made from what lies on the owner's disk (`half_done`), since a deployed client is a process a message.
What comes is hostile until checked. How anything is computed on ciphertexts is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import nn

from clients.encrypted.encryptor import WORTH, EncryptionError, Pending, encrypt_all, fresh
from clients.encrypted.evaluation import Value
from clients.encrypted.flooding import Flooding, Release
from clients.encrypted.half_done import Acknowledged, HalfDone, OwnerFolder
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ledger import ReleaseLedger
from clients.encrypted.network import ACTIVATIONS, PolynomialNet
from clients.encrypted.noise import ErrorModel, Magnitudes
from clients.encrypted.notes import BATCH, KEYS, LOGITS, NOTE, WANT, note, read_means, read_note
from clients.encrypted.owner import LOSS, Owner, WrapAroundError
from clients.encrypted.plan import HEADROOM, Plan, plan_of
from clients.encrypted.ranges import FEATURE_RMS
from clients.encrypted.schedule import batch_of_round, batches
from clients.encrypted.spec import Loss, Spec
from clients.resident import ResidentModel
from clients.split.trainer import Resident
from clients.tasks import Examples, Task
from clients.trainers.fedsgd import FedSgd
from clients.trainers.sgd import Fit, FitJob, TrainingDivergedError
from strategies.ckks import KeyFileError
from strategies.ckks.streams import CiphertextError
from strategies.collectors.encrypted import (
    COMPUTE,
    ENCRYPTED,
    MODE,
    OWNER,
    REFUSED,
    ROLE,
    SESSION,
    TURN,
    Served,
)
from strategies.collectors.turns import LAST, Learner, write_turn
from strategies.update import DELTA, Layout, Section
from strategies.wire import Refused, integer_in, unpack_model

log = logging.getLogger(__name__)

SPEC: Final = "encrypted.spec"
"""The setting by which a compute party says what it trains: `Spec.digest`."""

Mode = Literal["ce", "strict"]
LOSSES: Final[dict[Mode, Loss]] = {"ce": "cross_entropy", "strict": "squared"}
"""By the collector's mode."""

_RUN: Final = "config-hash"
"""The setting that tells one run from another."""
FOLDER: Final = "encrypted"
"""Where owners' own files lie, under the folder that they are given."""
_ACCURACY: Final = "accuracy"
_FLOODING: Final = Flooding()
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
class EncryptedTrainer(FedSgd):
    """The key's half of a training step; or, for the client that computes, the other one.

    Attributes:
        mode: the collector's: whether the owner answers logits (`ce`), or decrypts mean gradients alone (`strict`).
        key: file of the owner's secret key, made where there is none; the same for several clients that share one.
            None for one in the client's own folder.
        flooding: noise on all that is told of what was decrypted, and how often; None for tests, which compare.
        folder: where owners' files lie; given by the application.
        party: what computes, on the client that computes for the others; given by the application.
        computes: the client that does; given by the application.
    """

    mode: Mode = "ce"
    key: Path | None = None
    flooding: Flooding | None = _FLOODING
    loss: Literal["cross_entropy", "squared"] = field(
        default="cross_entropy", init=False, repr=False
    )
    folder: Path | None = field(default=None, repr=False, compare=False)
    party: Served | None = field(default=None, repr=False, compare=False)
    computes: int | None = field(default=None, repr=False, compare=False)
    _owners: dict[tuple[Path, Plan], tuple[OwnerKeys, Owner]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _learners: dict[str, Learner] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    own_records: ClassVar[frozenset[str]] = frozenset({ENCRYPTED})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "loss", LOSSES[self.mode])

    def keeping(self, folder: Path) -> Self:
        """The same trainer, whose owners' files lie in a folder."""
        return replace(self, folder=folder / FOLDER)

    def turn(self, job: FitJob, resident: Resident, task: Task) -> RecordDict:
        """The reply to one turn: an owner's, or the compute party's to another owner's.

        Raises:
            Refused: `terms`, `phase`, `missing`, `key`, or as the answer's arrays deserve.
            TrainingDivergedError: the logits have left their range.
        """
        if job.settings.get(ROLE) == COMPUTE:
            return self._computed(job)
        turn = _Turn(self, job, resident({}, job.settings).module)
        arrays, last = turn.reply()
        return write_turn(ENCRYPTED, arrays, {**turn.receipt, LAST: last})

    def fit_one(self, job: FitJob, model: ResidentModel, task: Task) -> Fit:
        """Minus the decrypted mean gradient, of the mini-batch that the round is on.

        Raises:
            Refused: as `turn`.
            TrainingDivergedError: a gradient has left its range.
        """
        turn = _Turn(self, job, model.module)
        gradients, metrics = turn.conclude()
        layout = Layout.of(
            dict(zip(model.layout.names, map(np.empty, model.layout.shapes), strict=True))
        )
        change = layout.flatten(gradients)
        section = Section(np.negative(change, out=change), layout)
        fit = self.concluded(job, {DELTA: section}, [metrics["train_loss"]])
        return replace(fit, metrics={**metrics, **fit.metrics})

    def owner(self, client: int, plan: Plan) -> tuple[OwnerKeys, Owner]:
        """A client's key and what works with it; made, the first time.

        Raises:
            Refused: `key`: its file can't be used.
        """
        path = self.key_of(client, plan)
        held = self._owners.get((path, plan))
        if held is None:
            try:
                # A key that is named is there: a slip of the pen must not make another one.
                read = OwnerKeys.load_or_make if self.key is None else OwnerKeys.load_for
                keys = read(path, plan.ring)
                ReleaseLedger(path, keys.fingerprint).check()
            except (KeyFileError, OSError) as error:
                raise Refused("key", str(error)) from error
            held = self._owners[path, plan] = keys, Owner(plan, keys)
        return held

    def key_of(self, client: int, plan: Plan) -> Path:
        """Where a client's key lies."""
        if self.key is not None:
            return self.key
        bits = "-".join(map(str, plan.ring.bits))
        return self.own(client).path / f"owner-key-{plan.ring.degree}-{bits}"

    def own(self, client: int, run: str = "") -> OwnerFolder:
        """A client's folder.

        Raises:
            ValueError: the application has named none.
        """
        if self.folder is None:
            raise ValueError("an owner needs a folder: EncryptedTrainer.keeping(folder)")
        return OwnerFolder(self.folder, client, run)

    def _computed(self, job: FitJob) -> RecordDict:
        """The compute party's answer to an owner's turn, which the server has passed on."""
        told, owner = _Told.of(job.settings), job.settings.get(OWNER)
        if self.party is None or job.client != self.computes or type(owner) is not int:
            raise Refused("terms", "this client computes for nobody")
        receipt: dict[str, bool | int | str] = {**told.receipt(job.client), OWNER: owner}
        learner = self._learners.get(told.session)
        if learner is None:
            self._learners.clear()
            learner = self._learners[told.session] = self.party.begin(job.arrays)
        try:
            arrays: Arrays = learner.answer(owner, _arrays(job))
        except Refused as refused:
            arrays, receipt[REFUSED] = {}, refused.reason
        return write_turn(ENCRYPTED, arrays, receipt)


@dataclass(frozen=True)
class _Told:
    """Where a request stands in a session."""

    session: str
    turn: int
    round: int

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> _Told:
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
        return {"client": client, "round": self.round, "turn": self.turn}


class _Turn:
    """One owner at one request."""

    def __init__(self, trainer: EncryptedTrainer, job: FitJob, module: nn.Module) -> None:
        self._trainer, self._job = trainer, job
        self._told = _Told.of(job.settings)
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
        self._arrays = _arrays(job)

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
        metrics = {"train_loss": float(told.pop(LOSS))}
        if _ACCURACY in told:
            metrics["train_accuracy"] = float(np.clip(told.pop(_ACCURACY), 0, 1))
        largest = max(float(np.abs(gradient).max()) for gradient in told.values())
        return told, {**metrics, "largest_gradient": largest}

    def _released(self, found: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """What may be told of what was decrypted, metrics of it too; raises `Refused` (`worn`)."""
        trainer, plan = self._trainer, self._plan
        key = trainer.key_of(self._job.client, plan)
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


def _arrays(job: FitJob) -> Arrays:
    """What came beside the request's settings."""
    return unpack_model(job.records.get(ENCRYPTED, ArrayRecord()))
