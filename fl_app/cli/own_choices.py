"""What users bring along to a command: a folder with choices of their own, and classes in the working directory.

Every command that composes a configuration calls these first, so that the same words mean the same to all of them
(docs/extending.md). Must not know any command, nor what is chosen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fl_app.config.catalogue import OWN


def add_choices(folder: str | None) -> None:
    """Adds a folder's choices to those of conf/, for this process and for those that it starts."""
    if folder is not None:
        os.environ[OWN] = str(Path(folder).resolve())


def find_own_classes() -> None:
    """Classes of the user's own may lie where the command is called; last, so that they shadow nothing."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
