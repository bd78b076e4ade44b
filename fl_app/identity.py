"""What code this is: one hash over every source file, sent with each request so that unequal ends notice."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("strategies", "clients", "fl_app", "conf")


@cache
def code_hash() -> str:
    """SHA-256, in hex, over the names and contents of the packages' Python and YAML files."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        files = [path for path in (_ROOT / package).rglob("*") if path.suffix in (".py", ".yaml")]
        for path in sorted(files, key=lambda path: path.as_posix()):
            digest.update(path.relative_to(_ROOT).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
