"""Files and folders that a user names, and names on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import doc


class DataError(ValueError):
    """Data that cannot be used as they are; names the file, the place in it and the mend."""


@dataclass(frozen=True)
class FolderOrHub:
    """Marks a text that is a folder where there is one, and else a name on the hub."""


Place = Annotated[str, FolderOrHub(), doc("a folder, or a name on the Hugging Face hub")]
"""A folder, or a name on the hub. What begins with /, ./, ../ or ~ is never looked up on the hub."""


def absolute(place: str, directory: Path) -> str:
    """The place with a folder written out in full, counted from `directory`; a hub name as it is."""
    folder = (directory / Path(place).expanduser()).absolute()
    return str(folder) if _says_folder(place) or folder.exists() else place


def require_folder(place: str, mend: str) -> str:
    """The place, as a library that takes folders and hub names is to be given it.

    Raises:
        DataError: it says that it is a folder, and there is none.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise DataError(f"{folder} is a file, and a folder is needed: {mend}")
    if _says_folder(place):
        raise DataError(f"there is no folder {folder.absolute()}: {mend}")
    return place


def require_file(path: Path) -> Path:
    """The path with ~ written out.

    Raises:
        DataError: there is no such file.
    """
    path = path.expanduser()
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path.absolute()} {found}: a relative path counts from where you are")
    return path


def _says_folder(place: str) -> bool:
    return place.startswith(("/", "./", "../", "~")) or place in (".", "..")
