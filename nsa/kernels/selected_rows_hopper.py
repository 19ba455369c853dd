"""dk and dv of attention over chosen blocks on Hopper for groups whose rows the copy engine brings, in Gluon.

As selected_keys_hopper.py, of which this takes a part of the work. A block's K and V stay in shared memory; two warp groups take turns
at the tiles of 64 rows of its list, each with sums of its own that are added at the end. Two warps of their own bring the tiles, one q
with the rows' statistics, the other dO: a query's heads lie side by side, so a piece is 64 columns of all of them. While one warp group
computes exponents the other keeps the tensor cores busy. Written for Triton 3.6's Gluon.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.banded_hopper import await_tile, copied_in_bulk, shared_layout
from nsa.kernels.launch import LOG2_E, launch

MIN_GROUP = 4
"""Heads whose rows the copy engine brings at once: as many as repeat the layout of shared memory."""
STAGES = 5
"""Tiles of q and dO in shared memory."""


@gluon.jit
def bring_half(common, SIDE: gl.constexpr, HALF: gl.constexpr, GROUP: gl.constexpr):
    """Brings columns 64·HALF … of the tiles of q (SIDE 0) or dO (1) in the order of the list: query by query, as they lie one behind the
    other in a tile of 64 rows. With the first half of q come the rows' statistics."""
    descs, _key_tiles, _tiles, pieces, stat_tiles, rings, tensors, item, _scales = common
    ready, empty, _turns = rings
    stats, queries = tensors[4], tensors[5]
    size, head, num_heads, num_stats = item[1], item[2], item[3], item[4]
    desc, places = descs[SIDE], pieces[SIDE]
    STAGES: gl.constexpr = ready.type.shape[0]
    COUNT: gl.constexpr = 64 // GROUP
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 64, layout=line)
    for number in range(gl.cdiv(size, COUNT)):
        slot = number % STAGES
        mbarrier.wait(empty.index(slot), (number // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(slot), COUNT * desc.block_type.nbytes)
        for entry in gl.static_range(COUNT):
            row = gl.load(queries + gl.minimum(number * COUNT + entry, size - 1))
            place = places.index((slot * 2 + HALF) * COUNT + entry)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
            tma.async_copy_global_to_shared(desc, [row, head, HALF * 64], ready.index(slot), place)
        if SIDE + HALF == 0:
            entry = number * COUNT + lane // GROUP
            row = gl.load(queries + gl.minimum(entry, size - 1)).to(gl.int64)
            at = gl.where(entry < size, row * num_heads + head + lane % GROUP, num_stats - 1)
            async_copy.async_copy_global_to_shared(stat_tiles.index(slot).slice(0, 64), stats + at)
            async_copy.async_copy_global_to_shared(stat_tiles.index(slot).slice(64, 64), stats + num_stats + at)
            async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)


@gluon.jit
def key_weights(s, stats, scale_log2, number, queries, item, key_s, column, GROUP: gl.constexpr):
    """gate · softmax weights `[keys, rows]` of a tile."""
    _block, size, _head, _num_heads, _num_stats, first_key, offset = item[:7]
    p = gl.exp2(s * scale_log2 + (stats * scale_log2)[None, :])
    COUNT: gl.constexpr = 64 // GROUP
    if gl.load(queries + number * COUNT) + offset < first_key + 63:
        entry = gl.minimum(number * COUNT + column, size - 1)
        p = gl.where(key_s[:, None] <= (gl.load(queries + entry) + offset)[None, :], p, 0.0)
    return p


@gluon.jit
def store_sum(acc, item, sums, target, LAYOUT: gl.constexpr):
    """A block's sum over one program's rows, to its target or the segment's place."""
    DIM: gl.constexpr = acc.shape[1]
    segment, num_segments, key_start, num_there, kv_head, num_kv_heads, first_key = item[7], item[8], item[9], item[10], item[11], item[12], item[5]
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    exists = (inner < num_there)[:, None]
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    if segment < 0:
        row = (key_start + first_key + inner).to(gl.int64) * num_kv_heads + kv_head
        gl.store(target + row[:, None] * DIM + dims, acc.to(target.dtype.element_ty), mask=exists)
    else:
        row = (kv_head * num_segments + segment).to(gl.int64) * 64 + inner
        gl.store(sums + row[:, None] * DIM + dims, acc, mask=exists)


@gluon.jit
def load_keys(tile, source, stride_row, stride_head, item, LAYOUT: gl.constexpr):
    """The block's rows of K or V; zeros after the sequence's last key."""
    key_start, num_there, kv_head, first_key = item[9], item[10], item[11], item[5]
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    row = (key_start + first_key + inner).to(gl.int64)[:, None]
    tile.store(gl.load(source + row * stride_row + kv_head * stride_head + dims, mask=(inner < num_there)[:, None], other=0.0))


@gluon.jit
def add_rows(common, WARP_GROUP: gl.constexpr, GROUP: gl.constexpr):
    """Every second tile's part of dk and dv; warp group 0 stores dk, 1 dv."""
    _descs, key_tiles, tiles, _pieces, stat_tiles, rings, tensors, item, scales = common
    key_tile, value_tile = key_tiles
    q_tiles, do_tiles = tiles
    ready, empty, turns = rings
    k, v, outputs, segment_sums, _stats, queries, strides = tensors
    scale, scale_log2 = scales
    size, first_key = item[1], item[5]
    STAGES: gl.constexpr = ready.type.shape[0]
    DIM: gl.constexpr = q_tiles.type.shape[2]
    DTYPE: gl.constexpr = k.dtype.element_ty
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    column_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    if WARP_GROUP == 0:
        load_keys(key_tile, k, strides[0], strides[1], item, wide)
    else:
        load_keys(value_tile, v, strides[2], strides[3], item, wide)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(turns.index(0), count=1)
    mbarrier.wait(turns.index(0), 0)

    acc_k = gl.zeros([64, DIM], gl.float32, layout=mma_o)
    acc_v = gl.zeros([64, DIM], gl.float32, layout=mma_o)
    zeros = gl.zeros([64, 64], gl.float32, layout=mma_s)
    key_s = first_key + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    column = gl.arange(0, 64, layout=column_s) // GROUP
    count = gl.cdiv(size, 64 // GROUP)
    for number in range(WARP_GROUP, count, 2):
        slot = await_tile(ready, number)
        q_tile, do_tile, stats = q_tiles.index(slot), do_tiles.index(slot), stat_tiles.index(slot)
        s = warpgroup_mma(key_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma(value_tile, do_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        first = stats.slice(0, 64).load(column_s)
        s = warpgroup_mma_wait(1, deps=[s])
        p = key_weights(s, first, scale_log2, number, queries, item, key_s, column, GROUP)
        weights = gl.convert_layout(p.to(DTYPE), weight_layout)
        adding_v = warpgroup_mma(weights, do_tile, acc_v, is_async=True)
        delta = stats.slice(64, 64).load(column_s)
        dp = warpgroup_mma_wait(1, deps=[dp])
        d_weights = gl.convert_layout((p * (dp + delta[None, :])).to(DTYPE), weight_layout)
        adding_k = warpgroup_mma(d_weights, q_tile, acc_k, is_async=True)
        acc_v, acc_k = warpgroup_mma_wait(0, deps=[adding_v, adding_k])
        mbarrier.arrive(empty.index(slot), count=1)

    # both warp groups are done with the tiles, whose room now holds what each has for the other
    gl.thread_barrier()
    mbarrier.arrive(turns.index(1), count=1)
    mbarrier.wait(turns.index(1), 0)
    sum_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], gl.float32)
    if WARP_GROUP == 0:
        q_tiles._reinterpret(gl.float32, [2, 64, DIM], sum_layout).index(0).store(acc_v)
    else:
        q_tiles._reinterpret(gl.float32, [2, 64, DIM], sum_layout).index(1).store(acc_k)
    gl.thread_barrier()
    mbarrier.arrive(turns.index(2), count=1)
    mbarrier.wait(turns.index(2), 0)
    if WARP_GROUP == 0:
        acc_k += q_tiles._reinterpret(gl.float32, [2, 64, DIM], sum_layout).index(1).load(mma_o)
        store_sum(acc_k * scale, item, segment_sums[0], outputs[0], mma_o)
    else:
        acc_v += q_tiles._reinterpret(gl.float32, [2, 64, DIM], sum_layout).index(0).load(mma_o)
        store_sum(acc_v, item, segment_sums[1], outputs[1], mma_o)


@gluon.jit(do_not_specialize=["num_stats", "num_segments"])
def dkdv_rows_kernel(
    q_desc, do_desc, k, v, stats, dk, dv, segment_dk, segment_dv, queries, counts, blocks, firsts, sizes, segments,
    block_sequence, block_ends, query_ends, key_ends, strides, num_stats, num_segments, scale, scale_log2,
    GROUP: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As selected_keys.dkdv_kernel; stats from row_stats_kernel stands for lse, delta and gate."""
    DTYPE: gl.constexpr = k.dtype.element_ty
    kv_head, num_kv_heads = gl.program_id(1), gl.num_programs(1)
    if gl.program_id(0) >= gl.load(counts + kv_head):
        return
    place = kv_head * gl.num_programs(0) + gl.program_id(0)
    block, size = gl.load(blocks + place), gl.load(sizes + place)
    queries += gl.where(size > 0, gl.load(firsts + place), 0)  # an empty list may begin after the last entry
    sequence = gl.load(block_sequence + block)
    key_start, key_end = gl.load(key_ends + sequence), gl.load(key_ends + sequence + 1)
    offset = key_end - key_start - gl.load(query_ends + sequence + 1)
    first_key = (block - gl.load(block_ends + sequence)) * 64
    num_there = gl.minimum(key_end - key_start - first_key, 64)
    segment = gl.load(segments + place)
    item = (
        block, size, kv_head * GROUP, num_kv_heads * GROUP, num_stats, first_key, offset, segment, num_segments, key_start, num_there,
        kv_head, num_kv_heads,
    )  # fmt: skip

    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    piece: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, 64], DTYPE)
    key_tile = gl.allocate_shared_memory(DTYPE, [64, DIM], shared)
    value_tile = gl.allocate_shared_memory(DTYPE, [64, DIM], shared)
    q_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DIM], shared)
    do_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DIM], shared)
    stat_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=36)  # halves of q and dO, and the 32 threads that bring statistics
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(3):
        mbarrier.init(turns.index(i), count=2)
    fence_async_shared()
    PIECES: gl.constexpr = STAGES * (DIM // 64) * (64 // GROUP)
    pieces = (q_tiles._reinterpret(DTYPE, [PIECES, GROUP, 64], piece), do_tiles._reinterpret(DTYPE, [PIECES, GROUP, 64], piece))
    tensors = (k, v, (dk, dv), (segment_dk, segment_dv), stats, queries, strides)
    common = (
        (q_desc, do_desc), (key_tile, value_tile), (q_tiles, do_tiles), pieces, stat_tiles, (ready, empty, turns), tensors, item,
        (scale, scale_log2),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (add_rows, (common, 0, GROUP)),
            (add_rows, (common, 1, GROUP)),
            (bring_half, (common, 0, 0, GROUP)),
            (bring_half, (common, 0, 1, GROUP)),
            (bring_half, (common, 1, 0, GROUP)),
            (bring_half, (common, 1, 1, GROUP)),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def takes(q: torch.Tensor, d_out: torch.Tensor, group: int) -> bool:
    """Whether this kernel computes what selected_keys_hopper takes: groups of 8 to 64 heads, a power of two, rows for the copy engine."""
    return group >= MIN_GROUP and group & (group - 1) == 0 and copied_in_bulk(q) and copied_in_bulk(d_out)


def query_descriptor(x: torch.Tensor, group: int) -> TensorDescriptor:
    """The copy engine's view of q or d_out: 64 columns of the heads of one KV head of one query."""
    box = [1, group, 64]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, shared_layout(box, x.dtype))


def dkdv(
    grid: tuple[int, int], d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stats: torch.Tensor, tables: tuple[Any, ...],
    num_segments: int, *, scale: float,
) -> None:  # fmt: skip
    """Launches the kernel: `tables` are its tensors from dk to key_ends; stats as `selected_keys_hopper.row_stats` makes them."""
    group = q.shape[1] // k.shape[1]
    launch(
        dkdv_rows_kernel, grid, query_descriptor(q, group), query_descriptor(d_out, group), k, v, stats, *tables,
        (*k.stride()[:2], *v.stride()[:2]), stats.shape[1], num_segments, scale, scale * LOG2_E,
        GROUP=group, DIM=q.shape[2], STAGES=STAGES, num_warps=4,
    )  # fmt: skip
