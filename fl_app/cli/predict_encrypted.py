"""`trellis predict-encrypted`: one owner's predictions from a service that sees ciphertexts only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fl_app.cli.main import DONE, FAILED, Parser
from fl_app.config.faults import ConfigError, Fault

_EXAMPLES = """examples:
  trellis predict-encrypted http://127.0.0.1:8000 images.npy
  trellis predict-encrypted https://models.example.org images.npy > labels.txt

DATA is a .npy file of numbers (n, …) as the model's task gives them to its network: for MNIST images (n, 1, 28, 28) of
(pixel / 255 - 0.1307) / 0.3081. One label a line is printed. The key is made for this call, and never leaves it.

exit codes: 0 done; 1 the service refused or failed; 2 DATA or an option is wrong
"""


def main(arguments: Sequence[str]) -> int:
    """Predicts, prints labels, and returns the exit code.

    Raises:
        ConfigError: the data are no array, or not what the model takes.
    """
    parser = Parser(
        "trellis predict-encrypted",
        usage="trellis predict-encrypted [-h] URL DATA [--timeout S]",
        description="Encrypts data, has a service predict on the ciphertexts, and decrypts the answers.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("url", metavar="URL", help="of a service (trellis serve-encrypted)")
    parser.add_argument("data", metavar="DATA", help="a .npy file")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for an answer (60)"
    )
    options = parser.read(arguments)
    if not options.timeout > 0:
        raise ConfigError([Fault("--timeout", "must be greater than 0", options.timeout)])
    import numpy as np

    from fl_app.encrypted_service.client import EncryptedClient, ServiceError

    try:
        data = np.load(Path(options.data), allow_pickle=False)
        if not isinstance(data, np.ndarray) or data.dtype.kind not in "fiu":
            raise ValueError("it holds no array of numbers")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            [Fault("DATA", f"{options.data} can't be read as .npy ({error})")]
        ) from error
    try:
        with EncryptedClient(options.url, timeout=options.timeout) as client:
            labels = client.predict(data).labels
    except ServiceError as error:
        print(error, file=sys.stderr)
        return FAILED
    except ValueError as error:
        raise ConfigError([Fault("DATA", str(error))]) from error
    print("\n".join(map(str, labels)))
    return DONE
