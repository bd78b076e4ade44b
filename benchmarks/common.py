"""What the benchmarks share: where figures go, and the versions that every one of them prints."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


def versions() -> str:
    """One line that says what ran and on what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "numpy"))
    return f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores;"
