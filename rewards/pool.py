"""Killable workers for reward functions: the parent owns the clock.

    submit(samples) → Future          from any thread, Ray actor or event loop (asyncio.wrap_future)
        └ dispatcher thread: jobs → idle workers, results → futures, deadlines → SIGKILL, spare worker steps in

A thread or an alarm cannot stop a function that holds the interpreter (a huge power does); a process can be killed. The
deadline is per call: it starts anew with every result. A function of TRL's signature gets a whole group in one call; if
that call fails, its samples are tried one by one, so that one bad sample costs only itself. Only JSON text crosses the
pipes. Workers die with the dispatcher thread (PDEATHSIG) and at end of file. Linux only, as RLIMIT_AS and PDEATHSIG are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.base import Outcome, Sample, Style
from rewards.registry import MEMORY_MB

logger = logging.getLogger(__name__)

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from rewards.worker import main; main(int(sys.argv[2]))"
_CHUNK = 16
"""Most samples in one job of a per-sample function; a small group is spread over all workers."""
_MAX_STARTS_FAILED = 3
_MAX_SAVED = 1_000
_READ = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """A reward by name, with its keyword arguments; `deadline_s` None is the pool's."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None


class _Call:
    """One submit(): the outcomes still missing and the future that gets them."""

    def __init__(self, samples: Sequence[Sample], num_functions: int) -> None:
        self.samples = [[sample.prompt, sample.completion, sample.answer, dict(sample.columns)] for sample in samples]
        self.outcomes: list[list[Outcome | None]] = [[None] * num_functions for _ in samples]
        self.missing = len(samples) * num_functions
        self.future: Future[list[list[Outcome]]] = Future()


class _Job:
    """Some samples of a call for one function; `done` counts results received, in order."""

    def __init__(self, call: _Call, function: int, indices: list[int]) -> None:
        self.call = call
        self.function = function
        self.indices = indices
        self.done = 0


class _Worker:
    """A child process and its pipes, without any policy."""

    def __init__(self, start: bytes, number: int) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, root, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.number = number
        self.outgoing = start
        self.incoming = b""
        self.ready = False
        self.job: _Job | None = None
        self.deadline = 0.0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class WorkerPool:
    """`workers` processes that run `functions`, and a spare one.

    Args:
        deadline_s: seconds one call may take, where its FunctionSpec does not say. memory_mb: address space of a
            worker; None: registry.MEMORY_MB's, or no limit.
        save_dir: folder that gets the sample of every timeout and crash as JSON. context: values for functions that name
            such a parameter (`prefilled`).

    Raises:
        ValueError: a function cannot be loaded (one line), at construction.
    """

    def __init__(
        self,
        functions: Sequence[FunctionSpec],
        *,
        workers: int = 2,
        deadline_s: float = 5.0,
        memory_mb: int | None = None,
        save_dir: str | Path | None = None,
        context: Mapping[str, Any] | None = None,
        start_deadline_s: float = 60.0,
    ) -> None:
        if not functions or workers < 1 or deadline_s <= 0:
            raise ValueError(f"a pool needs functions, workers ≥ 1 and deadline_s > 0; got {len(functions)}, {workers}, {deadline_s}")
        self.names = [spec.name for spec in functions]
        self.styles: list[Style] = []
        self.parameters: list[frozenset[str]] = []
        self.counters: Counter[str] = Counter()
        self._deadlines = [spec.deadline_s or deadline_s for spec in functions]
        self._start_deadline_s, self._size = start_deadline_s, workers
        self._save_dir = None if save_dir is None else Path(save_dir)
        try:
            self._start_message = _line(
                {
                    "sys_path": [os.path.abspath(entry) for entry in sys.path],
                    "functions": [{"name": spec.name, "arguments": dict(spec.arguments)} for spec in functions],
                    "context": dict(context or {}),
                    "memory_mb": memory_mb or max((MEMORY_MB.get(spec.name, 0) for spec in functions), default=0) or None,
                }
            )
        except TypeError as error:
            raise ValueError(f"reward arguments must be plain YAML values: {error}") from error
        self._submitted: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._logged: set[str] = set()
        self._started = threading.Event()
        self._fault: str | None = None
        self._closed = False
        self._starts_failed = self._spawned = self._saved = 0
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._dispatch, name="reward-pool", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._fault is not None:
            self.close()
            raise ValueError(self._fault)

    def submit(self, samples: Sequence[Sample]) -> Future[list[list[Outcome]]]:
        """Score samples of one group; the future gives, per sample, one Outcome per function.

        Raises:
            RuntimeError: the pool is closed or cannot start workers any more.
        """
        call = _Call(samples, len(self.names))
        with self._lock:
            if self._closed or self._fault is not None:
                raise RuntimeError(self._fault or "the reward pool is closed")
            if not call.missing:
                call.future.set_result([])
                return call.future
            self._submitted.put(call)
        self._wake()
        return call.future

    def close(self) -> None:
        """Kill all workers and wait for them; futures not yet done are cancelled. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Processes that score at the same time."""
        return self._size

    def process_ids(self) -> list[int]:
        """Ids of the live workers, the spare one included."""
        return [worker.process.pid for worker in list(self._workers)]

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            os.write(self._wake_write, b"x")

    # dispatcher thread

    def _dispatch(self) -> None:
        pending: set[_Call] = set()
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._wake_read, selectors.EVENT_READ, None)
            try:
                self._spawn()
                while not self._closed and self._fault is None:
                    for key, events in selector.select(self._next_deadline()):
                        if key.data is None:
                            os.read(self._wake_read, _READ)
                        elif key.data in self._workers:
                            self._serve(key.data, events)
                    self._accept(pending)
                    self._expire()
                    self._assign()
            except Exception as error:
                logger.exception("the reward pool stopped")
                self._fault = f"the reward pool stopped: {error!r}"
            finally:
                self._shut(pending)

    def _shut(self, pending: set[_Call]) -> None:
        with self._lock:
            if self._fault is None and not self._closed:
                self._fault = "the reward pool stopped"
        for worker in list(self._workers):
            self._remove(worker)
        self._accept(pending)
        for call in list(pending):  # a finished future takes itself out
            if not call.future.done():
                call.future.set_exception(RuntimeError(self._fault or "the reward pool was closed"))
        self._started.set()

    def _accept(self, pending: set[_Call]) -> None:
        while True:
            try:
                call = self._submitted.get_nowait()
            except queue.Empty:
                return
            if call is None:
                continue
            pending.add(call)
            call.future.set_running_or_notify_cancel()
            call.future.add_done_callback(lambda _, call=call: pending.discard(call))
            for function, style in enumerate(self.styles):
                step = len(call.samples) if style == "trl" else min(_CHUNK, -(-len(call.samples) // self._size))
                indices = list(range(len(call.samples)))
                self._jobs.extend(_Job(call, function, indices[first : first + step]) for first in range(0, len(indices), step))

    def _next_deadline(self) -> float | None:
        busy = [worker.deadline for worker in self._workers if worker.job is not None or not worker.ready]
        return max(0.0, min(busy) - time.monotonic()) if busy else None

    def _spawn(self) -> None:
        worker = _Worker(self._start_message, self._spawned)
        self._spawned += 1
        worker.deadline = time.monotonic() + self._start_deadline_s
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)

    def _remove(self, worker: _Worker) -> None:
        for descriptor in (worker.stdout, worker.stdin):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        self._workers.remove(worker)
        worker.close()

    def _assign(self) -> None:
        if not self._started.is_set():
            return
        while len(self._workers) < self._size + 1:
            self._spawn()
        idle = [worker for worker in self._workers if worker.ready and worker.job is None]
        free = self._size - sum(worker.job is not None for worker in self._workers)
        for worker in idle[: max(0, free)]:
            if not self._jobs:
                return
            job = self._jobs.popleft()
            worker.job = job
            worker.deadline = time.monotonic() + self._deadlines[job.function]
            samples = [job.call.samples[index] for index in job.indices]
            worker.outgoing += _line({"job": worker.number, "function": job.function, "samples": samples})
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            self._write(worker)

    def _serve(self, worker: _Worker, events: int) -> None:
        if worker.outgoing:
            self._write(worker)
        if worker not in self._workers:
            return
        try:
            data = os.read(worker.stdout, _READ)
        except BlockingIOError:
            return
        if not data:
            self._lost(worker, "crash")
            return
        lines = (worker.incoming + data).split(b"\n")
        worker.incoming = lines.pop()
        for line in lines:
            self._message(worker, json.loads(line))

    def _write(self, worker: _Worker) -> None:
        try:
            worker.outgoing = worker.outgoing[os.write(worker.stdin, worker.outgoing) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            worker.outgoing = b""  # it is dead; reading says so too
        if not worker.outgoing:
            self._selector.unregister(worker.stdin)

    def _message(self, worker: _Worker, message: Any) -> None:
        if isinstance(message, list):
            self._result(worker, message)
        elif "ready" in message:
            self.styles = [entry["style"] for entry in message["ready"]]
            self.parameters = [frozenset(entry["parameters"]) for entry in message["ready"]]
            worker.ready = True
            self._starts_failed = 0
            self._started.set()
        elif "fault" in message:
            self._fault = message["fault"]
        else:
            worker.job = None

    def _result(self, worker: _Worker, message: list[Any]) -> None:
        _, place, value, answer, fault, detail = message
        job = worker.job
        if job is None:
            return
        worker.deadline = time.monotonic() + self._deadlines[job.function]
        job.done += 1
        outcome = Outcome(value=value, answer=answer, fault=fault, detail=detail)
        if fault == "raised" and len(job.indices) > 1 and self.styles[job.function] == "trl":
            self._jobs.append(_Job(job.call, job.function, [job.indices[place]]))
            return
        self._settle(job, job.indices[place], outcome)

    def _settle(self, job: _Job, index: int, outcome: Outcome) -> None:
        call = job.call
        if call.outcomes[index][job.function] is not None:
            return
        call.outcomes[index][job.function] = outcome
        if outcome.fault is not None:
            self._count(job, index, outcome)
        call.missing -= 1
        if not call.missing and not call.future.done():
            call.future.set_result([[outcome for outcome in row if outcome is not None] for row in call.outcomes])

    def _count(self, job: _Job, index: int, outcome: Outcome) -> None:
        name = self.names[job.function]
        self.counters["timeouts" if outcome.fault == "timeout" else "failures"] += 1
        if f"{name}:{outcome.fault}" not in self._logged:
            self._logged.add(f"{name}:{outcome.fault}")
            what = {"timeout": f"took longer than {self._deadlines[job.function]:g} s", "crash": "killed its worker"}.get(
                str(outcome.fault), "failed"
            )
            logger.warning("reward %s %s%s (further cases are only counted)", name, what, f": {outcome.detail}" if outcome.detail else "")
        if outcome.fault in ("timeout", "crash"):
            self._save(name, str(outcome.fault), job.call.samples[index])

    def _save(self, name: str, fault: str, sample: list[Any]) -> None:
        if self._save_dir is None or self._saved >= _MAX_SAVED:
            return
        self._saved += 1
        prompt, completion, answer, _ = sample
        text = json.dumps({"reward": name, "fault": fault, "prompt": prompt, "completion": completion, "answer": answer})
        try:
            self._save_dir.mkdir(parents=True, exist_ok=True)
            (self._save_dir / f"{fault}-{self._saved:04d}.json").write_text(text, encoding="utf-8")
        except OSError as error:
            logger.warning("cannot save a sample that failed: %s", error)
            self._save_dir = None

    def _expire(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now >= worker.deadline and (worker.job is not None or not worker.ready):
                self._lost(worker, "timeout")

    def _lost(self, worker: _Worker, fault: str) -> None:
        """A worker died or ran past its deadline: settle the sample it was at, put the rest back in front."""
        job = worker.job
        self._remove(worker)
        if not worker.ready:
            self._starts_failed += 1
            if not self._started.is_set() or self._starts_failed >= _MAX_STARTS_FAILED:
                reason = f"did not load within {self._start_deadline_s:g} s" if fault == "timeout" else "died while loading"
                self._fault = f"rewards {', '.join(self.names)}: a worker {reason} (exit status {worker.process.returncode})"
            return
        if job is None or job.done >= len(job.indices):
            return
        detail = f"exit status {worker.process.returncode}" if fault == "crash" else ""
        if self.styles[job.function] == "trl" and len(job.indices) > 1:
            self._jobs.extendleft(_Job(job.call, job.function, [index]) for index in reversed(job.indices[job.done :]))
            return
        rest = job.indices[job.done + 1 :]
        if rest:
            self._jobs.appendleft(_Job(job.call, job.function, rest))
        self._settle(job, job.indices[job.done], Outcome(fault=fault, detail=detail))


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"
