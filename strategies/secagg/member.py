"""A client's half of secure aggregation, over all steps of the protocol.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", Figure 4; Bell et al.
2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", Algorithms 2 and 3.

    keys     a fresh pair to seal shares, a fresh pair to mask        → public keys (signed, with the neighbours drawn)
    shares   shares of the own seed and masking key to the neighbours → sealed, by way of the server
    upload   trains; update + own mask ± a mask with each neighbour   → one vector of integers modulo 2³²
             (signed, for each that it drew: “its mask is in my upload”)
    agree    (malicious mode) one set of survivors                    → signature
    unmask   of each neighbour EITHER its seed's share, where it survived, OR its masking key's, where it dropped out

Knows nothing of training and of other rounds, but for a ledger: no session twice, one sum a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from random import SystemRandom
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from strategies.configuration import digest_of_request
from strategies.contents import Contents
from strategies.records import bundle, records_in
from strategies.secagg.keys import KEY_BYTES, KeyPair, derive
from strategies.secagg.masking import masked
from strategies.secagg.policy import Policy, Roster
from strategies.secagg.sealing import seal, unseal
from strategies.secagg.shamir import share
from strategies.secagg.statements import (
    AGREE,
    KEYS,
    POINT_BYTES,
    SEALED_BYTES,
    SHARES,
    UNMASK,
    UPLOAD,
    agreement,
    inclusion,
    introduction,
    pair_context,
    seed_commitment,
)
from strategies.secagg.terms import ID_BYTES, SECAGG, ModelDigest, Said, Terms
from strategies.secagg.vault import Vault, forget_all
from strategies.secagg.witness import agreed_upon, included, introduced
from strategies.update import Update
from strategies.wire import Refused, config_of, integer_in, pack

_OPENED = "opened"
_LEDGER_WORDS = 4


class MaskedClient:
    """The client half of the collector `masked`, for all logical clients of one process.

    Args:
        folder: the clients' own, where secrets are kept while a session lasts.
        policy: conditions without which a client takes no part.
    """

    def __init__(self, folder: Path, policy: Policy | None = None) -> None:
        self._folder = folder
        self._policy = policy or Policy()
        self._digest = ModelDigest()

    def answer(self, request: RecordDict) -> RecordDict:
        """The reply of a phase that trains nothing.

        Raises:
            Refused: `terms`, `session`, `phase`, `replayed`, `malformed`, `neighbours`, `signature`, `survivors` or
                `reused`, when the client takes no further part.
        """
        said, client = Said.of(request), _client(request)
        steps: dict[str, Callable[[int, Vault, Said, RecordDict], dict[str, Any]]] = {
            KEYS: self._keys, SHARES: self._shares, AGREE: self._agree, UNMASK: self._unmask,
        }  # fmt: skip
        step = steps.get(said.step())
        if step is None:
            raise Refused("phase", f"the protocol has no step {said.step()!r:.40}")
        vault = Vault(self._folder, client)
        with vault.locked():
            return _record(step(client, vault, said, request))

    def prepare(self, request: RecordDict) -> RecordDict | None:
        """Takes the shares that others sent; the upload where it was made before, None to train."""
        said, vault = Said.of(request), Vault(self._folder, _client(request))
        session = said.octets("session", ID_BYTES)
        with vault.locked():
            state = vault.recall(session)
            if state["step"] == UPLOAD and (sent := vault.upload(session)) is not None:
                return _upload(sent, state)
            _in_step(state, SHARES)
            terms = Terms.read(state["terms"])
            if self._digest.of(records_in(request, ArrayRecord)) != terms.model:
                raise Refused("terms", "the model is not the one that the session's keys are for")
            _as_agreed(terms, request)
            self._receive(state, terms, said)
            vault.keep(session, state, durable=False)
        return None

    def reply(self, update: Update, request: RecordDict) -> RecordDict:
        """The masked update: on the disk before it is sent."""
        said, vault = Said.of(request), Vault(self._folder, _client(request))
        session = said.octets("session", ID_BYTES)
        with vault.locked():
            state = vault.recall(session)
            _in_step(state, SHARES)
            terms = Terms.read(state["terms"])
            _as_agreed(terms, request)
            contents = Contents(
                {name: section.layout for name, section in update.sections.items()},
                terms.metrics, terms.metric_limit, terms.max_weight or None,
            )  # fmt: skip
            array = pack(masked(update, contents, terms, derive(state["seed"], terms.context("self mask")),
                                *_pairwise(state, terms)))  # fmt: skip
            state |= {"step": UPLOAD, "shape": list(array.shape)}
            state["layouts"] = [contents.layouts[name].digest for name in sorted(contents.layouts)]
            if terms.malicious:
                state["included"] = self._includes(state, terms)
            # In this order: whatever dies in between, no second update is ever put under the same masks.
            vault.keep(session, state)
            vault.keep_upload(session, array.data)
        return _upload(array.data, state)

    def forget(self) -> None:
        """Deletes what is left of all sessions; the ledgers stay."""
        forget_all(self._folder)

    # ---- the steps ----

    def _keys(self, client: int, vault: Vault, said: Said, request: RecordDict) -> dict[str, Any]:
        terms = Terms.read(said.values)
        cohort = said.clients("clients") if terms.malicious else []
        self._policy.check(terms, client, cohort)
        _same_round(terms, request)
        self._once(vault, terms, said)
        vault.forget()
        sealing, masking = KeyPair.generate(), KeyPair.generate()
        state: dict[str, Any] = {
            "step": KEYS, "client": client, "terms": terms.record(), "cohort": cohort,
            "sealing": sealing.private, "masking": masking.private, "seed": os.urandom(KEY_BYTES),
        }  # fmt: skip
        reply: dict[str, Any] = {"keys": sealing.public + masking.public}
        if terms.malicious:
            others = [one for one in cohort if one != client]
            drawn = sorted(SystemRandom().sample(others, terms.degree))
            state["drawn"] = drawn
            signed = introduction(terms, client, reply["keys"], drawn)
            reply |= {"drawn": drawn, "signature": self._policy.identities[client].sign(signed)}
        vault.record(KEYS, terms.run.hex(), terms.model.hex(), terms.session.hex())
        vault.keep(terms.session, state, durable=False)
        return reply

    def _shares(self, client: int, vault: Vault, said: Said, request: RecordDict) -> dict[str, Any]:
        session = said.octets("session", ID_BYTES)
        state = vault.recall(session)
        _in_step(state, KEYS)
        terms = Terms.read(state["terms"])
        _same_round(terms, request)
        peers = said.clients("peers")
        rows = said.rows("keys", len(peers), 2 * KEY_BYTES)
        if client in peers or (not terms.malicious and len(peers) > terms.degree):
            raise Refused(
                "neighbours", f"{len(peers)} neighbours of {terms.degree}, or itself among them"
            )
        mine, theirs = peers, peers
        if terms.malicious:
            mine, theirs = introduced(self._roster, state, terms, said, peers, rows)
        holders = sorted([*mine, client])
        if len(holders) < terms.threshold:
            raise Refused(
                "neighbours",
                f"{len(holders)} shareholders are left, {terms.threshold} open a secret",
            )
        shares = share(state["seed"] + state["masking"], terms.threshold, len(holders))
        sealing, sealed = KeyPair.from_private(state["sealing"]), []
        # One agreement a neighbour gives the keys for both directions.
        common = {
            peer: _agreed(sealing, row[:KEY_BYTES], _sealing_context(terms, client, peer),
                          _sealing_context(terms, peer, client))
            for peer, row in zip(peers, rows, strict=True)
        }  # fmt: skip
        state |= {"step": SHARES, "peers": peers, "keys": rows, "held": {}}
        state["opens"] = {str(peer): common[peer][1] for peer in theirs}
        for point, (holder, row) in enumerate(zip(holders, shares, strict=True), 1):
            plain = point.to_bytes(POINT_BYTES, "big") + row.tobytes()
            if holder == client:
                state["held"][str(client)] = plain
            else:
                info = _sealing_context(terms, client, holder)
                sealed.append(seal(common[holder][0], plain, info))
        vault.keep(session, state)
        commitment = seed_commitment(terms, client, state["seed"])
        return {"to": mine, "sealed": b"".join(sealed), "commitment": commitment}

    def _receive(self, state: dict[str, Any], terms: Terms, said: Said) -> None:
        """Opens the shares of those who sent some, and takes note of who masks with this client."""
        client, opens = state["client"], state["opens"]
        partners, senders = said.clients("partners"), said.clients("senders")
        if not set(senders) <= set(partners) or not set(partners) <= set(state["peers"]):
            raise Refused("neighbours", "those who sent shares are not among the neighbours")
        if not opens.keys() >= set(map(str, senders)):
            raise Refused("neighbours", "shares came of clients that did not draw this one")
        left = len(set(partners) & set(state.get("drawn", partners))) + 1
        if left < terms.threshold:
            raise Refused(
                "neighbours", f"{left} shareholders are left, {terms.threshold} open a secret"
            )
        for sender, sealed in zip(
            senders, said.rows("sealed", len(senders), SEALED_BYTES), strict=True
        ):
            info = _sealing_context(terms, sender, client)
            try:
                state["held"][str(sender)] = unseal(opens[str(sender)], sealed, info)
            except ValueError as error:
                raise Refused(
                    "malformed", f"the share of client {sender} was changed on its way"
                ) from error
        state["partners"] = partners

    def _includes(self, state: Mapping[str, Any], terms: Terms) -> bytes:
        """Signed for each shareholder: this client's upload holds the mask with it, so that it may help to open it."""
        client = state["client"]
        identity = self._policy.identities[client]
        holders = sorted(set(state["drawn"]) & set(state["partners"]))
        return b"".join(identity.sign(inclusion(terms, client, one)) for one in holders)

    def _agree(self, client: int, vault: Vault, said: Said, request: RecordDict) -> dict[str, Any]:
        session = said.octets("session", ID_BYTES)
        state = vault.recall(session)
        _in_step(state, UPLOAD)
        terms = Terms.read(state["terms"])
        _same_round(terms, request)
        if not terms.malicious:
            raise Refused("phase", "survivors are agreed on in the malicious mode only")
        survivors = said.clients("survivors")
        strangers = set(survivors) - set(state["cohort"])
        least = max(terms.quorum, self._policy.least_cohort or 0)
        if strangers or client not in survivors or len(survivors) < least:
            raise Refused(
                "survivors",
                f"{len(survivors)} survivors, {len(strangers)} of them unknown: this client must be "
                f"among them, and {least} there",
            )
        # Signed once: a second set of survivors finds the session in another step.
        state |= {"step": AGREE, "survivors": survivors}
        vault.keep(session, state)
        signed = agreement(terms, survivors)
        return {"signature": self._policy.identities[client].sign(signed)}

    def _unmask(self, client: int, vault: Vault, said: Said, request: RecordDict) -> dict[str, Any]:
        session = said.octets("session", ID_BYTES)
        state = vault.recall(session)
        terms = Terms.read(state["terms"])
        _in_step(state, AGREE if terms.malicious else UPLOAD)
        _same_round(terms, request)
        alive, dropped = said.clients("alive"), said.clients("dropped")
        held: dict[str, bytes] = state["held"]
        if set(alive) & set(dropped):
            raise Refused(
                "survivors", "a client is said both to have survived and to have dropped out"
            )
        if client not in alive or not {*map(str, alive), *map(str, dropped)} <= held.keys():
            raise Refused("survivors", "this client is not among the survivors, or strangers are")
        # In the malicious mode this client holds shares of those that drew it, which may be few.
        if len(alive) < (min(terms.threshold, len(held)) if terms.malicious else terms.threshold):
            raise Refused("survivors", f"{len(alive)} survivors among the neighbours are too few")
        if terms.malicious:
            agreed_upon(self._roster, state, terms, said, alive, dropped)
            included(self._roster, state, terms, said, alive)
        vault.record(_OPENED, terms.run.hex(), terms.model.hex(), session.hex())
        seed, key = (
            slice(POINT_BYTES, POINT_BYTES + KEY_BYTES),
            slice(POINT_BYTES + KEY_BYTES, None),
        )
        reply = {
            "seeds": b"".join(held[str(one)][:POINT_BYTES] + held[str(one)][seed] for one in alive),
            "masking": b"".join(
                held[str(one)][:POINT_BYTES] + held[str(one)][key] for one in dropped
            ),
        }
        vault.forget()
        return reply

    # ---- what keeps the server honest ----

    @property
    def _roster(self) -> Roster:
        assert self._policy.roster is not None  # the policy of the malicious mode
        return self._policy.roster

    def _once(self, vault: Vault, terms: Terms, said: Said) -> None:
        """Refuses a session that was there before, and a second sum on a model.

        A sum may have been opened as soon as this client has given shares for it. A server that follows the protocol
        says which sessions came to nothing; one that may not is not believed.
        """
        joined = said.values.get("void")
        void = joined.hex() if isinstance(joined, bytes) and not terms.malicious else ""
        length = 2 * ID_BYTES
        declared = {void[begin : begin + length] for begin in range(0, len(void), length)}
        for entry in vault.recorded():
            if len(entry) != _LEDGER_WORDS:
                continue  # cut off as it was written: what it was for was then not done
            event, run, model, session = entry
            if session == terms.session.hex():
                raise Refused("replayed", "a session of this id was there before")
            same = (run, model) == (terms.run.hex(), terms.model.hex())
            if same and event == _OPENED and session not in declared:
                raise Refused(
                    "reused", "this client is in a sum on this very model, and joins no second one"
                )


def _pairwise(state: Mapping[str, Any], terms: Terms) -> tuple[list[bytes], list[bytes]]:
    """Keys of the masks with each partner: those that are added, towards higher ids, and those that are taken off."""
    client, masking = state["client"], KeyPair.from_private(state["masking"])
    keys = dict(zip(state["peers"], state["keys"], strict=True))
    added: list[bytes] = []
    taken: list[bytes] = []
    for partner in state["partners"]:
        (key,) = _agreed(masking, keys[partner][KEY_BYTES:], pair_context(terms, client, partner))
        (added if client < partner else taken).append(key)
    return added, taken


def _agreed(pair: KeyPair, public: bytes, *infos: bytes) -> list[bytes]:
    try:
        return pair.agree_for(public, *infos)
    except ValueError as error:
        raise Refused("neighbours", f"a neighbour's public key is none: {error}") from error


def _sealing_context(terms: Terms, sender: int, receiver: int) -> bytes:
    return terms.context("share", sender=sender, receiver=receiver)


def _in_step(state: Mapping[str, Any], step: str) -> None:
    if state["step"] != step:
        raise Refused(
            "phase", f"this client's session is past {state['step']!r}, not past {step!r}"
        )


def _same_round(terms: Terms, request: RecordDict) -> None:
    config = config_of(request)
    for key, agreed in (("server-round", terms.round), ("version", terms.version)):
        if (asked := integer_in(config, key)) != agreed:
            raise Refused("terms", f"the terms are of {key} {agreed}, the request is of {asked}")


def _as_agreed(terms: Terms, request: RecordDict) -> None:
    """Refuses to train on other settings than all members agreed on with their keys."""
    _same_round(terms, request)
    if digest_of_request(request, SECAGG) != terms.settings:
        raise Refused("terms", "the configuration is not the one that the session's keys are for")


def _client(request: RecordDict) -> int:
    return integer_in(config_of(request), "client")


def _record(values: dict[str, Any]) -> RecordDict:
    return bundle({SECAGG: ConfigRecord(values)})


def _upload(data: bytes, state: Mapping[str, Any]) -> RecordDict:
    said = {name: state[name] for name in ("layouts", "included") if name in state}
    array = Array(dtype="uint32", shape=tuple(state["shape"]), stype="numpy.ndarray", data=data)
    return bundle({SECAGG: ConfigRecord(said), "upload": ArrayRecord({"masked": array})})
