"""The Hopper kernel of dk and dv over a band of keys, in Gluon (see banded_hopper.py for how these are built).

64 keys a warp group stay in place, tiles of 64 rows of q and dO pass by, brought by a warp of its own; the weights go from one
product to the next in registers. The scores are computed again, those of a tile while the tensor cores still add up the tile before.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.banded_hopper import await_clearing, await_tile, clear_rows, copied_in_bulk, shared_layout
from nsa.kernels.banded_kernels import MAX_CHUNKS
from nsa.kernels.launch import LOG2_E, launch

KEYS = 128
"""Keys of a tile, half of them in each warp group."""
STAGES = 4
"""Tiles of q and dO in shared memory."""


@gluon.jit
def query_range(first, last, ahead, num_queries, chunk, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr):
    """Queries of a chunk that see keys first … last: begin, first and end of those that see all of them, end.

    The chunks are those of `banded_kernels.query_range`."""
    chunk_begin, chunk_end = 0, num_queries
    if SPLIT > 0:
        size = gl.cdiv(gl.cdiv(num_queries, MAX_CHUNKS), 64) * 64
        size += ((size % 1024 == 0) & (size < 4096)).to(gl.int32) * 64
        size = gl.maximum(size, SPLIT)
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
def await_rows(buffers, rings, number, query, num_queries, WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """The place of the `number`-th tile of rows once it and its dO are there and rows that the sequence does not have are cleared."""
    queries, d_outs = buffers
    q_ready, do_ready, _empty, cleared = rings
    slot = await_tile(q_ready, number)
    await_tile(do_ready, number)
    if query * GROUP + 64 > num_queries * GROUP:
        if WARP_GROUP == 0:
            clear_rows(queries.index(slot), query * GROUP, num_queries * GROUP, LAYOUT)
        else:
            clear_rows(d_outs.index(slot), query * GROUP, num_queries * GROUP, LAYOUT)
        await_clearing(cleared, 0)  # only the sequence's last tile: once in a program
    return slot


@gluon.jit
def key_tile_of(tables, num_heads, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr):
    """The program's work: KV head, first key of the tile and chunk; the sequence's first query and key, numbers of queries and keys, and
    tokens before its queries; the first of the chunk's queries that see a key of the tile, and their end."""
    Units, QueryEnds, TokenEnds, KeyEnds = tables
    unit, head = gl.program_id(0) // num_heads, gl.program_id(0) % num_heads
    sequence, start, chunk = gl.load(Units + 3 * unit), gl.load(Units + 3 * unit + 1), gl.load(Units + 3 * unit + 2)
    first_query, first_key = gl.load(QueryEnds + sequence), gl.load(KeyEnds + sequence)
    num_queries, num_keys = gl.load(QueryEnds + sequence + 1) - first_query, gl.load(KeyEnds + sequence + 1) - first_key
    ahead = gl.load(TokenEnds + sequence + 1) - gl.load(TokenEnds + sequence) - num_queries
    last = gl.minimum(start + 128, num_keys) - 1
    begin, _, _, end = query_range(start, last, ahead, num_queries, chunk, STRIDE, OFFSET, WINDOW, SPLIT)
    return head, start, chunk, first_query, first_key, num_queries, num_keys, ahead, begin, end


@gluon.jit
def bring_rows(common, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr):
    """Starts the copies of the tiles of q and dO that pass by, each once both warp groups have left its place."""
    descs, _key_buffers, buffers, _stats, rings, _tensors, tables, _strides, _score_scale, _scale, num_heads = common
    q_desc, do_desc = descs
    queries, d_outs = buffers
    q_ready, do_ready, empty, _cleared = rings
    stages: gl.constexpr = queries.type.shape[0]
    QUERIES: gl.constexpr = 64 // GROUP
    head, _start, _chunk, first_query, _first_key, _num_queries, _num_keys, _ahead, begin, end = key_tile_of(
        tables, num_heads, STRIDE, OFFSET, WINDOW, SPLIT
    )  # fmt: skip
    for number in range(gl.cdiv(gl.maximum(end - begin, 0), QUERIES)):
        mbarrier.wait(empty.index(number % stages), (number // stages & 1) ^ 1)
        fill_rows(q_desc, queries, q_ready, number, first_query + begin + number * QUERIES, head * GROUP)
        fill_rows(do_desc, d_outs, do_ready, number, first_query + begin + number * QUERIES, head * GROUP)


@gluon.jit
def pass_tiles(buffers, rings, first, last, begin, num_queries, WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Lets tiles first … last - 1 by, which see none of the warp group's keys."""
    for number in range(first, last):
        slot = await_rows(buffers, rings, number, begin + number * (64 // GROUP), num_queries, WARP_GROUP, GROUP, LAYOUT)
        mbarrier.arrive(rings[2].index(slot), count=1)


@gluon.jit
def key_weights(scores, shift, scale, query, bounds, ends, columns, QUERIES: gl.constexpr, WINDOW: gl.constexpr):
    """gate · softmax weights `[keys, rows]` of a tile of rows; `ends`: the first query that sees each key, columns: each row's query in the tile."""
    scores = scores * scale - shift[None, :]
    all_begin, all_end, end = bounds
    if (query < all_begin) | (query + QUERIES > all_end):
        positions = (query + columns)[None, :]
        seen = (ends <= positions) & (positions < end)
        if WINDOW > 0:
            seen = seen & (ends > positions - WINDOW)
        scores = gl.where(seen, scores, float("-inf"))
    return gl.exp2(scores)


@gluon.jit
def dkdv_keys(
    common,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """dk and dv of keys 64·WARP_GROUP … of the program's tile."""
    descs, key_buffers, buffers, stats, rings, tensors, tables, strides, score_scale, scale, num_heads = common
    keys, values = key_buffers
    queries, d_outs = buffers
    empty = rings[2]
    K, V, Stats, DKey, DValue = tensors
    (
        stride_k, stride_kh, stride_v, stride_vh, stride_sh, stats_size, stride_dk, stride_dkh, stride_dkc, stride_dv, stride_dvh, stride_dvc,
    ) = strides  # fmt: skip
    STAGES: gl.constexpr = queries.type.shape[0]
    DIM: gl.constexpr = queries.type.shape[2]
    DTYPE: gl.constexpr = descs[0].dtype
    QUERIES: gl.constexpr = 64 // GROUP
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column_layout: gl.constexpr = gl.SliceLayout(0, mma_s)
    head, start, chunk, first_query, first_key, num_queries, num_keys, ahead, begin, end = key_tile_of(
        tables, num_heads, STRIDE, OFFSET, WINDOW, SPLIT
    )  # fmt: skip
    last = gl.minimum(start + 128, num_keys) - 1
    count = gl.cdiv(gl.maximum(end - begin, 0), QUERIES)
    packed = first_query + begin
    first = start + WARP_GROUP * 64
    own_begin, all_begin, all_end, own_end = query_range(
        first, gl.minimum(last, first + 63), ahead, num_queries, chunk, STRIDE, OFFSET, WINDOW, SPLIT
    )  # fmt: skip
    own_first = gl.minimum(gl.maximum(own_begin - begin, 0) // QUERIES, count)
    own_last = gl.maximum(gl.minimum(gl.cdiv(gl.maximum(own_end - begin, 0), QUERIES), count), own_first)
    source, last_row = Stats + head.to(gl.int64) * stride_sh, gl.maximum((first_query + num_queries) * GROUP - 1, 0)
    copy_stats(stats.index(2 * WARP_GROUP + own_first % 2), source, (packed + own_first * QUERIES) * GROUP, last_row, stats_size, line)
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
    bounds = (all_begin, all_end, end)
    pass_tiles(buffers, rings, 0, own_first, begin, num_queries, WARP_GROUP, GROUP, wide)
    if own_first < own_last:
        slot = await_rows(buffers, rings, own_first, begin + own_first * QUERIES, num_queries, WARP_GROUP, GROUP, wide)
        scores = warpgroup_mma(key_tile, queries.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        d_p = warpgroup_mma(value_tile, d_outs.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        for turn in range(own_first + 1, own_last):
            before = (turn - 1) % STAGES
            copy_stats(stats.index(2 * WARP_GROUP + turn % 2), source, (packed + turn * QUERIES) * GROUP, last_row, stats_size, line)
            async_copy.wait_group(1)
            gl.thread_barrier()
            here = stats.index(2 * WARP_GROUP + (turn - 1) % 2)
            shift = here.slice(0, 64).load(column_layout)
            p = key_weights(scores, shift, score_scale, begin + (turn - 1) * QUERIES, bounds, ends, columns, QUERIES, WINDOW)
            weights = gl.convert_layout(p.to(DTYPE), weight_layout)
            await_tile(rings[0], turn)  # here, as its branch keeps the compiler from waiting for dP before the exponents
            d_p = warpgroup_mma_wait(0, deps=[d_p])
            adding_v = warpgroup_mma(weights, d_outs.index(before), d_value, is_async=True)
            delta = here.slice(64, 64).load(column_layout)
            d_scores = gl.convert_layout((p * (d_p - delta[None, :])).to(DTYPE), weight_layout)
            # with these sums still on their way the next products would be one too many for the registers
            d_value = warpgroup_mma_wait(0, deps=[adding_v])
            slot = await_rows(buffers, rings, turn, begin + turn * QUERIES, num_queries, WARP_GROUP, GROUP, wide)
            coming = warpgroup_mma(key_tile, queries.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            adding_k = warpgroup_mma(d_scores, queries.index(before), d_key, is_async=True)
            d_p = warpgroup_mma(value_tile, d_outs.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores, d_key = warpgroup_mma_wait(1, deps=[coming, adding_k])
            mbarrier.arrive(empty.index(before), count=1)
        async_copy.wait_group(0)
        gl.thread_barrier()
        slot, here = (own_last - 1) % STAGES, stats.index(2 * WARP_GROUP + (own_last - 1) % 2)
        shift = here.slice(0, 64).load(column_layout)
        p = key_weights(scores, shift, score_scale, begin + (own_last - 1) * QUERIES, bounds, ends, columns, QUERIES, WINDOW)
        weights = gl.convert_layout(p.to(DTYPE), weight_layout)
        adding_v = warpgroup_mma(weights, d_outs.index(slot), d_value, is_async=True)
        delta = here.slice(64, 64).load(column_layout)
        d_p = warpgroup_mma_wait(1, deps=[d_p])
        d_scores = gl.convert_layout((p * (d_p - delta[None, :])).to(DTYPE), weight_layout)
        adding_k = warpgroup_mma(d_scores, queries.index(slot), d_key, is_async=True)
        d_value, d_key = warpgroup_mma_wait(0, deps=[adding_v, adding_k])
        mbarrier.arrive(empty.index(slot), count=1)
    else:
        async_copy.wait_group(0)
    pass_tiles(buffers, rings, own_last, count, begin, num_queries, WARP_GROUP, GROUP, wide)

    result = gl.convert_layout(d_key * scale, wide)
    at = DKey + chunk.to(gl.int64) * stride_dkc + packed_keys * stride_dk + head * stride_dkh + dims
    gl.store(at, result.to(DKey.dtype.element_ty), mask=present)
    result = gl.convert_layout(d_value, wide)
    at = DValue + chunk.to(gl.int64) * stride_dvc + packed_keys * stride_dv + head * stride_dvh + dims
    gl.store(at, result.to(DValue.dtype.element_ty), mask=present)


@gluon.jit
def dkdv_kernel(
    q_desc, do_desc, tensors, tables, strides, score_scale, scale, num_heads,
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
    common = ((q_desc, do_desc), (keys, values), (queries, d_outs), stats, rings, tensors, tables, strides, score_scale, scale, num_heads)
    gl.warp_specialize(
        [
            (dkdv_keys, (common, 0, GROUP, STRIDE, OFFSET, WINDOW, SPLIT)),
            (dkdv_keys, (common, 1, GROUP, STRIDE, OFFSET, WINDOW, SPLIT)),
            (bring_rows, (common, GROUP, STRIDE, OFFSET, WINDOW, SPLIT)),
        ],
        [4, 1],
        [240, 24],
    )


def takes_rows(q: torch.Tensor, d_out: torch.Tensor, group: int) -> bool:
    """Whether `dkdv` takes the query-sided tensors (`takes` has been asked): rows of whole queries, which the copy engine can read."""
    return group & (group - 1) == 0 and copied_in_bulk(q) and copied_in_bulk(d_out)


def row_descriptor(x: torch.Tensor, group: int) -> TensorDescriptor:
    """The copy engine's view of q or dO: tiles of 64 rows, the heads of one KV head for each query."""
    box = [64 // group, group, x.shape[2]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, shared_layout(tuple(box), x.dtype))


def dkdv(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stats: torch.Tensor, parts: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, ...], geometry: dict[str, int], *, scale: float, split: int,
) -> None:  # fmt: skip
    """The part of `banded.banded_backward` that writes the chunks' sums of dk and dv.

    tables: units of KEYS keys (`banded.key_units`), then ends as ever."""
    num_heads = k.shape[1]
    group = q.shape[1] // num_heads
    strides = (
        *k.stride()[:2],
        *v.stride()[:2],
        *stats.stride()[:2],
        *(step for part in parts for step in (part.stride(1), part.stride(2), part.stride(0))),
    )
    launch(
        dkdv_kernel, (tables[0].shape[0] * num_heads,),
        row_descriptor(q, group), row_descriptor(d_out, group), (k, v, stats, *parts), tables, strides, scale * LOG2_E, scale, num_heads,
        GROUP=group, **geometry, STAGES=STAGES, SPLIT=split, num_warps=4,
    )  # fmt: skip
