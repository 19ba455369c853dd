"""The Hopper kernel of attention over a band of keys, in Gluon, and what it shares with those of the backward pass (banded.py says
what they compute and when they are taken).

Two warp groups share each tile of keys, 64 rows of queries each, and wait for nothing of each other but for room for the
next tile: while one computes exponents the other keeps the tensor cores busy. A warp of its own starts the bulk copies (TMA)
of K and V. A bulk copy may bring rows of a neighbouring sequence: the scores of those keys are masked, and rows
of V (K, q and dO, where they are factors of a gradient) are cleared in shared memory.

Every program works on a fixed list of tiles; while it writes the results of one, queries and first keys of the next are on
their way. A tile's result depends on its own sequence alone. Written for Triton 3.6's Gluon.
Leaves out the backward pass (banded_hopper_dq.py, banded_hopper_dkdv.py).

Registers: the loops over keys need nearly all of them, and what is spilled around a loop comes back from L2 (shared memory leaves
no L1), a few hundred cycles each. So whatever is cheap is computed anew for each tile: see `anew`.
"""

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.launch import launch

ROWS = 128
"""Rows (queries × heads of a KV head) of a tile, half of them in each warp group."""


@gluon.jit
def key_range(first, last, num_keys, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """Keys that queries at positions first … last see: begin, first key and end of those that all of them see, end."""
    end = gl.minimum(gl.maximum(last - OFFSET + STRIDE, 0) // STRIDE, num_keys)
    all_end = gl.minimum(gl.maximum(first - OFFSET + STRIDE, 0) // STRIDE, num_keys)
    begin, all_begin = first * 0, first * 0
    if WINDOW > 0:
        begin = gl.maximum(first - WINDOW + 1, 0)
        all_begin = gl.maximum(last - WINDOW + 1, 0)
    return begin, all_begin, all_end, end


@gluon.jit
def place_of(index, num_heads, tables, QUERIES: gl.constexpr):
    """Unit of work `index`: KV head, sequence; first query (in its sequence, and packed); number of queries; position of the first and last query."""
    Tiles, QueryEnds, TokenEnds = tables
    tile, head = index // num_heads, index % num_heads
    sequence, start = gl.load(Tiles + 2 * tile), gl.load(Tiles + 2 * tile + 1)
    first_query = gl.load(QueryEnds + sequence)
    num_queries = gl.load(QueryEnds + sequence + 1) - first_query
    ahead = gl.load(TokenEnds + sequence + 1) - gl.load(TokenEnds + sequence) - num_queries
    last = ahead + gl.minimum(start + QUERIES, num_queries) - 1
    return head, sequence, start, (first_query + start).to(gl.int64), num_queries, ahead + start, last


@gluon.jit
def keys_of(KeyEnds, sequence):
    """A sequence's first key in a band and how many it has."""
    first_key = gl.load(KeyEnds + sequence)
    return first_key, gl.load(KeyEnds + sequence + 1) - first_key


@gluon.jit
def visible(keys, positions, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """bool `[rows, keys]`: does the query at each position see each key."""
    ends = keys[None, :] * STRIDE + OFFSET
    seen = ends <= positions[:, None]
    if WINDOW > 0:
        seen = seen & (ends > positions[:, None] - WINDOW)
    return seen


@gluon.jit
def clear_rows(tile, first, count, LAYOUT: gl.constexpr):
    """Zeros in those of a shared tile's rows, the first of which is row `first` of a tensor of `count` rows, that come after the last."""
    present = first + gl.arange(0, tile.type.shape[0], layout=gl.SliceLayout(1, LAYOUT)) < count
    value = tile.load(LAYOUT)
    tile.store(gl.where(present[:, None], value, gl.zeros_like(value)))


@gluon.jit
def await_clearing(cleared, turn):
    """Both warp groups have cleared their share for the `turn`-th time, and tensor cores see it."""
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(cleared.index(0), count=1)
    mbarrier.wait(cleared.index(0), turn & 1)


@gluon.jit
def fill(desc, buffers, ready, empty, number, row, column):
    """Starts the copy of a tile, the `number`-th of its ring, once both warp groups have left the place."""
    stages: gl.constexpr = buffers.type.shape[0]
    slot = number % stages
    mbarrier.wait(empty.index(slot), (number // stages & 1) ^ 1)
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], ready.index(slot), buffers.index(slot))


@gluon.jit
def await_tile(ready, number):
    """The place of the `number`-th tile of a ring, once it is there."""
    stages: gl.constexpr = ready.type.shape[0]
    slot = number % stages
    mbarrier.wait(ready.index(slot), number // stages & 1)
    return slot


@gluon.jit
def row_pointers(base, row, stride, stride_head, rows, GROUP: gl.constexpr):
    """Pointers to a tile's rows of a query-sided tensor, counted from packed row `row`."""
    return base + row * stride + rows // GROUP * stride + rows % GROUP * stride_head


@gluon.jit
def anew(rows, place):
    """rows, in such a way that the compiler does not compute addresses from them once for all tiles and spill them: what is spilled
    around the loops over keys comes back from L2 (shared memory leaves no L1), a few hundred cycles each."""
    return rows + gl.minimum(place[4], 0)  # a number of queries: never negative, which only we know


@gluon.jit
def softmax_step(scores, row_max, scale, key, bounds, keys, positions, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """Weights of a tile of keys against the new maximum (base 2), that maximum, and the factor on what came before."""
    all_begin, all_end = bounds
    if (key < all_begin) | (key + keys.shape[0] > all_end):
        scores = gl.where(visible(key + keys, positions, STRIDE, OFFSET, WINDOW), scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    return gl.exp2(scores * scale - shift[:, None]), new_max, gl.exp2(row_max - shift)


@gluon.jit
def bring_tiles(common, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr):
    """Starts the copies of K and V that the program's warp groups take, in their order: the next tile of K before this one of V."""
    descs, buffers, rings, _tensors, tables, KeyEnds, strides, _scale, num_tiles, num_heads = common
    k_desc, v_desc = descs
    _queries, keys, values = buffers
    k_ready, k_empty, v_ready, v_empty, _cleared = rings
    width: gl.constexpr = keys.type.shape[1]
    done = 0
    for index in range(gl.program_id(0), num_tiles * num_heads, gl.num_programs(0)):
        head, sequence, _start, _row, _num_queries, first, last = place_of(index, num_heads, tables, 128 // GROUP)
        first_key, num_keys = keys_of(KeyEnds, sequence)
        begin, _all_begin, _all_end, end = key_range(first, last, num_keys, STRIDE, OFFSET, WINDOW)
        row, count = first_key + begin, gl.maximum(gl.cdiv(end - begin, width), 1)
        fill(k_desc, keys, k_ready, k_empty, done, row, head * strides[2])
        for i in range(1, count):
            fill(k_desc, keys, k_ready, k_empty, done + i, row + i * width, head * strides[2])
            fill(v_desc, values, v_ready, v_empty, done + i - 1, row + (i - 1) * width, head * strides[3])
        fill(v_desc, values, v_ready, v_empty, done + count - 1, row + (count - 1) * width, head * strides[3])
        done += count


@gluon.jit
def finish_rows(
    acc, row_max, row_sum, gate, tensors, strides, group, row, rows, wide_rows, written, valid, dims, LAYOUT: gl.constexpr, ACC_LAYOUT: gl.constexpr,
    GROUP: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """gate · o `[64, dims]` of a tile's rows in LAYOUT, from their unscaled sums in ACC_LAYOUT; stores their LSE, and with KEEP o itself."""
    Branch, Lse = tensors
    stride_b, stride_bh, stride_l = strides
    some = row_sum > 0
    total = gl.where(some, row_sum, 1.0)
    lse = gl.where(some, (row_max + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    gl.store(row_pointers(Lse + group, row, stride_l, 1, rows, GROUP), lse, mask=written)
    result = gl.convert_layout(acc / gl.convert_layout(total, gl.SliceLayout(1, ACC_LAYOUT))[:, None], LAYOUT)
    if KEEP:
        at = row_pointers(Branch + group * stride_bh, row, stride_b, stride_bh, wide_rows, GROUP)
        gl.store(at[:, None] + dims, result.to(Branch.dtype.element_ty), mask=valid[:, None])
    return result * gate.to(gl.float32)[:, None]


@gluon.jit
def forward_rows(
    common,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr,
    ACCUMULATE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Rows 64·WARP_GROUP … of each of the program's tiles."""
    _descs, buffers, rings, tensors, tables, KeyEnds, strides, scale, num_tiles, num_heads = common
    queries, keys, values = buffers
    k_ready, k_empty, v_ready, v_empty, cleared = rings
    Q, Gate, Out, Branch, Lse = tensors
    stride_q, stride_qh, _stride_kh, _stride_vh, stride_g, stride_gh, stride_o, stride_oh, stride_b, stride_bh, stride_l = strides
    KEYS: gl.constexpr = keys.type.shape[1]
    DIM: gl.constexpr = keys.type.shape[2]
    QUERIES: gl.constexpr = 128 // GROUP
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    query_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_s, k_width=2)
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    query_tile = queries.index(WARP_GROUP)
    rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    wide_rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, mma_s))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    zeros = gl.zeros([64, KEYS], gl.float32, layout=mma_s)
    num_units, step = num_tiles * num_heads, gl.num_programs(0)
    place = place_of(gl.program_id(0), num_heads, tables, QUERIES)
    valid = (place[2] + wide_rows // GROUP < place[4]) & (wide_rows < QUERIES * GROUP)
    first_at = row_pointers(Q + place[0] * GROUP * stride_qh, place[3], stride_q, stride_qh, wide_rows, GROUP)
    query_tile.store(gl.load(first_at[:, None] + dims, mask=valid[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    done, clearings = 0, 0
    for index in range(gl.program_id(0), num_units, step):
        head, sequence, start, row, num_queries, first, last = place
        _first_key, num_keys = keys_of(KeyEnds, sequence)
        begin, all_begin, all_end, end = key_range(first, last, num_keys, STRIDE, OFFSET, WINDOW)
        count = gl.maximum(gl.cdiv(end - begin, KEYS), 1)
        group = head * GROUP

        query_rows = query_tile.load(query_layout)  # as an operand from registers: shared memory is nearly as busy as the tensor cores
        positions = first + rows // GROUP
        bounds = (all_begin, all_end)
        slot = await_tile(k_ready, done)
        scores = warpgroup_mma(query_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k_empty.index(slot), count=1)
        row_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, mma_s))
        p, row_max, decay = softmax_step(scores, row_max, scale, begin, bounds, columns, positions, STRIDE, OFFSET, WINDOW)
        row_sum = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(Q.dtype.element_ty), weight_layout)
        acc = gl.zeros([64, DIM], gl.float32, layout=mma_o)
        v_slot = await_tile(v_ready, done)
        for i in range(1, count):
            slot = await_tile(k_ready, done + i)
            coming = warpgroup_mma(query_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            before = v_slot
            adding = warpgroup_mma(weights, values.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[coming])
            mbarrier.arrive(k_empty.index(slot), count=1)
            p, row_max, decay = softmax_step(scores, row_max, scale, begin + i * KEYS, bounds, columns, positions, STRIDE, OFFSET, WINDOW)
            row_sum = row_sum * decay + gl.sum(p, 1)
            v_slot = await_tile(v_ready, done + i)  # here, as its branch keeps the compiler from waiting for the product before the exponents
            acc = warpgroup_mma_wait(0, deps=[adding])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, mma_o))[:, None]
            weights = gl.convert_layout(p.to(Q.dtype.element_ty), weight_layout)
        if begin + count * KEYS > num_keys:
            last_key = begin + (count - 1) * KEYS
            if KEYS == 128:
                clear_rows(values.index(v_slot).slice(WARP_GROUP * 64, 64), last_key + WARP_GROUP * 64, num_keys, wide)
            elif WARP_GROUP == 0:
                clear_rows(values.index(v_slot), last_key, num_keys, wide)
            await_clearing(cleared, clearings)
            clearings += 1
        adding = warpgroup_mma(weights, values.index(v_slot), acc, is_async=True)
        done += count
        more = index + step < num_units
        here, own_rows = anew(wide_rows, place), anew(rows, place)
        next_place = place_of(gl.minimum(index + step, num_units - 1), num_heads, tables, QUERIES)
        next_valid = (next_place[2] + here // GROUP < next_place[4]) & (here < QUERIES * GROUP) & more
        at = row_pointers(Q + next_place[0] * GROUP * stride_qh, next_place[3], stride_q, stride_qh, here, GROUP)
        next_q = gl.load(at[:, None] + dims, mask=next_valid[:, None], other=0.0)
        valid = (start + here // GROUP < num_queries) & (here < QUERIES * GROUP)
        out_at = row_pointers(Out + group * stride_oh, row, stride_o, stride_oh, here, GROUP)[:, None] + dims
        if ACCUMULATE:
            before = gl.load(out_at, mask=valid[:, None], other=0.0)
        gate = gl.load(row_pointers(Gate + group * stride_gh, row, stride_g, stride_gh, here, GROUP), mask=valid, other=0.0)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(v_slot), count=1)

        written = (start + own_rows // GROUP < num_queries) & (own_rows < QUERIES * GROUP)
        kept = ((Branch, Lse), (stride_b, stride_bh, stride_l))
        result = finish_rows(acc, row_max, row_sum, gate, *kept, group, row, own_rows, here, written, valid, dims, wide, mma_o, GROUP, KEEP)
        if ACCUMULATE:
            result += before.to(gl.float32)
        gl.store(out_at, result.to(Out.dtype.element_ty), mask=valid[:, None])
        gl.thread_barrier()
        query_tile.store(next_q)
        fence_async_shared()
        gl.thread_barrier()
        place = next_place


@gluon.jit(do_not_specialize=["num_tiles"])
def forward_kernel(
    k_desc, v_desc, tensors, tables, key_ends, strides, scale, num_tiles, num_heads,
    GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
    ACCUMULATE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Out (+)= gate · o, branch output and LSE of the tiles program, program + programs, …, heads of a tile side by side."""
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    queries = gl.allocate_shared_memory(k_desc.dtype, [2, 64, DIM], gl.NVMMASharedLayout.get_default_for([64, DIM], k_desc.dtype))
    keys = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, DIM], k_desc.layout)
    values = gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, DIM], v_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(cleared.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    rings = (k_ready, k_empty, v_ready, v_empty, cleared)
    common = ((k_desc, v_desc), (queries, keys, values), rings, tensors, tables, key_ends, strides, scale, num_tiles, num_heads)
    gl.warp_specialize(
        [
            (forward_rows, (common, 0, GROUP, STRIDE, OFFSET, WINDOW, ACCUMULATE, KEEP)),
            (forward_rows, (common, 1, GROUP, STRIDE, OFFSET, WINDOW, ACCUMULATE, KEEP)),
            (bring_tiles, (common, GROUP, STRIDE, OFFSET, WINDOW)),
        ],
        [4, 1],
        [240, 24],
    )


def copied_in_bulk(x: torch.Tensor) -> bool:
    """Whether the copy engine takes `x` `[rows, heads, dim]`: 16-byte aligned rows, a row's heads within its stride."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
    return x.shape[0] > 0 and aligned and x.stride(2) == 1 and (x.shape[1] - 1) * x.stride(1) + x.shape[2] <= x.stride(0)


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether these kernels compute the forward pass and dq for the tensors, given a GPU that runs them."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and k.shape[2] == v.shape[2]
        and k.shape[2] in (64, 128)
        and q.shape[1] // k.shape[1] <= 64
        and copied_in_bulk(k)
        and copied_in_bulk(v)
    )


def rows_aligned(x: torch.Tensor) -> bool:
    """Whether a thread can copy rows `[T, heads, D]` 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0 and x.stride(2) == 1


@lru_cache(maxsize=64)
def shared_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory. (Finding it takes longer than the rest of a view for the copy engine.)"""
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def key_descriptor(x: torch.Tensor, keys: int) -> TensorDescriptor:
    """The copy engine's view of k or v: tiles of `keys` rows of one head, whose place in a row is head · stride of heads."""
    box = [keys, x.shape[2]]
    return TensorDescriptor(x, [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]], [x.stride(0), 1], box, shared_layout(tuple(box), x.dtype))


@lru_cache(maxsize=8)
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; each runs one program."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward_ring(window: bool) -> tuple[int, int]:
    """Keys of a tile and how many tiles of K (and of V) lie in shared memory."""
    return (64, 3) if window else (128, 2)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, out: torch.Tensor, branch: torch.Tensor | None, lse: torch.Tensor,
    tables: tuple[torch.Tensor, ...], geometry: dict[str, int], *, scale: float, accumulate: bool,
) -> None:  # fmt: skip
    """`banded.banded_forward` on these kernels: writes out, branch (where given) and lse.

    Args:
        tables: query tiles of ROWS // group queries, ends of queries, of tokens and of the band's keys.
        geometry: STRIDE, OFFSET, WINDOW. scale: on q·k, times log2(e).
    """
    num_heads = k.shape[1]
    num_tiles, kept = tables[0].shape[0], out if branch is None else branch
    keys, stages = forward_ring(geometry["WINDOW"] > 0)
    strides = (*q.stride()[:2], k.stride(1), v.stride(1), *gate.stride(), *out.stride()[:2], *kept.stride()[:2], lse.stride(0))
    launch(
        forward_kernel, (min(num_tiles * num_heads, num_processors(q.device)),),
        key_descriptor(k, keys), key_descriptor(v, keys), (q, gate, out, kept, lse), tables[:3], tables[3], strides, scale, num_tiles, num_heads,
        GROUP=q.shape[1] // num_heads, **geometry, STAGES=stages, ACCUMULATE=accumulate, KEEP=branch is not None, num_warps=4,
    )  # fmt: skip
