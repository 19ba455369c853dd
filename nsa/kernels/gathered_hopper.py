"""The block-major backward kernel of gathered.py, scheduled by hand for Hopper's tensor cores (Gluon, Triton 3.6).

One warp group walks a block's list of queries, 64 rows at a time: the next tile's rows are copied while this one is
multiplied, scores and dP begin with the rows' statistics, and the products into dV, dK and dQ run while the registers are
at work. gathered.py has the same kernel for everything else and says where this one is faster.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.launch import LOG2_E, ceil_div, launch


@triton.jit(do_not_specialize=["num_stats"])
def row_stats_kernel(lse, delta, gate, stats, delta_row, delta_head, gate_row, gate_head, num_heads, num_stats, scale_log2, ROWS: tl.constexpr):
    """stats `[2, T·Hq + 1]`, what the products q·k and <d_out, v> begin with: (log2(gate) − lse · log2(e)) / scale_log2 and
    −delta / gate, so that gate · p = exp2(scale_log2 · first) and dS is that times the second; minus infinity and 0 where
    nothing counts (no gate, nothing seen) and in the last place."""
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = item < num_stats - 1
    row, head = item // num_heads, item % num_heads
    log = tl.load(lse + item, mask=there, other=float("-inf"))
    gates = tl.load(gate + row * gate_row + head * gate_head, mask=there, other=0.0).to(tl.float32)
    counts = (gates > 0) & (log > float("-inf"))
    gates = tl.where(counts, gates, 1.0)
    deltas = tl.load(delta + row * delta_row + head * delta_head, mask=counts, other=0.0)
    tl.store(stats + item, tl.where(counts, (tl.log2(gates) - log * 1.4426950408889634) / scale_log2, float("-inf")), mask=item < num_stats)
    tl.store(stats + num_stats + item, -deltas / gates, mask=item < num_stats)


@gluon.jit
def tile_rows(queries, slots, start, size, first_query, LAYOUT: gl.constexpr, GROUP: gl.constexpr, CHOSEN: gl.constexpr):
    """A tile's packed query rows and places of their parts of dq in the range (-1: no such row), one a lane."""
    TILE: gl.constexpr = 64 // GROUP
    lane = gl.arange(0, 64, layout=LAYOUT)
    entry = start + lane // GROUP
    valid = (lane < TILE * GROUP) & (entry < size)
    entry = gl.minimum(entry, size - 1)
    row = gl.load(queries + entry)
    slot = gl.load(slots + entry).to(gl.int32)
    return row, gl.where(valid, ((row - first_query) * CHOSEN + slot) * GROUP + lane % GROUP, -1)


@gluon.jit
def copy_tile(
    q, d_out, stats, q_tile, do_tile, stats_tile, row, place, head, q_row, q_head, d_out_row, d_out_head, num_heads, num_stats,
    K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Starts the copy of a tile's q, d_out and statistics."""
    KEY_DIM: gl.constexpr = q_tile.shape[1]
    VALUE_DIM: gl.constexpr = do_tile.shape[1]
    lane = gl.arange(0, 64, layout=row.type.layout)
    wide = gl.convert_layout(row, gl.SliceLayout(1, K_LAYOUT)).to(gl.int64)
    lane_w = gl.arange(0, 64, layout=gl.SliceLayout(1, K_LAYOUT)) % GROUP
    dims = gl.arange(0, KEY_DIM, layout=gl.SliceLayout(0, K_LAYOUT))
    async_copy.async_copy_global_to_shared(q_tile, q + (wide * q_row + (head + lane_w) * q_head)[:, None] + dims[None, :])
    wide = gl.convert_layout(row, gl.SliceLayout(1, V_LAYOUT)).to(gl.int64)
    lane_w = gl.arange(0, 64, layout=gl.SliceLayout(1, V_LAYOUT)) % GROUP
    dims = gl.arange(0, VALUE_DIM, layout=gl.SliceLayout(0, V_LAYOUT))
    async_copy.async_copy_global_to_shared(do_tile, d_out + (wide * d_out_row + (head + lane_w) * d_out_head)[:, None] + dims[None, :])
    at = gl.where(place >= 0, row.to(gl.int64) * num_heads + head + lane % GROUP, num_stats - 1)
    async_copy.async_copy_global_to_shared(stats_tile.slice(0, 64), stats + at)
    async_copy.async_copy_global_to_shared(stats_tile.slice(64, 64), stats + num_stats + at)
    async_copy.commit_group()


@gluon.jit
def store_sum(acc, sums, total, target, sum_row, total_row, target_row, exists, alone, first_range, last_range, LAYOUT: gl.constexpr):
    """A block's sum over one program's rows: to the segment's place, or added to the ranges before and, last, to its target."""
    DIM: gl.constexpr = acc.shape[1]
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    mask = exists[:, None]
    if alone:
        if first_range == 0:
            acc += gl.load(total + total_row[:, None] * DIM + dims, mask=mask, other=0.0).to(gl.float32)
        if last_range != 0:
            gl.store(target + target_row[:, None] * DIM + dims, acc.to(target.dtype.element_ty), mask=mask)
        else:
            gl.store(total + total_row[:, None] * DIM + dims, acc.to(total.dtype.element_ty), mask=mask)
    else:
        gl.store(sums + sum_row[:, None] * DIM + dims, acc, mask=mask)


@gluon.jit(
    do_not_specialize=[
        "num_stats", "num_keys", "num_segments", "range_number", "first_head", "first_query", "num_rows", "first_range", "last_range",
    ]
)  # fmt: skip
def hopper_backward_kernel(
    d_out, q, k, v, stats, dk, dv, total_dk, total_dv, segment_dk, segment_dv, partial, queries, slots, counts, blocks, firsts, sizes,
    segments, block_sequence, block_ends, query_ends, key_ends,
    d_out_row, d_out_head, q_row, q_head, k_row, k_head, v_row, v_head, num_stats,
    num_kv_heads, num_keys, num_segments, range_number, first_head, first_query, num_rows, first_range, last_range, scale, scale_log2,
    GROUP: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, CHOSEN: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    """As gathered_backward_kernel; stats from row_stats_kernel stands for lse, delta and gate."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEY_DIM, 16])
    mma_v: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE_DIM, 16])
    k_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // KEY_DIM, KEY_DIM // 8], [4, 1], [1, 0])
    v_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    k_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, KEY_DIM], DTYPE)
    v_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, VALUE_DIM], DTYPE)
    s_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    kv_head = first_head + gl.program_id(1)
    owner = range_number * num_kv_heads + kv_head
    if gl.program_id(0) >= gl.load(counts + owner):
        return
    item = owner * gl.num_programs(0) + gl.program_id(0)
    block, size = gl.load(blocks + item), gl.load(sizes + item)
    first = gl.where(size > 0, gl.load(firsts + item), 0)  # an empty list may begin after the last entry
    queries += first
    slots += first
    sequence = gl.load(block_sequence + block)
    key_start, key_end = gl.load(key_ends + sequence), gl.load(key_ends + sequence + 1)
    offset = key_end - key_start - gl.load(query_ends + sequence + 1)
    first_key = (block - gl.load(block_ends + sequence)) * 64
    num_there = gl.minimum(key_end - key_start - first_key, 64)
    num_heads = num_kv_heads * GROUP
    head = kv_head * GROUP

    key_tile = gl.allocate_shared_memory(DTYPE, [64, KEY_DIM], k_shared)
    value_tile = gl.allocate_shared_memory(DTYPE, [64, VALUE_DIM], v_shared)
    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 64, KEY_DIM], k_shared)
    do_tiles = gl.allocate_shared_memory(DTYPE, [2, 64, VALUE_DIM], v_shared)
    if WITH_DQ:
        ds_tile = gl.allocate_shared_memory(DTYPE, [64, 64], s_shared)
    stat_tiles = gl.allocate_shared_memory(gl.float32, [2, 128], plain)

    TILE: gl.constexpr = 64 // GROUP
    count = gl.cdiv(size, TILE)
    row, place = tile_rows(queries, slots, 0, gl.maximum(size, 1), first_query, line, GROUP, CHOSEN)
    if count > 0:
        copy_tile(
            q, d_out, stats, q_tiles.index(0), do_tiles.index(0), stat_tiles.index(0), row, place, head, q_row, q_head, d_out_row, d_out_head,
            num_heads, num_stats, k_wide, v_wide, GROUP,
        )  # fmt: skip
    next_row, next_place = tile_rows(queries, slots, TILE, gl.maximum(size, 1), first_query, line, GROUP, CHOSEN)
    next_lowest = gl.load(queries)
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, k_wide))
    dims = gl.arange(0, KEY_DIM, layout=gl.SliceLayout(0, k_wide))
    at = (key_start + first_key + inner).to(gl.int64) * k_row + kv_head * k_head
    key_tile.store(gl.load(k + at[:, None] + dims[None, :], mask=(inner < num_there)[:, None], other=0.0))
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, v_wide))
    dims = gl.arange(0, VALUE_DIM, layout=gl.SliceLayout(0, v_wide))
    at = (key_start + first_key + inner).to(gl.int64) * v_row + kv_head * v_head
    value_tile.store(gl.load(v + at[:, None] + dims[None, :], mask=(inner < num_there)[:, None], other=0.0))

    acc_k = gl.zeros([64, KEY_DIM], gl.float32, layout=mma_k)
    acc_v = gl.zeros([64, VALUE_DIM], gl.float32, layout=mma_v)
    zeros_s = gl.zeros([64, 64], gl.float32, layout=mma_s)
    zeros_q = gl.zeros([64, KEY_DIM], gl.float32, layout=mma_k)
    key_s = first_key + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    column = gl.arange(0, 64, layout=column_s) // GROUP
    part = partial + gl.program_id(1).to(gl.int64) * num_rows * (CHOSEN * GROUP * KEY_DIM)
    for i in range(count):
        now = i % 2
        q_now, do_now, stats_now = q_tiles.index(now), do_tiles.index(now), stat_tiles.index(now)
        gl.thread_barrier()  # everybody has read what the next copies overwrite
        copy_tile(
            q, d_out, stats, q_tiles.index(1 - now), do_tiles.index(1 - now), stat_tiles.index(1 - now), next_row, next_place, head,
            q_row, q_head, d_out_row, d_out_head, num_heads, num_stats, k_wide, v_wide, GROUP,
        )  # fmt: skip
        here = place
        place = next_place
        lowest = next_lowest
        next_lowest = gl.load(queries + gl.minimum((i + 1) * TILE, size - 1))
        next_row, next_place = tile_rows(queries, slots, (i + 2) * TILE, size, first_query, line, GROUP, CHOSEN)
        async_copy.wait_group(1)
        fence_async_shared()
        gl.thread_barrier()
        s = zeros_s + stats_now.slice(0, 64).load(column_s)[None, :]
        s = warpgroup_mma(key_tile, q_now.permute((1, 0)), s, is_async=True)
        dp = zeros_s + stats_now.slice(64, 64).load(column_s)[None, :]
        dp = warpgroup_mma(value_tile, do_now.permute((1, 0)), dp, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale_log2)
        if lowest + offset < first_key + 63:
            entry = gl.minimum(i * TILE + column, size - 1)
            p = gl.where(key_s[:, None] <= (gl.load(queries + entry) + offset)[None, :], p, 0.0)
        weights = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(operand_index=0, parent=mma_v, k_width=2))
        adding_v = warpgroup_mma(weights, do_now, acc_v, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * dp).to(DTYPE)
        if WITH_DQ:
            ds_tile.store(ds)
            fence_async_shared()
            gl.thread_barrier()
        d_weights = gl.convert_layout(ds, gl.DotOperandLayout(operand_index=0, parent=mma_k, k_width=2))
        adding_k = warpgroup_mma(d_weights, q_now, acc_k, is_async=True)
        if WITH_DQ:
            dq = warpgroup_mma(ds_tile.permute((1, 0)), key_tile, zeros_q, use_acc=False, is_async=True)
            acc_v, acc_k, dq = warpgroup_mma_wait(0, deps=[adding_v, adding_k, dq])
            gl.thread_barrier()  # everybody's products are done: the tile of q has room for dq
            q_now.store(dq.to(DTYPE))
            gl.thread_barrier()
            target = gl.convert_layout(here, gl.SliceLayout(1, k_wide))
            dims = gl.arange(0, KEY_DIM, layout=gl.SliceLayout(0, k_wide))
            gl.store(part + (target.to(gl.int64) * KEY_DIM)[:, None] + dims[None, :], q_now.load(k_wide), mask=(target >= 0)[:, None])
        else:
            acc_v, acc_k = warpgroup_mma_wait(0, deps=[adding_v, adding_k])
    async_copy.wait_group(0)

    segment = gl.load(segments + item)
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, mma_k))
    key_row = (key_start + first_key + inner).to(gl.int64)
    total_row, target_row = gl.program_id(1).to(gl.int64) * num_keys + key_row, key_row * num_kv_heads + kv_head
    sum_row = (gl.program_id(1) * num_segments + segment).to(gl.int64) * 64 + inner
    store_sum(acc_k * scale, segment_dk, total_dk, dk, sum_row, total_row, target_row, inner < num_there, segment < 0, first_range, last_range, mma_k)
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, mma_v))
    key_row = (key_start + first_key + inner).to(gl.int64)
    total_row, target_row = gl.program_id(1).to(gl.int64) * num_keys + key_row, key_row * num_kv_heads + kv_head
    sum_row = (gl.program_id(1) * num_segments + segment).to(gl.int64) * 64 + inner
    store_sum(acc_v, segment_dv, total_dv, dv, sum_row, total_row, target_row, inner < num_there, segment < 0, first_range, last_range, mma_v)


def row_stats(lse: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 `[2, T·Hq + 1]`, what the kernel asks of each query row and head, from lse, delta and gate `[T, Hq]`."""
    num_stats = lse.numel() + 1
    stats = torch.empty(2, num_stats, dtype=torch.float32, device=lse.device)
    launch(
        row_stats_kernel, (ceil_div(num_stats, 1024),), lse, delta, gate, stats, *delta.stride(), *gate.stride(), lse.shape[1], num_stats,
        scale * LOG2_E, ROWS=1024,
    )  # fmt: skip
    return stats


def hopper_backward(
    grid: tuple[int, int], d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stats: torch.Tensor, tables: tuple[Any, ...],
    numbers: tuple[int, ...], *, scale: float, chosen: int, with_dq: bool,
) -> None:  # fmt: skip
    """Launches the kernel: `tables` are its tensors from dk to key_ends, `numbers` its integers from num_kv_heads to last_range."""
    launch(
        hopper_backward_kernel, grid,
        d_out, q, k, v, stats, *tables, *d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], stats.shape[1], *numbers,
        scale, scale * LOG2_E, GROUP=q.shape[1] // k.shape[1], KEY_DIM=q.shape[2], VALUE_DIM=v.shape[2], CHOSEN=chosen, WITH_DQ=with_dq, num_warps=4,
    )  # fmt: skip
