"""Hopper kernels of the backward pass over a band of keys, in Gluon (see banded_hopper.py for how they are built).

dq: 64 rows of queries a warp group, tiles of keys pass by. dk, dv: 64 keys a warp group, tiles of 64 rows of q and dO pass by,
and the weights go from one product to the next in registers. Both recompute the scores.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.banded_hopper import (
    await_clearing,
    await_tile,
    clear_rows,
    copied_in_bulk,
    key_descriptor,
    key_range,
    num_processors,
    place_of,
    row_pointers,
    shared_layout,
    visible,
)
from nsa.kernels.banded_kernels import MAX_CHUNKS
from nsa.kernels.launch import LOG2_E, launch

KEYS = 128
"""Keys of a tile of dk and dv, half of them in each warp group."""


@gluon.jit
def fill_pair(descs, buffers, ready, empty, number, row, columns):
    """Starts the copies of a tile of keys and its values, the `number`-th of their ring, once both warp groups have left the place."""
    k_desc, v_desc = descs
    keys, values = buffers
    slot = number % keys.type.shape[0]
    mbarrier.wait(empty.index(slot), (number // keys.type.shape[0] & 1) ^ 1)
    mbarrier.expect(ready.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, columns[0]], ready.index(slot), keys.index(slot))
    tma.async_copy_global_to_shared(v_desc, [row, columns[1]], ready.index(slot), values.index(slot))


@gluon.jit
def start_scores(query_tile, buffers, rings, number, key, num_keys, turn, zeros, WARP_GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Starts q·kᵀ of the `number`-th tile of keys once it is there and rows that the sequence does not have are cleared."""
    keys, values = buffers
    ready, _empty, cleared = rings
    slot = await_tile(ready, number)
    if key + keys.type.shape[1] > num_keys:
        if WARP_GROUP == 0:
            clear_rows(keys.index(slot), key, num_keys, LAYOUT)
        else:
            clear_rows(values.index(slot), key, num_keys, LAYOUT)
        await_clearing(cleared, turn)
    return slot, warpgroup_mma(query_tile, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def row_weights(scores, shift, scale, key, bounds, keys, positions, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """gate · softmax weights `[rows, keys]` of a tile of keys."""
    scores = scores * scale - shift[:, None]
    all_begin, all_end = bounds
    if (key < all_begin) | (key + keys.shape[0] > all_end):
        scores = gl.where(visible(key + keys, positions, STRIDE, OFFSET, WINDOW), scores, float("-inf"))
    return gl.exp2(scores)


@gluon.jit
def fill_first_pairs(common, done, head, first_key, num_keys, first, last, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """Starts the copies of the first tiles of K and V for queries at positions first … last, after `done` others."""
    descs, buffers, _, rings, _tensors, _tables, strides, _score_scale, _scale, _num_tiles, _num_heads = common
    ready, empty, _cleared = rings
    keys, _ = buffers
    stages: gl.constexpr = keys.type.shape[0]
    width: gl.constexpr = keys.type.shape[1]
    begin, _, _, end = key_range(first, last, num_keys, STRIDE, OFFSET, WINDOW)
    key_row, count = first_key + begin, gl.maximum(gl.cdiv(end - begin, width), 1)
    for i in gl.static_range(stages - 1):
        if i < count:
            fill_pair(descs, buffers, ready, empty, done + i, key_row + i * width, (head * strides[2], head * strides[3]))


@gluon.jit
def dq_rows(
    common,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Rows 64·WARP_GROUP … of each of the program's tiles; the statistics are those of `banded_kernels.dq_kernel`."""
    descs, buffers, query_buffers, rings, tensors, tables, strides, score_scale, scale, num_tiles, num_heads = common
    ready, empty, _cleared = rings
    queries, d_outs = query_buffers
    keys, values = buffers
    Q, DOut, Gate, Lse, Delta, DQ, Before, Stats = tensors
    (
        stride_q, stride_qh, stride_kh, stride_vh, stride_do, stride_doh, stride_g, stride_gh, stride_l, stride_lh, stride_d, stride_dh,
        stride_dq, stride_dqh, stride_b, stride_bh, stride_sh, stats_size,
    ) = strides  # fmt: skip
    STAGES: gl.constexpr = keys.type.shape[0]
    KEYS: gl.constexpr = keys.type.shape[1]
    DIM: gl.constexpr = keys.type.shape[2]
    QUERIES: gl.constexpr = 128 // GROUP
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    query_tile, d_out_tile = queries.index(WARP_GROUP), d_outs.index(WARP_GROUP)
    rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    wide_rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, mma_s))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    zeros = gl.zeros([64, KEYS], gl.float32, layout=mma_s)
    num_units, step = num_tiles * num_heads, gl.num_programs(0)
    head, start, row, first_key, num_queries, num_keys, first, last = place_of(gl.program_id(0), num_heads, tables, QUERIES)
    if WARP_GROUP == 0:
        fill_first_pairs(common, 0, head, first_key, num_keys, first, last, STRIDE, OFFSET, WINDOW)
    valid = ((start + wide_rows // GROUP < num_queries) & (wide_rows < QUERIES * GROUP))[:, None]
    first_at = row_pointers(Q + head * GROUP * stride_qh, row, stride_q, stride_qh, wide_rows, GROUP)
    query_tile.store(gl.load(first_at[:, None] + dims, mask=valid, other=0.0))
    first_at = row_pointers(DOut + head * GROUP * stride_doh, row, stride_do, stride_doh, wide_rows, GROUP)
    d_out_tile.store(gl.load(first_at[:, None] + dims, mask=valid, other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    done, clearings = 0, 0
    for index in range(gl.program_id(0), num_units, step):
        next_head, next_start, next_row, next_first_key, next_queries, next_keys, next_first, next_last = place_of(
            gl.minimum(index + step, num_units - 1), num_heads, tables, QUERIES
        )
        begin, all_begin, all_end, end = key_range(first, last, num_keys, STRIDE, OFFSET, WINDOW)
        count = gl.maximum(gl.cdiv(end - begin, KEYS), 1)
        key_row, group, places = first_key + begin, head * GROUP, (head * stride_kh, head * stride_vh)
        known = (start + rows // GROUP < num_queries) & (rows < QUERIES * GROUP)
        gate = gl.load(row_pointers(Gate + group * stride_gh, row, stride_g, stride_gh, rows, GROUP), mask=known, other=0.0).to(gl.float32)
        lse = gl.load(row_pointers(Lse + group * stride_lh, row, stride_l, stride_lh, rows, GROUP), mask=known, other=0.0)
        delta = gl.load(row_pointers(Delta + group * stride_dh, row, stride_d, stride_dh, rows, GROUP), mask=known, other=0.0)
        counts = (gate > 0) & (lse > float("-inf"))
        gate = gl.where(counts, gate, 1.0)
        shift = gl.where(counts, lse * 1.4426950408889634 - gl.log2(gate), float("inf"))
        delta = gl.where(counts, delta / gate, 0.0)
        at = Stats + head.to(gl.int64) * stride_sh + row * GROUP + rows
        gl.store(at, shift, mask=known)
        gl.store(at + stats_size, delta, mask=known)

        positions = first + rows // GROUP
        bounds = (all_begin, all_end)
        acc = gl.zeros([64, DIM], gl.float32, layout=mma_o)
        slot, scores = start_scores(query_tile, buffers, rings, done, begin, num_keys, clearings, zeros, WARP_GROUP, wide)
        d_p = warpgroup_mma(d_out_tile, values.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        for i in range(1, count):
            if WARP_GROUP == 0:  # noqa: SIM102 (one is known when compiled, the other is not)
                if i + STAGES - 2 < count:
                    fill_pair(descs, buffers, ready, empty, done + i + STAGES - 2, key_row + (i + STAGES - 2) * KEYS, places)
            p = row_weights(scores, shift, score_scale, begin + (i - 1) * KEYS, bounds, columns, positions, STRIDE, OFFSET, WINDOW)
            d_p = warpgroup_mma_wait(0, deps=[d_p])
            slot, coming = start_scores(query_tile, buffers, rings, done + i, begin + i * KEYS, num_keys, clearings, zeros, WARP_GROUP, wide)
            d_scores = gl.convert_layout((p * (d_p - delta[:, None])).to(Q.dtype.element_ty), weight_layout)
            before = (done + i - 1) % STAGES
            adding = warpgroup_mma(d_scores, keys.index(before), acc, is_async=True)
            d_p = warpgroup_mma(d_out_tile, values.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores, acc = warpgroup_mma_wait(1, deps=[coming, adding])
            mbarrier.arrive(empty.index(before), count=1)
        p = row_weights(scores, shift, score_scale, begin + (count - 1) * KEYS, bounds, columns, positions, STRIDE, OFFSET, WINDOW)
        d_p = warpgroup_mma_wait(0, deps=[d_p])
        d_scores = gl.convert_layout((p * (d_p - delta[:, None])).to(Q.dtype.element_ty), weight_layout)
        before = (done + count - 1) % STAGES
        adding = warpgroup_mma(d_scores, keys.index(before), acc, is_async=True)
        done += count
        if begin + count * KEYS > num_keys:
            clearings += 1
        more = index + step < num_units
        next_valid = ((next_start + wide_rows // GROUP < next_queries) & (wide_rows < QUERIES * GROUP) & more)[:, None]
        at = row_pointers(Q + next_head * GROUP * stride_qh, next_row, stride_q, stride_qh, wide_rows, GROUP)
        next_q = gl.load(at[:, None] + dims, mask=next_valid, other=0.0)
        at = row_pointers(DOut + next_head * GROUP * stride_doh, next_row, stride_do, stride_doh, wide_rows, GROUP)
        next_d_out = gl.load(at[:, None] + dims, mask=next_valid, other=0.0)
        if WARP_GROUP == 0:  # noqa: SIM102 (one is known when compiled, the other is not)
            if more:
                fill_first_pairs(common, done, next_head, next_first_key, next_keys, next_first, next_last, STRIDE, OFFSET, WINDOW)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(empty.index(before), count=1)
        valid = ((start + wide_rows // GROUP < num_queries) & (wide_rows < QUERIES * GROUP))[:, None]

        result = gl.convert_layout(acc * scale, wide)
        if ACCUMULATE:
            result += gl.load(
                row_pointers(Before + group * stride_bh, row, stride_b, stride_bh, wide_rows, GROUP)[:, None] + dims, mask=valid, other=0.0
            )
        at = row_pointers(DQ + group * stride_dqh, row, stride_dq, stride_dqh, wide_rows, GROUP)
        gl.store(at[:, None] + dims, result.to(DQ.dtype.element_ty), mask=valid)
        gl.thread_barrier()
        query_tile.store(next_q)
        d_out_tile.store(next_d_out)
        fence_async_shared()
        gl.thread_barrier()
        head, start, row, first_key = next_head, next_start, next_row, next_first_key
        num_queries, num_keys, first, last = next_queries, next_keys, next_first, next_last


@gluon.jit(do_not_specialize=["num_tiles"])
def dq_kernel(
    k_desc, v_desc, tensors, tables, strides, score_scale, scale, num_tiles, num_heads,
    GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """dq of the tiles program, program + programs, …, Before added where ACCUMULATE; writes the rows' statistics for `dkdv_kernel`."""
    DTYPE: gl.constexpr = k_desc.dtype
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    queries = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    d_outs = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], k_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], v_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(cleared.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    rings = (ready, empty, cleared)
    common = ((k_desc, v_desc), (keys, values), (queries, d_outs), rings, tensors, tables, strides, score_scale, scale, num_tiles, num_heads)
    gl.warp_specialize(
        [
            (dq_rows, (common, 0, GROUP, STRIDE, OFFSET, WINDOW, ACCUMULATE)),
            (dq_rows, (common, 1, GROUP, STRIDE, OFFSET, WINDOW, ACCUMULATE)),
        ],
        [4],
        [240],
    )


@gluon.jit
def query_range(first, last, ahead, num_queries, chunk, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr):
    """Queries of a chunk that see keys first … last: begin, first and end of those that see all of them, end.

    The chunks are those of `banded_kernels.query_range`."""
    chunk_begin, chunk_end = 0, num_queries
    if SPLIT > 0:
        size = gl.maximum(gl.cdiv(gl.cdiv(num_queries, MAX_CHUNKS), 64) * 64, SPLIT)
        chunk_begin, chunk_end = chunk * size, gl.minimum((chunk + 1) * size, num_queries)
    begin = gl.maximum(first * STRIDE + OFFSET - ahead, chunk_begin)
    end, all_end = chunk_end, chunk_end
    if WINDOW > 0:
        end = gl.minimum(end, last + WINDOW - ahead)
        all_end = gl.minimum(end, first + WINDOW - ahead)
    return begin, last * STRIDE + OFFSET - ahead, all_end, end


@gluon.jit
def copy_stats(target, source, row, last_row, stats_size, LAYOUT: gl.constexpr):
    """Starts the copy of the shift and delta of 64 rows; rows after the last one repeat it."""
    lane = gl.arange(0, 128, layout=LAYOUT)
    async_copy.async_copy_global_to_shared(target, source + gl.minimum(row + lane % 64, last_row) + lane // 64 * stats_size)
    async_copy.commit_group()


@gluon.jit
def fill_rows(desc, buffers, ready, number, query, group):
    """Starts the copy of a tile of 64 rows, the `number`-th of its ring."""
    slot = number % buffers.type.shape[0]
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    place = buffers.index(slot)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [query, group, 0], ready.index(slot), place)


@gluon.jit
def dkdv_keys(
    common,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """dk and dv of keys 64·WARP_GROUP … of the program's tile."""
    descs, key_buffers, buffers, stats, rings, tensors, tables, strides, score_scale, scale = common
    q_desc, do_desc = descs
    keys, values = key_buffers
    queries, d_outs = buffers
    q_ready, do_ready, empty, cleared = rings
    K, V, Stats, DKey, DValue = tensors
    Tiles, QueryEnds, TokenEnds, KeyEnds = tables
    (
        stride_k, stride_kh, stride_v, stride_vh, stride_sh, stats_size, stride_dk, stride_dkh, stride_dkc, stride_dv, stride_dvh, stride_dvc,
    ) = strides  # fmt: skip
    STAGES: gl.constexpr = queries.type.shape[0]
    DIM: gl.constexpr = queries.type.shape[2]
    DTYPE: gl.constexpr = q_desc.dtype
    QUERIES: gl.constexpr = 64 // GROUP
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column_layout: gl.constexpr = gl.SliceLayout(0, mma_s)
    sequence, start = gl.load(Tiles + 2 * gl.program_id(0)), gl.load(Tiles + 2 * gl.program_id(0) + 1)
    head, chunk = gl.program_id(1), gl.program_id(2)
    first_query, first_key = gl.load(QueryEnds + sequence), gl.load(KeyEnds + sequence)
    num_queries, num_keys = gl.load(QueryEnds + sequence + 1) - first_query, gl.load(KeyEnds + sequence + 1) - first_key
    ahead = gl.load(TokenEnds + sequence + 1) - gl.load(TokenEnds + sequence) - num_queries
    last = gl.minimum(start + 128, num_keys) - 1
    begin, all_begin, all_end, end = query_range(start, last, ahead, num_queries, chunk, STRIDE, OFFSET, WINDOW, SPLIT)
    count = gl.cdiv(gl.maximum(end - begin, 0), QUERIES)
    packed, group = first_query + begin, head * GROUP
    if WARP_GROUP == 0:
        for i in gl.static_range(STAGES - 1):
            if i < count:
                fill_rows(q_desc, queries, q_ready, i, packed + i * QUERIES, group)
                fill_rows(do_desc, d_outs, do_ready, i, packed + i * QUERIES, group)
    source, last_row = Stats + head.to(gl.int64) * stride_sh, gl.maximum((first_query + num_queries) * GROUP - 1, 0)
    copy_stats(stats.index(2 * WARP_GROUP), source, packed * GROUP, last_row, stats_size, line)
    wide_keys = start + WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    packed_keys = (first_key + wide_keys).to(gl.int64)[:, None]
    present = (wide_keys < num_keys)[:, None]
    key_tile, value_tile = keys.index(WARP_GROUP), values.index(WARP_GROUP)
    key_tile.store(gl.load(K + packed_keys * stride_k + head * stride_kh + dims, mask=present, other=0.0))
    value_tile.store(gl.load(V + packed_keys * stride_v + head * stride_vh + dims, mask=present, other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    d_key = gl.zeros([64, DIM], gl.float32, layout=mma_o)
    d_value = gl.zeros([64, DIM], gl.float32, layout=mma_o)
    zeros = gl.zeros([64, 64], gl.float32, layout=mma_s)
    ends = ((start + WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))) * STRIDE + OFFSET - ahead)[:, None]
    columns = gl.arange(0, 64, layout=column_layout) // GROUP
    for i in range(count):
        query = begin + i * QUERIES
        slot = await_tile(q_ready, i)
        await_tile(do_ready, i)
        if query + QUERIES > num_queries:
            if WARP_GROUP == 0:
                clear_rows(queries.index(slot), query * GROUP, num_queries * GROUP, wide)
            else:
                clear_rows(d_outs.index(slot), query * GROUP, num_queries * GROUP, wide)
            await_clearing(cleared, 0)  # only the sequence's last tile: once in a program
        scores = warpgroup_mma(key_tile, queries.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        d_p = warpgroup_mma(value_tile, d_outs.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        copy_stats(stats.index(2 * WARP_GROUP + (i + 1) % 2), source, (packed + (i + 1) * QUERIES) * GROUP, last_row, stats_size, line)
        async_copy.wait_group(1)
        gl.thread_barrier()
        own_stats = stats.index(2 * WARP_GROUP + i % 2)
        shift = own_stats.slice(0, 64).load(column_layout)
        scores = warpgroup_mma_wait(1, deps=[scores])
        scores = scores * score_scale - shift[None, :]
        if (query < all_begin) | (query + QUERIES > all_end):
            positions = (query + columns)[None, :]
            seen = (ends <= positions) & (positions < end)
            if WINDOW > 0:
                seen = seen & (ends > positions - WINDOW)
            scores = gl.where(seen, scores, float("-inf"))
        p = gl.exp2(scores)
        weights = gl.convert_layout(p.to(DTYPE), weight_layout)
        adding_v = warpgroup_mma(weights, d_outs.index(slot), d_value, is_async=True)
        delta = own_stats.slice(64, 64).load(column_layout)
        d_p = warpgroup_mma_wait(1, deps=[d_p])
        d_scores = gl.convert_layout((p * (d_p - delta[None, :])).to(DTYPE), weight_layout)
        adding_k = warpgroup_mma(d_scores, queries.index(slot), d_key, is_async=True)
        if WARP_GROUP == 0:
            later = i + STAGES - 1
            if later < count:
                mbarrier.wait(empty.index(later % STAGES), (later // STAGES & 1) ^ 1)
                fill_rows(q_desc, queries, q_ready, later, packed + later * QUERIES, group)
                fill_rows(do_desc, d_outs, do_ready, later, packed + later * QUERIES, group)
        d_value, d_key = warpgroup_mma_wait(0, deps=[adding_v, adding_k])
        mbarrier.arrive(empty.index(slot), count=1)
    async_copy.wait_group(0)

    stored = present
    if SPLIT > 0:
        stored = present & (count > 0)
    result = gl.convert_layout(d_key * scale, wide)
    at = DKey + chunk.to(gl.int64) * stride_dkc + packed_keys * stride_dk + head * stride_dkh + dims
    gl.store(at, result.to(DKey.dtype.element_ty), mask=stored)
    result = gl.convert_layout(d_value, wide)
    at = DValue + chunk.to(gl.int64) * stride_dvc + packed_keys * stride_dv + head * stride_dvh + dims
    gl.store(at, result.to(DValue.dtype.element_ty), mask=stored)


@gluon.jit
def dkdv_kernel(
    q_desc, do_desc, tensors, tables, strides, score_scale, scale,
    GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of 128 keys of one KV head from one chunk of the queries."""
    DTYPE: gl.constexpr = q_desc.dtype
    DIM: gl.constexpr = q_desc.block_type.shape[2]
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    keys = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    values = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    queries = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DIM], rows_layout)
    d_outs = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DIM], rows_layout)
    stats = gl.allocate_shared_memory(gl.float32, [4, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(cleared.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(do_ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    rings = (q_ready, do_ready, empty, cleared)
    common = ((q_desc, do_desc), (keys, values), (queries, d_outs), stats, rings, tensors, tables, strides, score_scale, scale)
    gl.warp_specialize(
        [
            (dkdv_keys, (common, 0, GROUP, STRIDE, OFFSET, WINDOW, SPLIT)),
            (dkdv_keys, (common, 1, GROUP, STRIDE, OFFSET, WINDOW, SPLIT)),
        ],
        [4],
        [240],
    )


def takes_rows(q: torch.Tensor, d_out: torch.Tensor, group: int) -> bool:
    """Whether `dkdv` takes the query-sided tensors (`takes` has been asked): rows of whole queries, which the copy engine can read."""
    return group & (group - 1) == 0 and copied_in_bulk(q) and copied_in_bulk(d_out)


def row_descriptor(x: torch.Tensor, group: int) -> TensorDescriptor:
    """The copy engine's view of q or dO: tiles of 64 rows, the heads of one KV head for each query."""
    box = [64 // group, group, x.shape[2]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, shared_layout(box, x.dtype))


def dq(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor,
    target: torch.Tensor, before: torch.Tensor | None, stats: torch.Tensor, tables: tuple[torch.Tensor, ...], geometry: dict[str, int],
    *, scale: float,
) -> None:  # fmt: skip
    """The part of `banded.banded_backward` that writes dq and stats; tables and geometry as in `banded_hopper.forward`."""
    num_heads, num_tiles = k.shape[1], tables[0].shape[0]
    added = target if before is None else before
    strides = (
        *q.stride()[:2], k.stride(1), v.stride(1), *d_out.stride()[:2], *gate.stride(), *lse.stride(), *delta.stride(),
        *target.stride()[:2], *added.stride()[:2], *stats.stride()[:2],
    )  # fmt: skip
    launch(
        dq_kernel, (min(num_tiles * num_heads, num_processors(q.device)),),
        key_descriptor(k, 64), key_descriptor(v, 64), (q, d_out, gate, lse, delta, target, added, stats), tables, strides,
        scale * LOG2_E, scale, num_tiles, num_heads, GROUP=q.shape[1] // num_heads, **geometry, STAGES=3, ACCUMULATE=before is not None, num_warps=4,
    )  # fmt: skip


def dkdv(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stats: torch.Tensor, parts: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, ...], geometry: dict[str, int], *, scale: float, split: int,
) -> None:  # fmt: skip
    """The part of `banded.banded_backward` that writes the chunks' sums of dk and dv; tables: key tiles of KEYS keys, then ends as ever."""
    num_heads = k.shape[1]
    group = q.shape[1] // num_heads
    strides = (
        *k.stride()[:2],
        *v.stride()[:2],
        *stats.stride()[:2],
        *(step for part in parts for step in (part.stride(1), part.stride(2), part.stride(0))),
    )
    launch(
        dkdv_kernel, (tables[0].shape[0], num_heads, parts[0].shape[0]),
        row_descriptor(q, group), row_descriptor(d_out, group), (k, v, stats, *parts), tables, strides, scale * LOG2_E, scale,
        GROUP=group, **geometry, STAGES=3, SPLIT=split, num_warps=4,
    )  # fmt: skip
