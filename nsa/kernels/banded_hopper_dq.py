"""The Hopper kernel of dq over one band of keys or over both, in Gluon (see banded_hopper.py for how these are built).

64 rows of queries a warp group, tiles of keys pass by, brought by a warp of its own; the scores are computed again. Both bands' parts
are added up in the same registers: q and dO are read once, dq is written once.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.banded_hopper import (
    anew,
    await_clearing,
    await_tile,
    clear_rows,
    key_descriptor,
    key_range,
    keys_of,
    num_processors,
    place_of,
    row_pointers,
    visible,
)
from nsa.kernels.launch import LOG2_E, launch

STAGES = 4
"""Tiles of K and V in shared memory."""


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
def await_keys(buffers, rings, number, key, num_keys, turn, WARP_GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """The place of the `number`-th tile of keys once it is there and rows that the sequence does not have are cleared."""
    keys, values = buffers
    ready, _empty, cleared = rings
    slot = await_tile(ready, number)
    if key + keys.type.shape[1] > num_keys:
        if WARP_GROUP == 0:
            clear_rows(keys.index(slot), key, num_keys, LAYOUT)
        else:
            clear_rows(values.index(slot), key, num_keys, LAYOUT)
        await_clearing(cleared, turn)
    return slot


@gluon.jit
def row_weights(scores, shift, scale, key, bounds, keys, positions, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """gate · softmax weights `[rows, keys]` of a tile of keys."""
    scores = scores * scale - shift[:, None]
    all_begin, all_end = bounds
    if (key < all_begin) | (key + keys.shape[0] > all_end):
        scores = gl.where(visible(key + keys, positions, STRIDE, OFFSET, WINDOW), scores, float("-inf"))
    return gl.exp2(scores)


@gluon.jit
def bring_band(band, buffers, rings, done, place, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """Starts the copies of a band's K and V for the queries at a place, after `done` other tiles; returns how many tiles have been brought."""
    descs, KeyEnds, _tensors, strides = band
    ready, empty, _cleared = rings
    width: gl.constexpr = buffers[0].type.shape[1]
    head, sequence, _start, _row, _num_queries, first, last = place
    first_key, num_keys = keys_of(KeyEnds, sequence)
    begin, _, _, end = key_range(first, last, num_keys, STRIDE, OFFSET, WINDOW)
    key_row, count = first_key + begin, gl.maximum(gl.cdiv(end - begin, width), 1)
    for i in range(count):
        fill_pair(descs, buffers, ready, empty, done + i, key_row + i * width, (head * strides[0], head * strides[1]))
    return done + count


@gluon.jit
def bring_keys(common, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SECOND: gl.constexpr):
    """Brings the tiles of K and V that the program's warp groups take, in their order."""
    first_band, second_band, buffers, _query_buffers, rings, _tensors, tables, _strides, _score_scale, _scale, num_tiles, num_heads = common
    done = 0
    for index in range(gl.program_id(0), num_tiles * num_heads, gl.num_programs(0)):
        place = place_of(index, num_heads, tables, 128 // GROUP)
        done = bring_band(first_band, buffers, rings, done, place, STRIDE, OFFSET, WINDOW)
        if SECOND > 0:
            done = bring_band(second_band, buffers, rings, done, place, 1, 0, SECOND)


@gluon.jit
def row_statistics(tensors, strides, first_head, row, rows, known, GROUP: gl.constexpr):
    """shift and delta of rows from packed query `row` on: gate · p = exp2(score · score_scale − shift), dS = that · (dP − delta); an infinite
    shift where nothing counts, as in rows that are not `known`."""
    Gate, Lse, Delta = tensors
    stride_g, stride_gh, stride_l, stride_lh, stride_d, stride_dh = strides
    gate = gl.load(row_pointers(Gate + first_head * stride_gh, row, stride_g, stride_gh, rows, GROUP), mask=known, other=0.0).to(gl.float32)
    lse = gl.load(row_pointers(Lse + first_head * stride_lh, row, stride_l, stride_lh, rows, GROUP), mask=known, other=0.0)
    delta = gl.load(row_pointers(Delta + first_head * stride_dh, row, stride_d, stride_dh, rows, GROUP), mask=known, other=0.0)
    counts = (gate > 0) & (lse > float("-inf"))
    gate = gl.where(counts, gate, 1.0)
    return gl.where(counts, lse * 1.4426950408889634 - gl.log2(gate), float("inf")), gl.where(counts, delta / gate, 0.0)


@gluon.jit
def statistics(band, place, rows, GROUP: gl.constexpr, QUERIES: gl.constexpr):
    """`row_statistics` for a band, which go to its Stats too; see `banded_kernels.dq_kernel`."""
    _descs, _key_ends, tensors, strides = band
    Gate, Lse, Delta, Stats = tensors
    _stride_kh, _stride_vh, stride_g, stride_gh, stride_l, stride_lh, stride_d, stride_dh, stride_sh, stats_size = strides
    head, _sequence, start, row, num_queries, _first, _last = place
    known = (start + rows // GROUP < num_queries) & (rows < QUERIES * GROUP)
    row_strides = (stride_g, stride_gh, stride_l, stride_lh, stride_d, stride_dh)
    shift, delta = row_statistics((Gate, Lse, Delta), row_strides, head * GROUP, row, rows, known, GROUP)
    at = Stats + head.to(gl.int64) * stride_sh + row * GROUP + rows
    gl.store(at, shift, mask=known)
    gl.store(at + stats_size, delta, mask=known)
    return shift, delta


@gluon.jit
def gather_dq(
    acc, band, operands, buffers, rings, turns, place, rows, columns, zeros, score_scale,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr,
    OUTPUT: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """acc with a band's part of dq added: the last product on its way, the place of its keys, and the new numbers of tiles and clearings."""
    descs, KeyEnds, _tensors, _strides = band
    _ready, empty, _cleared = rings
    query_rows, d_out_rows = operands
    keys, values = buffers
    done, clearings = turns
    STAGES: gl.constexpr = keys.type.shape[0]
    KEYS: gl.constexpr = keys.type.shape[1]
    DTYPE: gl.constexpr = descs[0].dtype
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    _head, sequence, _start, _row, _num_queries, first, last = place
    _first_key, num_keys = keys_of(KeyEnds, sequence)
    begin, all_begin, all_end, end = key_range(first, last, num_keys, STRIDE, OFFSET, WINDOW)
    count = gl.maximum(gl.cdiv(end - begin, KEYS), 1)
    shift, delta = statistics(band, place, anew(rows, place), GROUP, 128 // GROUP)
    positions, bounds = first + rows // GROUP, (all_begin, all_end)

    slot = await_keys(buffers, rings, done, begin, num_keys, clearings, WARP_GROUP, WIDE)
    scores = warpgroup_mma(query_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    d_p = warpgroup_mma(d_out_rows, values.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    for i in range(1, count):
        p = row_weights(scores, shift, score_scale, begin + (i - 1) * KEYS, bounds, columns, positions, STRIDE, OFFSET, WINDOW)
        # here, as its branches keep the compiler from waiting for dP before the exponents
        slot = await_keys(buffers, rings, done + i, begin + i * KEYS, num_keys, clearings, WARP_GROUP, WIDE)
        d_p = warpgroup_mma_wait(0, deps=[d_p])
        coming = warpgroup_mma(query_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        d_scores = gl.convert_layout((p * (d_p - delta[:, None])).to(DTYPE), weight_layout)
        before = (done + i - 1) % STAGES
        adding = warpgroup_mma(d_scores, keys.index(before), acc, is_async=True)
        d_p = warpgroup_mma(d_out_rows, values.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores, acc = warpgroup_mma_wait(1, deps=[coming, adding])
        mbarrier.arrive(empty.index(before), count=1)
    p = row_weights(scores, shift, score_scale, begin + (count - 1) * KEYS, bounds, columns, positions, STRIDE, OFFSET, WINDOW)
    d_p = warpgroup_mma_wait(0, deps=[d_p])
    d_scores = gl.convert_layout((p * (d_p - delta[:, None])).to(DTYPE), weight_layout)
    slot = (done + count - 1) % STAGES
    adding = warpgroup_mma(d_scores, keys.index(slot), acc, is_async=True)
    if begin + count * KEYS > num_keys:
        clearings += 1
    return adding, slot, (done + count, clearings)


@gluon.jit
def load_rows(base, place, stride, stride_head, rows, dims, valid, GROUP: gl.constexpr):
    """Rows of q or dO at a place; zeros where they are not valid."""
    head, _sequence, _start, row, _num_queries, _first, _last = place
    at = row_pointers(base + head * GROUP * stride_head, row, stride, stride_head, rows, GROUP)
    return gl.load(at[:, None] + dims, mask=valid, other=0.0)


@gluon.jit
def dq_rows(
    common,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SECOND: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Rows 64·WARP_GROUP … of each of the program's tiles."""
    first_band, second_band, buffers, query_buffers, rings, tensors, tables, strides, score_scale, scale, num_tiles, num_heads = common
    _ready, empty, _cleared = rings
    queries, d_outs = query_buffers
    Q, DOut, DQ, Before = tensors
    stride_q, stride_qh, stride_do, stride_doh, stride_dq, stride_dqh, stride_b, stride_bh = strides
    KEYS: gl.constexpr = buffers[0].type.shape[1]
    DIM: gl.constexpr = buffers[0].type.shape[2]
    QUERIES: gl.constexpr = 128 // GROUP
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    row_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_s, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    tiles = (queries.index(WARP_GROUP), d_outs.index(WARP_GROUP))
    rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    wide_rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, mma_s))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    zeros = gl.zeros([64, KEYS], gl.float32, layout=mma_s)
    num_units, step = num_tiles * num_heads, gl.num_programs(0)
    place = place_of(gl.program_id(0), num_heads, tables, QUERIES)
    valid = ((place[2] + wide_rows // GROUP < place[4]) & (wide_rows < QUERIES * GROUP))[:, None]
    tiles[0].store(load_rows(Q, place, stride_q, stride_qh, wide_rows, dims, valid, GROUP))
    tiles[1].store(load_rows(DOut, place, stride_do, stride_doh, wide_rows, dims, valid, GROUP))
    fence_async_shared()
    gl.thread_barrier()
    turns = (0, 0)
    for index in range(gl.program_id(0), num_units, step):
        acc = gl.zeros([64, DIM], gl.float32, layout=mma_o)
        # as operands from registers: otherwise shared memory would be as busy as the tensor cores
        operands = (tiles[0].load(row_layout), tiles[1].load(row_layout))
        adding, slot, turns = gather_dq(
            acc, first_band, operands, buffers, rings, turns, place, rows, columns, zeros, score_scale,
            WARP_GROUP, GROUP, STRIDE, OFFSET, WINDOW, mma_o, wide,
        )  # fmt: skip
        if SECOND > 0:
            acc = warpgroup_mma_wait(0, deps=[adding])
            mbarrier.arrive(empty.index(slot), count=1)
            adding, slot, turns = gather_dq(
                acc, second_band, operands, buffers, rings, turns, place, rows, columns, zeros, score_scale,
                WARP_GROUP, GROUP, 1, 0, SECOND, mma_o, wide,
            )  # fmt: skip
        next_place = place_of(gl.minimum(index + step, num_units - 1), num_heads, tables, QUERIES)
        more = index + step < num_units
        here = anew(wide_rows, place)
        next_valid = ((next_place[2] + here // GROUP < next_place[4]) & (here < QUERIES * GROUP) & more)[:, None]
        next_q = load_rows(Q, next_place, stride_q, stride_qh, here, dims, next_valid, GROUP)
        next_d_out = load_rows(DOut, next_place, stride_do, stride_doh, here, dims, next_valid, GROUP)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(empty.index(slot), count=1)

        head, _sequence, start, row, num_queries, _first, _last = place
        valid = ((start + here // GROUP < num_queries) & (here < QUERIES * GROUP))[:, None]
        result = gl.convert_layout(acc * scale, wide)
        if ACCUMULATE:
            at = row_pointers(Before + head * GROUP * stride_bh, row, stride_b, stride_bh, here, GROUP)
            result += gl.load(at[:, None] + dims, mask=valid, other=0.0)
        at = row_pointers(DQ + head * GROUP * stride_dqh, row, stride_dq, stride_dqh, here, GROUP)
        gl.store(at[:, None] + dims, result.to(DQ.dtype.element_ty), mask=valid)
        gl.thread_barrier()
        tiles[0].store(next_q)
        tiles[1].store(next_d_out)
        fence_async_shared()
        gl.thread_barrier()
        place = next_place


@gluon.jit(do_not_specialize=["num_tiles"])
def dq_kernel(
    k_desc, v_desc, k_desc_2, v_desc_2, tensors, tables, key_ends, first_tensors, second_tensors, strides, first_strides, second_strides,
    score_scale, scale, num_tiles, num_heads,
    GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SECOND: gl.constexpr, STAGES: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """dq of the tiles program, program + programs, …, Before added where ACCUMULATE; writes the rows' statistics for dk and dv.

    SECOND: the window of a second band, of raw keys; 0: there is none."""
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
    rings, buffers = (ready, empty, cleared), (keys, values)
    first_band = ((k_desc, v_desc), key_ends[0], first_tensors, first_strides)
    second_band = ((k_desc_2, v_desc_2), key_ends[1], second_tensors, second_strides)
    common = (first_band, second_band, buffers, (queries, d_outs), rings, tensors, tables, strides, score_scale, scale, num_tiles, num_heads)
    gl.warp_specialize(
        [
            (dq_rows, (common, 0, GROUP, STRIDE, OFFSET, WINDOW, SECOND, ACCUMULATE)),
            (dq_rows, (common, 1, GROUP, STRIDE, OFFSET, WINDOW, SECOND, ACCUMULATE)),
            (bring_keys, (common, GROUP, STRIDE, OFFSET, WINDOW, SECOND)),
        ],
        [4, 1],
        [240, 24],
    )


def dq(
    d_out: torch.Tensor, q: torch.Tensor, bands: list[tuple[torch.Tensor, ...]], target: torch.Tensor, before: torch.Tensor | None,
    tables: tuple[torch.Tensor, ...], geometry: dict[str, int], second: int, *, scale: float,
) -> None:  # fmt: skip
    """The part of `banded.banded_backward` that writes dq and stats, for one band or for the sum of two.

    Args:
        bands: one or two times k, v, ends of the band's keys, gate, lse, delta, stats.
        tables: query tiles of ROWS // group queries, ends of queries and of tokens. geometry: STRIDE, OFFSET, WINDOW of the first band.
        second: the window of the second band, whose keys are raw ones; 0: there is none.
    """
    num_heads, num_tiles = bands[0][0].shape[1], tables[0].shape[0]
    added = target if before is None else before
    descriptors, key_ends, tensors, strides = [], [], [], []
    for k, v, ends, gate, lse, delta, stats in bands:
        descriptors += [key_descriptor(k, 64), key_descriptor(v, 64)]
        key_ends.append(ends)
        tensors.append((gate, lse, delta, stats))
        strides.append((k.stride(1), v.stride(1), *gate.stride(), *lse.stride(), *delta.stride(), *stats.stride()[:2]))
    if len(bands) == 1:  # the kernel has parameters for two
        descriptors, key_ends, tensors, strides = descriptors * 2, key_ends * 2, tensors * 2, strides * 2
    launch(
        dq_kernel, (min(num_tiles * num_heads, num_processors(q.device)),),
        *descriptors, (q, d_out, target, added), tables, tuple(key_ends), *tensors,
        (*q.stride()[:2], *d_out.stride()[:2], *target.stride()[:2], *added.stride()[:2]), *strides, scale * LOG2_E, scale, num_tiles, num_heads,
        GROUP=q.shape[1] // num_heads, **geometry, SECOND=second, STAGES=STAGES, ACCUMULATE=before is not None, num_warps=4,
    )  # fmt: skip
