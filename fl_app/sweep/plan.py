"""The jobs of a sweep, composed and checked as a whole: a sweep with one wrong job starts none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from clients.threads import one_thread
from fl_app.assembly import check
from fl_app.compose import compose, expand
from fl_app.config import catalogue
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import Config
from fl_app.engine import resolve_workers

_NAMED = 5
"""Jobs that a fault names; of more it tells the number."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        number: from 1, in the order of the sweep.
        overrides: all that it was composed of.
        told: those of them that tell it from the others.
        config: what they compose to.
        threads: that its own arithmetic takes.
    """

    number: int
    overrides: tuple[str, ...]
    told: tuple[str, ...]
    config: Config
    threads: int = 1

    @property
    def folder(self) -> str:
        """Name of its folder, which no other job of the sweep has."""
        return self.config.folder_name


@dataclass(frozen=True)
class Plan:
    """A sweep that may start.

    Attributes:
        output_dir: absolute; holds the jobs' folders.
        jobs: in order.
        at_once: how many run at a time.
    """

    output_dir: Path
    jobs: tuple[Job, ...]
    at_once: int


def plan(overrides: Sequence[str], at_once: int = 1) -> Plan:
    """Composes and checks every job.

    Args:
        overrides: in Hydra's sweep syntax.
        at_once: how many jobs are to run at a time; with more than one, `runtime.workers=auto` is a share of the CPUs.

    Raises:
        ConfigError: a job is refused, with its number and the overrides that tell it from the others; or jobs that are
            right alone don't go together.
    """
    combinations = expand(overrides)
    common = set(combinations[0]).intersection(*combinations)
    faults = _Faults(len(combinations))
    jobs = []
    for number, written in enumerate(combinations, 1):
        told = tuple(text for text in written if text not in common)
        with one_thread():  # the jobs are forks of this process
            checked = faults.collect(number, told, partial(_checked, written))
        if checked is not None:
            jobs.append(Job(number, tuple(written), told, checked))
    faults.settle()
    _check_together(jobs, at_once)
    jobs = [_with_share(job, at_once) for job in jobs]
    return Plan(jobs[0].config.run_dir.parent, tuple(jobs), at_once)


def _checked(overrides: Sequence[str]) -> Config:
    """The configuration of one job, its contract checked."""
    config = compose(overrides)
    try:
        check(config)
    except ConfigError:
        raise
    except Exception as error:  # a class of the user's own may raise anything
        told = f"its parts can't be made: {type(error).__name__}: {error}"
        raise ConfigError([Fault("job", told)]) from error
    return config


class _Faults:
    """The faults of all jobs, each told once with the jobs that have it.

    Args:
        total: number of jobs.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._found: dict[tuple[str, str, str], tuple[Fault, list[tuple[int, str]]]] = {}

    def collect(
        self, number: int, told: Iterable[str], check: Callable[[], Config]
    ) -> Config | None:
        """What the check gives; None where it refuses, and the faults are kept."""
        try:
            return check()
        except ConfigError as error:
            for fault in error.faults:
                key = fault.path, fault.message, repr(fault.value)
                _, jobs = self._found.setdefault(key, (fault, []))
                jobs.append((number, " ".join(told)))
        return None

    def settle(self) -> None:
        """Raises what was found.

        Raises:
            ConfigError: there was something.
        """
        if self._found:
            raise ConfigError(
                Fault(fault.path, f"{fault.message}{self._where(jobs)}", fault.value)
                for fault, jobs in self._found.values()
            )

    def _where(self, jobs: Sequence[tuple[int, str]]) -> str:
        if self._total == 1:
            return ""
        if len(jobs) == self._total:
            return " [every job]"
        named = "; ".join(f"job {number}: {told}" for number, told in jobs[:_NAMED])
        more = f"; and {len(jobs) - _NAMED} more" if len(jobs) > _NAMED else ""
        return f" [{named}{more}, of {self._total}]"


def _check_together(jobs: Sequence[Job], at_once: int) -> None:
    """Refuses jobs that are right alone and wrong together.

    Raises:
        ConfigError: two jobs share a folder, there is more than one `output_dir`, or Flower is to run jobs at a time.
    """
    faults = []
    parents = sorted({str(job.config.run_dir.parent) for job in jobs})
    if len(parents) > 1:
        told = "a sweep has one folder for all of its jobs; sweep over other keys, or start two"
        raise ConfigError([Fault("output_dir", told, parents)])
    if at_once > 1 and any(job.config.backend == "flower" for job in jobs):
        told = (
            "each of Flower's simulations takes the whole machine and its ports, so its jobs run one after another: "
            "leave --jobs out, or use backend=engine"
        )
        faults.append(Fault("--jobs", told, at_once))
    shared: dict[str, list[Job]] = {}
    for job in jobs:
        shared.setdefault(job.folder, []).append(job)
    faults += [_shared(folder, same) for folder, same in shared.items() if len(same) > 1]
    if faults:
        raise ConfigError(faults)


def _shared(folder: str, jobs: Sequence[Job]) -> Fault:
    """The fault of jobs that would write into the same folder."""
    numbers = ", ".join(str(job.number) for job in jobs[:_NAMED])
    numbers += ", …" if len(jobs) > _NAMED else ""
    keys = list(dict.fromkeys(text.partition("=")[0] for text in jobs[0].told))
    parts = {*catalogue.groups()} - {"strategy", "experiment"}
    name = "-".join(f"${{{key}._target_}}" if key in parts else f"${{{key}}}" for key in keys)
    apart = f"tell them apart, as in run_name='{name}'" if name else "leave one of them out"
    if jobs[0].config.run_name == "auto":
        told = (
            f"jobs {numbers} are the same run, since what differs is not of its identity: {apart}"
        )
    else:
        told = f"jobs {numbers} would share this folder: leave run_name=auto, or {apart}"
    return Fault("run_name", told, folder)


def _with_share(job: Job, at_once: int) -> Job:
    """The job with its share of the CPUs, where others run beside it."""
    share = max(1, resolve_workers("auto") // at_once)
    config, runtime = job.config, job.config.runtime
    if at_once > 1 and runtime.workers == "auto":
        shared = runtime.model_copy(update={"workers": share})
        config = config.model_copy(update={"runtime": shared})
    return replace(job, config=config, threads=min(share, torch.get_num_threads()))
