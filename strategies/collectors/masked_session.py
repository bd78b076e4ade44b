"""One cohort's secure aggregation on the server, as a state machine: no I/O, no clock.

Each phase asks every client that is still there, and ends when all have answered or its deadline has passed. Whoever
is missing has dropped out for good. Before anything is opened it is known whether the rest suffices: if not, the
session is void, and nobody has revealed a share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import SystemRandom
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

from strategies.contents import SATURATED, Contents
from strategies.protocols import Event, Job, Refusal, Reply, Request, Void
from strategies.records import bundle, extended, record_in
from strategies.secagg.graph import circulant
from strategies.secagg.keys import KEY_BYTES, KeyPair
from strategies.secagg.masking import Ring, opened
from strategies.secagg.opening import CannotOpenError, Member, remove_masks
from strategies.secagg.statements import (
    AGREE,
    KEYS,
    POINT_BYTES,
    SEALED_BYTES,
    SHARES,
    SIGNATURE_BYTES,
    UNMASK,
    UPLOAD,
)
from strategies.secagg.terms import SECAGG, Said, Terms
from strategies.update import Update
from strategies.wire import CONFIG, TRAINS, Refused, failure_of, unpack

log = logging.getLogger(__name__)

_SEMI_HONEST = (KEYS, SHARES, UPLOAD, UNMASK)
_MALICIOUS = (KEYS, SHARES, UPLOAD, AGREE, UNMASK)


class MaskedSession:
    """Secure aggregation over one cohort.

    Args:
        job: what the round asks of it.
        members: logical ids, ascending.
        terms: of the session.
        void: ids of the sessions on this model that came to nothing.
        keep: told of the sum before anything is made of it.
        over: told when nothing more will come.
    """

    def __init__(
        self,
        job: Job,
        members: Sequence[int],
        terms: Terms,
        void: bytes,
        keep: Callable[[Update], None] = lambda update: None,
        over: Callable[[], None] = lambda: None,
    ) -> None:
        self._job, self._terms, self._void = job, terms, void
        self._keep, self._over = keep, over
        self._steps = _MALICIOUS if terms.malicious else _SEMI_HONEST
        self._step = ""
        self._config = ConfigRecord(
            {
                **job.config,
                "server-round": job.round,
                "version": job.version,
                "phases": len(self._steps),
            }
        )
        self._contents = Contents(
            job.wire, terms.metrics, terms.metric_limit, terms.max_weight or None
        )
        self._members = tuple(members)
        self._neighbours: dict[int, frozenset[int]] = {}
        if not terms.malicious:
            order = SystemRandom().sample(members, len(members))
            graph = circulant(order, terms.degree)
            self._neighbours = {one: frozenset(near) for one, near in graph.items()}
        self._pair = KeyPair.generate()
        self._keys: dict[int, bytes] = {}
        self._drawn: dict[int, list[int]] = {}
        self._partners: dict[int, frozenset[int]] = {}
        self._points: dict[int, dict[int, int]] = {}
        self._signed: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._commitments: dict[int, bytes] = {}
        self._included: dict[int, dict[int, bytes]] = {}
        self._total: Ring | None = None
        self._survivors: list[int] = []
        self._agreed: dict[int, bytes] = {}
        self._asked: dict[int, tuple[list[int], list[int]]] = {}
        self._seeds: dict[int, dict[int, bytes]] = {}
        self._masking: dict[int, dict[int, bytes]] = {}
        self._waiting: dict[int, Request] = {}
        self.done = False

    def start(self) -> list[Request]:
        """Asks every member for its keys."""
        told: dict[str, Any] = {**self._terms.record(), "void": self._void}
        if self._terms.malicious:
            told["clients"] = list(self._members)
        events = self._ask(KEYS, dict.fromkeys(self._members, told))
        return [event for event in events if isinstance(event, Request)]

    def receive(self, reply: Reply) -> list[Event]:
        """Takes a reply of the present phase; the next one's requests, or the sum, when it was the last.

        Raises:
            Refused: `duplicate`, of a client that is not waited for, or a reply to an earlier phase.
        """
        client = reply.request.client
        if self._waiting.get(client) is not reply.request:
            raise Refused(
                "duplicate", "this client has answered before, or too late, or was not asked"
            )
        del self._waiting[client]
        events: list[Event] = []
        try:
            if reply.content is None:
                raise failure_of(reply.error)
            takes: Mapping[str, Callable[[int, Reply], None]] = {
                KEYS: self._take_keys, SHARES: self._take_shares, UPLOAD: self._take_upload,
                AGREE: self._take_signature, UNMASK: self._take_revealed,
            }  # fmt: skip
            takes[self._step](client, reply)
        except Refused as refused:
            events.append(Refusal(client, refused))
        return events if self._waiting else events + self._advance()

    def expire(self) -> list[Event]:
        """Goes on without those who have not answered."""
        late: list[Event] = [
            Refusal(
                client,
                Refused("timeout", f"no reply in the phase {self._step} before its deadline"),
            )
            for client in sorted(self._waiting)
        ]
        self._waiting.clear()
        return late + self._advance()

    # ---- replies ----

    def _take_keys(self, client: int, reply: Reply) -> None:
        said = _said(reply)
        keys = said.octets("keys", 2 * KEY_BYTES)
        self._probe(keys)
        if self._terms.malicious:
            drawn = said.clients("drawn")
            strangers = set(drawn) - set(self._members)
            if len(drawn) != self._terms.degree or strangers or client in drawn:
                raise Refused(
                    "neighbours", f"{self._terms.degree} others of the cohort are to be drawn"
                )
            self._signed[client] = said.octets("signature", SIGNATURE_BYTES)
            self._drawn[client] = drawn
        self._keys[client] = keys

    def _probe(self, keys: bytes) -> None:
        """Refuses keys that no pair has: all neighbours of such a client would have to drop out."""
        for public in (keys[:KEY_BYTES], keys[KEY_BYTES:]):
            try:
                self._pair.agree(public, b"")
            except ValueError as error:
                raise Refused("malformed", str(error)) from error

    def _take_shares(self, client: int, reply: Reply) -> None:
        said = _said(reply)
        to = said.clients("to")
        if set(to) != self._points[client].keys() - {client}:
            raise Refused("neighbours", "shares are for others than this client's neighbours")
        rows = said.rows("sealed", len(to), SEALED_BYTES)
        self._commitments[client] = said.octets("commitment", KEY_BYTES)
        self._sealed[client] = dict(zip(to, rows, strict=True))

    def _take_upload(self, client: int, reply: Reply) -> None:
        wanted = [self._job.wire[name].digest for name in sorted(self._job.wire)]
        if _said(reply).values.get("layouts") != wanted:
            raise Refused("shape", "the client laid its parameters out otherwise than the server")
        if self._terms.malicious:
            holders = sorted(self._points[client].keys() & self._sealed.keys() - {client})
            rows = _said(reply).rows("included", len(holders), SIGNATURE_BYTES)
            self._included[client] = dict(zip(holders, rows, strict=True))
        upload = _uploaded(reply, self._contents.size + self._contents.tail_size)
        if self._total is None:
            self._total = np.zeros_like(upload)
        self._total += upload
        self._survivors.append(client)

    def _take_signature(self, client: int, reply: Reply) -> None:
        self._agreed[client] = _said(reply).octets("signature", SIGNATURE_BYTES)

    def _take_revealed(self, client: int, reply: Reply) -> None:
        said = _said(reply)
        alive, dropped = self._asked[client]
        for name, owners, shares in (
            ("seeds", alive, self._seeds),
            ("masking", dropped, self._masking),
        ):
            for owner, row in zip(
                owners, said.rows(name, len(owners), POINT_BYTES + KEY_BYTES), strict=True
            ):
                point = int.from_bytes(row[:POINT_BYTES], "big")
                if point == self._points[owner][client]:
                    shares.setdefault(owner, {})[point] = row[POINT_BYTES:]

    # ---- phases ----

    def _advance(self) -> list[Event]:
        if self.done:
            return []
        following: Mapping[str, Callable[[], list[Event]]] = {
            KEYS: self._ask_shares,
            SHARES: self._ask_uploads,
            UPLOAD: self._ask_agreement if self._terms.malicious else self._ask_unmasking,
            AGREE: self._ask_unmasking,
            UNMASK: self._open,
        }
        return following[self._step]()

    def _ask_shares(self) -> list[Event]:
        there = self._keys.keys()
        self._settle(there)
        if (lack := self._lacking(there, there)) is not None:
            return self._stop(f"after the phase keys {lack}")
        told: dict[int, dict[str, Any]] = {}
        for client in sorted(there):
            peers = sorted(self._partners[client])
            told[client] = {"peers": peers, "keys": b"".join(self._keys[one] for one in peers)}
            if self._terms.malicious:
                told[client]["drawn"] = [one for peer in peers for one in self._drawn[peer]]
                told[client]["signatures"] = b"".join(self._signed[peer] for peer in peers)
        return self._ask(SHARES, told)

    def _ask_uploads(self) -> list[Event]:
        shared = self._sealed.keys()
        if (lack := self._lacking(shared, shared)) is not None:
            return self._stop(f"after the phase shares {lack}")
        told: dict[int, dict[str, Any]] = {}
        for client in sorted(shared):
            partners = sorted(self._partners[client] & shared)
            senders = [one for one in partners if client in self._sealed[one]]
            sealed = b"".join(self._sealed[sender].pop(client) for sender in senders)
            told[client] = {"partners": partners, "senders": senders, "sealed": sealed}
        return self._ask(UPLOAD, told)

    def _ask_agreement(self) -> list[Event]:
        if (lack := self._lacking(self._sealed.keys(), set(self._survivors))) is not None:
            return self._stop(f"after the phase upload {lack}")
        told = {"survivors": sorted(self._survivors)}
        return self._ask(AGREE, dict.fromkeys(sorted(self._survivors), told))

    def _ask_unmasking(self) -> list[Event]:
        there = set(self._agreed) if self._terms.malicious else set(self._survivors)
        if (lack := self._lacking(self._sealed.keys(), there)) is not None:
            return self._stop(f"after the phase {self._step} {lack}")
        survivors, shared = set(self._survivors), self._sealed.keys()
        signers = sorted(self._agreed)
        proof: dict[str, Any] = {}
        if self._terms.malicious:
            signatures = b"".join(self._agreed[one] for one in signers)
            proof = {"signers": signers, "signatures": signatures}
        told: dict[int, dict[str, Any]] = {}
        for client in sorted(there):
            held = {one for one in self._partners[client] & shared if client in self._points[one]}
            alive, dropped = sorted((held & survivors) | {client}), sorted(held - survivors)
            self._asked[client] = alive, dropped
            if self._terms.malicious:
                signed = (self._included[one][client] for one in alive if one != client)
                proof["included"] = b"".join(signed)
            told[client] = {"alive": alive, "dropped": dropped, **proof}
        return self._ask(UNMASK, told)

    def _open(self) -> list[Event]:
        assert self._total is not None
        survivors = set(self._survivors)
        dropped = self._sealed.keys() - survivors
        sharers = {
            one: Member(
                self._keys[one][KEY_BYTES:],
                self._commitments[one],
                self._partners[one] & self._sealed.keys(),
            )
            for one in self._sealed
        }
        masked_with = {one for one in dropped if sharers[one].partners & survivors}
        try:
            remove_masks(
                self._total,
                self._terms,
                sharers,
                {one: self._seeds.get(one, {}) for one in survivors},
                {one: self._masking.get(one, {}) for one in masked_with},
            )
        except CannotOpenError as error:
            return self._stop(f"after the phase unmask {error}")
        self.done = True
        self._over()
        members = tuple(sorted(survivors))
        try:
            sums, tail, noise = opened(self._total, self._contents, self._terms, len(members))
            update = self._contents.update(sums, tail, members, self._job.version, noise)
        except Refused as refused:
            return [Void(str(refused), wrong=True)]
        self._keep(update)
        if (cut := update.metrics[SATURATED]) > 0:
            log.warning(
                "%.3g%% of the elements of a sum were cut at ±%g: raise collector.limit, or clip",
                100 * cut,
                self._terms.limit,
            )
        return [update]

    # ---- who is whose neighbour, and whether enough are left ----

    def _settle(self, there: Iterable[int]) -> None:
        """Partners and shareholders among those whose keys are there.

        A client masks with its neighbours. Its shares go to them and to itself; in the malicious mode, where clients
        draw their neighbours, it masks with those that drew it too, and its shares go to those that it drew.
        """
        there = frozenset(there)
        near = {one: self._neighbours.get(one, frozenset()) & there for one in there}
        if self._terms.malicious:
            near = {one: frozenset(self._drawn[one]) & there for one in there}
        partners = {one: set(others) for one, others in near.items()}
        for one, others in near.items():
            for other in others:
                partners[other].add(one)
        self._partners = {one: frozenset(others) for one, others in partners.items()}
        # A share's point is the holder's place among all holders.
        self._points = {
            one: {holder: place for place, holder in enumerate(sorted({*others, one}), 1)}
            for one, others in near.items()
        }

    def _lacking(self, owners: Iterable[int], there: Iterable[int]) -> str | None:
        """What is missing to open the owners' secrets with those who are there; None where nothing is."""
        left = set(there)
        if len(left) < self._terms.quorum:
            return f"{len(left)} of {self._terms.members} clients are left, {self._terms.quorum} are needed"
        for owner in owners:
            holders = len(self._points[owner].keys() & left)
            if holders < self._terms.threshold:
                return f"{holders} shareholders of client {owner} are left, {self._terms.threshold} are needed"
        return None

    # ---- requests ----

    def _stop(self, reason: str) -> list[Event]:
        self.done = True
        self._over()
        return [Void(reason)]

    def _ask(self, step: str, told: Mapping[int, Mapping[str, Any]]) -> list[Event]:
        self._step = step
        phase = self._steps.index(step)
        config = extended(self._config, {"phase": phase, TRAINS: step == UPLOAD})
        requests = []
        for client, values in told.items():
            said = ConfigRecord({"session": self._terms.session, **values, "step": step})
            content = {CONFIG: extended(config, self._job.own(client)), SECAGG: said}
            records = self._job.records if step == UPLOAD else {}
            requests.append(
                Request(client, "train", bundle({**records, **content}), self._job.round)
            )
        self._waiting = {request.client: request for request in requests}
        return list(requests)


def _said(reply: Reply) -> Said:
    assert reply.content is not None
    return Said.of(reply.content)


def _uploaded(reply: Reply, size: int) -> Ring:
    assert reply.content is not None
    record = record_in(reply.content, "upload", ArrayRecord)
    array = None if record is None else record.get("masked")
    if not isinstance(array, Array):
        raise Refused("missing", "the reply holds no masked upload")
    vector = unpack(array, "the masked upload")
    if vector.dtype != np.uint32 or vector.shape != (size,):
        raise Refused(
            "shape",
            f"a masked upload of {vector.dtype} {vector.shape}, uint32 ({size},) was asked for",
        )
    return vector  # type: ignore[return-value]
