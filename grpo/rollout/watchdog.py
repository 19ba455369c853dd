"""A deadline for calls that may never come back.

`watch` wraps one call. When it takes too long, a thread prints where every thread stands and interrupts the caller: a
signal raises `EngineFailed` in the main thread as soon as Python runs there again. A call that is stuck outside Python (a
GPU that does not answer) cannot be interrupted; after a grace period `last_action` gets its chance (the trainer saves what
was learnt, where it lives here) and the process ends, so that whoever waits for it (the trainer, for an actor; a shell)
sees it end instead of waiting for ever. Leaves out calls that come back slowly with
nothing: the engine counts those itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from grpo.errors import EngineFailed

GRACE_S = 10.0
LAST_ACTION_S = 60.0
"""Time for saving what can be saved before the process ends."""
_EXIT_CODE = 1


class Watchdog:
    """Watches one call at a time.

    Args:
        deadline_s: longest time for a call. key: the configuration key of it, for the message.
        grace_s: time for the interrupted call to come back.
    """

    _overdue: str | None = None
    """What the next SIGUSR2 raises; the process has one main thread, whatever the number of watchdogs."""

    def __init__(self, deadline_s: float, key: str, *, grace_s: float = GRACE_S) -> None:
        self._deadline_s, self._key, self._grace_s = deadline_s, key, grace_s
        self._lock = threading.Condition()
        self.last_action: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None
        self._what: str | None = None
        self._began = 0.0
        self._caller = 0
        self._may_interrupt = self._take_signal()

    @contextlib.contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Raise EngineFailed from inside the call where it takes longer than the deadline; calls inside it are part of it."""
        if self._what is not None:
            yield
            return
        with self._lock:
            self._what, self._began, self._caller = what, time.monotonic(), threading.get_ident()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vllm-watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._what = None

    def _run(self) -> None:
        interrupted = 0.0
        while True:
            time.sleep(min(1.0, self._deadline_s / 4))
            with self._lock:
                what, age = self._what, time.monotonic() - self._began
                began, caller = self._began, self._caller
            if what is None or age <= self._deadline_s:
                continue
            if interrupted != began:
                interrupted = began
                self._say(what)
                Watchdog._overdue = self._message(what)
                if self._may_interrupt and caller == threading.main_thread().ident:
                    os.kill(os.getpid(), signal.SIGUSR2)
            elif age > self._deadline_s + self._grace_s:
                print(f"error: vLLM hangs in {what} and cannot be interrupted; this process ends", file=sys.stderr, flush=True)
                self._act()
                os._exit(_EXIT_CODE)

    def _act(self) -> None:
        """The last action, in a thread of its own: it may hang as well."""
        if self.last_action is not None:
            thread = threading.Thread(target=self.last_action, daemon=True)
            thread.start()
            thread.join(LAST_ACTION_S)

    def _message(self, what: str) -> str:
        return f"vLLM hangs: {what} did not come back for {self._deadline_s:g} s ({self._key})"

    def _say(self, what: str) -> None:
        print(f"error: {self._message(what)}", file=sys.stderr, flush=True)
        with contextlib.suppress(ValueError, OSError):  # stderr may have no file behind it
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

    def _take_signal(self) -> bool:
        """Take SIGUSR2, if this is the main thread and nobody else has it."""
        if threading.current_thread() is not threading.main_thread():
            return False
        holder = signal.getsignal(signal.SIGUSR2)
        if holder not in (signal.SIG_DFL, Watchdog._on_signal):
            return False
        signal.signal(signal.SIGUSR2, Watchdog._on_signal)
        return True

    @staticmethod
    def _on_signal(_number: int, _frame: FrameType | None) -> None:
        message, Watchdog._overdue = Watchdog._overdue, None
        if message is not None:
            raise EngineFailed(message)
