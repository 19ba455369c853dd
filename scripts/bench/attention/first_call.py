"""Seconds that the first call of a process takes for one shape, with nothing compiled before it.

    TRITON_CACHE_DIR=$(mktemp -d) python -m scripts.bench.attention.first_call a training     # or: b decode

Prints the processor's seconds, compilers counted in, then the clock's: they differ where other processes want the cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nsa.attention import nsa_attention, nsa_decode
from scripts.bench.attention.workload import CONFIG, make_problem, make_step

LENGTH = 8192
KINDS = ("training", "decode")


def first_call_seconds(layout: str, kind: str) -> float:
    """As this module run in a process of its own, with an empty cache of compiled kernels."""
    with tempfile.TemporaryDirectory() as cache:
        root = Path(__file__).resolve().parents[3]
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-m", "scripts.bench.attention.first_call", layout, kind]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(f"the first call failed: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def busy_seconds() -> float:
    """Processor seconds of this process and of those it has waited for."""
    return sum(os.times()[:4])


def main(layout: str, kind: str) -> None:
    """One call at 8,192 tokens: forward and backward (`training`) or one step (`decode`)."""
    if kind == "training":
        problem = make_problem(layout, LENGTH, realistic=True)
        torch.cuda.synchronize()
        start, busy = time.perf_counter(), busy_seconds()
        out = nsa_attention(problem.q, problem.kv, problem.gates, phi=problem.phi, config=CONFIG, backend="triton")
        assert isinstance(out, torch.Tensor)
        out.backward(problem.d_out)
    else:
        step = make_step(layout, LENGTH, 1)
        torch.cuda.synchronize()
        start, busy = time.perf_counter(), busy_seconds()
        nsa_decode(step.q, step.cache, step.table, step.lengths, step.gates, phi=None, config=CONFIG, backend="triton")
    torch.cuda.synchronize()
    print(busy_seconds() - busy)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
