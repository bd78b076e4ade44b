"""`trellis report` from the command to its files, with hostile text in all of them."""

from __future__ import annotations

import csv
import html.parser
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import write_run

from fl_app.cli.main import main
from fl_app.report.tables import escaped, guarded
from fl_app.report.text import one_line
from fl_app.sweep.record import Record

pytestmark = pytest.mark.pictures

HOSTILE = "=cmd|' /C calc'!A0<script>alert(1)</script>$\\frac$\n| x |\x1b[2J`*[a](javascript:b)"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for place, strategy in enumerate(("fedavg", "fedprox")):
        for alpha in (0.1, 1.0):
            for seed in (1, 2, 3):
                figures = [0.3, 0.5 + 0.1 * place, 0.6 + 0.1 * place + 0.01 * seed * (1 + alpha)]
                name = f"{strategy}-{alpha}-{seed}"
                write_run(tmp_path / name, figures, strategy=strategy, seed=seed, task__alpha=alpha)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_report_has_all_its_files(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "broken", status="failed", reason="it broke")
    Record(runs).note("refused", ("seed=9",), "failed", "never begun")
    assert main(["report", str(runs), "--baseline", "fedavg", "--target", "0.6"]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    page = runs / "report" / "index.html"
    assert output.splitlines()[-1] == str(page)
    squeezed = re.sub(" +", " ", output)
    assert "| fedprox | 0.1 | 3 | 0.7220 ± 0.0110 | +0.1000 [+0.1000, +0.1000] | 3 |" in squeezed
    assert "all 3 pairs differ by the same figure" in output
    assert "12 completed runs in 4 groups; 2 left out." in output
    assert "it broke" in output
    text = (runs / "report" / "report.md").read_text()
    assert "| strategy | task.alpha | n | accuracy, mean ± sd |" in text
    assert "| refused | failed | never begun |" in text
    found = rows_of(runs / "report" / "report.csv")
    assert [(row["strategy"], row["task.alpha"], row["n"]) for row in found] == [
        ("fedavg", "0.1", "3"), ("fedavg", "1.0", "3"), ("fedprox", "0.1", "3"), ("fedprox", "1.0", "3"),
    ]  # fmt: skip
    assert [row["pairs"] for row in found] == ["", "", "3", "3"]
    assert float(found[2]["difference"]) == pytest.approx(0.1)
    assert float(found[2]["reached"]) == 3
    each = rows_of(runs / "report" / "runs.csv")
    assert [row["status"] for row in each].count("completed") == 12
    assert [row["reason"] for row in each if row["status"] == "failed"] == [
        "it broke",
        "never begun",
    ]
    for name in ("curves.png", "heat_map.png"):
        width, height = png_size(runs / "report" / name)
        assert min(width, height) > 200
    # A later report with another grouping takes the heat map away, and the report is no run.
    assert main(["report", str(runs), "--by", "strategy"]) == 0
    assert not (runs / "report" / "heat_map.png").exists()


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_stays_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", [0.5], strategy=HOSTILE, seed=seed)
        write_run(tmp_path / f"b{seed}", [0.7], strategy="日本", seed=seed, client__lr=HOSTILE)
    write_run(tmp_path / "=1+1", status="failed", reason=HOSTILE)
    (tmp_path / "<img src=x onerror=alert(1)>").mkdir()
    (tmp_path / "<img src=x onerror=alert(1)>" / "summary.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 0
    output, errors = capfd.readouterr()
    assert (errors, "\x1b" in output) == ("", False)
    report = tmp_path / "report"
    reader = Reader()
    reader.feed((report / "index.html").read_text())
    tags = {tag for tag, _ in reader.tags}
    assert "script" not in tags
    assert "alert(1)" in reader.text
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert images
    assert all(str(item["src"]).startswith("data:image/png;base64,") for item in images)
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "href" not in attributes
    text = (report / "report.md").read_text()
    assert "<script>" not in text.replace("\\<script\\>", "")
    table = text.splitlines()[2:6]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(re.findall(r"\|", table[0]))}  # fmt: skip
    for name in ("report.csv", "runs.csv"):
        for row in rows_of(report / name):
            for cell in row.values():
                assert not cell.startswith(("=", "+", "@", "\t")), cell


def test_folders_without_anything_to_compare_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capfd.readouterr().err
    write_run(tmp_path / "a")
    assert main(["report", str(tmp_path), "--metric", "f1"]) == 2
    assert "there are accuracy, loss" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "file")]) == 2
    assert "can't be written" in capfd.readouterr().err
    assert main(["report", str(tmp_path), "--target", "nan"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["report"])


def test_failures_alone_are_still_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", status="failed", reason="it broke")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "there")]) == 2
    output = capfd.readouterr().out
    assert "it broke" in output
    assert output.splitlines()[-1] == str(tmp_path / "there" / "index.html")
    assert not (tmp_path / "there" / "curves.png").exists()


def test_many_groups_can_still_be_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        write_run(tmp_path / f"r{number}", [0.1, 0.01 * number], strategy=f"strategy {number}")
    assert main(["report", str(tmp_path)]) == 0
    assert (
        "The first 28 of 30 groups are drawn." in (tmp_path / "report" / "index.html").read_text()
    )
    assert png_size(tmp_path / "report" / "curves.png")[1] > 500


def test_curves_are_means_over_all_runs_of_a_group(tmp_path: Path) -> None:
    from fl_app.report.analysis import analyse
    from fl_app.report.collect import collect
    from fl_app.report.figures import curve_of

    write_run(tmp_path / "a", [0.2, None, 0.4, 0.6], seed=1)
    write_run(tmp_path / "b", [0.4, 0.5, 0.8], seed=2)
    (row,) = analyse(collect(tmp_path), by=["strategy"]).rows
    rounds, means, deviations = curve_of(row, "accuracy")
    assert rounds == [1, 3]
    assert means == pytest.approx([0.3, 0.6])
    assert deviations == pytest.approx([0.02**0.5, 0.08**0.5])


@given(st.text())
def test_no_text_is_a_formula_or_more_than_a_line(text: str) -> None:
    cell = guarded(text)
    assert isinstance(cell, str)
    assert not cell.lstrip().startswith(("=", "+", "-", "@"))
    assert one_line(text).isprintable()
    assert not re.search(r"(?<!\\)(?:\\\\)*[|<>`*]", escaped(text))


def test_numbers_stay_numbers_in_a_spreadsheet() -> None:
    assert [guarded(cell) for cell in (-1, -0.5, None, True, "-1", " =x")] == [
        -1,
        -0.5,
        None,
        "true",
        "'-1",
        "'=x",
    ]
