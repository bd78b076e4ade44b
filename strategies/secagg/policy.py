"""What a client demands of a session before it takes part: set by whoever runs the client, never by the server.

Against a server that may lie, a client needs three things that cannot come from it: whose keys belong to which client
(a roster, handed out beforehand), the smallest cohort it hides in, and how many may collude.

The server picks the cohort, so it may pick all who collude with it: their number is a part of the roster, whatever the
size of the cohort, and a cohort is half of the roster at least unless whoever runs the client says otherwise. A part of
the cohort would be nobody of three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from strategies import plain_json
from strategies.ranges import Ranged
from strategies.secagg.keys import KEY_BYTES, Identity
from strategies.secagg.parameters import choose
from strategies.secagg.terms import Terms, ids_digest
from strategies.wire import Refused


@dataclass(frozen=True)
class Roster:
    """The public identity keys of all clients, by logical id.

    Raises:
        ValueError: a key is not 32 bytes, or two clients have the same.
    """

    keys: Mapping[int, bytes]

    def __post_init__(self) -> None:
        wrong = [client for client, key in self.keys.items() if len(key) != KEY_BYTES]
        if wrong:
            raise ValueError(f"the identity key of client {wrong[0]} is not {KEY_BYTES} bytes long")
        if len(set(self.keys.values())) < len(self.keys):
            raise ValueError("two clients of the roster have the same identity key")

    @classmethod
    def load(cls, path: Path) -> Roster:
        """Reads a roster: a JSON object of hexadecimal keys by client.

        Raises:
            ValueError: the file is missing or is no roster; the message names it.
        """
        try:
            content = plain_json.loads(path.read_text(), object_pairs_hook=_once_each)
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
            return cls({_client(client): bytes.fromhex(key) for client, key in content.items()})
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no roster of identity keys: {error}") from error

    def save(self, path: Path) -> None:
        """Writes the roster, one client a line."""
        lines = (f'  "{client}": "{key.hex()}"' for client, key in sorted(self.keys.items()))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@dataclass(frozen=True)
class Policy(Ranged):
    """A client's own conditions.

    Attributes:
        malicious: whether the server is not trusted to follow the protocol; a roster and an identity are then needed.
        roster: pinned identity keys.
        identities: the private identity of each logical client that this process may be.
        least_cohort: members of a session, and survivors of a sum, without which this client takes no part. None: 3, or
            in the malicious mode half of the roster, of which a quorum must survive.
        dropouts: share of a cohort that may drop out.
        colluders: share of the roster that may collude with the server, all in one cohort; without a roster no
            condition depends on it.

    Raises:
        ValueError: the malicious mode without a roster, or a setting out of its range.
    """

    malicious: bool = False
    roster: Roster | None = None
    identities: Mapping[int, Identity] = field(default_factory=dict, repr=False)
    least_cohort: Annotated[int, Ge(3)] | None = None
    dropouts: Annotated[float, Ge(0), Le(0.9)] = 0.3
    colluders: Annotated[float, Ge(0), Le(0.9)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.malicious and self.roster is None:
            raise ValueError(
                "the malicious mode needs a roster of identity keys that was handed out beforehand: "
                "make one by `trellis keys identities`, and name it to each client"
            )

    @property
    def least_members(self) -> int:
        """Members of a session without which this client takes no part."""
        if self.least_cohort is not None:
            return self.least_cohort
        return least_cohort(len(self.roster.keys) if self.malicious and self.roster else 0)

    def check(self, terms: Terms, client: int, cohort: Sequence[int]) -> None:
        """Holds a session's terms against the conditions.

        Args:
            terms: of the session.
            client: who is asked to take part.
            cohort: ids of all members, where the terms tell them.

        Raises:
            Refused: `terms`, with the condition that is not met.
        """
        if terms.members < self.least_members:
            raise Refused(
                "terms",
                f"a cohort of {terms.members} hides too little: {self.least_members} are asked for; raise"
                f" sampler.fraction, or set {LEAST_COHORT} in the clients' node config (collector.least_cohort in a"
                f" simulation)",
            )
        if terms.malicious is not self.malicious:
            server, own = (
                "malicious" if mode else "semi-honest" for mode in (terms.malicious, self.malicious)
            )
            raise Refused("terms", f"the server's mode is {server}, this client's {own}")
        if self.malicious:
            self._check_malicious(terms, client, cohort)

    def _check_malicious(self, terms: Terms, client: int, cohort: Sequence[int]) -> None:
        assert self.roster is not None
        strangers = sorted(set(cohort) - self.roster.keys.keys())
        if strangers:
            raise Refused("terms", f"clients {strangers[:5]} are not in the roster")
        if (
            client not in cohort
            or len(cohort) != terms.members
            or ids_digest(cohort) != terms.cohort
        ):
            raise Refused("terms", "the list of members is not that of the terms")
        if client not in self.identities:
            raise Refused("terms", f"client {client} has no identity of its own here")
        try:
            asked = choose(
                terms.members, dropouts=self.dropouts, colluders=self.colluders, malicious=True,
                complete=terms.degree == terms.members - 1, population=len(self.roster.keys),
            )  # fmt: skip
        except ValueError as error:
            raise Refused("terms", str(error)) from error
        if (terms.degree, terms.threshold) != (asked.degree, asked.threshold):
            raise Refused(
                "terms",
                f"{terms.threshold} shares of {terms.degree} neighbours: this client's conditions "
                f"give {asked.threshold} of {asked.degree}{self._conditions}",
            )
        if terms.quorum < asked.quorum:
            raise Refused(
                "terms",
                f"a quorum of {terms.quorum}: at least {asked.quorum} is needed{self._conditions}",
            )

    @property
    def _conditions(self) -> str:
        assert self.roster is not None
        return (
            f" (collector.dropouts = {self.dropouts}, collector.colluders = {self.colluders} of a roster of"
            f" {len(self.roster.keys)}: the run's clients should be as many)"
        )


def least_cohort(roster: int) -> int:
    """The smallest cohort by default, where so many clients are in the roster."""
    return max(3, ceil(roster / 2))


ROSTER, IDENTITY, LEAST_COHORT = "secagg-roster", "secagg-identity", "secagg-least-cohort"
DROPOUTS, COLLUDERS = "secagg-dropouts", "secagg-colluders"
"""A SuperNode's node config; with a roster there, its client takes part in the malicious mode only."""


def identity_file(client: int) -> str:
    """The name of the file with a client's private identity key."""
    return f"client-{client}.pem"


def node_policy(settings: Mapping[str, object], *, malicious: bool) -> Policy:
    """The conditions in a SuperNode's node config.

    Args:
        settings: the node config.
        malicious: whether the run asks for the malicious mode.

    Raises:
        ValueError: the malicious mode without a roster, or a file that can't be read.
    """
    names = {LEAST_COHORT: "least_cohort", DROPOUTS: "dropouts", COLLUDERS: "colluders"}
    numbers = numbers_in(settings, names, whole={LEAST_COHORT})
    if ROSTER not in settings:
        return Policy(malicious=malicious, **numbers)
    if IDENTITY not in settings:
        raise ValueError(
            f"the node config names {ROSTER} and no {IDENTITY}, the client's private key"
        )
    client, path = settings.get("partition-id"), Path(str(settings[IDENTITY]))
    if not isinstance(client, int):
        raise ValueError(f"the node config's partition-id is {client!r}: a whole number is needed")
    roster = Roster.load(Path(str(settings[ROSTER])))
    identity = _identity(path)
    if roster.keys.get(client) != identity.public:
        raise ValueError(f"{path} is not the key that the roster has for client {client}")
    return Policy(True, roster, {client: identity}, **numbers)


def numbers_in(
    settings: Mapping[str, object], names: Mapping[str, str], *, whole: Set[str]
) -> dict[str, Any]:
    """The numbers of a node config by the names that they have in a dataclass; those that are not there are left out.

    Args:
        settings: the node config.
        names: for each of its keys the dataclass's name.
        whole: keys whose values are whole numbers.

    Raises:
        ValueError: a value is of another type; the message names the key.
    """
    found: dict[str, Any] = {}
    for key, name in names.items():
        if key in settings:
            value = settings[key]
            if type(value) is not int and (key in whole or type(value) is not float):
                kind = "a whole number" if key in whole else "a number"
                raise ValueError(f"the node config's {key} is {value!r}: {kind} is needed")
            found[name] = value
    return found


def simulation_policy(
    roster: Path | None,
    identities: Path | None,
    *,
    malicious: bool,
    dropouts: float,
    colluders: float,
    least_cohort: int | None = None,
) -> Policy:
    """The conditions of clients that are this machine's own: the run's.

    Raises:
        ValueError: as `node_policy`.
    """
    if not malicious and (roster or identities):
        raise ValueError(
            "collector.roster and collector.identities are for the malicious mode: set collector.malicious=true"
        )
    pinned = None if roster is None else Roster.load(roster)
    keys = {} if pinned is None else _identities_of(pinned, identities)
    return Policy(malicious, pinned, keys, least_cohort, dropouts, colluders)


def _identities_of(roster: Roster, folder: Path | None) -> dict[int, Identity]:
    """The private key of every client of a roster, each the one that the roster has.

    Raises:
        ValueError: one is missing, or another's.
    """
    if folder is None:
        raise ValueError("collector.identities is missing: the folder of the clients' private keys")
    keys: dict[int, Identity] = {}
    for client, public in sorted(roster.keys.items()):
        path = folder / identity_file(client)
        keys[client] = _identity(path)
        if keys[client].public != public:
            raise ValueError(f"{path} is not the key that the roster has for client {client}")
    return keys


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ: of two entries for one client, the last would count silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a client is named twice")
    return found


def _client(text: str) -> int:
    """A client as `Roster.save` writes it; "03" would be a second name of client 3."""
    client = int(text)
    if client < 0 or str(client) != text:
        raise ValueError(f"{text!r} is no client: write {abs(client)}")
    return client


def _identity(path: Path) -> Identity:
    try:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"others can read it: chmod 600 {path}")
        return Identity.from_pem(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no private identity key: {error}") from error
