"""What there is to choose from: the groups of conf/, their files, and the one line that each says of itself.

Reads the files' header comments only, and imports nothing heavy: `trellis list` is to answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
"""Beside the package, in a checkout, in a wheel and in a Flower bundle alike."""


@dataclass(frozen=True)
class Choice:
    """One file of a group.

    Attributes:
        group: the folder's name.
        name: the file's name without its ending, what stands right of `group=`.
        description: the first line of the header comment.
        command: the second line: a command that runs it.
    """

    group: str
    name: str
    description: str
    command: str


def groups(conf: Path = CONF) -> list[str]:
    """The names of the groups, sorted."""
    folders = (entry for entry in conf.iterdir() if entry.is_dir())
    return sorted(folder.name for folder in folders if any(folder.glob("*.yaml")))


def choices(group: str, conf: Path = CONF) -> list[Choice]:
    """The choices of a group, sorted by name; none when there is no such group."""
    return [_choice(file) for file in sorted((conf / group).glob("*.yaml"))]


def names(group: str, conf: Path = CONF) -> list[str]:
    """The names of a group's choices, sorted; none when there is no such group."""
    return sorted(file.stem for file in (conf / group).glob("*.yaml"))


def header(file: Path) -> list[str]:
    """The comment lines at the top of a file, without Hydra's own (`# @package …`)."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if not text.startswith("@"):
            lines.append(text)
    return lines


def _choice(file: Path) -> Choice:
    description, command = [*header(file), "", ""][:2]
    return Choice(file.parent.name, file.stem, description, command)


def defaults(conf: Path = CONF) -> dict[str, str]:
    """The choice of each group in config.yaml, without what presets choose for it."""
    import yaml

    entries = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {
        group.removeprefix("optional "): choice for group, choice in pairs if choice is not None
    }
