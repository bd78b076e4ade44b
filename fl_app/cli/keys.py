"""`trellis keys`: what clients must hold before a server asks them for anything, made on their own side."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clients.encrypted.keys import OwnerKeys
from clients.encrypted.plan import plan_of
from clients.encrypted.ring import MOST_BITS, Ring
from fl_app.cli.main import DONE, REFUSED, Parser
from fl_app.config.faults import nearest
from strategies.ckks import CkksParameters, SharedKey
from strategies.secagg.keys import Identity
from strategies.secagg.policy import Roster, identity_file

_KINDS = {
    "identity": "one client's private identity key; prints the public one, for the roster",
    "roster": "a roster of public identity keys, out of what `trellis keys identity` printed",
    "identities": "a roster and all private keys at once, to simulate the malicious mode on one machine",
    "ckks": "the key that all clients of collector=ckks share and the server never gets; prints its fingerprint",
    "encrypted": "the key of a data owner of collector=encrypted, who alone decrypts; prints its fingerprint",
}

_EXAMPLES = """examples:
  trellis keys identity client-3.pem                    on the device of client 3
  trellis keys roster roster.json 0=5f0c… 1=a93b… …     by whoever all clients trust with it
  trellis keys identities keys --clients 20             a simulation
  trellis keys ckks shared.key                          once, by whoever all clients trust; copy it to each
  trellis keys encrypted owner.key                      by a data owner; a copy to owners that share one key
  trellis keys encrypted owner.key collector.mode=strict   for a run with these overrides beside strategy=encrypted
  trellis run strategy=secure collector.malicious=true collector.roster=keys/roster.json \\
      collector.identities=keys num_clients=20

A client names its keys in its own node config, where no server can change it:
  flower-supernode --node-config 'partition-id=3 secagg-roster="/etc/roster.json" secagg-identity="/etc/client-3.pem"'
  flower-supernode --node-config 'partition-id=3 ckks-key="/etc/shared.key"'
"""


def main(arguments: Sequence[str]) -> int:
    """Makes the keys that are named."""
    listed = "\n".join(f"  {kind:<10} {what}" for kind, what in _KINDS.items())
    parser = Parser(
        "trellis keys",
        usage="trellis keys [-h] KIND …",
        description=f"Makes keys and rosters for secure aggregation. Nothing is overwritten.\n\nkinds:\n{listed}",
        epilog=_EXAMPLES,
    )
    if not arguments or arguments[0] in {"-h", "--help"}:
        parser.print_help(sys.stdout if arguments else sys.stderr)
        return DONE if arguments else REFUSED
    kind, *rest = arguments
    makers: dict[str, Callable[[Sequence[str]], None]] = {
        "identity": _identity, "roster": _roster, "identities": _identities,
        "ckks": _ckks, "encrypted": _encrypted,
    }  # fmt: skip
    if kind not in makers:
        guess = nearest(kind, list(makers))
        parser.error(f"unknown kind {kind}" + (f"; did you mean {guess}?" if guess else ""))
    try:
        makers[kind](rest)
    except (OSError, ValueError) as error:
        print(f"trellis keys {kind}: {error}", file=sys.stderr)
        return REFUSED
    return DONE


def _identity(arguments: Sequence[str]) -> None:
    parser = Parser("trellis keys identity", description=_KINDS["identity"])
    parser.add_argument("file", type=Path, help="where the private key goes, mode 0600")
    path: Path = parser.read(arguments).file
    identity = Identity.generate()
    _write_private(path, identity.to_pem())
    print(identity.public.hex())


def _roster(arguments: Sequence[str]) -> None:
    parser = Parser("trellis keys roster", description=_KINDS["roster"])
    parser.add_argument("file", type=Path, help="where the roster goes")
    parser.add_argument(
        "keys", nargs="+", metavar="CLIENT=KEY", help="public key of a client, hexadecimal"
    )
    options = parser.read(arguments)
    keys: dict[int, bytes] = {}
    for entry in options.keys:
        client, _, key = entry.partition("=")
        try:
            keys[int(client)] = bytes.fromhex(key)
        except ValueError:
            raise ValueError(f"{entry!r} is not CLIENT=KEY, as in 3=5f0c…") from None
    if len(keys) < len(options.keys):
        raise ValueError("a client is named twice")
    _absent(options.file)
    roster = Roster(keys)
    if len(keys) < 3:
        raise ValueError(f"{len(keys)} clients are named: three or more can hide in a sum")
    roster.save(options.file)
    print(f"{options.file}: {len(keys)} clients", file=sys.stderr)


def _identities(arguments: Sequence[str]) -> None:
    parser = Parser("trellis keys identities", description=_KINDS["identities"])
    parser.add_argument("folder", type=Path, help="where roster.json and client-N.pem go")
    parser.add_argument(
        "--clients", type=int, required=True, metavar="N", help="how many clients there are"
    )
    options = parser.read(arguments)
    if options.clients < 3:
        raise ValueError(f"--clients {options.clients}: three or more can hide in a sum")
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _absent(folder / "roster.json")
    identities = {client: Identity.generate() for client in range(options.clients)}
    for client, identity in identities.items():
        _write_private(folder / identity_file(client), identity.to_pem())
    Roster({client: one.public for client, one in identities.items()}).save(folder / "roster.json")
    print(f"{folder}: roster.json and {options.clients} private keys", file=sys.stderr)


def _ckks(arguments: Sequence[str]) -> None:
    parser = Parser("trellis keys ckks", description=_KINDS["ckks"])
    parser.add_argument("file", type=Path, help="where the key goes, mode 0600")
    parser.add_argument(
        "--degree",
        type=int,
        default=4096,
        choices=(4096, 8192),
        help="collector.degree of the runs",
    )
    options = parser.read(arguments)
    _absent(options.file)
    key = SharedKey.generate(CkksParameters(degree=options.degree))
    key.save(options.file)
    print(key.fingerprint)


def _encrypted(arguments: Sequence[str]) -> None:
    parser = Parser("trellis keys encrypted", description=_KINDS["encrypted"])
    parser.add_argument("file", type=Path, help="where the key goes, mode 0600")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="the run's overrides beside strategy=encrypted: its model and mode decide the ring",
    )
    parser.add_argument(
        "--degree", type=int, choices=tuple(MOST_BITS), help="of the ring, if named"
    )
    parser.add_argument(
        "--bits", type=_numbers, metavar="B,B,…", help="of its primes, the special one last"
    )
    options = parser.read(arguments)
    if (options.degree is None) != (options.bits is None):
        parser.error("--degree and --bits go together; without them, the overrides decide")
    _absent(options.file)
    named = options.bits is not None
    ring = Ring(options.degree, options.bits) if named else _ring_of(options.overrides)
    keys = OwnerKeys.generate(ring)
    keys.save(options.file)
    print(keys.fingerprint)


def _ring_of(overrides: Sequence[str]) -> Ring:
    """The ring of a run."""
    from fl_app.assembly import Assembly
    from fl_app.compose import compose
    from fl_app.encryption import spec_in

    config = compose(["strategy=encrypted", *overrides])
    assembly = Assembly(config)
    return plan_of(spec_in(config, assembly.module(), assembly.trainer)).ring


def _numbers(text: str) -> tuple[int, ...]:
    """Lengths of primes; argparse says "invalid value" by this function's name."""
    return tuple(int(number) for number in text.split(","))


def _absent(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} is there already: remove it first, or choose another name")


def _write_private(path: Path, data: bytes) -> None:
    _absent(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
