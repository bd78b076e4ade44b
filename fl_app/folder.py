"""A run's folder: who may work in it, what an earlier process left there, and what this one leaves."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from filelock import FileLock, Timeout

from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import Config
from fl_app.services.checkpoint import Checkpoints, Found
from fl_app.services.files import remove_leftovers, sync_folder, write_atomically
from fl_app.services.summary import NAME, read_summary
from strategies.state import State

log = logging.getLogger(__name__)

_LEFT = ("checkpoints", "clients", "sums", "privacy")
"""Folders of a run, gone with it in this order."""
_PATIENCE = 1.0
"""Seconds that the lock is waited for: workers share that of a process that was killed, and die a moment later."""


class RunFolder:
    """`<output_dir>/<run_name>`.

    Args:
        config: of the run that wants to work here.

    Attributes:
        path: absolute.
        summary: path of summary.json.
        checkpoints: folder and files of the run's checkpoints.
        checkpoint: the one that `found` came upon; None where there is none.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.path = config.run_dir
        self.summary = self.path / NAME
        saving = config.checkpoint
        self.checkpoints = Checkpoints(
            self.path / "checkpoints", saving.every, saving.keep, config.rounds
        )
        self.checkpoint: Found | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The folder for this process alone.

        Raises:
            ConfigError: the folder can't be made, or another process works in it.
        """
        lock = FileLock(self.path / ".lock", timeout=_PATIENCE)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise self._refused(
                "run_name", "another process is running there; wait for it, or name another run"
            ) from None
        except (FileExistsError, NotADirectoryError) as error:
            file = next(place for place in (self.path, *self.path.parents) if place.exists())
            key = "run_name" if file == self.path else "output_dir"
            told = f"{file} is a file where a folder is needed: move it away, or name another"
            raise self._refused(key, told) from error
        except OSError as error:
            raise self._refused("output_dir", f"it can't be written ({error.strerror})") from error
        try:
            for folder in (self.path, self.checkpoints.folder, self.path / "sums"):
                remove_leftovers(folder)
            yield
        finally:
            lock.release()

    def earlier(self, num_clients: int, data_hash: str) -> State | None:
        """The state to go on from; None to begin, with the configuration written down.

        Args:
            num_clients: that there are now.
            data_hash: of the task's data as they are now.

        Raises:
            ConfigError: the folder holds a run of another configuration, number of clients or data, or `resume=must`
                finds nothing to resume.
        """
        state = self._earlier(num_clients, data_hash)
        if state is None:
            try:
                write_atomically(self.path / "config.yaml", self._config.to_yaml().encode())
            except OSError as error:
                raise self._refused(
                    "output_dir", f"it can't be written ({error.strerror})"
                ) from error
        return state

    def completed(self) -> int:
        """How many rounds a run has that ended as it should; 0 for any other."""
        summary = read_summary(self.summary) or {}
        done = summary.get("rounds_completed")
        return done if summary.get("status") == "completed" and isinstance(done, int) else 0

    @property
    def finished(self) -> bool:
        """Whether this very run is there with all its rounds, and is not to be started anew."""
        summary = read_summary(self.summary) or {}
        same = summary.get("config_hash") == self._config.identity_hash()
        return same and self._config.resume != "never" and self.completed() >= self._config.rounds

    @property
    def taken(self) -> bool:
        """Whether another process works in it at this moment."""
        try:
            with FileLock(self.path / ".lock", timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return False  # there is no such folder yet, or none that can be written

    def _earlier(self, num_clients: int, data_hash: str) -> State | None:
        if self._config.resume == "never":
            self._clear()
            return None
        return self.found(num_clients, data_hash)

    def found(self, num_clients: int, data_hash: str) -> State | None:
        """What `earlier` would go on from where `resume` is not `never`; nothing is written, so anybody may look.

        Raises:
            ConfigError: as `earlier`.
        """
        summary = read_summary(self.summary)
        if summary is not None and summary.get("config_hash") != self._config.identity_hash():
            raise self._refused(
                "run_name",
                f"it holds a run of another configuration (asked for → there):{self._difference()}",
            )
        state = self._newest()
        if state is None and self._config.resume == "must":
            raise self._refused(
                "resume",
                "there is no whole checkpoint to resume from: name the run's own run_name, or begin with resume=auto",
            )
        begun = None if state is None else (state.get("config_hash"), state.get("num_clients"))
        if begun is not None and begun[0] != self._config.identity_hash():
            raise self._refused(
                "run_name",
                f"its checkpoint is of another configuration (asked for → there):{self._difference()}",
            )
        if begun is not None and begun[1] != num_clients:
            raise self._refused(
                "num_clients",
                f"it was begun with {begun[1]} clients and there are {num_clients}: "
                "data are cut otherwise; name another run_name, or set resume=never",
            )
        if state is not None and state.get("data_hash") != data_hash:
            raise self._refused(
                "task",
                "it was begun on other data than are there now under the same name; "
                "name another run_name, or start it anew with resume=never",
            )
        return state

    def _newest(self) -> State | None:
        """The state of the newest whole checkpoint."""
        try:
            self.checkpoint = self.checkpoints.newest()
        except OSError as error:
            told = f"its checkpoints can't be read ({error.strerror}: {error.filename})"
            raise self._refused(
                "output_dir",
                f"{told}; mend that, name another run_name, or start it anew with resume=never",
            ) from error
        if self.checkpoint is not None:
            return self.checkpoint.state
        if names := self.checkpoints.names:
            raise self._refused(
                "resume",
                f"there is no whole checkpoint to resume from: {', '.join(names)} can't be read; "
                "put back a copy, name another run_name, or start it anew with resume=never",
            )
        return None

    def _clear(self) -> None:
        """Removes what an earlier run left, in an order that loses no charge wherever it is cut off.

        Without its checkpoints a run begins anew and still counts what its ledger says; with them, and the ledger gone,
        it would count what the checkpoint knew of.

        Raises:
            ConfigError: something can't be removed.
        """
        try:
            checkpoints, gone = self.path / "checkpoints", self.path / "checkpoints.gone"
            there = [name for name in (*_LEFT, NAME) if (self.path / name).exists()]
            done = (read_summary(self.summary) or {}).get("rounds_completed")
            if gone.exists():
                shutil.rmtree(gone)
            if checkpoints.exists():
                checkpoints.rename(gone)
                sync_folder(self.path)
            self._set_spending_aside()
            for name in ("checkpoints.gone", *_LEFT[1:]):
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            self.summary.unlink(missing_ok=True)
        except OSError as error:
            told = f"what is there can't be removed ({error.strerror}: {error.filename})"
            raise self._refused("resume", f"{told}; mend that, or name another run_name") from error
        if there:
            log.warning(
                "resume=never: cleared an earlier run%s (%s) from %s",
                "" if done is None else f" of {done} round{'' if done == 1 else 's'}",
                ", ".join(there),
                self.path,
            )

    def _set_spending_aside(self) -> None:
        """Keeps what an earlier run here has spent of privacy on record: beginning anew gives nothing back."""
        spent = [*self.path.glob("privacy/*.jsonl"), *self.path.glob("clients/*.spent")]
        if not spent:
            return
        taken = [int(n) for path in self.path.glob("spent-*") if (n := path.name[6:]).isdecimal()]
        aside = self.path / f"spent-{max(taken, default=0) + 1}"
        aside.mkdir()
        for file in spent:
            file.rename(aside / file.name)
        sync_folder(aside)
        privacy = (read_summary(self.summary) or {}).get("privacy")
        epsilon = privacy.get("epsilon") if isinstance(privacy, dict) else None
        told = f"ε = {epsilon:.4g}" if isinstance(epsilon, float) else "some privacy"
        log.warning(
            "%s was spent here before on the same clients, and the two runs add up: %s has the record",
            told,
            aside,
        )

    def _difference(self) -> str:
        try:
            lines = self._config.difference(yaml.safe_load((self.path / "config.yaml").read_text()))
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
            lines = [f"its config.yaml can't be read ({error})"]
        told = (
            "".join(f"\n      {line}" for line in lines)
            or "\n      (an earlier version of Trellis)"
        )
        return f"{told}\n    name another run_name, or start it anew with resume=never"

    def _refused(self, path: str, reason: str) -> ConfigError:
        return ConfigError([Fault(path, f"{self.path}: {reason}")])
