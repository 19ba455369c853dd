"""compute-sanitizer finds no illegal access and no data race in the kernels on a small case.

What racecheck says of the Hopper kernels' own bodies is left out: they only make barriers and start the warp groups, and the compiler
hands the groups their work through shared memory and barriers that the tool does not follow. The groups' code counts like any other.

    compute-sanitizer --tool memcheck python tests/nsa/kernels/test_sanitizer.py

Run as a script, this file is the small case: forward, backward and decode with a small and a large group; a number picks one of the two.
The test runs them by themselves first, so that everything is compiled, and then under the tools.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa.attention import LayerCache, nsa_attention, nsa_decode
from nsa.config import SparsityConfig
from nsa.kernels import banded_hopper, banded_hopper_dkdv, banded_hopper_dq, selected_dq_hopper, selected_hopper
from nsa.testing import make_inputs

SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
CONFIG = SparsityConfig(compress_block_size=16, compress_stride=8, select_block_size=16, num_selected_blocks=4, window_size=24)
CASES = [(3, 64, 16), (16, 128, 64)]
"""Query heads of a KV head, head dim, keys of a selected block (64: the kernels for Hopper)."""


def small_case(group_size: int, dim: int, block_size: int) -> None:
    """Packed sequences of 270, 1 and 33 tokens in bf16, forward and backward; then one decode step of two sequences."""
    config = replace(CONFIG, select_block_size=block_size)
    dtype = torch.bfloat16
    options = {"num_kv_heads": 1, "group_size": group_size, "key_dim": dim, "value_dim": dim, "dtype": dtype, "device": "cuda"}
    inputs = make_inputs(config, lengths=[270, 1, 33], **options)
    out = nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend="triton")
    assert isinstance(out, torch.Tensor)
    out.backward(torch.ones_like(out))
    raw = torch.randn(9, 2, 64, 3, dim, device="cuda").to(dtype)
    compressed = torch.randn(9, 64 // config.compress_stride, 1, 2 * dim, device="cuda").to(dtype)
    table = torch.arange(1, 9, device="cuda", dtype=torch.int32).view(2, 4)
    lengths = torch.tensor([200, 37], device="cuda", dtype=torch.int32)
    q, gates = torch.randn(2, 1, group_size, dim, device="cuda").to(dtype), torch.rand(2, 1, group_size, 3, device="cuda").to(dtype)
    step = nsa_decode(q, LayerCache(raw, compressed, dim, dim, 3), table, lengths, gates, phi=None, config=config, backend="triton")
    assert isinstance(step, torch.Tensor)
    torch.cuda.synchronize()
    print(f"group {group_size}, dim {dim}: {float(out.float().abs().mean()):.3f} {float(step.float().abs().mean()):.3f}", flush=True)


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on PATH")
def test_memcheck_and_racecheck_find_nothing(tmp_path: Path) -> None:
    checkout = str(Path(__file__).parents[3])
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": checkout}
    command = [sys.executable, __file__]
    compilers = [subprocess.Popen([*command, str(number)], env=environment) for number in range(len(CASES))]
    assert [compiler.wait(timeout=150) for compiler in compilers] == [0] * len(CASES)
    tools = {
        name: subprocess.Popen(
            [str(SANITIZER), "--tool", name, "--error-exitcode", "99", *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in ("memcheck", "racecheck")
    }  # fmt: skip
    try:
        found = {name: tool.communicate(timeout=240)[0] for name, tool in tools.items()}
    finally:
        for tool in tools.values():
            tool.kill()
    for name, text in found.items():
        assert sum(line.startswith("group ") for line in text.splitlines()) == len(CASES), f"{name} did not reach the end:\n{text[-3000:]}"
    assert "ERROR SUMMARY: 0 errors" in found["memcheck"], found["memcheck"][-3000:]
    assert "RACECHECK SUMMARY" in found["racecheck"], found["racecheck"][-3000:]
    races = accesses(found["racecheck"])
    assert not races, f"{len(races)} accesses: {sorted(set(races))[:20]}"


def accesses(text: str) -> list[str]:
    """Accesses that racecheck blames, as `kernel in file:line`, but for those in the bodies of kernels that start warp groups."""
    bodies = {
        f"{Path(module.__file__).name}:{line}"
        for module in (banded_hopper, banded_hopper_dkdv, banded_hopper_dq, selected_dq_hopper, selected_hopper)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
        for line in range(first_line(kernel), first_line(kernel) + len(inspect.getsourcelines(kernel.fn)[0]))
    }
    found = re.findall(r"(?:Read|Write) access at (\w+)\+0x[0-9a-f]+ in (\S+:\d+)", text)
    assert len(found) >= 2 * text.count("Race reported"), "an access without a line"
    return [f"{kernel} in {place}" for kernel, place in found if place not in bodies]


def first_line(kernel: Any) -> int:
    return inspect.getsourcelines(kernel.fn)[1]


RACES = """
========= Error: Race reported between Read access at dkdv_kernel+0x150 in banded_hopper_dkdv.py:{inside}
=========     and Write access at dkdv_kernel+0xe7a0 in banded_hopper_dkdv.py:{outside} [6 hazards]
"""


def test_only_the_bodies_of_kernels_that_start_warp_groups_are_left_out() -> None:
    first = first_line(banded_hopper_dkdv.dkdv_kernel)
    assert accesses(RACES.format(inside=first, outside=first + 5)) == []
    assert accesses(RACES.format(inside=first, outside=first - 20)) == [f"dkdv_kernel in banded_hopper_dkdv.py:{first - 20}"]


if __name__ == "__main__":
    for number in [int(argument) for argument in sys.argv[1:]] or range(len(CASES)):
        small_case(*CASES[number])
