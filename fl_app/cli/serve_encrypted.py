"""`trellis serve-encrypted`: the command line of `fl_app.encrypted_service`."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from fl_app.cli.main import DONE, FAILED, Parser
from fl_app.config.faults import ConfigError, Fault

if TYPE_CHECKING:
    from clients.encrypted.model_file import TrainedModel

_BOUND = 16.0
_MOST_CONNECTIONS = 128
"""At once; more are told to come again (503)."""

_EXAMPLES = """examples:
  trellis serve-encrypted runs/encrypted-mnist-s0-1a2b3c4d
      the model of a run, at http://127.0.0.1:8000
  trellis serve-encrypted RUN --export mlp.safetensors
      the same model as one file, and nothing is served
  trellis serve-encrypted mlp.safetensors --host 0.0.0.0 --port 8443 --workers 2
  trellis predict-encrypted http://127.0.0.1:8000 images.npy
      on another machine, which has the key and the images

Requests are ciphertexts and so are answers: the server has no key, and learns neither inputs nor labels. Who holds the
key can learn the model from the answers. Where the network is not your own, put a proxy with TLS in front.
docs/encrypted_inference.md says who learns what, and gives the protocol.

exit codes: 0 ended by Ctrl-C; 1 the address is taken; 2 MODEL or an option is wrong
"""


def main(arguments: Sequence[str]) -> int:
    """Serves a model until it is interrupted, and returns the exit code.

    Raises:
        ConfigError: the model or an option is wrong.
    """
    parser = Parser(
        "trellis serve-encrypted",
        usage="trellis serve-encrypted [-h] MODEL [--host HOST] [--port PORT] [--workers N] [--waiting N] "
        "[--max-body-mb MB] [--body-seconds S] [--bound B] [--export FILE]",
        description="Serves predictions on encrypted inputs; it has no key.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a model's file, or the folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any (default 8000)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="requests at a time (1)"
    )
    parser.add_argument(
        "--waiting", type=int, default=4, metavar="N", help="requests that may wait (4)"
    )
    parser.add_argument(
        "--max-body-mb", type=float, default=256.0, metavar="MB", help="of a request (256)"
    )
    parser.add_argument(
        "--body-seconds", type=float, default=60.0, metavar="S", help="in which a request came (60)"
    )
    parser.add_argument(
        "--bound",
        type=float,
        metavar="B",
        help=f"of a run's model: the largest magnitude of a feature ({_BOUND:g}); a file has its own",
    )
    parser.add_argument("--export", metavar="FILE", help="writes the model's file and ends")
    options = parser.read(arguments)
    if not 0 <= options.port < 1 << 16:
        raise ConfigError([Fault("--port", "must be from 0 to 65535", options.port)])
    model = _model(options)
    if options.export is not None:
        return _export(model, Path(options.export))
    return _serve(model, options)


def _model(options: Namespace) -> TrainedModel:
    from clients.encrypted.model_file import ModelFileError, load

    path = Path(options.model)
    if path.is_dir():
        from fl_app.encrypted_service.trained import of_run  # what trains is not needed to serve

        return of_run(path, _BOUND if options.bound is None else options.bound)
    if options.bound is not None:
        raise ConfigError([Fault("--bound", "is for a run's folder: a model's file has its own")])
    try:
        return load(path)
    except ModelFileError as error:
        raise ConfigError([Fault("MODEL", str(error))]) from error


def _export(model: TrainedModel, path: Path) -> int:
    from fl_app.services.files import write_atomically

    try:
        write_atomically(path, model.to_bytes())
    except OSError as error:
        raise ConfigError([Fault("--export", f"{path} can't be written ({error})")]) from error
    print(path.absolute())
    return DONE


def _serve(model: TrainedModel, options: Namespace) -> int:
    import uvicorn

    from fl_app.encrypted_service.server import Limits, application

    try:
        limits = Limits(options.workers, options.waiting, options.max_body_mb, options.body_seconds)
        app = application(model, limits)
    except ValueError as error:
        raise ConfigError([Fault("options", str(error))]) from error
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        limit_concurrency=_MOST_CONNECTIONS,
    )
    try:
        listener = socket.create_server((options.host, options.port))
    except OSError as error:
        print(f"{options.host}:{options.port} can't be served: {error}", file=sys.stderr)
        return FAILED
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)  # uvicorn hands it on when all is ended
    with listener:
        host, port = listener.getsockname()[:2]
        terms = model.plan.terms
        print(
            f"layers {'-'.join(map(str, model.network.sizes))}, N = {terms.ring.degree},"
            f" {model.plan.headroom_bits:.1f} bits of headroom, up to {terms.samples} samples a request"
        )
        print(f"http://{host}:{port}", flush=True)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    print("ended", file=sys.stderr)
    return DONE


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
