"""`trellis privacy-audit` as a user meets it: what it prints, writes, refuses, and its exit codes."""

import json
from pathlib import Path

import pytest
from audit_helpers import CLIPPED, contents, made
from filelock import FileLock

from fl_app.audit.conduct import DEFAULT_CANARIES, Plan, conduct, default_plan, refuted, verdicts
from fl_app.audit.target import Promise, load
from fl_app.cli.main import main
from fl_app.config.faults import ConfigError

DP = [
    "strategy=dp",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=2",
    "sampler.fraction=0.5",
]


@pytest.fixture(scope="module")
def clipped(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"), *CLIPPED)


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    return made(tmp_path_factory.mktemp("private"), *DP)


def audit(capsys, *words: object) -> tuple[int, dict, list[str]]:
    code = main(["privacy-audit", *map(str, words)])
    lines = capsys.readouterr().out.splitlines()
    return code, json.loads(Path(lines[-1]).read_text(encoding="utf-8")), lines


def promising(folder: Path, epsilon: float) -> None:
    path = folder / "summary.json"
    promise = {
        "unit": "client",
        "epsilon": epsilon,
        "delta": 1e-5,
        "adjacency": "add_or_remove_one",
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"privacy": promise}))


def test_a_private_run_leaks_less_than_it_promises(private, capsys):
    """For certain: 24 canaries bound ε by 1.7 at most, and z = 2 gives more than 1.8."""
    before = contents(private)
    code, document, lines = audit(capsys, private, "--canaries", 24)
    assert contents(private) == before
    assert code == 0
    assert document["promise"]["unit"] == "client"
    (versions, final) = document["verdicts"]
    assert versions["promised_epsilon"] == document["promise"]["epsilon"] > 1.8
    assert {versions["verdict"], final["verdict"]} == {"within the promise"}
    assert document["canaries"]["norm_is_the_clip"]
    assert document["canaries"]["versions"]["delta"] == document["promise"]["delta"]
    assert lines[0].startswith(f"audit of {private.name}: it promises ε = ")
    assert lines[1] == "canaries: 2 rounds with 4 + 24 clients"
    assert any("| canaries, versions |" in line for line in lines)


def test_an_audit_trains_with_the_noise_of_the_run(private):
    target = load(private)
    assert target.promise.noise_multiplier == 2
    arguments = target.trained_anew("canaries").privacy.arguments
    assert arguments["noise_multiplier"] == 2
    assert arguments["target_epsilon"] is None
    assert arguments["delta"] == target.promise.delta


def test_a_promise_that_is_untrue_is_found_out(tmp_path, capsys):
    """No noise, and ε = 0.5 promised: 24 canaries all told apart bound ε by 1.7."""
    folder = made(tmp_path, *CLIPPED)
    promising(folder, 0.5)
    code, document, lines = audit(capsys, folder, "--canaries", 24)
    assert code == 1
    assert document["verdicts"][0]["verdict"] == "above the promise"
    assert any("above the promise" in line for line in lines)


def test_parts_of_an_earlier_audit_are_kept(clipped, capsys):
    before = contents(clipped)
    _, first, _ = audit(capsys, clipped, "--membership", "--shadows", 0)
    assert first["canaries"] is first["inversion"] is None
    assert first["membership"]["lira"] is None
    assert first["verdicts"][0]["verdict"] == "no promise"
    code, second, lines = audit(capsys, clipped, "--canaries", 8, "--confidence", "0.9")
    assert code == 0
    assert second["membership"] == first["membership"]
    assert second["canaries"]["canaries"] == 8
    assert second["canaries"]["versions"]["confidence"] == 0.9
    assert [one["attack"] for one in second["verdicts"]] == [
        "canaries, versions", "canaries, final", "membership, loss",
    ]  # fmt: skip
    assert lines[-1] == str(clipped / "audit" / "audit.json")
    assert contents(clipped) == before


def test_without_options_canaries_go_where_something_bounds_or_promises(clipped, tmp_path):
    assert default_plan(load(clipped), 0.9) == Plan(True, 0, DEFAULT_CANARIES, False, 0.9)
    bare = made(tmp_path)
    assert default_plan(load(bare), 0.95) == Plan(membership=True)
    promising(bare, 1.0)
    assert default_plan(load(bare), 0.95).canaries == DEFAULT_CANARIES


def bound(epsilon: float) -> dict:
    return {"epsilon_lower_bound": epsilon, "confidence": 0.95}


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("client", True), ("client update", True), ("example", False), ("sentence", False)],
)
def test_only_the_bound_that_was_named_before_decides_and_only_for_its_unit(unit, expected):
    promise = Promise(unit, 1.0, 1e-5, "add_or_remove_one")
    document = {
        "canaries": {"versions": bound(1.5), "final": bound(0.1)},
        "membership": {"loss": bound(2.0), "lira": bound(0.5)},
    }
    document["verdicts"] = verdicts(document, promise)
    assert refuted(document) is expected
    document["membership"]["lira"] = None
    document["verdicts"] = verdicts(document, promise)
    assert refuted(document) is (unit != "sentence")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--canaries", "7"], "must be at least 8"),
        (["--shadows", "1"], "must be 0, or at least 2"),
        (["--confidence", "1"], "must be at least 0.5 and less than 1"),
        (["--frobnicate"], "unknown option --frobnicate"),
    ],
)
def test_wrong_options_are_refused(clipped, words, said, capsys):
    try:
        code = main(["privacy-audit", str(clipped), *words])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_wrong_folder_is_refused_without_being_touched(tmp_path, capsys):
    assert main(["privacy-audit", str(tmp_path)]) == 2
    assert "it holds no run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_audits_at_once_are_refused(clipped):
    target = load(clipped)
    target.folder.mkdir(exist_ok=True)
    with (
        FileLock(target.folder / ".lock"),
        pytest.raises(ConfigError, match="another audit of this run"),
    ):
        conduct(target, Plan(membership=True), lambda title: lambda done, total: None)


def test_help_has_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as end:
        main(["privacy-audit", "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "trellis privacy-audit RUN --inversion" in told
    assert "exit codes: 0 done; 1" in told
