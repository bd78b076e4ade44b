"""A language model out of a GGUF file, written as everything else here reads models: safetensors and a tokenizer.

transformers reads the file by the package `gguf`, which multiplies quantised weights out. They are kept in half
precision, which rounds by 2^-11 what four bits have left. A token of its own fills rows up where the file has the end
of a text do it too: within a row the two must be told apart.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

RECORD: Final = "converted.json"
"""The file that says what the others in its folder were made from; it is written last, with their hashes."""


class GgufError(ValueError):
    """A file that can't be converted."""


def is_converted(folder: Path, source_sha256: str) -> bool:
    """Whether a folder holds the whole model of a GGUF file with this hash, each file as it was written."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files: Mapping[str, str] = record["files"]
        whole = all(_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return whole and bool(files) and record.get("source_sha256") == source_sha256


def convert(source: Path, folder: Path, *, padding: str, licence: Path | None = None) -> None:
    """Writes the model of a GGUF file into a folder, all of it or nothing; other files there stay.

    Args:
        source: the file.
        folder: where config.json, model.safetensors and the tokenizer's files go.
        padding: the token that fills rows up.
        licence: a file that goes with it.

    Raises:
        GgufError: there is no causal language model in the file, or it does not know the token for padding.
        OSError: the folder can't be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
        new = Path(temporary) / folder.name
        _save(source, new, padding)
        if licence is not None:
            (new / licence.name).write_bytes(licence.read_bytes())
        files = {path.name: _sha256(path) for path in sorted(new.iterdir())}
        record = {"source_sha256": _sha256(source), "files": files}
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for name in (*files, RECORD):
            (new / name).replace(folder / name)


def _save(source: Path, folder: Path, padding: str) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    where: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **where)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.float32, **where
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GgufError(f"{source.name} can't be read as a language model: {first}") from error
    if padding not in tokenizer.get_vocab():
        raise GgufError(f"{source.name} has no token {padding!r}")
    tokenizer.pad_token = padding
    config = model.config
    config.pad_token_id = tokenizer.pad_token_id
    if hasattr(config, "quantization_config"):
        del (
            config.quantization_config
        )  # the weights are multiplied out; a model that had it is saved by nobody
    whole: Any = transformers.AutoModelForCausalLM
    plain = whole.from_config(config, dtype=torch.float16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
