"""No file of the three packages imports in a circle: not when it is loaded, nor for the sake of its types."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("strategies", "clients", "fl_app")


def modules(root: Path, packages: tuple[str, ...]) -> dict[str, ast.Module]:
    """The tree of every module, by its dotted name."""
    found = {}
    for path in (path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules that a module names in imports anywhere: within functions too, and where only types are looked at."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:  # a name of the module's own, or a module of that package
                within = f"{node.module}.{alias.name}"
                yield within if within in known else node.module


def circle(trees: dict[str, ast.Module]) -> list[str]:
    """Modules of which each imports the next or is imported by it, the first again at the end; none where none do."""
    known = set(trees)
    graph = {name: set(imported(tree, known)) - {name} for name, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_in_a_circle():
    trees = modules(ROOT, PACKAGES)
    assert {"strategies.rounds", "clients.client", "fl_app.run"} <= trees.keys()
    assert circle(trees) == []


def test_circles_are_found_wherever_an_import_stands(tmp_path):
    files = {
        "__init__.py": "",
        "upper.py": "from room import middle",
        "middle.py": "def work():\n    import room.lower",
        "lower.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from room.upper import Thing",
    }
    (tmp_path / "room").mkdir()
    for name, text in files.items():
        (tmp_path / "room" / name).write_text(text)
    found = circle(modules(tmp_path, ("room",)))
    assert set(found) == {"room.upper", "room.middle", "room.lower"}
    (tmp_path / "room" / "lower.py").write_text("import json")
    assert circle(modules(tmp_path, ("room",))) == []
