"""Compiles every Triton kernel of a training call and of a decode step for sm_90 on a machine without a GPU; test_compile.py runs it.

    python tests/nsa/kernels/compile_for_hopper.py

The interpreter takes what the compiler refuses: a variable that changes its type in a loop, tiles that shared memory does not hold.
Leaves out the kernels in Gluon, which need one version of Triton.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nsa.attention import LayerCache
from nsa.config import SparsityConfig
from nsa.kernels import launch
from nsa.kernels.compress import compress
from nsa.kernels.decode import paged_decode
from nsa.kernels.packed import attention_backward, run_branches
from nsa.kernels.tiles import KernelPlan
from nsa.testing import make_inputs

SHARED_MEMORY = 232448
"""Bytes that a program has on Hopper."""


class Hopper:
    """What Triton asks of a driver before it compiles."""

    class utils:
        @staticmethod
        def get_device_properties(_device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0


def training(num_tokens: int, config: SparsityConfig) -> None:
    """Forward and backward of 8 query and 2 KV heads; long enough that small groups may go block by block."""
    inputs = make_inputs(config, lengths=[num_tokens], num_kv_heads=2, group_size=4, key_dim=128, value_dim=128, dtype=torch.bfloat16)
    plan = KernelPlan(torch.tensor([0, num_tokens]), None, config=config, device=torch.device("cpu"))
    q, kv, gates = inputs.q, inputs.kv, inputs.gates
    kc, vc = (compress(x, w, plan, config) for x, w in ((kv.cmp[0], inputs.options["phi"].k), (kv.cmp[1], inputs.options["phi"].v)))
    tensors = (q, kc, vc, *kv.slc, *kv.win, gates)
    out, *kept = run_branches(*tensors, None, plan, 0.1, True, False)
    attention_backward(out, *tensors, kept, plan, 0.1, False)


def decode(num_tokens: int, config: SparsityConfig) -> None:
    """A new token of each of three sequences on their pages."""
    pages = num_tokens // 64
    raw, cmp = torch.zeros(pages + 1, 2, 64, 6, 128, dtype=torch.bfloat16), torch.zeros(pages + 1, 4, 2, 256, dtype=torch.bfloat16)
    cache = LayerCache(raw=raw, cmp=cmp, key_dim=128, value_dim=128, num_sets=3)
    q, gates = torch.zeros(3, 1, 8, 128, dtype=torch.bfloat16), torch.zeros(3, 1, 8, 3)
    table, lengths = torch.ones(3, pages, dtype=torch.int32), torch.full((3,), num_tokens, dtype=torch.int32)
    paged_decode(q, cache, table, lengths, gates, config=config, selection=None, return_selection=True, scale=0.1)


@torch.no_grad()
def main() -> None:
    """Prints one line a kernel."""
    driver.set_active(Hopper())
    torch.cuda.current_device = lambda: 0
    token = launch.rehearsal.set(kernels := [])
    try:
        training(8300, SparsityConfig())
        decode(4096, SparsityConfig())
    finally:
        launch.rehearsal.reset(token)
    for name, shared in sorted({(kernel.metadata.name, kernel.metadata.shared) for kernel in kernels}):
        print(name, shared, "" if shared <= SHARED_MEMORY else "does not fit")


if __name__ == "__main__":
    main()
