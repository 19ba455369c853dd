"""What runs inside every actor process: one part of the run, its faults and log records turned into values.

Knows nothing of Ray (grpo.actors does) and must stay light: the reward actor imports it and does without torch.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import RunConfig
from grpo.errors import RunFailed

FAILED_REWARDS = "failed_rewards"
"""Folder of a run for samples whose reward hung or killed its worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception in an actor, as text."""

    summary: str
    trace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an actor's method returns: its value or its failure, and the log records made meanwhile."""

    value: Any = None
    failure: Failure | None = None
    records: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Where an actor's process is."""

    pid: int
    host: str


class _Records(logging.Handler):
    """Keeps log records until the next reply takes them to the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[str, int, str], ...]:
        self.acquire()  # calls of one actor may overlap
        try:
            kept, self.kept = tuple(self.kept), []
        finally:
            self.release()
        return kept


class Host:
    """What the three actors share: building the part inside, and turning faults and logs into values."""

    owner = ""

    def __init__(self) -> None:
        self._part: Any = None
        self._records = _Records()

    def identify(self, stack_file: str | None, folder: str) -> Identity:
        """Take over the trainer's working folder, log level and stack-dump signal."""
        logging.getLogger().addHandler(self._records)
        logging.captureWarnings(True)
        if Path(folder).is_dir():
            os.chdir(folder)
        if stack_file is not None:
            faulthandler.register(signal.SIGUSR1, file=open(stack_file, "w"), all_threads=True)  # noqa: SIM115 (open while the process lives)
        return Identity(pid=os.getpid(), host=socket.gethostname())

    def open(self, config: RunConfig, run_dir: Path) -> Reply:
        def build() -> None:
            self._part = self._build(config, run_dir)

        return self._reply(build)

    def call(self, method: str, *arguments: Any) -> Reply:
        return self._reply(lambda: getattr(self._part, method)(*arguments))

    def _build(self, config: RunConfig, run_dir: Path) -> Any:
        raise NotImplementedError

    def _reply(self, work: Callable[[], Any]) -> Reply:
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 (travels to the trainer, which raises it)
            return self._failure(error)
        return Reply(value=value, records=self._records.take())

    def _failure(self, error: Exception) -> Reply:
        name = "" if isinstance(error, RunFailed) else type(error).__name__  # a RunFailed says in words what it is
        summary = ": ".join(part for part in (name, str(error)) if part)
        return Reply(failure=Failure(summary=" ".join(summary.split()), trace=traceback.format_exc().rstrip()), records=self._records.take())

    def _stream(self, start: Callable[[], Iterable[Any]]) -> Iterator[Reply]:
        try:
            for value in start():
                yield Reply(value=value, records=self._records.take())
        except Exception as error:  # noqa: BLE001 (as above)
            yield self._failure(error)
