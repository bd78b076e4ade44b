"""`trellis certs`: what a secured deployment needs before its first start, and how its parts are renewed.

Private keys are never printed, and never overwritten unless `--force` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fl_app.cli.main import DONE, FAILED, REFUSED, Parser
from fl_app.config.faults import nearest
from fl_app.flower.certificates import (
    AUTHORITY_DAYS,
    SERVER_DAYS,
    Certificates,
    describe,
    make_authority,
    make_missing,
    make_node,
    make_server,
    renew_authority,
    renew_server,
)

_KINDS = {
    "all": "an authority, the SuperLink's certificate and nodes' keys; what is there stays",
    "authority": "the authority that signs: ca.pem goes to every machine, ca.key to none",
    "server": "the SuperLink's key and certificate",
    "node": "key pairs of SuperNodes",
    "show": "what certificates and keys are: hosts, validity, fingerprints",
}

_EXAMPLES = """examples:
  trellis certs all certs --host fl.example.org --host 10.0.0.5 --nodes 3
  trellis certs authority certs
  trellis certs server certs --host fl.example.org
  trellis certs server certs --renew                 the same key and hosts, a new year
  trellis certs node certs hospital-a hospital-b
  trellis certs show certs/server.pem certs/nodes/hospital-a.pub

A SuperLink takes   --ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key --enable-supernode-auth
a SuperNode         --root-certificates ca.pem --auth-supernode-private-key nodes/hospital-a
and is made known by   flwr supernode register nodes/hospital-a.pub
"""


def main(arguments: Sequence[str]) -> int:
    """Makes, renews or shows what is named."""
    listed = "\n".join(f"  {kind:<10} {what}" for kind, what in _KINDS.items())
    parser = Parser(
        "trellis certs",
        usage="trellis certs [-h] KIND …",
        description=f"Makes the keys and certificates of a deployment.\n\nkinds:\n{listed}",
        epilog=_EXAMPLES,
    )
    if not arguments or arguments[0] in {"-h", "--help"}:
        parser.print_help(sys.stdout if arguments else sys.stderr)
        return DONE if arguments else REFUSED
    kind, *rest = arguments
    makers: dict[str, Callable[[Sequence[str]], int]] = {
        "all": _all, "authority": _authority, "server": _server, "node": _node, "show": _show,
    }  # fmt: skip
    if kind not in makers:
        guess = nearest(kind, list(makers))
        parser.error(f"unknown kind {kind}" + (f"; did you mean {guess}?" if guess else ""))
    try:
        return makers[kind](rest)
    except FileNotFoundError as error:
        mend = (
            ""
            if kind == "show"
            else ": make an authority first, trellis certs authority DIR, or bring its files"
        )
        print(f"trellis certs {kind}: {error.filename} is not there{mend}", file=sys.stderr)
        return REFUSED
    except (OSError, ValueError) as error:
        print(f"trellis certs {kind}: {error}", file=sys.stderr)
        return REFUSED


def _parser(kind: str, *, days: int | None = None) -> Parser:
    parser = Parser(f"trellis certs {kind}", description=_KINDS[kind], epilog=_EXAMPLES)
    if kind != "show":
        parser.add_argument("folder", type=Path, metavar="DIR", help="where all of them are")
    if days is not None:
        parser.add_argument(
            "--days", type=int, default=days, metavar="N", help=f"of validity (default: {days})"
        )
        parser.add_argument(
            "--renew", action="store_true", help="a new certificate of the key that is there"
        )
    if kind in {"authority", "server", "node"}:
        parser.add_argument("--force", action="store_true", help="replace a key that is there")
    if kind in {"all", "server"}:
        parser.add_argument(
            "--host",
            action="append",
            metavar="HOST",
            help="a name or address of the SuperLink, as nodes write it; several by repetition;"
            " localhost and 127.0.0.1 are always in",
        )
    return parser


def _all(arguments: Sequence[str]) -> int:
    parser = _parser("all")
    parser.add_argument("--nodes", type=int, default=0, metavar="N", help="node-0, node-1, …")
    options = parser.read(arguments)
    if options.nodes < 0:
        raise ValueError(f"--nodes {options.nodes}: 0 or more")
    names = [f"node-{number}" for number in range(options.nodes)]
    for path in make_missing(options.folder, options.host or (), names):
        print(path)
    return DONE


def _authority(arguments: Sequence[str]) -> int:
    options = _parser("authority", days=AUTHORITY_DAYS).read(arguments)
    _not_both(options.renew, options.force)
    files = Certificates(options.folder)
    if options.renew:
        renew_authority(options.folder, days=options.days)
        print(f"copy {files.authority} to every machine before the old one ends", file=sys.stderr)
    else:
        make_authority(options.folder, days=options.days, force=options.force)
    print(files.authority)
    return DONE


def _server(arguments: Sequence[str]) -> int:
    options = _parser("server", days=SERVER_DAYS).read(arguments)
    _not_both(options.renew, options.force)
    files = Certificates(options.folder)
    if options.renew:
        renew_server(options.folder, options.host, days=options.days)
        print("a SuperLink that runs shows it after its next start", file=sys.stderr)
    else:
        make_server(options.folder, options.host or (), days=options.days, force=options.force)
    print(files.server)
    return DONE


def _node(arguments: Sequence[str]) -> int:
    parser = _parser("node")
    parser.add_argument("names", nargs="+", metavar="NAME", help="a node's, such as hospital-a")
    options = parser.read(arguments)
    for name in options.names:
        make_node(options.folder, name, force=options.force)
        print(Certificates(options.folder).node_public(name))
    return DONE


def _show(arguments: Sequence[str]) -> int:
    parser = _parser("show")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="certificate or key")
    code = DONE
    for path in parser.read(arguments).files:
        found = describe(path)
        print(f"{path}: {found.kind}")
        if found.begins is not None and found.ends is not None:
            left = (found.ends - datetime.now(UTC)).days
            print(f"  valid        {found.begins:%Y-%m-%d} to {found.ends:%Y-%m-%d}")
            print(f"  left         {left} days" if left >= 0 else "  left         none: expired")
            print(f"  signed by    {found.issuer}")
            code = FAILED if left < 0 else code
        if found.hosts:
            print(f"  hosts        {', '.join(found.hosts)}")
        print(f"  fingerprint  {found.fingerprint}")
    return code


def _not_both(renew: bool, force: bool) -> None:
    if renew and force:
        raise ValueError("--renew keeps the key, --force makes another: one of them")
