"""`trellis make-base-model` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fl_app.cli.main import main
from tests.support.notes import write_notes

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--layers", "2", "--width", "16", "--heads", "2", "--vocab", "300", "--context", "32"]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return write_notes(tmp_path / "notes")


def command(notes: Path, output: Path, *more: str) -> list[str]:
    return ["make-base-model", "--corpus", str(notes), "--output", str(output), *TINY, *more]


def test_it_is_made_once_and_the_last_line_is_its_folder(
    notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    assert main(command(notes, output, "--tokens", "2000")) == 0
    said, errors = capfd.readouterr()
    assert said.splitlines()[-1] == str(output)
    assert "perplexity on held-out text" in said
    assert "100%  loss" in errors
    assert " s left" in errors
    written = (output / "model.safetensors").stat().st_mtime_ns
    record = json.loads((output / "base_model.json").read_text())
    assert record["settings"]["tokens"] == 2_000
    assert record["settings"]["minutes"] is None

    assert main(command(notes, output, "--tokens", "2000")) == 0
    again, errors = capfd.readouterr()
    assert again == said
    assert errors == "made before, of the same settings and text\n"
    assert (output / "model.safetensors").stat().st_mtime_ns == written

    assert main(command(notes, output, "--tokens", "2001")) == 2
    refused, errors = capfd.readouterr()
    assert refused == ""
    assert "a model of other settings or text: remove it, or name another --output" in errors
    assert (output / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--heads", "3"], 2, "width = 16: must be a multiple of heads = 3"),
        (["--tokens", "9", "--minutes", "1"], 2, "one of them"),
        (["--corpus", "nowhere"], 2, "there is no folder"),
        (["--context", "30000", "--tokens", "9"], 1, "must be more than a row's 30000"),
    ],
)
def test_what_cannot_be_made_is_said_in_a_line(
    notes: Path,
    tmp_path: Path,
    more: list[str],
    code: int,
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(command(notes, tmp_path / "model", *more)) == code
    output, errors = capfd.readouterr()
    assert output == ""
    assert said in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "model").exists()


def test_help_has_examples_and_needs_nothing_heavy() -> None:
    program = (
        "import sys\nfrom fl_app.cli.main import main\n"
        "try:\n    main(['make-base-model', '--help'])\n"
        "except SystemExit:\n    print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "trellis make-base-model --minutes 20" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_leaves_nothing_and_says_so(notes: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_app.cli", *command(notes, output, "--tokens", "100000")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "reading the text\n"
    assert process.stderr.readline().startswith(" 10%  loss")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "stopped"
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
