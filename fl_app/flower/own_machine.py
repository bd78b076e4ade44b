"""A SuperLink that takes commands from its own machine only.

Flower serves three interfaces at one port: Fleet, where SuperNodes sign each request if node authentication is on;
Control, which `flwr run` and `flwr supernode register` use; and Runtime, for the processes that run a ServerApp. The
open distribution asks nobody at Control who they are: whoever reaches the port could register a key of their own, or
have all SuperNodes run code of theirs, and TLS only hides what they say. No firewall tells the three apart. So here
all but Fleet and the health check is refused to other machines, before Flower sees it.

It also waits longer for its database: after 5 s of a busy disk Flower's gives up and answers 500, and each SuperNode
that gets such an answer is lost (`own_node.py`). And it ends when it is told to: Flower's waits until the last answer
is sent, without end where somebody follows a run's log or has sent half a request.

``python -m fl_app.flower.own_machine ARGUMENTS`` is ``flower-superlink ARGUMENTS`` with that door. It goes by the
address that a connection comes from. A proxy on the same machine makes strangers look local, and so does the port
forwarding of rootless containers (podman, rootless Docker), which may show each stranger as 127.0.0.1. There must be
neither, or one that lets ``/v1/fleet/`` and ``/health`` through and nothing else.
"""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

FAREWELL = 5
"""Seconds that answers under way have when it is told to stop; who gets none tries again."""

_BUSY = "60000"  # milliseconds that a statement waits for the database's lock
_OPEN = "/v1/fleet/"
_HEALTH = "/health"
_REFUSAL = (
    "This SuperLink takes commands from its own machine only: run flwr there, or through an SSH"
    " tunnel to its 127.0.0.1."
)


class OwnMachine:
    """Middleware that refuses to other machines all but the Fleet interface and the health check.

    Args:
        app: what serves the requests that are let through.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, or refuse."""
        if scope["type"] == "lifespan" or is_open(scope["path"]) or from_here(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"detail": _REFUSAL}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def is_open(path: str) -> bool:
    """Whether other machines may ask for a path."""
    return path == _HEALTH or path.startswith(_OPEN)


def from_here(scope: Scope) -> bool:
    """Whether a request comes from this machine: from the loopback, or from the very address that it came to."""
    client, server = _address(scope.get("client")), _address(scope.get("server"))
    return client is not None and (client.is_loopback or client == server)


def _address(
    pair: Sequence[object] | None,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(str(pair[0]) if pair else "")
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def behind_door(make: Callable[..., FastAPI]) -> Callable[..., FastAPI]:
    """Flower's function that makes its app, with the door before all else that the app does."""

    def create_app(*given: object, **named: object) -> FastAPI:
        app = make(*given, **named)
        app.add_middleware(OwnMachine)  # the outermost: the one added last
        return app

    return create_app


def patient(pragmas: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Flower's settings of its database, but for how long a statement waits for another."""
    return (*(one for one in pragmas if one[0] != "busy_timeout"), ("busy_timeout", _BUSY))


def main(arguments: Sequence[str]) -> None:
    """Run ``flower-superlink`` behind the door until it is told to stop.

    Args:
        arguments: of ``flower-superlink``.
    """
    import uvicorn
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import SQLITE_PRAGMAS
    from flwr.superlink import main as served
    from flwr.superlink.cli.flower_superlink import flower_superlink

    served.create_app = behind_door(served.create_app)
    vars(sql_mixin)["SQLITE_PRAGMAS"] = patient(SQLITE_PRAGMAS)
    uvicorn.run = partial(uvicorn.run, timeout_graceful_shutdown=FAREWELL)
    # With this, uvicorn would believe a stranger's X-Forwarded-For.
    os.environ.pop("FORWARDED_ALLOW_IPS", None)
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


if __name__ == "__main__":
    main(sys.argv[1:])
