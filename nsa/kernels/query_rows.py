"""What the selected branch's backward kernels (dq of selected.py and gathered.py, dk and dv of selected_keys.py) load for a tile of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    d_out, q, lse, delta, gate, row, head, valid, num_heads, d_out_row, d_out_head, q_row, q_head, delta_row, delta_head, gate_row, gate_head,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """q `[rows, Dk]`, d_out `[rows, Dv]`, gate, delta and the base-2 LSE of (query `row`, `head`), int64 and int32 `[rows]`; where not `valid`
    zeros and an infinite LSE, so that a row's weights are 0."""
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    q_tile = tl.load(q + (row * q_row + head * q_head)[:, None] + key_dim[None, :], mask=valid[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
    do_mask = valid[:, None] & (value_dim < VALUE_DIM)[None, :]
    do_tile = tl.load(d_out + (row * d_out_row + head * d_out_head)[:, None] + value_dim[None, :], mask=do_mask, other=0.0)
    gates = tl.load(gate + row * gate_row + head * gate_head, mask=valid, other=0.0).to(tl.float32)
    deltas = tl.load(delta + row * delta_row + head * delta_head, mask=valid, other=0.0)
    lse_log2 = tl.load(lse + row * num_heads + head, mask=valid, other=float("inf")) * 1.4426950408889634
    return q_tile, do_tile, gates, deltas, lse_log2
