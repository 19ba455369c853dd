"""Facts about processes from /proc (Linux): memory, children, and a worker's last words.

Elsewhere the functions say that they know nothing (None, [], "").
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When a process started (clock ticks since boot), so that a reused pid is not mistaken for it; None if it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def rss_mb(pid: int) -> float | None:
    """Resident memory in MB."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def family(roots: Iterable[int]) -> dict[int, int]:
    """`roots` and every living process below them: pid → start ticks."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[int, int] = {}
    queue = list(roots)
    while queue:
        pid = queue.pop()
        ticks = start_ticks(pid)
        if ticks is not None and pid not in found:
            found[pid] = ticks
            queue += children.get(pid, [])
    return found


def end_processes(noted: dict[int, int], *, patience_s: float = 5.0) -> None:
    """Wait until the processes noted by `family` are gone; kill those that are not after `patience_s`."""
    end = time.monotonic() + patience_s
    while alive := [pid for pid, ticks in noted.items() if start_ticks(pid) == ticks]:
        if time.monotonic() > end:
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return
        time.sleep(0.05)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM meanwhile, so that a second one does not cut the clearing up short (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_tail(folder: Path, pid: int, lines: int = 20) -> str:
    """The end of what a Ray worker wrote to stderr, searched below `folder`; "" where there is nothing."""
    for path in sorted(folder.glob(f"session_2*/logs/worker-*-{pid}.err")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            return "the end of its stderr:\n" + "\n".join(text.splitlines()[-lines:])
    return ""


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the state on."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
