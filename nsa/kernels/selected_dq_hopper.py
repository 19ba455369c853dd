"""Hopper's kernel of the selected branch's dq, in Gluon (selected.py says what it computes and when it is taken).

Two warp groups and a warp that brings blocks, as in selected_hopper.py, whose parts it uses. q and dO are operands from registers;
those of the next tile are copied into shared memory meanwhile. Each warp group has the next block's scores and dP on their way.
A block that a row's query did not choose gets weights of exactly 0 and changes nothing in the row. Written for Triton 3.6's Gluon.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.banded_hopper import anew, await_tile, key_descriptor, num_processors
from nsa.kernels.banded_hopper_dq import row_statistics
from nsa.kernels.launch import LOG2_E, launch
from nsa.kernels.selected_hopper import bring_blocks, copy_rows, next_own, prepare_blocks, store_rows, tile_of
from nsa.kernels.tiles import KernelPlan
from nsa.kernels.unions import BlockUnions

STAGES = 4
"""Blocks of K and V in shared memory."""


@gluon.jit
def statistics(tensors, strides, place, rows, GROUP: gl.constexpr, QUERIES: gl.constexpr):
    """`row_statistics` of a place's rows."""
    head, start, row, _first_key, num_queries, _num_keys, _position, _list_at, _count = place
    known = (start + rows // GROUP < num_queries) & (rows < QUERIES * GROUP)
    return row_statistics(tensors, strides, head * GROUP, row, rows, known, GROUP)


@gluon.jit
def row_weights(scores, shift, scale, block, bits, query, positions, first_position, columns):
    """gate · softmax weights `[rows, keys]` of a block; 0 in rows whose query did not choose it."""
    scores = scores * scale - gl.where(((bits >> query) & 1) != 0, shift, float("inf"))[:, None]
    if block * 64 + 63 > first_position:
        scores = gl.where((block * 64 + columns)[None, :] <= positions[:, None], scores, float("-inf"))
    return gl.exp2(scores)


@gluon.jit
def gather_dq(
    acc, common, place, operands, stats, rows, columns, zeros, done,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """acc with the parts of a place's blocks added: the last product on its way, and the place of its keys."""
    blocks, _row_tiles, _tensors, _row_tensors, _row_strides, score_scale, _scale = common
    descs, buffers, rings, lists, _tables, _strides, _sizes = blocks
    keys, values = buffers
    ready, empty, _landed = rings
    q_rows, do_rows = operands
    shift, delta = stats
    position, list_at, count = place[6], place[7], place[8]
    STAGES: gl.constexpr = keys.type.shape[0]
    DTYPE: gl.constexpr = descs[0].dtype
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    query = gl.minimum(rows // GROUP, QUERIES - 1)
    positions = position + query

    block, bits = gl.load(lists[0] + list_at), gl.load(lists[1] + list_at)
    slot = await_tile(ready, done)
    scores = warpgroup_mma(q_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    d_p = warpgroup_mma(do_rows, values.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    now = 0
    while now < count - 1:
        next_bits = gl.load(lists[1] + list_at + now + 1)
        p = row_weights(scores, shift, score_scale, block, bits, query, positions, position, columns)
        # Its branches keep the compiler from waiting for dP before the exponents. A block's place is free once `now` has left it.
        last = gl.minimum(now + STAGES - 1, count - 1)
        coming, block, bits, slot = next_own(lists, rings, list_at, now + 1, last, next_bits, done, STAGES - 2, WARP_GROUP, GROUP, QUERIES)
        d_p = warpgroup_mma_wait(0, deps=[d_p])
        next_scores = warpgroup_mma(q_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        d_scores = gl.convert_layout((p * (d_p - delta[:, None])).to(DTYPE), weight_layout)
        before = (done + now) % STAGES
        adding = warpgroup_mma(d_scores, keys.index(before), acc, is_async=True)
        d_p = warpgroup_mma(do_rows, values.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores, acc = warpgroup_mma_wait(1, deps=[next_scores, adding])
        mbarrier.arrive(empty.index(before), count=1)
        now = coming
    p = row_weights(scores, shift, score_scale, block, bits, query, positions, position, columns)
    d_p = warpgroup_mma_wait(0, deps=[d_p])
    d_scores = gl.convert_layout((p * (d_p - delta[:, None])).to(DTYPE), weight_layout)
    slot = (done + count - 1) % STAGES
    return warpgroup_mma(d_scores, keys.index(slot), acc, is_async=True), slot


@gluon.jit
def dq_rows(common, WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr, BEFORE: gl.constexpr):
    """Rows 64·WARP_GROUP … of each of the program's tiles."""
    blocks, row_tiles, tensors, row_tensors, row_strides, _score_scale, scale = common
    _descs, buffers, rings, _lists, tables, _strides, sizes = blocks
    empty = rings[1]
    Q, DOut, DQ, Before = tensors
    stride_q, stride_qh, stride_do, stride_doh, stride_dq, stride_dqh, stride_b, stride_bh = row_strides[0]
    num_tiles, num_heads, capacity = sizes
    DIM: gl.constexpr = buffers[0].type.shape[2]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    row_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_s, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    q_tile, do_tile, result_tile = row_tiles[0].index(WARP_GROUP), row_tiles[1].index(WARP_GROUP), row_tiles[2].index(WARP_GROUP)
    rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    wide_rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, mma_s))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    zeros = gl.zeros([64, 64], gl.float32, layout=mma_s)
    num_units, step = num_tiles * num_heads, gl.num_programs(0)
    place = tile_of(gl.program_id(0), num_tiles, num_heads, tables, capacity)
    copy_rows(q_tile, Q, place, stride_q, stride_qh, wide_rows, dims, GROUP, QUERIES)
    copy_rows(do_tile, DOut, place, stride_do, stride_doh, wide_rows, dims, GROUP, QUERIES)
    async_copy.commit_group()
    stats = statistics(row_tensors, row_strides[1], place, rows, GROUP, QUERIES)
    done = 0
    for index in range(gl.program_id(0), num_units, step):
        async_copy.wait_group(0)
        gl.thread_barrier()
        operands = (q_tile.load(row_layout), do_tile.load(row_layout))
        gl.thread_barrier()
        here = anew(wide_rows, place)
        following = tile_of(gl.minimum(index + step, num_units - 1), num_tiles, num_heads, tables, capacity)
        copy_rows(q_tile, Q, following, stride_q, stride_qh, here, dims, GROUP, QUERIES)
        copy_rows(do_tile, DOut, following, stride_do, stride_doh, here, dims, GROUP, QUERIES)
        if BEFORE:
            copy_rows(result_tile, Before, place, stride_b, stride_bh, here, dims, GROUP, QUERIES)
        async_copy.commit_group()
        acc = gl.zeros([64, DIM], gl.float32, layout=mma_o)
        adding, slot = gather_dq(acc, common, place, operands, stats, rows, columns, zeros, done, WARP_GROUP, GROUP, QUERIES, mma_o)
        done += place[8]
        next_place = tile_of(gl.minimum(index + step, num_units - 1), num_tiles, num_heads, tables, capacity)
        stats = statistics(row_tensors, row_strides[1], next_place, anew(rows, place), GROUP, QUERIES)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(empty.index(slot), count=1)
        result = acc * scale
        async_copy.wait_group(0)
        gl.thread_barrier()
        if BEFORE:
            result += result_tile.load(mma_o).to(gl.float32)
        result_tile.store(result.to(DQ.dtype.element_ty))
        gl.thread_barrier()
        store_rows(DQ, place, stride_dq, stride_dqh, result_tile, anew(wide_rows, place), dims, GROUP, QUERIES, wide)
        place = next_place
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["num_tiles", "capacity", "limit"])
def dq_kernel(
    k_desc, v_desc, tensors, row_tensors, lists, TotalBlocks, tables, strides, row_strides, score_scale, scale, num_tiles, num_heads, capacity, limit,
    GROUP: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr, BEFORE: gl.constexpr,
):  # fmt: skip
    """dq = Before (with BEFORE) + scale · dS K of the tiles program, program + programs, …"""
    if gl.load(TotalBlocks) > limit:
        return
    DTYPE: gl.constexpr = k_desc.dtype
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    queries = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    d_outs = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    results = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    blocks = prepare_blocks(k_desc, v_desc, lists, tables, strides, (num_tiles, num_heads, capacity), STAGES)
    common = (blocks, (queries, d_outs, results), tensors, row_tensors, row_strides, score_scale, scale)
    gl.warp_specialize(
        [(dq_rows, (common, 0, GROUP, QUERIES, BEFORE)), (dq_rows, (common, 1, GROUP, QUERIES, BEFORE)), (bring_blocks, (blocks,))],
        [4, 1],
        [240, 24],
    )


def dq(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor,
    target: torch.Tensor, before: torch.Tensor | None, unions: BlockUnions, plan: KernelPlan, *, limit: int, scale: float,
) -> None:  # fmt: skip
    """The part of `selected.selected_backward` that writes dq (target), unless the unions' total is above `limit`.

    unions: over tiles of ROWS // group queries, at most MAX_QUERIES."""
    num_tiles, num_heads, added = unions.tiles.shape[0], k.shape[1], target if before is None else before
    launch(
        dq_kernel, (min(num_tiles * num_heads, num_processors(q.device)),),
        key_descriptor(k, 64), key_descriptor(v, 64), (q, d_out, target, added), (gate, lse, delta), (unions.blocks, unions.bits), unions.total,
        (unions.tiles, plan.query_ends, plan.key_ends, unions.counts), (k.stride(1), v.stride(1)),
        ((*q.stride()[:2], *d_out.stride()[:2], *target.stride()[:2], *added.stride()[:2]), (*gate.stride(), *lse.stride(), *delta.stride())),
        scale * LOG2_E, scale, num_tiles, num_heads, unions.blocks.shape[1], limit,
        GROUP=q.shape[1] // num_heads, QUERIES=unions.queries, STAGES=STAGES, BEFORE=before is not None, num_warps=4,
    )  # fmt: skip
