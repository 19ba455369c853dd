"""The gates' gradients and every branch's delta term, in one pass over the outputs.

out = Σ_b gate_b · o_b, so d_gate_b = <d_out, o_b>; a branch's backward needs delta_b = gate_b · <d_out, o_b>. The gated sum
itself has no kernel: each branch's forward adds gate_b · o_b to the output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa.kernels.launch import ceil_div, launch, power_of_two


@triton.jit
def gate_backward_kernel(
    DOut, Gates, First, Second, Third, DGates, Delta, num_rows, num_heads,
    stride_do, stride_doh, stride_g, stride_gh, stride_gb, stride_1, stride_1h, stride_2, stride_2h, stride_3, stride_3h,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS (token, head) pairs; DGates and Delta are contiguous `[T, Hq, 3]`."""
    rows = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, WIDTH)
    valid = rows < num_rows
    mask = valid[:, None] & (dims < DIM)[None, :]
    token, head = rows // num_heads, rows % num_heads
    d_out = tl.load(DOut + (token * stride_do + head * stride_doh)[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    first = tl.load(First + (token * stride_1 + head * stride_1h)[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(Second + (token * stride_2 + head * stride_2h)[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    third = tl.load(Third + (token * stride_3 + head * stride_3h)[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    gates = Gates + token * stride_g + head * stride_gh
    for branch in tl.static_range(3):
        if branch == 0:
            product = tl.sum(d_out * first, 1)
        elif branch == 1:
            product = tl.sum(d_out * second, 1)
        else:
            product = tl.sum(d_out * third, 1)
        gate = tl.load(gates + branch * stride_gb, mask=valid, other=0.0).to(tl.float32)
        tl.store(DGates + rows * 3 + branch, product.to(DGates.dtype.element_ty), mask=valid)
        tl.store(Delta + rows * 3 + branch, product * gate, mask=valid)


def gate_backward(
    d_out: torch.Tensor, gates: torch.Tensor, outs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of the gates, and the delta terms of the branches' backwards.

    Args:
        d_out: `[T, Hq, Dv]`. gates: `[T, Hq, 3]`, any strides.
        outs: the branches' outputs without gates, `[T, Hq, Dv]` each, in the gates' order.
    Returns:
        d_gates `[T, Hq, 3]` in gates' dtype; delta fp32 `[T, Hq, 3]`, gate · <d_out, out>.
    """
    d_out, *parts = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_out, *outs))
    num_tokens, num_heads, dim = d_out.shape
    d_gates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    delta = torch.empty(gates.shape, dtype=torch.float32, device=gates.device)
    num_rows, width = num_tokens * num_heads, power_of_two(dim)
    rows = max(1, 4096 // width)
    if num_rows:
        launch(
            gate_backward_kernel, (ceil_div(num_rows, rows),),
            d_out, gates, *parts, d_gates, delta, num_rows, num_heads, *d_out.stride()[:2], *gates.stride(),
            *(stride for part in parts for stride in part.stride()[:2]), DIM=dim, WIDTH=width, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return d_gates, delta
