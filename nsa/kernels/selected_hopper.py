"""Hopper's kernel of the selected branch's forward pass, in Gluon (selected.py says what it computes and when it is taken).

One warp group takes 64 rows (queries × heads of a KV head) through the blocks that any of its queries chose; two programs
share a streaming multiprocessor, and while one computes exponents the other keeps the tensor cores busy. K and V come by
bulk copy, the next blocks while this one is multiplied; a block that a row's query did not choose gets weights of exactly
0 and changes nothing in the row. Written for Triton 3.6's Gluon, with the parts of banded_hopper.py.
Leaves out the backward pass: dq in Triton reaches the same rate (selected.py), dk and dv are in selected_keys_hopper.py.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.banded_hopper import await_tile, clear_rows, copied_in_bulk, finish_rows, key_descriptor, num_processors, row_pointers
from nsa.kernels.launch import launch
from nsa.kernels.tiles import KernelPlan
from nsa.kernels.unions import BlockUnions

ROWS = 64
STAGES = 3
"""Blocks of K in shared memory; of V one fewer, so that two programs find room."""
MIN_GROUP = 2
"""Heads of a KV head, so that a tile's queries have room in an int32 of bits."""


@gluon.jit
def tile_of(index, num_tiles, num_heads, tables, capacity):
    """Unit of work `index`: KV head; first query (in its sequence, and packed); first key; numbers of queries and keys;
    position of the first query; the list of blocks and its length. Head by head, since K and V of one fit into the L2 cache."""
    Tiles, QueryEnds, KeyEnds, Counts = tables
    tile, head = index % num_tiles, index // num_tiles
    item = tile * num_heads + head
    sequence, start = gl.load(Tiles + 2 * tile), gl.load(Tiles + 2 * tile + 1)
    first_query, first_key = gl.load(QueryEnds + sequence), gl.load(KeyEnds + sequence)
    num_queries, num_keys = gl.load(QueryEnds + sequence + 1) - first_query, gl.load(KeyEnds + sequence + 1) - first_key
    row, position = (first_query + start).to(gl.int64), num_keys - num_queries + start
    return head, start, row, first_key, num_queries, num_keys, position, item.to(gl.int64) * capacity, gl.load(Counts + item)


@gluon.jit
def fill(desc, buffers, ready, number, row, column):
    """Starts the copy of a block, the `number`-th of its ring; everybody has left its place."""
    slot = number % buffers.type.shape[0]
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], ready.index(slot), buffers.index(slot))


@gluon.jit
def fill_first(descs, buffers, rings, Blocks, list_at, count, done, first_key, columns):
    """Starts the copies of a tile's first blocks, after `done` others."""
    k_desc, v_desc = descs
    keys, values = buffers
    k_ready, v_ready = rings
    stages: gl.constexpr = keys.type.shape[0]
    for i in gl.static_range(stages):
        if i < count:
            row = first_key + gl.load(Blocks + list_at + i) * 64
            fill(k_desc, keys, k_ready, done + i, row, columns[0])
            if i < stages - 1:
                fill(v_desc, values, v_ready, done + i, row, columns[1])


@gluon.jit
def softmax_step(scores, row_max, scale, block, bits, query, positions, first_position, columns):
    """Weights of a block against the new maximum (base 2), that maximum, and the factor on what came before."""
    if block * 64 + 63 > first_position:
        scores = gl.where((block * 64 + columns)[None, :] <= positions[:, None], scores, float("-inf"))
    mine = ((bits >> query) & 1) != 0
    new_max = gl.where(mine, gl.maximum(row_max, gl.max(scores, 1) * scale), row_max)
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    decay = gl.exp2(row_max - shift)
    return gl.exp2(scores * scale - gl.where(mine, shift, float("inf"))[:, None]), new_max, decay


@gluon.jit(do_not_specialize=["num_tiles", "capacity", "limit"])
def forward_kernel(
    k_desc, v_desc, Q, Gate, Out, Branch, Lse, Blocks, Bits, TotalBlocks, tables, strides, scale, num_tiles, num_heads, capacity, limit,
    GROUP: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr, ACCUMULATE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Out (+)= gate · o, branch output and LSE of the tiles program, program + programs, …, heads of a tile side by side."""
    if gl.load(TotalBlocks) > limit:
        return
    DTYPE: gl.constexpr = k_desc.dtype
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    stride_q, stride_qh, stride_kh, stride_vh, stride_g, stride_gh, stride_o, stride_oh, stride_b, stride_bh, stride_l = strides
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    query_tile = gl.allocate_shared_memory(DTYPE, [64, DIM], gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE))
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DIM], k_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES - 1, 64, DIM], v_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES - 1, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(number), count=1)
    for number in gl.static_range(STAGES - 1):
        mbarrier.init(v_ready.index(number), count=1)
    fence_async_shared()
    gl.thread_barrier()
    descs, buffers, rings = (k_desc, v_desc), (keys, values), (k_ready, v_ready)

    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    wide_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, mma_s))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    zeros = gl.zeros([64, 64], gl.float32, layout=mma_s)
    query = gl.minimum(rows // GROUP, QUERIES - 1)
    num_units, step = num_tiles * num_heads, gl.num_programs(0)
    head, start, row, first_key, num_queries, num_keys, position, list_at, count = tile_of(gl.program_id(0), num_tiles, num_heads, tables, capacity)
    fill_first(descs, buffers, rings, Blocks, list_at, count, 0, first_key, (head * stride_kh, head * stride_vh))
    valid = (start + wide_rows // GROUP < num_queries) & (wide_rows < QUERIES * GROUP)
    first_at = row_pointers(Q + head * GROUP * stride_qh, row, stride_q, stride_qh, wide_rows, GROUP)
    query_tile.store(gl.load(first_at[:, None] + dims, mask=valid[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    done = 0
    for index in range(gl.program_id(0), num_units, step):
        next_head, next_start, next_row, next_first_key, next_queries, next_keys, next_position, next_list, next_count = tile_of(
            gl.minimum(index + step, num_units - 1), num_tiles, num_heads, tables, capacity
        )
        group = head * GROUP
        positions = position + rows // GROUP
        block, bits = gl.load(Blocks + list_at), gl.load(Bits + list_at)
        v_row = first_key + gl.load(Blocks + list_at + gl.minimum(STAGES - 1, count - 1)) * 64
        slot = await_tile(k_ready, done)
        scores = warpgroup_mma(query_tile, keys.index(slot).permute((1, 0)), zeros, use_acc=False)
        row_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, mma_s))
        p, row_max, decay = softmax_step(scores, row_max, scale, block, bits, query, positions, position, columns)
        row_sum = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(DTYPE), weight_layout)
        acc = gl.zeros([64, DIM], gl.float32, layout=mma_o)
        gl.thread_barrier()
        for i in range(1, count):
            block, bits = gl.load(Blocks + list_at + i), gl.load(Bits + list_at + i)
            k_ahead = i + STAGES - 1
            k_row = first_key + gl.load(Blocks + list_at + gl.minimum(k_ahead, count - 1)) * 64
            slot = await_tile(k_ready, done + i)
            coming = warpgroup_mma(query_tile, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            v_slot = await_tile(v_ready, done + i - 1)
            adding = warpgroup_mma(weights, values.index(v_slot), acc, is_async=True)
            if k_ahead < count:  # in the place of block i - 1, whose scores are done
                fill(k_desc, keys, k_ready, done + k_ahead, k_row, head * stride_kh)
            scores = warpgroup_mma_wait(1, deps=[coming])
            p, row_max, decay = softmax_step(scores, row_max, scale, block, bits, query, positions, position, columns)
            row_sum = row_sum * decay + gl.sum(p, 1)
            acc = warpgroup_mma_wait(0, deps=[adding])
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, mma_o))[:, None]
            weights = gl.convert_layout(p.to(DTYPE), weight_layout)
            gl.thread_barrier()
            if i + STAGES - 2 < count:  # in the place of block i - 1
                fill(v_desc, values, v_ready, done + i + STAGES - 2, v_row, head * stride_vh)
            v_row = k_row
        slot = await_tile(v_ready, done + count - 1)
        if block * 64 + 64 > num_keys:
            clear_rows(values.index(slot), block * 64, num_keys, wide)
            fence_async_shared()
            gl.thread_barrier()
        acc = warpgroup_mma(weights, values.index(slot), acc)
        done += count
        more = index + step < num_units
        next_valid = (next_start + wide_rows // GROUP < next_queries) & (wide_rows < QUERIES * GROUP) & more
        at = row_pointers(Q + next_head * GROUP * stride_qh, next_row, stride_q, stride_qh, wide_rows, GROUP)
        next_q = gl.load(at[:, None] + dims, mask=next_valid[:, None], other=0.0)
        gl.thread_barrier()  # everybody's products are done: all places are free
        if more:
            fill_first(descs, buffers, rings, Blocks, next_list, next_count, done, next_first_key, (next_head * stride_kh, next_head * stride_vh))
        valid = (start + wide_rows // GROUP < num_queries) & (wide_rows < QUERIES * GROUP)
        out_at = row_pointers(Out + group * stride_oh, row, stride_o, stride_oh, wide_rows, GROUP)[:, None] + dims
        gate = gl.load(row_pointers(Gate + group * stride_gh, row, stride_g, stride_gh, wide_rows, GROUP), mask=valid, other=0.0)
        written = (start + rows // GROUP < num_queries) & (rows < QUERIES * GROUP)
        kept = ((Branch, Lse), (stride_b, stride_bh, stride_l))
        result = finish_rows(acc, row_max, row_sum, gate, *kept, group, row, rows, wide_rows, written, valid, dims, wide, mma_o, GROUP, KEEP)
        if ACCUMULATE:
            result += gl.load(out_at, mask=valid[:, None], other=0.0).to(gl.float32)
        gl.store(out_at, result.to(Out.dtype.element_ty), mask=valid[:, None])
        gl.thread_barrier()
        query_tile.store(next_q)
        fence_async_shared()
        gl.thread_barrier()
        head, start, row, first_key, num_queries, num_keys = next_head, next_start, next_row, next_first_key, next_queries, next_keys
        position, list_at, count = next_position, next_list, next_count


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> bool:
    """Whether this kernel computes the forward pass for the tensors and blocks of `size` keys, given a GPU that runs it."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and size == 64
        and k.shape[2] == v.shape[2]
        and k.shape[2] in (64, 128)
        and MIN_GROUP <= q.shape[1] // k.shape[1] <= ROWS
        and copied_in_bulk(k)
        and copied_in_bulk(v)
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, out: torch.Tensor, branch: torch.Tensor | None, lse: torch.Tensor,
    unions: BlockUnions, plan: KernelPlan, *, limit: int, scale: float, accumulate: bool,
) -> None:  # fmt: skip
    """`selected.selected_forward` on this kernel: writes out, branch (where given) and lse, unless the unions' total is above `limit`.

    Args:
        unions: over tiles of ROWS // group queries. scale: on q·k, times log2(e).
    """
    num_tiles, num_heads, kept = unions.tiles.shape[0], k.shape[1], out if branch is None else branch
    strides = (*q.stride()[:2], k.stride(1), v.stride(1), *gate.stride(), *out.stride()[:2], *kept.stride()[:2], lse.stride(0))
    launch(
        forward_kernel, (min(num_tiles * num_heads, 2 * num_processors(q.device)),),
        key_descriptor(k, 64), key_descriptor(v, 64), q, gate, out, kept, lse, unions.blocks, unions.bits, unions.total,
        (unions.tiles, plan.query_ends, plan.key_ends, unions.counts), strides, scale, num_tiles, num_heads, unions.blocks.shape[1], limit,
        GROUP=q.shape[1] // num_heads, QUERIES=unions.queries, STAGES=STAGES, ACCUMULATE=accumulate, KEEP=branch is not None, num_warps=4,
    )  # fmt: skip
