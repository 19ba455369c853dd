"""dk and dv of attention over chosen blocks on Hopper, in Gluon (selected_keys.py says what they are and cuts the lists).

One warp group walks a part of a block's list of queries, 64 rows at a time: the next tile's rows are copied while this one is
multiplied, scores and dP begin with the rows' statistics, and the products into dV and dK run while the registers are at
work. A query's heads lie side by side, so in groups of at least 8 the copy engine fetches them in one piece; neighbours choose
mostly the same blocks (four of five tiles of group 16 are four queries in a row), and such a tile comes in one piece too.
Written for Triton 3.6's Gluon.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.banded_hopper import copied_in_bulk, rows_aligned, shared_layout
from nsa.kernels.launch import LOG2_E, ceil_div, launch

MIN_BULK_GROUP = 8
"""Heads whose rows the copy engine brings at once: as many as repeat the layout of shared memory."""


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
def list_entries(queries, start, size, LAYOUT: gl.constexpr, GROUP: gl.constexpr):
    """Of the tile of queries start … of a list: packed query row of each of its rows, its first and its last query; the list's last where it
    ends before. Loaded a tile ahead, as they come from L2."""
    COUNT: gl.constexpr = 64 // GROUP
    row = gl.load(queries + gl.minimum(start + gl.arange(0, 64, layout=LAYOUT) // GROUP, size - 1))
    return row, gl.load(queries + gl.minimum(start, size - 1)), gl.load(queries + gl.minimum(start + COUNT - 1, size - 1))


@gluon.jit
def tile_stats_at(row, start, size, num_heads, head, num_stats, LAYOUT: gl.constexpr, GROUP: gl.constexpr):
    """Where the statistics of each row of a tile are: the last place if there is no such row."""
    TILE: gl.constexpr = 64 // GROUP
    lane = gl.arange(0, 64, layout=LAYOUT)
    return gl.where((lane < TILE * GROUP) & (start + lane // GROUP < size), row.to(gl.int64) * num_heads + head + lane % GROUP, num_stats - 1)


@gluon.jit
def copy_rows(source, tile, row, stride_row, stride_head, head, LAYOUT: gl.constexpr, GROUP: gl.constexpr):
    """Starts the copy of a tile's rows of q or d_out, 16 bytes a thread."""
    wide = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT)).to(gl.int64)
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)) % GROUP
    dims = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    async_copy.async_copy_global_to_shared(tile, source + (wide * stride_row + (head + lane) * stride_head)[:, None] + dims[None, :])


@gluon.jit
def copy_piece(desc, pieces, number, ready, at):
    """Starts the copy of a descriptor's box to the `number`-th piece of shared memory."""
    tma.async_copy_global_to_shared(desc, at, ready, pieces.index(number)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout))


@gluon.jit
def fetch_rows(descs, pieces, ready, slot, queries, entries, start, size, head, GROUP: gl.constexpr):
    """Starts the copies of a tile's rows of q and d_out by the copy engine, 64 columns at a time: all of them together where the queries
    follow each other, else query by query, as they lie one behind the other in a tile of 64 rows."""
    q_desc, do_desc, q_run, do_run = descs
    q_pieces, do_pieces, q_halves, do_halves = pieces
    COUNT: gl.constexpr = 64 // GROUP
    HALVES: gl.constexpr = q_halves.type.shape[0] // 2
    _row, first, last = entries
    mbarrier.expect(ready, HALVES * (q_run.block_type.nbytes + do_run.block_type.nbytes))
    if (start + COUNT <= size) & (last - first == COUNT - 1):  # ascending numbers, so that there is none but these
        for half in gl.static_range(HALVES):
            copy_piece(q_run, q_halves, slot * HALVES + half, ready, [first, head, half * 64])
            copy_piece(do_run, do_halves, slot * HALVES + half, ready, [first, head, half * 64])
    else:
        for entry in gl.static_range(COUNT):
            row = gl.load(queries + gl.minimum(start + entry, size - 1))
            for half in gl.static_range(HALVES):
                number = (slot * HALVES + half) * COUNT + entry
                copy_piece(q_desc, q_pieces, number, ready, [row, head, half * 64])
                copy_piece(do_desc, do_pieces, number, ready, [row, head, half * 64])


@gluon.jit
def start_tile(
    descs, sources, tiles, pieces, ready, slot, queries, entries, start, size, head, strides, num_heads, num_stats,
    WIDE: gl.constexpr, GROUP: gl.constexpr, BULK: gl.constexpr,
):  # fmt: skip
    """Starts the copy of the tile of queries start … of a list, whose `list_entries` are given, to place `slot`: q, d_out and the statistics."""
    q, d_out, stats = sources
    q_tiles, do_tiles, stat_tiles = tiles
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    d_out_row, d_out_head, q_row, q_head, _k_row, _k_head, _v_row, _v_head = strides
    row = entries[0]
    at = tile_stats_at(row, start, size, num_heads, head, num_stats, line, GROUP)
    if BULK:
        fetch_rows(descs, pieces, ready.index(slot), slot, queries, entries, start, size, head, GROUP)
    else:
        copy_rows(q, q_tiles.index(slot), row, q_row, q_head, head, WIDE, GROUP)
        copy_rows(d_out, do_tiles.index(slot), row, d_out_row, d_out_head, head, WIDE, GROUP)
    async_copy.async_copy_global_to_shared(stat_tiles.index(slot).slice(0, 64), stats + at)
    async_copy.async_copy_global_to_shared(stat_tiles.index(slot).slice(64, 64), stats + num_stats + at)
    async_copy.commit_group()


@gluon.jit
def store_sum(acc, segment, sums, target, sum_row, target_row, exists, LAYOUT: gl.constexpr):
    """A block's sum over one program's rows, to its target or the segment's place."""
    DIM: gl.constexpr = acc.shape[1]
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    if segment < 0:
        gl.store(target + target_row[:, None] * DIM + dims, acc.to(target.dtype.element_ty), mask=exists[:, None])
    else:
        gl.store(sums + sum_row[:, None] * DIM + dims, acc, mask=exists[:, None])


@gluon.jit(do_not_specialize=["num_stats", "num_segments"])
def dkdv_kernel(
    q_desc, do_desc, q_run, do_run, d_out, q, k, v, stats, dk, dv, segment_dk, segment_dv, queries, counts, order, blocks, firsts, sizes, segments,
    block_sequence, block_ends, query_ends, key_ends, strides, num_stats, num_segments, scale, scale_log2,
    GROUP: gl.constexpr, DIM: gl.constexpr, BULK: gl.constexpr,
):  # fmt: skip
    """As selected_keys.dkdv_kernel; stats from row_stats_kernel stands for lse, delta and gate."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    column_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    _d_out_row, _d_out_head, _q_row, _q_head, k_row, k_head, v_row, v_head = strides
    kv_head, num_kv_heads = gl.program_id(1), gl.num_programs(1)
    if gl.program_id(0) >= gl.load(counts + kv_head):
        return
    item = kv_head * gl.num_programs(0) + gl.load(order + kv_head * gl.num_programs(0) + gl.program_id(0))
    block, size = gl.load(blocks + item), gl.load(sizes + item)
    queries += gl.where(size > 0, gl.load(firsts + item), 0)  # an empty list may begin after the last entry
    sequence = gl.load(block_sequence + block)
    key_start, key_end = gl.load(key_ends + sequence), gl.load(key_ends + sequence + 1)
    offset = key_end - key_start - gl.load(query_ends + sequence + 1)
    first_key = (block - gl.load(block_ends + sequence)) * 64
    num_there = gl.minimum(key_end - key_start - first_key, 64)
    num_heads, head = num_kv_heads * GROUP, kv_head * GROUP

    key_tile = gl.allocate_shared_memory(DTYPE, [64, DIM], shared)
    value_tile = gl.allocate_shared_memory(DTYPE, [64, DIM], shared)
    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], shared)
    do_tiles = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], shared)
    stat_tiles = gl.allocate_shared_memory(gl.float32, [2, 128], plain)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    if BULK:
        mbarrier.init(ready.index(0), count=1)
        mbarrier.init(ready.index(1), count=1)
        fence_async_shared()
        gl.thread_barrier()

    TILE: gl.constexpr = 64 // GROUP
    descs = (q_desc, do_desc, q_run, do_run)
    sources, tiles, pieces = (q, d_out, stats), (q_tiles, do_tiles, stat_tiles), (q_tiles, do_tiles)
    if BULK:
        piece: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, 64], DTYPE)
        half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
        pieces = (
            q_tiles._reinterpret(DTYPE, [2 * DIM // 64 * TILE, GROUP, 64], piece),
            do_tiles._reinterpret(DTYPE, [2 * DIM // 64 * TILE, GROUP, 64], piece),
            q_tiles._reinterpret(DTYPE, [2 * DIM // 64, 64, 64], half),
            do_tiles._reinterpret(DTYPE, [2 * DIM // 64, 64, 64], half),
        )
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    count = gl.cdiv(size, TILE)
    entries = list_entries(queries, 0, gl.maximum(size, 1), line, GROUP)
    lowest = entries[1]
    if count > 0:
        start_tile(
            descs, sources, tiles, pieces, ready, 0, queries, entries, 0, size, head, strides, num_heads, num_stats, wide, GROUP, BULK
        )  # fmt: skip
        entries = list_entries(queries, TILE, size, line, GROUP)
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    row = (key_start + first_key + inner).to(gl.int64)[:, None]
    key_tile.store(gl.load(k + row * k_row + kv_head * k_head + dims, mask=(inner < num_there)[:, None], other=0.0))
    value_tile.store(gl.load(v + row * v_row + kv_head * v_head + dims, mask=(inner < num_there)[:, None], other=0.0))

    acc_k = gl.zeros([64, DIM], gl.float32, layout=mma_o)
    acc_v = gl.zeros([64, DIM], gl.float32, layout=mma_o)
    zeros = gl.zeros([64, 64], gl.float32, layout=mma_s)
    key_s = first_key + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    column = gl.arange(0, 64, layout=column_s) // GROUP
    for i in range(count):
        now = i % 2
        q_now, do_now, stats_now = q_tiles.index(now), do_tiles.index(now), stat_tiles.index(now)
        gl.thread_barrier()  # everybody has read what the next copies overwrite
        if BULK:
            if i + 1 < count:
                start_tile(
                    descs, sources, tiles, pieces, ready, 1 - now, queries, entries, (i + 1) * TILE, size, head, strides, num_heads, num_stats,
                    wide, GROUP, BULK,
                )  # fmt: skip
            else:
                async_copy.commit_group()
            mbarrier.wait(ready.index(now), i // 2 & 1)
        else:  # after the last tile its last query again
            start_tile(
                descs, sources, tiles, pieces, ready, 1 - now, queries, entries, (i + 1) * TILE, size, head, strides, num_heads, num_stats, wide,
                GROUP, BULK,
            )  # fmt: skip
        first, lowest = lowest, entries[1]
        entries = list_entries(queries, (i + 2) * TILE, size, line, GROUP)
        async_copy.wait_group(1)
        fence_async_shared()
        gl.thread_barrier()
        s = zeros + stats_now.slice(0, 64).load(column_s)[None, :]
        s = warpgroup_mma(key_tile, q_now.permute((1, 0)), s, is_async=True)
        dp = zeros + stats_now.slice(64, 64).load(column_s)[None, :]
        dp = warpgroup_mma(value_tile, do_now.permute((1, 0)), dp, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale_log2)
        if first + offset < first_key + 63:
            entry = gl.minimum(i * TILE + column, size - 1)
            p = gl.where(key_s[:, None] <= (gl.load(queries + entry) + offset)[None, :], p, 0.0)
        weights = gl.convert_layout(p.to(DTYPE), weight_layout)
        adding_v = warpgroup_mma(weights, do_now, acc_v, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        d_weights = gl.convert_layout((p * dp).to(DTYPE), weight_layout)
        adding_k = warpgroup_mma(d_weights, q_now, acc_k, is_async=True)
        acc_v, acc_k = warpgroup_mma_wait(0, deps=[adding_v, adding_k])
    async_copy.wait_group(0)

    segment = gl.load(segments + item)
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, mma_o))
    target_row = (key_start + first_key + inner).to(gl.int64) * num_kv_heads + kv_head
    sum_row = (kv_head * num_segments + segment).to(gl.int64) * 64 + inner
    store_sum(acc_k * scale, segment, segment_dk, dk, sum_row, target_row, inner < num_there, mma_o)
    store_sum(acc_v, segment, segment_dv, dv, sum_row, target_row, inner < num_there, mma_o)


def takes(d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> bool:
    """Whether this kernel computes dk and dv for the tensors and blocks of `size` keys, given a GPU that runs it: head
    dimensions of 64 or 128, blocks of 64 keys, rows that can be copied 16 bytes at a time."""
    fits = (
        q.shape[2] == v.shape[2]
        and q.shape[2] in (64, 128)
        and size == 64
        and q.shape[1] <= 64 * k.shape[1]
        and q.dtype in (torch.bfloat16, torch.float16)
    )
    return fits and all(rows_aligned(x) for x in (d_out, q, k, v))


def query_descriptor(x: torch.Tensor, queries: int, group: int) -> TensorDescriptor:
    """The copy engine's view of q or d_out: 64 columns of the heads of one KV head of neighbouring queries."""
    box = [queries, group, 64]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, shared_layout(tuple(box), x.dtype))


def row_stats(lse: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 `[2, T·Hq + 1]`, what the kernel asks of each query row and head, from lse, delta and gate `[T, Hq]`."""
    num_stats = lse.numel() + 1
    stats = torch.empty(2, num_stats, dtype=torch.float32, device=lse.device)
    launch(
        row_stats_kernel, (ceil_div(num_stats, 1024),), lse, delta, gate, stats, *delta.stride(), *gate.stride(), lse.shape[1], num_stats,
        scale * LOG2_E, ROWS=1024,
    )  # fmt: skip
    return stats


def dkdv(
    grid: tuple[int, int], d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor,
    gate: torch.Tensor, tables: tuple[Any, ...], num_segments: int, *, scale: float,
) -> None:  # fmt: skip
    """Launches the kernel: `tables` are its tensors from dk to key_ends; lse, delta and gate are `[T, Hq]`."""
    group = q.shape[1] // k.shape[1]
    stats = row_stats(lse, delta, gate, scale)
    bulk = group >= MIN_BULK_GROUP and group & (group - 1) == 0 and copied_in_bulk(q) and copied_in_bulk(d_out)
    descs = tuple(query_descriptor(x, queries, group) for queries in (1, 64 // group) for x in (q, d_out)) if bulk else (q, d_out) * 2
    strides = (*d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    launch(
        dkdv_kernel, grid, *descs, d_out, q, k, v, stats, *tables, strides, stats.shape[1], num_segments, scale, scale * LOG2_E,
        GROUP=group, DIM=q.shape[2], BULK=bulk, num_warps=4,
    )  # fmt: skip
