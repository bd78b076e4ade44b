"""What there is to choose from: the groups of conf/, their files, and the one line that each says of itself.

Reads the files' header comments only, and imports nothing heavy: `trellis list` is to answer at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from fl_app.config.faults import ConfigError, Fault

CONF = Path(__file__).resolve().parents[2] / "conf"
"""Beside the package, in a checkout, in a wheel and in a Flower bundle alike."""

OWN: Final = "TRELLIS_CONFIG_DIR"
"""The environment's name for a folder with choices of the user's own; Flower's processes on this machine inherit it."""


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


def folders(conf: Path = CONF) -> list[Path]:
    """Where choices lie: `conf`, and the user's own folder where there is one.

    Raises:
        ConfigError: the user's own is no folder, or has a group or a choice that it can't have.
    """
    own = os.environ.get(OWN)
    if not own or conf != CONF:
        return [conf]
    folder = Path(own).resolve()
    _check_own(folder, conf)
    return [conf, folder]


def groups(conf: Path = CONF) -> list[str]:
    """The names of the groups, sorted."""
    return _groups(conf)


def choices(group: str, conf: Path = CONF) -> list[Choice]:
    """The choices of a group, sorted by name; none when there is no such group."""
    return [_choice(file) for file in _files(group, conf)]


def names(group: str, conf: Path = CONF) -> list[str]:
    """The names of a group's choices, sorted; none when there is no such group."""
    return [file.stem for file in _files(group, conf)]


def file_of(group: str, choice: str, conf: Path = CONF) -> Path:
    """The file of a choice that there is."""
    return next(file for file in _files(group, conf) if file.stem == choice)


def _groups(folder: Path) -> list[str]:
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry.name for entry in entries if any(entry.glob("*.yaml")))


def _files(group: str, conf: Path) -> list[Path]:
    files = chain.from_iterable((folder / group).glob("*.yaml") for folder in folders(conf))
    return sorted(files, key=lambda file: file.stem)


def _check_own(folder: Path, conf: Path) -> None:
    if not folder.is_dir():
        raise ConfigError([Fault("--config-dir", "there is no such folder", str(folder))])
    known = _groups(conf)
    for group in _groups(folder):
        if group not in known:
            told = f"a folder in it is named after a group: {', '.join(known)}"
            raise ConfigError([Fault("--config-dir", told, group)])
        for file in sorted((folder / group).glob("*.yaml")):
            if (conf / group / file.name).exists():
                told = f"there is a {group}={file.stem} already: give it another name"
                raise ConfigError([Fault("--config-dir", told, str(file))])


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
