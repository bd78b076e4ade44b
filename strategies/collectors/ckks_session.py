"""A cohort's exchange under CKKS as a state machine; see `strategies.collectors.ckks`.

upload    each client trains and encrypts factor · update with its tail       → ciphertexts, tag
open      the sum goes to a few of its members, drawn at random               → the plain sum, flooded with noise
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from strategies.ckks import CiphertextError, Sum, add_tags
from strategies.ckks.messages import (
    CIPHERTEXTS,
    CKKS,
    FINGERPRINT_LENGTH,
    ID_BYTES,
    PLAIN,
    carrier,
    data_in,
    octets,
    said_in,
)
from strategies.ckks.settings import CkksSettings
from strategies.ckks.tags import NONCE_BYTES, TAG_BYTES
from strategies.collectors.once import Once
from strategies.contents import SATURATED
from strategies.protocols import Event, Job, Refusal, Reply, Request, Void
from strategies.records import bundle, extended, record_in
from strategies.secagg.terms import ModelDigest
from strategies.wire import CONFIG, TRAINS, Refused, failure_of, unpack

log = logging.getLogger(__name__)


class Memory:
    """What a collector remembers from round to round.

    Attributes:
        once: the run's id, and of the last models the sessions and the sums.
        digest: of models.
        warned: whether it was said that the key has opened as much as it should.
    """

    def __init__(self, once: Once) -> None:
        self.once, self.digest, self.warned = once, ModelDigest(), False


@dataclass
class _Group:
    """Uploads under one key."""

    total: Sum
    tag: bytes
    nonces: dict[int, bytes] = field(default_factory=dict)


class CkksSession:
    """Uploads until all have come or the deadline has passed; then the sum, to one member after the other."""

    def __init__(
        self,
        settings: CkksSettings,
        memory: Memory,
        shuffle: Callable[[list[int]], None],
        job: Job,
        cohort: Sequence[int],
        model: bytes,
    ) -> None:
        self._settings, self._memory, self._job, self._model = settings, memory, job, model
        self._shuffle = shuffle
        self._cohort = tuple(cohort)
        self._waiting = set(cohort)
        self._contents = settings.contents(job.wire)
        self._size = self._contents.size + self._contents.tail_size
        self._layouts = [self._contents.layouts[name].digest for name in sorted(job.wire)]
        self._id = os.urandom(ID_BYTES)
        self._void = memory.once.void(model)
        memory.once.begin(model, self._id)
        self._config = ConfigRecord(
            {**job.config, "server-round": job.round, "version": job.version, "phases": 2}
        )
        self._groups: dict[str, _Group] = {}
        self._group: _Group | None = None
        self._phase = 0
        self._spare: list[int] = []
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._request: RecordDict | None = None
        self.done = not self._waiting
        self._warn()

    def _warn(self) -> None:
        """Once, of a key that has opened more ciphertexts than its statistical security is laid out for."""
        most, each = self._settings.decryptions, self._settings.parameters.ciphertexts(self._size)
        if self._job.round * each > most and not self._memory.warned:
            self._memory.warned = True
            log.warning(
                "round %d opens %d ciphertexts under one key, %d are laid out for: raise collector.decryptions (four"
                " times as many double the error), or give the clients a new key",
                self._job.round, self._job.round * each, most,
            )  # fmt: skip

    def start(self) -> list[Request]:
        """One request to train a client; they share the records of the model."""
        told: dict[str, Any] = {
            "session": self._id,
            "run": self._memory.once.run,
            "void": self._void,
            "settings": self._settings.digest,
            "layouts": self._layouts,
        }
        records = {**self._job.records, CKKS: ConfigRecord(told)}
        return [self._asked(client, records, trains=True) for client in self._cohort]

    def receive(self, reply: Reply) -> list[Event]:
        """What follows a reply.

        Raises:
            Refused: `late`, `duplicate`, `client_error`, `paused`, or as the reply deserves, where nothing follows.
        """
        client, phase = reply.request.client, reply.request.content[CONFIG].get("phase")
        if self.done or phase != self._phase:
            raise Refused("late", f"a reply of phase {phase!r} came in phase {self._phase}")
        if client not in self._waiting:
            raise Refused("duplicate", "this client has answered before, or was not asked")
        self._waiting.discard(client)
        events: list[Event] = []
        try:
            if reply.content is None:
                raise failure_of(reply.error)
            (self._opened if self._phase else self._upload)(client, reply.content)
        except Refused as refused:
            events.append(Refusal(client, refused))
        if self._phase:
            events += self._go_on()
        elif not self._waiting:
            events += self._close()
        return events

    def expire(self) -> list[Event]:
        """The phase's deadline has passed: who is missing, and what follows."""
        late = Refused("timeout", "no reply before the phase's deadline")
        events: list[Event] = [Refusal(client, late) for client in sorted(self._waiting)]
        self._waiting.clear()
        return events + (self._go_on() if self._phase else self._close())

    # ---- uploads ----

    def _upload(self, client: int, content: RecordDict) -> None:
        said = said_in(content)
        if said.get("layouts") != self._layouts:
            raise Refused("shape", "the client laid its parameters out otherwise than the server")
        self._hold(said)
        nonce, tag = octets(said, "nonce", NONCE_BYTES), octets(said, "tag", TAG_BYTES)
        key = said.get("key")
        if not isinstance(key, str) or len(key) != FINGERPRINT_LENGTH:
            raise Refused("malformed", "the reply does not say under which key it is encrypted")
        parameters = self._settings.parameters
        group = self._groups.get(key) or _Group(Sum(parameters, self._size), bytes(TAG_BYTES))
        try:
            group.total.add(data_in(content, CIPHERTEXTS))
        except CiphertextError as error:
            raise Refused("malformed", str(error)) from error
        group.tag = add_tags(group.tag, tag, parameters.modulus)
        group.nonces[client] = nonce
        self._groups[key] = group

    def _hold(self, said: ConfigRecord) -> None:
        for name, wanted in (("session", self._id), ("settings", self._settings.digest)):
            if said.get(name) != wanted:
                raise Refused("session", f"the reply belongs to another {name}")

    def _close(self) -> list[Event]:
        """No more uploads: the largest group's sum goes out, if there are enough in it."""
        events: list[Event] = []
        groups = sorted(self._groups.items(), key=lambda item: (-len(item[1].nonces), item[0]))
        for key, group in groups[1:]:
            refused = Refused(
                "key", f"it has another key ({key[:8]}) than most ({groups[0][0][:8]})"
            )
            events += [Refusal(client, refused) for client in sorted(group.nonces)]
        count = len(groups[0][1].nonces) if groups else 0
        least = max(self._settings.quorum, self._job.quorum)
        self._groups.clear()
        if count < least:
            return events + self._end(
                f"{count} clients uploaded, no sum of fewer than {least} is opened"
            )
        self._group, self._phase = groups[0][1], 1
        self._spare = sorted(self._group.nonces)
        self._shuffle(self._spare)
        return events + self._go_on()

    # ---- opening ----

    def _go_on(self) -> list[Event]:
        """Asks as many members as are still needed, or ends."""
        missing = self._settings.decryptors - len(self._sums) - len(self._waiting)
        if not missing and not self._waiting:
            return self._finish()
        if missing > len(self._spare):
            assert self._group is not None
            left = self._settings.decryptors - missing + len(self._spare)
            return self._end(
                f"{left} of {len(self._group.nonces)} members are left to open the sum,"
                f" {self._settings.decryptors} must agree on it"
            )
        asked, self._spare = self._spare[:missing], self._spare[missing:]
        self._waiting.update(asked)
        return [self._asked(client, self._sum(), trains=False) for client in asked]

    def _sum(self) -> dict[str, Any]:
        """The records that every decryptor is sent."""
        if self._request is None:
            assert self._group is not None
            members = sorted(self._group.nonces)
            told: dict[str, Any] = {
                "session": self._id,
                "settings": self._settings.digest,
                "members": members,
                "nonces": b"".join(self._group.nonces[client] for client in members),
                "tag": self._group.tag,
            }
            blob = self._group.total.to_bytes()
            self._request = bundle(
                {CKKS: ConfigRecord(told), CIPHERTEXTS: carrier(CIPHERTEXTS, blob)}
            )
        return dict(self._request)

    def _opened(self, client: int, content: RecordDict) -> None:
        # Whatever becomes of it: the server has seen what may be the sum.
        self._memory.once.seen(self._model, self._id)
        self._hold(said_in(content))
        record = record_in(content, PLAIN, ArrayRecord)
        if record is None or set(record) != {PLAIN}:
            raise Refused("missing", "the reply holds no plain sum")
        plain = unpack(record[PLAIN], "the plain sum")
        if plain.dtype != np.float64 or plain.shape != (self._size,):
            raise Refused(
                "shape", f"the plain sum is {plain.dtype} {plain.shape}, not ({self._size},)"
            )
        most = (
            self._settings.parameters.limit * self._settings.members
            + self._settings.parameters.error
        )
        if not (np.abs(plain) <= most).all():
            raise Refused("too_large", f"the plain sum has elements beyond {most:g}")
        self._sums[client] = plain.astype(np.float64)

    def _finish(self) -> list[Event]:
        """The mean, where all decryptors agree."""
        assert self._group is not None
        (first, plain), *others = sorted(self._sums.items())
        for other, theirs in others:
            # Both are multiples of the grid; rounded where two machines' arithmetic differs, they are neighbours.
            away = np.abs(plain - theirs)
            wrong = int(np.count_nonzero(away > 1.25 * self._settings.parameters.grid))
            if wrong:
                return self._end(
                    f"clients {first} and {other} opened the same sum and disagree in {wrong} of {self._size}"
                    f" elements, by up to {float(away.max()):g}"
                )
        size, members = self._contents.size, tuple(sorted(self._group.nonces))
        tail = plain[size:] / self._settings.limit
        try:
            # The noise is the sum's; a member's share of it is what adds up to that by squares.
            noise = self._settings.parameters.flooding / sqrt(len(members))
            update = self._contents.update(plain[:size], tail, members, self._job.version, noise)
        except Refused as refused:
            return self._end(str(refused))
        self.done = True
        self._memory.once.keep(self._model, self._id, update)
        # The tail is as far off as any element: a share within its error is none.
        if plain[size:][-3] > self._settings.parameters.error:
            log.warning(
                "%.3g%% of all elements were cut at ±%g: raise collector.limit, or clip",
                100 * update.metrics[SATURATED],
                self._settings.limit,
            )
        return [update]

    def _end(self, reason: str) -> list[Event]:
        self.done = True
        self._waiting.clear()
        return [Void(reason)]

    # ---- messages ----

    def _asked(self, client: int, records: dict[str, Any], *, trains: bool) -> Request:
        own = {**self._job.own(client), "phase": self._phase, TRAINS: trains}
        content = bundle({**records, CONFIG: extended(self._config, own)})
        return Request(client, "train", content, self._job.round)
