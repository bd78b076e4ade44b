"""What the app, inside a Flower process, has to do and may know about how it was launched.

Imported first by ``server_app.py`` and ``client_app.py``, because the import itself makes the
process run the app's code from the bundle, whatever directory it started in: in a simulation the
ServerApp and Ray's driver share one process (``flwr-simulation``) whose working directory is that
of the SuperLink, which is wherever somebody ran ``flwr run`` when the SuperLink was started. Ray
puts the driver's working directory in front of the import path of its workers, so with two
checkouts the clients of one would run the code of the other. Ray starts after the apps are
imported; changing to the bundle's root here makes the workers import the code that was sent with
the run.

The change is done at import, once per process and under the import lock, because the ServerApp is
imported in a thread beside the one that imports the ClientApp.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

STOP_FILE = "TRELLIS_STOP_FILE"
"""Environment variable with the path of the file whose existence asks the run to stop."""

LAUNCHED_IN = "TRELLIS_LAUNCH_DIRECTORY"
"""Environment variable by which a simulation tells its workers where it was launched."""

BUNDLE = Path(__file__).resolve().parents[2]
"""Directory that holds the packages this process runs: the bundle's root, or the checkout."""

LAUNCH_DIRECTORY = Path(os.environ.get(LAUNCHED_IN) or Path.cwd())
"""Directory that relative paths of a run's configuration refer to (absolute).

It is the working directory of the process before the change. With ``trellis run backend=flower``
that is where the user called it; with a bare ``flwr run`` it is where the SuperLink was started,
and on a SuperNode where that was started.
"""

if Path(sys.argv[0]).name == "flwr-simulation":
    os.environ[LAUNCHED_IN] = str(LAUNCH_DIRECTORY)  # for Ray's workers, which start in the bundle
    os.chdir(BUNDLE)


def stop_requested() -> bool:
    """Whether the user who started this run has asked it to stop (Ctrl-C).

    A simulated ServerApp is a thread that no signal reaches, and its process is ended within
    seconds of one. So whoever started the SuperLink asks first, by creating a file, and the
    ServerApp is to look here whenever it waits. Always false under a SuperLink of somebody else's.
    """
    path = os.environ.get(STOP_FILE)
    return path is not None and Path(path).exists()
