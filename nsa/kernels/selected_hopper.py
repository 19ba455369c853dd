"""Hopper's kernel of the selected branch's forward pass, in Gluon, and what it shares with that of dq (selected.py says what they
compute and when they are taken).

Two warp groups take 64 rows (queries × heads of a KV head) each through the blocks that any of the tile's queries chose. They
share the blocks in shared memory, so that one brought from L2 serves 128 rows, and let those pass that none of their own
queries chose. A warp of its own brings them, so that neither waits for the other to make room. q is an operand from registers;
that of the next tile is copied into shared memory meanwhile. While one warp group computes exponents the other keeps the tensor
cores busy; each has the next block's scores on their way while it adds up this one's values. A block that a row's query did not
choose gets weights of exactly 0 and changes nothing in the row. Written for Triton 3.6's Gluon, with the parts of banded_hopper.py.
Leaves out the backward pass: dq is in selected_dq_hopper.py, dk and dv are in selected_keys_hopper.py.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa.kernels.banded_hopper import anew, await_tile, clear_rows, copied_in_bulk, key_descriptor, num_processors, row_pointers, rows_aligned
from nsa.kernels.banded_hopper_dq import fill_pair
from nsa.kernels.launch import launch
from nsa.kernels.tiles import KernelPlan
from nsa.kernels.unions import BlockUnions

ROWS = 128
STAGES = 5
"""Blocks of K and V in shared memory."""
MIN_GROUP = 3
"""Heads of a KV head, so that a tile's queries have room in an int32 of bits and fill both warp groups."""


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
def copy_rows(tile, Source, place, stride, stride_head, rows, dims, GROUP: gl.constexpr, QUERIES: gl.constexpr):
    """Starts the copy of a place's rows of q, dO or dq, 16 bytes a thread; rows of no query repeat the last query's."""
    head, start, row, _first_key, num_queries, _num_keys, _position, _list_at, _count = place
    query = gl.minimum(gl.minimum(rows // GROUP, QUERIES - 1), num_queries - 1 - start)
    at = Source + head * GROUP * stride_head + row * stride + query * stride + rows % GROUP * stride_head
    async_copy.async_copy_global_to_shared(tile, at[:, None] + dims)


@gluon.jit
def next_own(
    lists, rings, list_at, number, last, bits, done,
    PASSES: gl.constexpr, WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """The first of a list's blocks from the `number`-th on, whose bits are given, that one of the warp group's queries chose: its number, the
    block, its bits and its place, in which it is. Up to PASSES others before `last` are let pass."""
    Blocks, Bits = lists
    ready, empty, _landed = rings
    FIRST: gl.constexpr = WARP_GROUP * 64 // GROUP
    LAST: gl.constexpr = min((WARP_GROUP * 64 + 63) // GROUP, QUERIES - 1)
    MINE: gl.constexpr = (1 << (LAST - FIRST + 1)) - 1
    for _ in gl.static_range(PASSES):
        if (number < last) & (((bits >> FIRST) & MINE) == 0):
            mbarrier.arrive(empty.index(await_tile(ready, done + number)), count=1)
            number += 1
            bits = gl.load(Bits + list_at + number)
    return number, gl.load(Blocks + list_at + number), bits, await_tile(ready, done + number)


@gluon.jit
def fill_last(descs, buffers, rings, number, turn, row, columns, num_keys):
    """As `fill_pair`, of a block with fewer keys than 64, the `turn`-th of them: what lies behind the keys is cleared before the block counts
    as there."""
    k_desc, v_desc = descs
    keys, values = buffers
    ready, empty, landed = rings
    DIM: gl.constexpr = keys.type.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [1, 1], [1, 0])
    slot = number % keys.type.shape[0]
    mbarrier.wait(empty.index(slot), (number // keys.type.shape[0] & 1) ^ 1)
    mbarrier.expect(landed.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, columns[0]], landed.index(0), keys.index(slot))
    tma.async_copy_global_to_shared(v_desc, [row, columns[1]], landed.index(0), values.index(slot))
    mbarrier.wait(landed.index(0), turn & 1)
    for first in gl.static_range(0, 64, 8):  # a warp has few registers
        if num_keys < first + 8:
            clear_rows(keys.index(slot).slice(first, 8), first, num_keys, LAYOUT)
            clear_rows(values.index(slot).slice(first, 8), first, num_keys, LAYOUT)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def bring_blocks(blocks):
    """Starts the copies of every block of the program's tiles, in order, each once both warp groups have left its place."""
    descs, buffers, rings, lists, tables, strides, sizes = blocks
    ready, empty, _landed = rings
    num_tiles, num_heads, capacity = sizes
    done, turn = 0, 0
    for index in range(gl.program_id(0), num_tiles * num_heads, gl.num_programs(0)):
        head, _start, _row, first_key, _num_queries, num_keys, _position, list_at, count = tile_of(index, num_tiles, num_heads, tables, capacity)
        columns = (head * strides[0], head * strides[1])
        for i in range(count):
            key = gl.load(lists[0] + list_at + i) * 64
            if key + 64 > num_keys:
                fill_last(descs, buffers, rings, done + i, turn, first_key + key, columns, num_keys - key)
                turn += 1
            else:
                fill_pair(descs, buffers, ready, empty, done + i, first_key + key, columns)
        done += count


@gluon.jit
def prepare_blocks(k_desc, v_desc, lists, tables, strides, sizes, STAGES: gl.constexpr):
    """What all warps have to know of the blocks: where they come from, STAGES places, and their barriers: one that is there, one that both
    warp groups have left, one that is being cleared."""
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    keys = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 64, DIM], k_desc.layout)
    values = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 64, DIM], v_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(landed.index(0), count=1)
    fence_async_shared()
    return (k_desc, v_desc), (keys, values), (ready, empty, landed), lists, tables, strides, sizes


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


@gluon.jit
def gather_values(
    blocks, place, q_rows, rows, columns, zeros, scale, done,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr, SCORES: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Unscaled sums of a place's values, the last product on its way; the place of its values; maximum and sum of each row."""
    descs, buffers, rings, lists, _tables, _strides, _sizes = blocks
    keys, values = buffers
    ready, empty, _landed = rings
    position, list_at, count = place[6], place[7], place[8]
    STAGES: gl.constexpr = keys.type.shape[0]
    DIM: gl.constexpr = keys.type.shape[2]
    DTYPE: gl.constexpr = descs[0].dtype
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    PASSES: gl.constexpr = STAGES - 3
    query = gl.minimum(rows // GROUP, QUERIES - 1)
    positions = position + query

    slot = await_tile(ready, done)
    scores = warpgroup_mma(q_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False)
    row_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    block, bits = gl.load(lists[0] + list_at), gl.load(lists[1] + list_at)
    p, row_max, _decay = softmax_step(scores, row_max, scale, block, bits, query, positions, position, columns)
    row_sum = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(DTYPE), weight_layout)
    acc = gl.zeros([64, DIM], gl.float32, layout=OUTPUT)
    now, coming = 0, gl.minimum(1, count - 1)
    bits = gl.load(lists[1] + list_at + coming)
    coming, block, bits, slot = next_own(lists, rings, list_at, coming, count - 1, bits, done, PASSES, WARP_GROUP, GROUP, QUERIES)
    while now < count - 1:
        before = (done + now) % STAGES
        scores = warpgroup_mma(q_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        adding = warpgroup_mma(weights, values.index(before), acc, is_async=True)
        following = gl.minimum(coming + 1, count - 1)
        next_bits = gl.load(lists[1] + list_at + following)
        scores = warpgroup_mma_wait(1, deps=[scores])
        p, row_max, decay = softmax_step(scores, row_max, scale, block, bits, query, positions, position, columns)
        row_sum = row_sum * decay + gl.sum(p, 1)
        # Its branches keep the compiler from waiting for the product before the exponents. A block's place is free once `now` has left it.
        last = gl.minimum(now + STAGES - 1, count - 1)
        following, block, bits, slot = next_own(lists, rings, list_at, following, last, next_bits, done, PASSES, WARP_GROUP, GROUP, QUERIES)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(empty.index(before), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT))[:, None]
        weights = gl.convert_layout(p.to(DTYPE), weight_layout)
        now, coming = coming, following
    return warpgroup_mma(weights, values.index(slot), acc, is_async=True), slot, row_max, row_sum


@gluon.jit
def store_rows(Target, place, stride, stride_head, tile, rows, dims, GROUP: gl.constexpr, QUERIES: gl.constexpr, LAYOUT: gl.constexpr):
    """Writes the rows of a shared tile to those of a query-sided tensor that exist."""
    head, start, row, _first_key, num_queries, _num_keys, _position, _list_at, _count = place
    valid = ((start + rows // GROUP < num_queries) & (rows < QUERIES * GROUP))[:, None]
    at = row_pointers(Target + head * GROUP * stride_head, row, stride, stride_head, rows, GROUP)
    gl.store(at[:, None] + dims, tile.load(LAYOUT), mask=valid)


@gluon.jit
def forward_rows(common, WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr, ACCUMULATE: gl.constexpr, KEEP: gl.constexpr):
    """Rows 64·WARP_GROUP … of each of the program's tiles."""
    blocks, row_tiles, tensors, strides, scale = common
    _descs, buffers, rings, _lists, tables, _strides, sizes = blocks
    Q, Gate, Out, Branch, Lse = tensors
    stride_q, stride_qh, stride_g, stride_gh, stride_o, stride_oh, stride_b, stride_bh, stride_l = strides
    num_tiles, num_heads, capacity = sizes
    empty = rings[1]
    DIM: gl.constexpr = buffers[0].type.shape[2]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    output_rows: gl.constexpr = gl.SliceLayout(1, mma_o)
    row_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_s, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    q_tile, result_tile = row_tiles[0].index(WARP_GROUP), row_tiles[1].index(WARP_GROUP)
    rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    wide_rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, mma_s))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    zeros = gl.zeros([64, 64], gl.float32, layout=mma_s)
    num_units, step = num_tiles * num_heads, gl.num_programs(0)
    place = tile_of(gl.program_id(0), num_tiles, num_heads, tables, capacity)
    copy_rows(q_tile, Q, place, stride_q, stride_qh, wide_rows, dims, GROUP, QUERIES)
    async_copy.commit_group()
    done = 0
    for index in range(gl.program_id(0), num_units, step):
        async_copy.wait_group(0)
        gl.thread_barrier()
        q_rows = q_tile.load(row_layout)
        gl.thread_barrier()
        here = anew(wide_rows, place)
        following = tile_of(gl.minimum(index + step, num_units - 1), num_tiles, num_heads, tables, capacity)
        copy_rows(q_tile, Q, following, stride_q, stride_qh, here, dims, GROUP, QUERIES)
        if ACCUMULATE:
            copy_rows(result_tile, Out, place, stride_o, stride_oh, here, dims, GROUP, QUERIES)
        async_copy.commit_group()
        adding, slot, row_max, row_sum = gather_values(
            blocks, place, q_rows, rows, columns, zeros, scale, done, WARP_GROUP, GROUP, QUERIES, mma_s, mma_o
        )
        done += place[8]
        head, start, row, _first_key, num_queries, _num_keys, _position, _list_at, _count = place
        own_rows = anew(rows, place)
        known = (start + own_rows // GROUP < num_queries) & (own_rows < QUERIES * GROUP)
        gate_at = row_pointers(Gate + head * GROUP * stride_gh, row, stride_g, stride_gh, own_rows, GROUP)
        gate = gl.load(gate_at, mask=known, other=0.0).to(gl.float32)
        some = row_sum > 0
        total = gl.where(some, row_sum, 1.0)
        lse = gl.where(some, (row_max + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        gl.store(row_pointers(Lse + head * GROUP, row, stride_l, 1, own_rows, GROUP), lse, mask=known)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(empty.index(slot), count=1)
        result = acc / gl.convert_layout(total, output_rows)[:, None]
        gated = result * gl.convert_layout(gate, output_rows)[:, None]
        async_copy.wait_group(0)
        gl.thread_barrier()
        if ACCUMULATE:
            gated += result_tile.load(mma_o).to(gl.float32)
            gl.thread_barrier()
        here = anew(wide_rows, place)
        if KEEP:
            result_tile.store(result.to(Branch.dtype.element_ty))
            gl.thread_barrier()
            store_rows(Branch, place, stride_b, stride_bh, result_tile, here, dims, GROUP, QUERIES, wide)
            gl.thread_barrier()
        result_tile.store(gated.to(Out.dtype.element_ty))
        gl.thread_barrier()
        store_rows(Out, place, stride_o, stride_oh, result_tile, here, dims, GROUP, QUERIES, wide)
        place = tile_of(gl.minimum(index + step, num_units - 1), num_tiles, num_heads, tables, capacity)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["num_tiles", "capacity", "limit"])
def forward_kernel(
    k_desc, v_desc, tensors, lists, TotalBlocks, tables, key_strides, strides, scale, num_tiles, num_heads, capacity, limit,
    GROUP: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr, ACCUMULATE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Out (+)= gate · o, branch output and LSE of the tiles program, program + programs, …"""
    if gl.load(TotalBlocks) > limit:
        return
    DTYPE: gl.constexpr = k_desc.dtype
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    queries = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    results = gl.allocate_shared_memory(DTYPE, [2, 64, DIM], rows_layout)
    blocks = prepare_blocks(k_desc, v_desc, lists, tables, key_strides, (num_tiles, num_heads, capacity), STAGES)
    common = (blocks, (queries, results), tensors, strides, scale)
    gl.warp_specialize(
        [
            (forward_rows, (common, 0, GROUP, QUERIES, ACCUMULATE, KEEP)),
            (forward_rows, (common, 1, GROUP, QUERIES, ACCUMULATE, KEEP)),
            (bring_blocks, (blocks,)),
        ],
        [4, 1],
        [240, 24],
    )


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int, others: list[torch.Tensor]) -> bool:
    """Whether these kernels compute the forward pass and dq for the tensors and blocks of `size` keys, given a GPU that runs them.
    others: what is read or written with q's rows (out; or d_out and dq)."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and size == 64
        and k.shape[2] == v.shape[2]
        and k.shape[2] in (64, 128)
        and MIN_GROUP <= q.shape[1] // k.shape[1] <= ROWS // 2
        and copied_in_bulk(k)
        and copied_in_bulk(v)
        and all(x.dtype == q.dtype and rows_aligned(x) for x in (q, *others))
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, out: torch.Tensor, branch: torch.Tensor | None, lse: torch.Tensor,
    unions: BlockUnions, plan: KernelPlan, *, limit: int, scale: float, accumulate: bool,
) -> None:  # fmt: skip
    """`selected.selected_forward` on this kernel: writes out, branch (where given) and lse, unless the unions' total is above `limit`.

    Args:
        unions: over tiles of ROWS // group queries, at most MAX_QUERIES. scale: on q·k, times log2(e).
    """
    num_tiles, num_heads, kept = unions.tiles.shape[0], k.shape[1], out if branch is None else branch
    strides = (*q.stride()[:2], *gate.stride(), *out.stride()[:2], *kept.stride()[:2], lse.stride(0))
    launch(
        forward_kernel, (min(num_tiles * num_heads, num_processors(q.device)),),
        key_descriptor(k, 64), key_descriptor(v, 64), (q, gate, out, kept, lse), (unions.blocks, unions.bits), unions.total,
        (unions.tiles, plan.query_ends, plan.key_ends, unions.counts), (k.stride(1), v.stride(1)), strides, scale, num_tiles, num_heads,
        unions.blocks.shape[1], limit, GROUP=q.shape[1] // num_heads, QUERIES=unions.queries, STAGES=STAGES, ACCUMULATE=accumulate,
        KEEP=branch is not None, num_warps=4,
    )  # fmt: skip
