"""A run's log: everything into a file of its own, warnings to whoever watches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGES = ("strategies", "clients", "fl_app")


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Leaves a full disk to whoever writes what matters more: the run ends for it, and says so."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Notes(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Passes the message on, without a traceback: that is the file's."""
        self._note(record.getMessage())


@contextmanager
def log_to(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Sends the packages' messages to a file (INFO and above) and to `note` (warnings and above)."""
    file = _File(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers = (file, _Notes(note))
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)
        file.close()
