"""The folder that a run will write to: can it be written, is there room, and what is in it already.

Nothing is written into the run's own folder; whether its parent can be written is found by a folder made there and
taken away again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from fl_app.checks.check import Finding
from fl_app.cli.console import human_bytes
from fl_app.config.faults import ConfigError
from fl_app.config.schema import Config
from fl_app.folder import RunFolder
from fl_app.services.summary import read_summary

_COPIES: Final = 3
"""Checkpoints on the disk at once: two that are kept, and one in the making."""
_SPARE: Final = 0.5
"""Of the free disk: who needs more of it is warned."""


def writable(config: Config) -> Finding:
    """Whether the run's folder can be made, or written."""
    folder = config.run_dir
    parent = nearest_existing(folder)
    mend = "choose another output_dir"
    if not parent.is_dir():
        return Finding("failed", f"{parent} is a file, and {folder} would be below it", mend)
    if parent == folder:
        blocked = [path for path in (folder, *folder.iterdir()) if not os.access(path, os.W_OK)]
        if blocked:
            return Finding("failed", f"{blocked[0]} can't be written", "change its owner or mode")
        return Finding("ok", f"{folder} is there and can be written")
    try:
        Path(tempfile.mkdtemp(prefix=".trellis-", dir=parent)).rmdir()
    except OSError as error:
        return Finding("failed", f"no folder can be made in {parent}: {error.strerror}", mend)
    return Finding("ok", f"{folder} will be made")


def room(folder: Path, checkpoint: int, clients: int) -> Finding:
    """Whether the disk has room for what the run leaves there.

    Args:
        folder: the run's.
        checkpoint: bytes of one.
        clients: bytes that all clients keep there.
    """
    needed = _COPIES * checkpoint + clients
    free = shutil.disk_usage(nearest_existing(folder)).free
    said = (
        f"{human_bytes(needed)} for {_COPIES} checkpoints of {human_bytes(checkpoint)}"
        + (f" and {human_bytes(clients)} of clients' states" if clients else "")
        + f"; {human_bytes(free)} are free"
    )
    mend = "free some, or choose an output_dir on another disk"
    if needed > free:
        return Finding("failed", said, mend)
    return Finding("warning", said, mend) if needed > _SPARE * free else Finding("ok", said)


def earlier(config: Config, num_clients: int, data_hash: str) -> Finding:
    """What an earlier run left there, and what this one would make of it."""
    folder = RunFolder(config)
    if not folder.path.is_dir():
        if config.resume == "must":
            said = f"{folder.path} is not there, and resume=must"
            return Finding("failed", said, "set resume=auto, or mend run_name or output_dir")
        return Finding("ok", "nothing is there yet: the run begins at round 1")
    if (folder.path / ".lock").exists() and folder.taken:
        said = f"another process is running in {folder.path}"
        return Finding("failed", said, "wait for it, or name another run_name")
    done = (read_summary(folder.summary) or {}).get("rounds_completed", 0)
    if config.resume == "never":
        if not done:
            return Finding("ok", "no round is there: the run begins at round 1")
        said = f"resume=never throws {done} rounds away that are there"
        return Finding("warning", said, "resume=auto goes on, another run_name leaves them")
    try:
        state = folder.found(num_clients, data_hash)
    except ConfigError as error:
        said = "; ".join(fault.message for fault in error.faults)
        return Finding("failed", said, "name another run_name, or start it anew with resume=never")
    if folder.finished:
        said = f"the run is complete with {folder.completed()} rounds: nothing would be done"
        mend = "another run_name leaves it, resume=never starts anew"
        more = "" if config.rounds_are_planned else "more rounds= go on, "
        return Finding("warning", said, more + mend)
    if state is None:
        return Finding("ok", "no checkpoint is there: the run begins at round 1")
    begun = done if folder.checkpoint is None else folder.checkpoint.round
    return Finding("ok", f"the run goes on at round {begun + 1} of {config.rounds}")


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
