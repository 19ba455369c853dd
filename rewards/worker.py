"""The process in which reward functions run: JSON lines in, JSON lines out, nothing else.

Started by pool.py. It has no clock of its own: the parent kills it when a call takes too long. What a function prints
goes to stderr, so that the pipe stays clean. Protocol:

    in   {"sys_path", "functions": [{"name", "arguments"}], "context", "memory_mb"}      once
    out  {"ready": [{"style", "parameters"}]} or {"fault": line}
    in   {"job", "function", "samples": [[prompt, completion, answer, columns], …]}      function: index
    out  [job, sample index, value, answer, fault, detail] per sample, then {"done": job}
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import IO, Any

_PR_SET_PDEATHSIG = 1


def main(parent: int) -> None:
    """Serve jobs until the pipe closes; `parent` is the process id of the pool."""
    _die_with_parent(parent)
    pipe_in = os.fdopen(os.dup(0), "rb")
    pipe_out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    start = json.loads(pipe_in.readline() or b"null")
    if start is None:
        return
    known = set(sys.path)
    sys.path += [entry for entry in start["sys_path"] if entry not in known]
    if start["memory_mb"]:
        limit = start["memory_mb"] << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from rewards.base import last_line
    from rewards.registry import load

    try:
        rewards = [load(function["name"], function["arguments"], start["context"]) for function in start["functions"]]
    except ValueError as error:
        _send(pipe_out, {"fault": " ".join(str(error).split())})
        return
    except MemoryError as error:
        _send(pipe_out, {"fault": f"rewards.memory_mb={start['memory_mb']} is too little to load the rewards ({last_line(error)})"})
        return
    _send(pipe_out, {"ready": [{"style": reward.style, "parameters": sorted(reward.parameters)} for reward in rewards]})
    while line := pipe_in.readline():
        _serve(json.loads(line), rewards, pipe_out)
    os._exit(0)


def _die_with_parent(parent: int) -> None:
    """SIGKILL when the parent's thread that started us ends (the pool's dispatcher, which lives as long as the pool)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the signal was set
            os._exit(0)


def _send(pipe: IO[bytes], message: Any) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[pipe.write(data) :]


def _serve(job: dict[str, Any], rewards: list[Any], pipe: IO[bytes]) -> None:
    from rewards.base import Sample

    reward = rewards[job["function"]]
    samples = [Sample(prompt=prompt, completion=completion, answer=answer, columns=columns) for prompt, completion, answer, columns in job["samples"]]
    if reward.style == "trl":
        for index, outcome in enumerate(reward.many(samples)):
            _send(pipe, [job["job"], index, outcome.value, outcome.answer, outcome.fault, outcome.detail])
    else:
        for index, sample in enumerate(samples):
            outcome = reward.one(sample)
            _send(pipe, [job["job"], index, outcome.value, outcome.answer, outcome.fault, outcome.detail])
    _send(pipe, {"done": job["job"]})
