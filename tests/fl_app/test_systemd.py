"""The units in deploy/systemd against what is installed: programs, options, and nothing that opens a door."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fl_app.flower import own_machine

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
GUIDE = UNITS.parents[1] / "docs" / "deployment.md"
VENV = "/opt/trellis/.venv"
LINK, NODE = "trellis-superlink.service", "trellis-supernode@.service"
BOTH = pytest.mark.parametrize("unit", [LINK, NODE])


def settings(unit: str) -> dict[str, list[str]]:
    """Values by key, over all sections; a key may stand several times."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, sign, value = line.partition("=")
            assert sign, line
            found.setdefault(key, []).append(value)
    return found


def words(unit: str) -> list[str]:
    (command,) = settings(unit)["ExecStart"]
    return command.split()


@cache
def help_of(program: str) -> set[str]:
    """Options that an installed program names in its help."""
    path = Path(sys.executable).parent / program
    done = subprocess.run([path, "--help"], capture_output=True, encoding="utf-8", check=True)
    return set(re.findall(r"--[a-z-]+", done.stdout))


def variables(text: str) -> set[str]:
    return set(re.findall(r"^([A-Z_]+)=", text, flags=re.MULTILINE))


@BOTH
def test_the_program_is_installed_and_knows_every_option(unit: str) -> None:
    program, *rest = words(unit)
    assert program.startswith(f"{VENV}/bin/")
    name = Path(program).name
    assert (Path(sys.executable).parent / name).is_file()
    given = {word for word in rest if word.startswith("--")}
    flower = "flower-superlink" if unit == LINK else "flower-supernode"
    assert given <= help_of(flower)
    assert len(given) >= 6


@BOTH
def test_nothing_is_insecure(unit: str) -> None:
    given = words(unit)
    assert "--insecure" not in (UNITS / unit).read_text()
    # The one with a door, and the one that ends when it is lost: not Flower's own.
    assert given[1] == ("superlink" if unit == LINK else "supernode")
    if unit == LINK:
        assert "--enable-supernode-auth" in given
        assert {"--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile"} <= set(given)
    else:
        assert {"--root-certificates", "--auth-supernode-private-key"} <= set(given)
        assert given[given.index("--host") + 1] == "127.0.0.1"


@BOTH
def test_keys_are_credentials_that_the_command_uses(unit: str) -> None:
    loaded = {entry.partition(":")[0] for entry in settings(unit)["LoadCredential"]}
    used = {word.removeprefix("%d/") for word in words(unit) if word.startswith("%d/")}
    assert loaded == used
    assert "ca.key" not in (UNITS / unit).read_text()


@BOTH
def test_it_starts_again_for_ever_and_keeps_to_itself(unit: str) -> None:
    found = settings(unit)
    expected = {
        "Restart": "always",
        "StartLimitIntervalSec": "0",
        "OOMPolicy": "continue",
        "KillMode": "mixed",
        "UMask": "0077",
        "User": "trellis",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "CapabilityBoundingSet": "",
    }
    assert {key: found[key] for key in expected} == {key: [one] for key, one in expected.items()}
    # Flower says nothing to a watchdog, which would therefore kill it.
    assert "WatchdogSec" not in found


@pytest.mark.parametrize(
    ("unit", "example"), [(LINK, "superlink.env.example"), (NODE, "node.env.example")]
)
def test_every_variable_has_a_value(unit: str, example: str) -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)\}", " ".join(words(unit))))
    given = variables((UNITS / example).read_text())
    assert used == given
    in_unit = {entry.partition("=")[0] for entry in settings(unit)["Environment"]}
    if unit == LINK:
        assert used <= in_unit
    else:  # what has no sensible value stops a start without the file
        (file,) = settings(unit)["EnvironmentFile"]
        assert not file.startswith("-")


@BOTH
def test_all_that_it_writes_is_in_its_state_folder(unit: str) -> None:
    """Under ProtectSystem=strict and ProtectHome nothing else can be written."""
    found = settings(unit)
    (own,) = found["StateDirectory"]
    environment = dict(entry.split("=", 1) for entry in found["Environment"])
    places = [environment["HOME"], environment["FLWR_HOME"], *found["WorkingDirectory"]]
    if unit == LINK:
        places.append(words(unit)[words(unit).index("--database") + 1])
    else:  # where clients' memories go, also where several nodes share a machine and a user
        places.append(environment["XDG_STATE_HOME"])
        assert own.endswith("/%i")
    for place in places:
        assert place == f"%S/{own}" or place.startswith(f"%S/{own}/")
    assert "ReadWritePaths" not in found


def test_a_superlink_has_ended_by_itself_before_systemd_kills_it() -> None:
    (patience,) = settings(LINK)["TimeoutStopSec"]
    assert int(patience) >= own_machine.FAREWELL + 10


def installed() -> dict[str, tuple[str, str]]:
    """What the guide's `install` commands put where: file to (mode, source)."""
    found: dict[str, tuple[str, str]] = {}
    made = {"/etc/systemd/system"}  # there with systemd; /etc/sysusers.d is not
    blocks = GUIDE.read_text().split("```")[1::2]
    for line in "\n".join(blocks).splitlines():
        for command in line.partition("#")[0].split("&&"):
            name, *rest = command.split() or [""]
            if name != "install":
                continue
            mode = rest[rest.index("-m") + 1]
            *sources, target = [word for word in rest if word[0] != "-" and word != mode]
            if "-d" in rest:
                made.add(target)
                continue
            for source in sources:
                file = f"{target}{Path(source).name}" if target.endswith("/") else target
                assert "-D" in rest or str(Path(file).parent) in made, f"no folder yet: {line}"
                found[file] = (mode, source)
    return found


@BOTH
def test_the_guide_puts_there_what_the_unit_reads(unit: str) -> None:
    there = installed()
    assert there[f"/etc/systemd/system/{unit}"] == ("644", f"deploy/systemd/{unit}")
    for entry in settings(unit)["LoadCredential"]:
        name, _, path = entry.partition(":")
        mode, _ = there[path.replace("%i", "hospital-a")]
        assert mode == ("600" if name.endswith(".key") else "644")
    (file,) = settings(unit)["EnvironmentFile"]
    assert file.lstrip("-").replace("%i", "hospital-a") in there
    sources = [source for _, source in there.values() if source.startswith("deploy/")]
    assert len(sources) >= 5
    assert [source for source in sources if not (UNITS.parents[1] / source).is_file()] == []


@BOTH
def test_systemd_takes_it(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("this machine has no systemd-analyze")
    text = (UNITS / unit).read_text().replace(VENV, sys.prefix)
    path = tmp_path / unit.replace("@", "@hospital-a")
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", path], capture_output=True, encoding="utf-8", check=False
    )
    # Back-off came with systemd 254; those before it say that they do without.
    later = re.compile(r"Unknown key (name )?'(RestartSteps|RestartMaxDelaySec)'")
    said = [line for line in done.stderr.splitlines() if not later.search(line)]
    ours = [line for line in said if "trellis" in line]
    assert (done.returncode, ours) == (0, [])
