"""`trellis deploy`: a secured federation on this machine, from its start to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fl_app.cli.main import DONE, FAILED, REFUSED, Parser
from fl_app.cli.own_choices import find_own_classes
from fl_app.config.faults import ConfigError, nearest

_ACTIONS = {
    "up": "start what does not run, and say what does: a SuperLink with TLS and node authentication, and SuperNodes",
    "run": "run the app on it, and wait for the end",
    "status": "what runs, and until when the certificate is valid",
    "down": "end what was started; keys, database and clients' memories stay",
}

_EXAMPLES = """examples:
  trellis deploy up --nodes 3
  trellis deploy run task=digits num_clients=3 rounds=5 run_name=secured
  trellis deploy status
  trellis deploy down
  trellis deploy up --nodes 0 --host 0.0.0.0 --port 9092     for nodes of other machines: docs/deployment.md

All of it is in .deployment of this directory, or in the folder that --state names.

exit codes: 0 done; 1 failed, or (status) something does not run; 2 the command is wrong; run: as `trellis run`
"""


def main(arguments: Sequence[str]) -> int:
    """Does what is asked with the deployment of a folder."""
    listed = "\n".join(f"  {name:<8} {what}" for name, what in _ACTIONS.items())
    parser = Parser(
        "trellis deploy",
        usage="trellis deploy [-h] ACTION …",
        description=f"A secured SuperLink and SuperNodes on this machine.\n\nactions:\n{listed}",
        epilog=_EXAMPLES,
    )
    if not arguments or arguments[0] in {"-h", "--help"}:
        parser.print_help(sys.stdout if arguments else sys.stderr)
        return DONE if arguments else REFUSED
    action, *rest = arguments
    actions: dict[str, Callable[[Sequence[str]], int]] = {
        "up": _up, "run": _run, "status": _status, "down": _down,
    }  # fmt: skip
    if action not in actions:
        guess = nearest(action, list(actions))
        parser.error(f"unknown action {action}" + (f"; did you mean {guess}?" if guess else ""))
    from fl_app.flower import FlowerError

    try:
        return actions[action](rest)
    except ConfigError:
        raise  # said as of every other command
    except FlowerError as error:
        print(f"trellis deploy {action}: {error}", file=sys.stderr)
        return FAILED
    except (OSError, ValueError) as error:
        print(f"trellis deploy {action}: {error}", file=sys.stderr)
        return REFUSED


def _parser(action: str) -> Parser:
    parser = Parser(
        f"trellis deploy {action}", description=_ACTIONS[action] + ".", epilog=_EXAMPLES
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(".deployment"),
        metavar="DIR",
        help="where keys, database, logs and the list of processes are (default: .deployment)",
    )
    return parser


def _up(arguments: Sequence[str]) -> int:
    from fl_app.flower.background import Background
    from fl_app.flower.bundle import BUNDLE

    parser = _parser("up")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=9092, help="of the SuperLink (default: 9092)")
    parser.add_argument(
        "--node-config",
        default="",
        metavar="'K=V …'",
        help="what each SuperNode is told beside partition-id and num-partitions",
    )
    options = parser.read(arguments)
    if options.nodes < 0 or not 1 <= options.port <= 65535:
        raise ValueError("--nodes is 0 or more, --port 1 to 65535")
    Background(options.state, BUNDLE).up(
        options.nodes,
        host=options.host,
        port=options.port,
        node_config=options.node_config,
        say=_say,
    )
    return DONE


def _run(arguments: Sequence[str]) -> int:
    parser = _parser("run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `trellis run`")
    options = parser.read(arguments)
    find_own_classes()
    from fl_app.assembly import check
    from fl_app.compose import compose
    from fl_app.flower.background import Background
    from fl_app.flower.bundle import BUNDLE

    check(compose([*options.overrides, "backend=flower"]))  # here a refusal has a reader
    return Background(options.state, BUNDLE).run(options.overrides, echo=_say)


def _status(arguments: Sequence[str]) -> int:
    from fl_app.flower.background import Background
    from fl_app.flower.bundle import BUNDLE
    from fl_app.flower.certificates import describe

    deployment = Background(_parser("status").read(arguments).state, BUNDLE)
    programs = deployment.programs
    if not programs:
        print(f"nothing was started from {deployment.folder}")
        return FAILED
    running = 0
    for one in programs:
        process = one.process()
        running += process is not None
        since = datetime.fromtimestamp(one.since, UTC)
        state = f"process {one.pid} since {since:%Y-%m-%d %H:%M} UTC" if process else "ended"
        print(f"{one.name:<12} {state:<42} {one.log}")
    print(f"address      {deployment.address}")
    ends = describe(deployment.files.server).ends
    if ends is not None:
        print(f"certificate  until {ends:%Y-%m-%d}, {(ends - datetime.now(UTC)).days} days left")
    return DONE if running == len(programs) else FAILED


def _down(arguments: Sequence[str]) -> int:
    from fl_app.flower.background import Background
    from fl_app.flower.bundle import BUNDLE

    Background(_parser("down").read(arguments).state, BUNDLE).down(_say)
    return DONE


def _say(line: str) -> None:
    print(line, flush=True)
