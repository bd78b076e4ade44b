"""Overrides in, a checked `Config` out. The only file that knows Hydra.

Hydra composes the groups of conf/. Every override is read, and every value set, one at a time: Hydra's own compose
stops at the first fault, and a user wants to hear of all of them. The result is held against the schema and against
the constructors that `_target_` names (`fl_app.config.checking`).
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString, ValueType
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from fl_app.config import catalogue
from fl_app.config.checking import Checker, part_of, together
from fl_app.config.faults import ConfigError, Fault, by_cause, nearest, unknown_choice
from fl_app.config.parameters import fields_of, parameters_of
from fl_app.config.schema import Config
from fl_app.config.targets import build, locate

__all__ = [
    "ConfigError",
    "build",
    "compose",
    "expand",
    "join_overrides",
    "override",
    "parse_overrides",
]

_PRESETS = ("strategy", "experiment")
_STEERING = frozenset({*_PRESETS, "task"})
"""Groups whose files choose other groups: while one of these is unknown, no key of a part can be judged."""

_TEXTS = frozenset({"output_dir", "run_name"})
"""Taken as they are written: 2024_01 is a name here, not the number 202401."""

_DEEPEST = 32
"""Levels of nesting; a mapping that interpolates its own parent has no end."""

_MOST_JOBS = 10_000
"""Of one sweep; a range without end has more."""

_INTERPOLATION = re.compile(r"(\\*)\$\{")
"""OmegaConf takes a backslash before `${` for an escape, and two for one."""

_SPELLING = (
    "cannot be read; a value with a comma, =, brackets, a quote or letters beyond ASCII goes in quotes inside the "
    "override: 'key=\"a, b\"'"
)


def parse_overrides(text: str) -> list[str]:
    """The overrides in one string, as the run-config of Flower carries them, split as a shell would.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError([Fault("overrides", f"cannot be split: {error}", text)]) from error


def join_overrides(overrides: Sequence[str]) -> str:
    """One string that `parse_overrides` splits into these overrides again."""
    return shlex.join(overrides)


def override(key: str, value: Any) -> str:
    """The override that sets `key` to a plain value.

    Args:
        key: dotted path.
        value: null, a boolean, a number, a text, or a list or mapping of these; keys of mappings are plain words.
    """
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        bare = _INTERPOLATION.sub(lambda found: 2 * found[1] + r"\${", value)
        return QuotedString(bare, Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(_literal, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value in (None, True, False)
        else repr(value)
    )


def compose(overrides: Sequence[str] = (), *, conf: Path = catalogue.CONF) -> Config:
    """The configuration that conf/ and the overrides make together.

    Args:
        overrides: Hydra's syntax, `key=value` and `group=choice`; a later one wins over an earlier one.
        conf: the folder that is composed.

    Raises:
        ConfigError: with every fault, in the order of the overrides that caused them.
    """
    request = _Request.read(overrides, conf)
    tree, choices = _groups(request, conf)
    _set_values(tree, request)
    raw = _resolved(tree, "", request)
    checker = Checker(lambda path, target: _name(path, target, choices, conf), request.skipped)
    clean = checker.check(raw)
    faults = [*request.faults, *checker.faults, *together(clean)]
    if faults:
        raise ConfigError(by_cause(faults, request.keys))
    return Config.model_validate(clean)


def expand(overrides: Sequence[str], *, conf: Path = catalogue.CONF) -> list[list[str]]:
    """The jobs of a sweep: every combination of the values that the overrides list.

    Args:
        overrides: Hydra's syntax; `key=a,b`, `choice(…)`, `range(…)`, `glob(…)`, with `sort` and `shuffle` about them.
            Of two that set the same key, the later counts.
        conf: the folder whose groups `glob(…)` chooses from.

    Returns:
        The overrides of each job; the last one that was written varies fastest.

    Raises:
        ConfigError: values can't be listed, or make more than 10,000 jobs. What one job alone would be refused for is
            left to `compose`.
    """
    parser = OverridesParser.create()
    values: dict[str, list[str]] = {}
    faults = []
    for text in overrides:
        parsed = _parsed(text, parser)
        if isinstance(parsed, Fault) or not parsed.is_sweep_override():
            key = text if isinstance(parsed, Fault) else parsed.get_key_element()
            values.pop(key, None)
            values[key] = [text]
            continue
        key = parsed.get_key_element()
        try:
            listed = _listed(parsed, conf)
        except (HydraException, ValueError) as error:
            faults.append(Fault(key, str(error).splitlines()[0], text.partition("=")[2]))
            continue
        values.pop(key, None)
        values[key] = [f"{key}={value}" for value in listed]
    count = math.prod(map(len, values.values()))
    if count > _MOST_JOBS:
        faults.append(Fault("sweep", f"it has more than {_MOST_JOBS:,} jobs; cut it into several"))
    if faults:
        raise ConfigError(faults)
    return [list(job) for job in itertools.product(*values.values())]


def _listed(parsed: Override, conf: Path) -> list[str]:
    """The values of an override that lists several, each as it would be written alone.

    Raises:
        ValueError: they have no list, or there are none.
        HydraException: Hydra can't list them.
    """
    if parsed.is_interval_sweep():
        raise ValueError("an interval has no list of values; write range(…) or a,b,c")
    chosen = parsed.value()
    if isinstance(chosen, Glob):
        listed = chosen.filter(catalogue.names(parsed.key_or_group, conf))
    else:
        values = parsed.sweep_string_iterator()
        listed = list(itertools.islice(values, _MOST_JOBS + 1))
    if not listed:
        raise ValueError("lists no value at all")
    return listed


@dataclass
class _Request:
    """The overrides, read one by one.

    Attributes:
        keys: what each override sets, in their order.
        groups: chosen groups; a wrong choice is replaced by the nearest right one, so that the rest can be checked.
        values: overrides of single values, in order.
        skipped: groups that nothing can be said of, because their choice is wrong and nothing is near.
        faults: found so far.
    """

    keys: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    values: list[Override] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def read(cls, overrides: Sequence[str], conf: Path) -> _Request:
        request = cls()
        known = catalogue.groups(conf)
        parser = OverridesParser.create()
        for text in overrides:
            request._read(text, parser, known, conf)
        if request.skipped & _STEERING:
            request.skipped |= {*known} - {"runtime"}
        return request

    def _read(self, text: str, parser: OverridesParser, known: Sequence[str], conf: Path) -> None:
        parsed = _parsed(text, parser)
        if isinstance(parsed, Fault):
            self.keys.append(parsed.path)
            self.faults.append(parsed)
            return
        key = parsed.key_or_group
        self.keys.append(key)
        fault = _unsupported(parsed, text)
        if fault is not None:
            self.keys[-1] = fault.path
            self.faults.append(fault)
        elif key in known and not isinstance(parsed.value(), dict):
            self._choose(key, parsed, catalogue.names(key, conf))
        else:
            self.values.append(parsed)

    def _choose(self, group: str, parsed: Override, choices: Sequence[str]) -> None:
        value = parsed.value()
        if value is None and group == "experiment":
            self.groups.pop(group, None)
        elif value is None and "none" in choices:
            self.groups[group] = "none"
        elif str(value) in choices:
            self.groups[group] = str(value)
        else:
            written = "null" if value is None else str(value)
            self.faults.append(unknown_choice(group, written, choices))
            guess = nearest(written, choices)
            self.groups |= {group: guess} if guess else {}
            self.skipped |= set() if guess else {group}


def _parsed(text: str, parser: OverridesParser) -> Override | Fault:
    key, equals, written = text.partition("=")
    bare = written.strip()
    try:
        parsed = parser.parse_override(text)
    except HydraException:
        name = key.lstrip("+~")
        if name in _TEXTS and bare and bare[0] not in "'\"":
            return parser.parse_override(f"{key}={_literal(bare)}")
        if not equals:
            return Fault(text, "not an override: write key=value")
        if not key or any(sign.isspace() for sign in key):
            return Fault(text, "not an override: write key=value, without spaces before the =")
        return Fault(name, _SPELLING, written)
    if not parsed.key_or_group:
        return Fault(text, "not an override: write key=value")
    if parsed.key_or_group in _TEXTS and isinstance(parsed.value(), bool | int | float):
        return parser.parse_override(f"{key}={_literal(bare)}")
    return parsed


def _unsupported(parsed: Override, text: str) -> Fault | None:
    """The fault of an override that Hydra reads, but that has no meaning for one run."""
    key = parsed.key_or_group
    head, *rest = key.split(".")
    if parsed.is_delete():
        return Fault(text, f"nothing is deleted here: set another value or choice, {key}=…")
    if parsed.package is not None:
        return Fault(text, "a group cannot be moved to another place: write group=choice")
    if head.split("/")[0] == "hydra":
        return Fault(key, "unknown key; Hydra's own settings are not used here")
    if head in _PRESETS and (rest or isinstance(parsed.value(), dict)):
        return Fault(key, f"unknown key; {head} is a choice and has no settings: write {head}=…")
    if parsed.is_sweep_override():
        written = text.partition("=")[2]
        comma = parsed.value_type is ValueType.SIMPLE_CHOICE_SWEEP
        mend = (
            f"or write a list as [{written}], a text with a comma in quotes"
            if comma
            else "or give one value"
        )
        told = "several values to sweep over, and a run takes one; add -m to run each of them"
        return Fault(key, f"{told}, {mend}", written)
    return None


@contextmanager
def _hydra_put_back() -> Iterator[None]:
    """Leaves Hydra's global state (a user's own `GlobalHydra` and `HydraConfig`, the resolvers) as it was."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(state)


def _groups(request: _Request, conf: Path) -> tuple[DictConfig, dict[str, str | None]]:
    """The files of conf/ merged, and which file each group took."""
    # In quotes: Hydra reads a bare nan as a number.
    chosen = tuple(f"{group}='{name}'" for group, name in sorted(request.groups.items()))
    folders = tuple(catalogue.folders(conf))
    found = (file for folder in folders for file in sorted(folder.rglob("*.yaml")))
    files = tuple((file, file.stat().st_mtime_ns) for file in found)
    try:
        tree, choices = _merged(chosen, folders, files)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if len(folders) == 1:  # ours are right: a test composes each
            raise
        told = f"its files can't be composed: {str(error).splitlines()[0]}"
        raise ConfigError([Fault("--config-dir", told, str(folders[-1]))]) from error
    return copy.deepcopy(tree), dict(choices)


@lru_cache(maxsize=128)
def _merged(
    chosen: tuple[str, ...], folders: tuple[Path, ...], files: tuple[tuple[Path, int], ...]
) -> tuple[DictConfig, dict[str, str | None]]:
    """Hydra's own work, a tenth of a second: done once for the same choices of the same `files`, as in a sweep."""
    conf, *own = folders
    where = [override("hydra.searchpath", [f"file://{folder}" for folder in own])] if own else []
    with (
        _hydra_put_back(),
        initialize_config_dir(str(conf.resolve()), job_name="trellis", version_base="1.3"),
    ):
        tree = hydra_compose("config", [*where, *chosen], return_hydra_config=True)
    taken = tree.hydra.runtime.choices
    choices = {name: taken[name] for name in catalogue.groups(conf) if name in taken}
    with open_dict(tree):
        del tree["hydra"]
        for name in _PRESETS:
            tree[name] = choices.get(name)
    return tree, choices


def _set_values(tree: DictConfig, request: _Request) -> None:
    """Sets the values, each on its own.

    A class that is named in the place of a file's takes none of that file's settings over: they were the other class's.
    """
    for parsed in request.values:
        node, _, leaf = parsed.key_or_group.rpartition(".")
        settings = OmegaConf.select(tree, node) if leaf == "_target_" else None
        if isinstance(settings, DictConfig) and settings.get("_target_") != parsed.value():
            kept = _beside(node)
            with open_dict(settings):
                for name in [name for name in settings if name not in kept]:
                    del settings[name]
    for parsed in request.values:
        try:
            OmegaConf.update(tree, parsed.key_or_group, parsed.value(), merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError) as error:
            request.faults.append(Fault(parsed.key_or_group, _reason(error), parsed.value()))


def _beside(node: str) -> frozenset[str]:
    """Settings of a node that are not its class's own."""
    parameter = fields_of(Config).get(node)
    part = part_of(parameter.annotation) if parameter else None
    return frozenset(parameters_of(locate(part.beside))[0]) if part and part.beside else frozenset()


def _resolved(tree: DictConfig | ListConfig, path: str, request: _Request, depth: int = 0) -> Any:
    """Plain dicts and lists, interpolations resolved; a key that can't be resolved is a fault and left out."""
    found: dict[str, Any] = {}
    for key in range(len(tree)) if isinstance(tree, ListConfig) else list(tree):
        place = f"{path}.{key}" if path else str(key)
        try:
            value = tree[key]
        except OmegaConfBaseException as error:
            request.faults.append(Fault(place, _reason(error)))
            request.skipped.add(place)
            continue
        if isinstance(value, DictConfig | ListConfig):
            if depth > _DEEPEST:
                request.faults.append(
                    Fault(place, "nests without end: it interpolates what it is a part of")
                )
                return found
            value = _resolved(value, place, request, depth + 1)
        found[str(key)] = value
    return list(found.values()) if isinstance(tree, ListConfig) else found


def _reason(error: Exception) -> str:
    """OmegaConf's first line; what follows is about its own types."""
    if isinstance(error, MissingMandatoryValue):
        return "must be given a value; ??? says that there is none yet"
    return f"cannot be resolved: {str(error).splitlines()[0]}"


def _name(path: str, target: str, choices: Mapping[str, str | None], conf: Path) -> str:
    """The choice of the group, or the class's own name where the class is not the one of that file."""
    choice = choices.get(path)
    if choice:
        file = OmegaConf.load(catalogue.file_of(path, choice, conf))
        # A file of package _global_ has the part's settings under the group's own name.
        if target in (OmegaConf.select(file, key) for key in ("_target_", f"{path}._target_")):
            return choice
    return target.rpartition(".")[2].lower()
