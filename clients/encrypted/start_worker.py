"""Starts a worker in a third of the memory: `python -m clients.encrypted.start_worker DESCRIPTOR`.

What the package `strategies` offers at its top has Flower and SciPy with it, 75 MB in each process, of which a worker
needs nothing: it takes modules below it by their own names. So the package is put in place here without its top.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec


def bare(package: str) -> None:
    """Makes a package's modules importable without what its `__init__` imports.

    Raises:
        ModuleNotFoundError: there is no such package.
    """
    found = find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"no package {package}")
    sys.modules[package] = module_from_spec(found)


if __name__ == "__main__":
    bare("strategies")
    from clients.encrypted.worker import main

    main(int(sys.argv[1]))
