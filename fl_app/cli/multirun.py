"""`trellis run -m`: what a sweep shows, and what its jobs are."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from rich.console import Console as Terminal
from rich.text import Text

from fl_app.cli.console import PlainConsole
from fl_app.cli.main import DONE, FAILED
from fl_app.cli.on_flower import on_flower
from fl_app.config.faults import ConfigError, Fault
from fl_app.folder import RunFolder
from fl_app.run import run_engine
from fl_app.services.summary import read_summary
from fl_app.sweep.launch import LOG, Ending, Launcher, Status
from fl_app.sweep.plan import Job, Plan, plan
from fl_app.sweep.record import Record

_STYLES = {"completed": "green", "stopped": "yellow", "failed": "red"}
_BUSY = "another process is running there"


def sweep(overrides: Sequence[str], *, at_once: int = 1, dry_run: bool = False) -> int:
    """Runs every combination of the values that the overrides list.

    Args:
        overrides: in Hydra's sweep syntax.
        at_once: how many jobs run at a time.
        dry_run: only list them.

    Returns:
        The exit code.

    Raises:
        ConfigError: a job is refused, and none has started.
    """
    if at_once < 1:
        raise ConfigError([Fault("--jobs", "must be a whole number of at least 1", at_once)])
    planned = plan(overrides, at_once)
    if dry_run:
        for job in planned.jobs:
            print(f"{job.number}/{len(planned.jobs)}  {_told(job)}  {job.config.run_dir}")
        return DONE
    return _Sweep(planned).run()


class _Sweep:
    """A sweep that goes on: its record, and what it has shown."""

    def __init__(self, planned: Plan) -> None:
        self._plan = planned
        self._record = Record(planned.output_dir)
        self._width = min(60, max(len(_told(job)) for job in planned.jobs))
        self._terminal = Terminal(file=sys.stdout, highlight=False, soft_wrap=True)
        self._counts: Counter[str] = Counter()

    def run(self) -> int:
        """Runs what is not complete, and returns the exit code."""
        jobs, at_once = self._plan.jobs, self._plan.at_once
        together = f", {at_once} at a time" if at_once > 1 else ""
        count = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
        self._say(f"{count}{together}, in {self._plan.output_dir}")
        self._announce()
        launcher = Launcher(_work, at_once, started=self._started, ended=self._ended)
        interrupted = False
        try:
            # Looked at when its turn comes: another sweep may have done it by then.
            launcher.run(job for job in jobs if not self._settled(job))
        except KeyboardInterrupt:
            interrupted = True
        completed = self._counts["completed"]
        parts = [f"{completed} of {len(jobs)} completed"]
        parts += [
            f"{self._counts[status]} {status}"
            for status in ("failed", "stopped")
            if self._counts[status]
        ]
        rest = len(jobs) - self._counts.total()
        parts += [f"{rest} not begun"] if rest else []
        style = "green" if completed == len(jobs) else "red"
        self._say(", ".join(parts) + (" (interrupted)" if interrupted else ""), style)
        self._say(f"trellis report {shlex.quote(str(self._plan.output_dir))}")
        print(self._record.path, flush=True)
        return DONE if completed == len(jobs) else FAILED

    def _announce(self) -> None:
        """Enters the jobs that are to run."""
        folders = [(job, RunFolder(job.config)) for job in self._plan.jobs]
        todo = [job for job, folder in folders if not (folder.finished or folder.taken)]
        try:
            self._record.announce({job.folder: job.overrides for job in todo})
        except (OSError, ValueError) as error:
            self._behind(error)

    def _behind(self, error: Exception) -> None:
        """Tells that the record can't be written: the jobs are worth more than their list."""
        self._say(f"{self._record.path} is out of date: {error}", "yellow")

    def _settled(self, job: Job) -> bool:
        """Whether there is nothing to do for a job; tells so."""
        folder = RunFolder(job.config)
        if folder.finished:
            self._note(job, Ending("completed", "", None))
            self._tell(job, "completed", f"{_result(job)}  was there already")
        elif folder.taken:
            # Its entry is for the process that works there.
            self._tell(job, "failed", f"failed: {_BUSY}; try again when it has ended")
        else:
            return False
        return True

    def _started(self, job: Job) -> None:
        self._note(job, None)

    def _note(self, job: Job, ending: Ending | None) -> None:
        """Enters a job into the record: its ending, or that it has begun."""
        try:
            if ending is None:
                self._record.note(job.folder, job.overrides, "running")
            else:
                self._record.note(
                    job.folder, job.overrides, ending.status, ending.reason, ending.seconds
                )
        except (OSError, ValueError) as error:
            self._behind(error)

    def _ended(self, job: Job, ending: Ending) -> None:
        self._note(job, ending)
        if ending.status == "completed":
            told = _result(job)
        else:
            first = ending.reason.splitlines()[0] if ending.reason else "no reason given"
            told = f"{ending.status}: {first} ({job.config.run_dir / LOG})"
        self._tell(job, ending.status, f"{told}  {ending.seconds or 0:.1f} s")

    def _tell(self, job: Job, status: Status, text: str) -> None:
        self._counts[status] += 1
        total = len(self._plan.jobs)
        count = f"{self._counts.total():>{len(str(total))}}/{total}"
        self._say(f"{count}  {_told(job):<{self._width}}  {text}", _STYLES[status])

    def _say(self, text: str, style: str = "") -> None:
        self._terminal.print(Text(text, style=style))
        sys.stdout.flush()


def _told(job: Job) -> str:
    """A job in the overrides that tell it from the others."""
    return " ".join(job.told or job.overrides) or "(as configured)"


def _result(job: Job) -> str:
    """The figure that a completed job came to."""
    final = (read_summary(RunFolder(job.config).summary) or {}).get("final", {})
    for metric in ("accuracy", "loss"):
        if isinstance(final.get(metric), float | int):
            return f"{metric} {final[metric]:.4f}"
    return "not evaluated"


def _work(job: Job) -> tuple[Status, str]:
    """A job, in its own process."""
    if job.config.backend == "flower":
        return _on_flower(job)
    torch.set_num_threads(job.threads)
    result = run_engine(job.config, PlainConsole())
    return result.status, result.reason


def _on_flower(job: Job) -> tuple[Status, str]:
    code = on_flower(job.config, job.overrides)
    summary = read_summary(RunFolder(job.config).summary) or {}
    status, reason = summary.get("status"), str(summary.get("reason", ""))
    if code == DONE and status == "completed":
        return "completed", ""
    if status == "stopped":
        return "stopped", reason
    return "failed", reason or f"Flower's run ended with exit code {code}"
