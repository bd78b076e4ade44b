"""The clients' half of sums under CKKS: encrypts an update, and opens sums that it can tell to be sums.

What a client holds the server to, whatever that says: it opens a sum only of a session that it uploaded to, of at least
a quorum of different clients who have the key and were told the same settings, as their tags prove, and one sum a
session. It uploads once on a model, unless the server declares that nothing came of the earlier session.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from strategies.ckks import Cipher, CiphertextError, Member, SharedKey, Tagger
from strategies.ckks.conditions import KeyLedger
from strategies.ckks.messages import (
    CIPHERTEXTS,
    CKKS,
    ID_BYTES,
    PLAIN,
    carrier,
    data_in,
    octets,
    said_in,
)
from strategies.ckks.settings import CkksSettings
from strategies.ckks.tags import NONCE_BYTES, TAG_BYTES
from strategies.ckks.vectors import sum_residues
from strategies.configuration import digest_of_request
from strategies.records import bundle, records_in
from strategies.secagg.terms import ModelDigest
from strategies.secagg.vault import Vault
from strategies.update import Update
from strategies.wire import Refused, config_of, integer_in, pack

_UPLOADED: Final = "uploaded"
_OPENED: Final = "opened"
_WORDS: Final = 5
"""Of an upload's entry in the ledger, beside its name: run, model, session, settings, size."""


class CkksClient:
    """The client half of `strategies.collectors.Ckks`.

    Args:
        settings: the same as the server's.
        key: gives the key that the clients share; asked when it is first needed.
        folder: where each client of this process keeps its ledger, and the key's is.
        wears: whether openings under the key are counted, and refused past those that its noise is made for. Not
            where the key protects nobody, as in a simulation.
    """

    def __init__(
        self,
        settings: CkksSettings,
        key: Callable[[], SharedKey],
        folder: Path,
        *,
        wears: bool = True,
    ) -> None:
        self._settings, self._make_key, self._folder = settings, key, folder
        self._wears = wears
        self._digest = ModelDigest()

    @cached_property
    def _key(self) -> SharedKey:
        return self._make_key()

    @cached_property
    def _cipher(self) -> Cipher:
        return Cipher(self._settings.parameters, self._key)

    def prepare(self, request: RecordDict) -> None:
        """Holds the session against what this client has done before, and has the key at hand.

        Raises:
            Refused: `session`, `malformed`, `replayed`, `reused` or `key`.
        """
        said = said_in(request)
        self._same_settings(said)
        _asked(request)
        try:
            _ = self._cipher
        except (ValueError, OSError) as error:
            raise Refused("key", str(error)) from error
        vault = self._vault(request)
        with vault.locked():
            self._once(vault, said, self._model(request))

    def reply(self, update: Update, request: RecordDict) -> RecordDict:
        """The encrypted update with its tag.

        Raises:
            Refused: as `prepare`, or the update can't be encrypted.
        """
        said, model, asked = said_in(request), self._model(request), _asked(request)
        (client,) = update.members
        contents = self._settings.contents(
            {name: section.layout for name, section in update.sections.items()}
        )
        digests = [contents.layouts[name].digest for name in sorted(contents.layouts)]
        if said.get("layouts") != digests:
            raise Refused("shape", "this client lays its parameters out otherwise than the server")
        factor, limit = contents.factor(update), self._settings.limit
        vector = np.zeros(contents.size + contents.tail_size)
        cut = 0
        for place, values in contents.vectors(update):
            vector[place] = values
            cut += int(np.count_nonzero(np.abs(values) > limit))
        body = vector[: contents.size]
        np.clip(body, -limit, limit, out=body)
        body *= factor
        vector[contents.size :] = contents.tail(update, cut) * limit
        try:
            encrypted = self._cipher.encrypt(vector)
        except ValueError as error:
            raise Refused("not_finite", str(error)) from error
        member = Member(client, os.urandom(NONCE_BYTES))
        session, run = (octets(said, name, ID_BYTES) for name in ("session", "run"))
        vault = self._vault(request)
        with vault.locked():
            self._once(vault, said, model)
            entry = (item.hex() for item in (run, model, session, asked))
            vault.record(_UPLOADED, *entry, str(vector.size))
        told: dict[str, Any] = {
            "session": session,
            "settings": self._settings.digest,
            "layouts": digests,
            "key": self._key.fingerprint,
            "nonce": member.nonce,
            "tag": self._tagger(run, model, session, asked, vector.size).tag(
                encrypted.residues, member
            ),
        }
        return bundle({CKKS: ConfigRecord(told), CIPHERTEXTS: carrier(CIPHERTEXTS, encrypted.blob)})

    def answer(self, request: RecordDict) -> RecordDict:
        """The plain sum, where it is one that this client may open.

        Raises:
            Refused: `session`, `members`, `reused`, `tag`, `worn` or `malformed`.
        """
        said = said_in(request)
        self._same_settings(said)
        session = octets(said, "session", ID_BYTES)
        client = integer_in(config_of(request), "client")
        blob, members = data_in(request, CIPHERTEXTS), self._members(said, client)
        vault = self._vault(request)
        with vault.locked():
            run, model, asked, size = _uploaded(vault, session)
            parameters = self._settings.parameters
            try:
                residues = sum_residues(parameters, blob, size)
            except CiphertextError as error:
                raise Refused("malformed", str(error)) from error
            tagger = self._tagger(run, model, session, asked, size)
            if not tagger.verify(residues, members, octets(said, "tag", TAG_BYTES)):
                raise Refused("tag", "these ciphertexts are not the sum of those clients' uploads")
            digest = hashlib.sha256(blob).hexdigest()
            opened = [
                entry[2] for entry in vault.recorded() if entry[:2] == (_OPENED, session.hex())
            ]
            if any(not hmac.compare_digest(other, digest) for other in opened):
                raise Refused("reused", "this client has opened another sum of this session")
            if self._wears:
                ledger = KeyLedger(self._folder, self._key.fingerprint)
                ledger.open(session, digest, len(residues), self._settings.decryptions)
            if not opened:
                vault.record(_OPENED, session.hex(), digest)
        plain = self._cipher.release(blob, size)
        told: dict[str, Any] = {"session": session, "settings": self._settings.digest}
        return bundle({CKKS: ConfigRecord(told), PLAIN: ArrayRecord({PLAIN: pack(plain)})})

    def _members(self, said: ConfigRecord, client: int) -> list[Member]:
        """Those whose sum this is said to be: this client and others, a quorum at least."""
        given = said.get("members")
        ids = [one for one in given if type(one) is int] if isinstance(given, list) else []
        if given != ids or not all(0 <= one < 1 << 62 for one in ids):
            raise Refused("malformed", "members should be a list of clients")
        nonces = octets(said, "nonces", NONCE_BYTES * len(ids))
        members = [
            Member(one, nonces[NONCE_BYTES * index : NONCE_BYTES * (index + 1)])
            for index, one in enumerate(ids)
        ]
        if client not in ids or not self._settings.quorum <= len(set(ids)) == len(ids):
            raise Refused(
                "members",
                f"a sum of {len(set(ids))} clients: this one opens sums of {self._settings.quorum} or more that it"
                " is in",
            )
        return members

    def _same_settings(self, said: ConfigRecord) -> None:
        if said.get("settings") != self._settings.digest:
            raise Refused(
                "session", "the server's settings of the collector differ from this client's"
            )

    def _once(self, vault: Vault, said: ConfigRecord, model: bytes) -> None:
        """Refuses a session that was there before, and a second one on a model unless nothing came of the first."""
        session, run = (octets(said, name, ID_BYTES).hex() for name in ("session", "run"))
        void = said.get("void")
        joined = void if isinstance(void, bytes) else b""
        declared = {joined[at : at + ID_BYTES].hex() for at in range(0, len(joined), ID_BYTES)}
        entries = list(vault.recorded())
        # One whose sum this client has opened itself is not void, whoever says so.
        declared -= {entry[1] for entry in entries if entry[0] == _OPENED and len(entry) > 1}
        for event, *entry in entries:
            if (
                event != _UPLOADED or len(entry) < _WORDS
            ):  # one that was cut off came before no upload
                continue
            if entry[2] == session:
                raise Refused("replayed", "this client has uploaded to this session before")
            if entry[:2] == [run, model.hex()] and entry[2] not in declared:
                raise Refused(
                    "reused", "this client is in a sum on this very model, and joins no second one"
                )

    def _tagger(self, run: bytes, model: bytes, session: bytes, asked: bytes, size: int) -> Tagger:
        bound = b"".join(
            (run, model, session, asked, size.to_bytes(8, "little"), self._settings.digest)
        )
        return Tagger(self._key, bound, self._settings.parameters.modulus)

    def _model(self, request: RecordDict) -> bytes:
        return self._digest.of(records_in(request, ArrayRecord))

    def _vault(self, request: RecordDict) -> Vault:
        return Vault(self._folder, integer_in(config_of(request), "client"))


def _asked(request: RecordDict) -> bytes:
    """The digest of the configuration that a client is told to train with: only those who share it sum."""
    return digest_of_request(request, CKKS)


def _uploaded(vault: Vault, session: bytes) -> tuple[bytes, bytes, bytes, int]:
    """Run, model, settings and size of this client's upload to a session.

    Raises:
        Refused: `session`, where there was none.
    """
    for event, *entry in vault.recorded():
        if event == _UPLOADED and len(entry) == _WORDS and entry[2] == session.hex():
            run, model, _, asked, size = entry
            return bytes.fromhex(run), bytes.fromhex(model), bytes.fromhex(asked), int(size)
    raise Refused("session", f"this client has uploaded nothing to session {session.hex()[:8]}")
