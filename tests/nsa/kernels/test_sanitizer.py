"""compute-sanitizer finds no illegal access and no data race in the kernels on a small case.

    compute-sanitizer --tool memcheck python tests/nsa/kernels/test_sanitizer.py

Run as a script, this file is the small case: forward, backward and decode with a small and a large group; a number picks one of the two.
The test runs them by themselves first, so that everything is compiled, and then under the tools.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa.attention import LayerCache, nsa_attention, nsa_decode
from nsa.config import SparsityConfig
from nsa.testing import make_inputs

SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
CONFIG = SparsityConfig(compress_block_size=16, compress_stride=8, select_block_size=16, num_selected_blocks=4, window_size=24)
CASES = [(3, 64), (16, 128)]
"""Query heads of a KV head, head dim."""


def small_case(group_size: int, dim: int) -> None:
    """Packed sequences of 150, 1 and 33 tokens in bf16, forward and backward; then one decode step of two sequences."""
    dtype = torch.bfloat16
    options = {"num_kv_heads": 1, "group_size": group_size, "key_dim": dim, "value_dim": dim, "dtype": dtype, "device": "cuda"}
    inputs = make_inputs(CONFIG, lengths=[150, 1, 33], **options)
    out = nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, backend="triton")
    assert isinstance(out, torch.Tensor)
    out.backward(torch.ones_like(out))
    raw = torch.randn(9, 2, 64, 3, dim, device="cuda").to(dtype)
    compressed = torch.randn(9, 64 // CONFIG.compress_stride, 1, 2 * dim, device="cuda").to(dtype)
    table = torch.arange(1, 9, device="cuda", dtype=torch.int32).view(2, 4)
    lengths = torch.tensor([200, 37], device="cuda", dtype=torch.int32)
    q, gates = torch.randn(2, 1, group_size, dim, device="cuda").to(dtype), torch.rand(2, 1, group_size, 3, device="cuda").to(dtype)
    step = nsa_decode(q, LayerCache(raw, compressed, dim, dim, 3), table, lengths, gates, phi=None, config=CONFIG, backend="triton")
    assert isinstance(step, torch.Tensor)
    torch.cuda.synchronize()
    print(f"group {group_size}, dim {dim}: {float(out.float().abs().mean()):.3f} {float(step.float().abs().mean()):.3f}", flush=True)


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on PATH")
def test_memcheck_and_racecheck_find_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
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
        assert tools[name].returncode == 0, f"{name}:\n{text[-3000:]}"
        assert sum(line.startswith("group ") for line in text.splitlines()) == len(CASES), f"{name} did not reach the end:\n{text[-3000:]}"
    assert "ERROR SUMMARY: 0 errors" in found["memcheck"]
    assert "RACECHECK SUMMARY: 0 hazards" in found["racecheck"]


if __name__ == "__main__":
    for number in [int(argument) for argument in sys.argv[1:]] or range(len(CASES)):
        small_case(*CASES[number])
