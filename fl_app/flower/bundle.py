"""What the app, inside a Flower process, has to do and may know about how it was launched."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

STOP_FILE = "TRELLIS_STOP_FILE"
"""Environment variable with the path of the file whose existence asks the run to stop."""

LAUNCHED_IN = "TRELLIS_LAUNCH_DIRECTORY"
"""Environment variable by which a simulation tells its workers where it was launched."""

BUNDLE = Path(__file__).resolve().parents[2]
"""Directory that holds the packages this process runs: the bundle's root, or the checkout."""

_lock = threading.Lock()


def enter_bundle() -> None:
    """Make a simulation's workers run the code that was sent with the run.

    To be called when ``server_app`` and ``client_app`` are imported. In a simulation the ServerApp
    and Ray's driver share one process (``flwr-simulation``) whose working directory is that of the
    SuperLink, which is wherever somebody ran ``flwr run`` when the SuperLink was started. Ray puts
    the driver's working directory in front of the import path of its workers, so with two
    checkouts the clients of one would run the code of the other. Ray starts after the ClientApp is
    imported: going to the bundle's root by then is early enough. Other processes stay where they
    are, and a second call does nothing.
    """
    with _lock:  # the two apps are imported by two threads
        if Path(sys.argv[0]).name == "flwr-simulation" and Path.cwd() != BUNDLE:
            os.environ[LAUNCHED_IN] = str(Path.cwd())
            os.chdir(BUNDLE)


def simulated() -> bool:
    """Whether this process plays the clients of a simulation of its user's own: Ray's, or its driver.

    Elsewhere it is a device's, and what a run says about the device's own keys and files is a stranger's word.
    """
    return Path(sys.argv[0]).name in {"flwr-simulation", "default_worker.py"}


def launch_directory() -> Path:
    """The directory that relative paths of a run's configuration refer to (absolute).

    With ``trellis run backend=flower`` it is where the user called that; with a bare ``flwr run``
    where the SuperLink was started, and on a SuperNode where that was started. A simulation leaves
    it (:func:`enter_bundle`), so there a relative path must not be resolved in any other way.
    """
    return Path(os.environ.get(LAUNCHED_IN) or Path.cwd())


def stop_requested() -> bool:
    """Whether the user who started this run has asked it to stop (Ctrl-C).

    A simulated ServerApp is a thread that no signal reaches, and its process is ended within
    seconds of one. So whoever started the SuperLink asks first, by creating a file, and the
    ServerApp is to look here whenever it waits. Always false under a SuperLink of somebody else's.
    """
    path = os.environ.get(STOP_FILE)
    return path is not None and Path(path).exists()
