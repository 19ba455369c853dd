"""What surrounds a run's loop: a clock on an iterator, log lines above the progress display, SIGTERM as an orderly end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from grpo.data_types import Group
from grpo.log import RunLogger


class Timed:
    """An iterator that sums up the seconds its source takes."""

    def __init__(self, source: Iterable[Group]) -> None:
        self._source = iter(source)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Group]:
        return self

    def __next__(self) -> Group:
        began = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.seconds += time.perf_counter() - began


class _LogLines(logging.Handler):
    """Warnings of the packages' loggers (those of actors included), one line each above the progress display."""

    def __init__(self, log: RunLogger) -> None:
        super().__init__(logging.WARNING)
        self._run_log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._run_log.message(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def log_lines_to(log: RunLogger) -> Iterator[None]:
    handler = _LogLines(log)
    loggers = [logging.getLogger(name) for name in ("grpo", "nsa", "rewards")]
    for one in loggers:
        one.addHandler(handler)
    try:
        yield
    finally:
        for one in loggers:
            one.removeHandler(handler)


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, clearing up on the way (main thread only)."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
