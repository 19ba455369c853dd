"""Hopper kernels of attention over bands of keys, in Gluon (banded.py says what they compute and when they are taken).

Two warp groups share each tile of keys, 64 rows of queries each, and wait for nothing of each other but for room for the
next tile: while one computes exponents the other keeps the tensor cores busy. Warp group 0 starts the bulk copies (TMA) of
K and V. There is no warp group for copies alone: a third one would leave 168 registers a thread, too few for the products
to stay asynchronous. A bulk copy may bring rows of a neighbouring sequence: the scores of those keys are masked, and rows
of V (K, q and dO, where they are factors of a gradient) are cleared in shared memory.

Every program works on a fixed list of tiles; while it writes the results of one, queries and first keys of the next are on
their way. Both bands of a tile may come one after the other: then its queries are read once. A tile's result depends on its own
sequence alone. Written for Triton 3.6's Gluon. Leaves out the backward pass (banded_hopper_dq.py, banded_hopper_dkdv.py).
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
def geometry_of(band, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SECOND: gl.constexpr):
    """Stride, offset and window of the kernel's band `band`: the first as told (WINDOW 0: unlimited), the second SECOND raw keys.

    They are known when compiled where there is one band; two share their code, as twice as much of it does not fit the
    instruction cache."""
    far: gl.constexpr = 1 << 30
    stride, offset, window = STRIDE, OFFSET, WINDOW if WINDOW > 0 else far
    if SECOND > 0:
        stride = gl.where(band == 0, STRIDE, 1)
        offset = gl.where(band == 0, OFFSET, 0)
        window = gl.where(band == 0, WINDOW if WINDOW > 0 else far, SECOND)
    return stride, offset, window


@gluon.jit
def key_range(first, last, num_keys, geometry):
    """Keys that queries at positions first … last see: begin, first key and end of those that all of them see, end."""
    stride, offset, window = geometry
    end = gl.minimum(gl.maximum(last - offset + stride, 0) // stride, num_keys)
    all_end = gl.minimum(gl.maximum(first - offset + stride, 0) // stride, num_keys)
    return gl.maximum(first - window + 1, 0), gl.maximum(last - window + 1, 0), all_end, end


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
def visible(keys, positions, geometry):
    """bool `[rows, keys]`: does the query at each position see each key."""
    stride, offset, window = geometry
    ends = keys[None, :] * stride + offset
    return (ends <= positions[:, None]) & (ends > positions[:, None] - window)


@gluon.jit
def clear_rows(tile, first, count, LAYOUT: gl.constexpr):
    """Zeros in those of a shared tile's 64 rows, the first of which is row `first` of a tensor of `count` rows, that come after the last."""
    present = first + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)) < count
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
def softmax_step(scores, row_max, scale, key, bounds, keys, positions, geometry):
    """Weights of a tile of keys against the new maximum (base 2), that maximum, and the factor on what came before."""
    all_begin, all_end = bounds
    if (key < all_begin) | (key + keys.shape[0] > all_end):
        scores = gl.where(visible(key + keys, positions, geometry), scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    return gl.exp2(scores * scale - shift[:, None]), new_max, gl.exp2(row_max - shift)


@gluon.jit
def either(band, first, second):
    """The first band's or the second one's."""
    chosen = first
    if band > 0:
        chosen = second
    return chosen


@gluon.jit
def fill_of(descs, buffers, ready, empty, number, row, column, band, SECOND: gl.constexpr):
    """`fill` from the band's own tensor."""
    if SECOND > 0:
        if band == 0:
            fill(descs[0], buffers, ready, empty, number, row, column)
        else:
            fill(descs[1], buffers, ready, empty, number, row, column)
    else:
        fill(descs[0], buffers, ready, empty, number, row, column)


@gluon.jit
def fill_first(sources, buffers, rings, done, item, SECOND: gl.constexpr):
    """Starts the copies of the first tiles of K and V of an item of work, after `done` others."""
    k_descs, v_descs, _key_ends, _strides = sources
    keys, values = buffers
    k_ready, k_empty, v_ready, v_empty, _cleared = rings
    stages: gl.constexpr = keys.type.shape[0]
    width: gl.constexpr = keys.type.shape[1]
    band, place, geometry, first_key, num_keys, k_column, v_column = item
    _head, _sequence, _start, _row, _num_queries, first, last = place
    begin, _, _, end = key_range(first, last, num_keys, geometry)
    key_row, count = first_key + begin, gl.maximum(gl.cdiv(end - begin, width), 1)
    for i in gl.static_range(stages):
        if i < count:
            fill_of(k_descs, keys, k_ready, k_empty, done + i, key_row + i * width, k_column, band, SECOND)
            if i < stages - 1:
                fill_of(v_descs, values, v_ready, v_empty, done + i, key_row + i * width, v_column, band, SECOND)


@gluon.jit
def item_of(number, num_heads, tables, sources, last, QUERIES: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr,
            SECOND: gl.constexpr):  # fmt: skip
    """The program's item of work `number`: band, place, geometry, first key, number of keys, their columns. Bands of a tile follow each other."""
    _k_descs, _v_descs, key_ends, strides = sources
    bands: gl.constexpr = 2 if SECOND > 0 else 1
    band = number % bands
    place = place_of(gl.minimum(gl.program_id(0) + number // bands * gl.num_programs(0), last), num_heads, tables, QUERIES)
    first_key, num_keys = keys_of(either(band, key_ends[0], key_ends[1]), place[1])
    k_column, v_column = place[0] * gl.where(band > 0, strides[2], strides[0]), place[0] * gl.where(band > 0, strides[3], strides[1])
    return band, place, geometry_of(band, STRIDE, OFFSET, WINDOW, SECOND), first_key, num_keys, k_column, v_column


@gluon.jit
def attend(
    query_rows, sources, buffers, rings, turns, item, rows, columns, zeros, nothing, scale,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, SECOND: gl.constexpr, SCORES: gl.constexpr, OUTPUT: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Online softmax of a tile over a band's keys: the last product on its way (Σ p·v), the place of its values, maxima, sums of p, new turns."""
    k_descs, v_descs, _key_ends, _strides = sources
    keys, values = buffers
    k_ready, k_empty, v_ready, v_empty, cleared = rings
    done, clearings = turns
    band, place, geometry, first_key, num_keys, k_column, v_column = item
    STAGES: gl.constexpr = keys.type.shape[0]
    KEYS: gl.constexpr = keys.type.shape[1]
    DTYPE: gl.constexpr = k_descs[0].dtype
    weight_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    _head, _sequence, _start, _row, _num_queries, first, last = place
    begin, all_begin, all_end, end = key_range(first, last, num_keys, geometry)
    count = gl.maximum(gl.cdiv(end - begin, KEYS), 1)
    key_row, positions, bounds = first_key + begin, first + rows // GROUP, (all_begin, all_end)

    slot = await_tile(k_ready, done)
    scores = warpgroup_mma(query_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(k_empty.index(slot), count=1)
    row_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    p, row_max, decay = softmax_step(scores, row_max, scale, begin, bounds, columns, positions, geometry)
    row_sum = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(DTYPE), weight_layout)
    acc = nothing
    for i in range(1, count):
        slot = await_tile(k_ready, done + i)
        coming = warpgroup_mma(query_rows, keys.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        v_slot = await_tile(v_ready, done + i - 1)
        adding = warpgroup_mma(weights, values.index(v_slot), acc, is_async=True)
        if WARP_GROUP == 0:
            later = i + STAGES - 1
            if later < count:
                fill_of(k_descs, keys, k_ready, k_empty, done + later, key_row + later * KEYS, k_column, band, SECOND)
            if later - 1 < count:
                fill_of(v_descs, values, v_ready, v_empty, done + later - 1, key_row + (later - 1) * KEYS, v_column, band, SECOND)
        scores = warpgroup_mma_wait(1, deps=[coming])
        mbarrier.arrive(k_empty.index(slot), count=1)
        p, row_max, decay = softmax_step(scores, row_max, scale, begin + i * KEYS, bounds, columns, positions, geometry)
        row_sum = row_sum * decay + gl.sum(p, 1)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT))[:, None]
        weights = gl.convert_layout(p.to(DTYPE), weight_layout)
    slot = await_tile(v_ready, done + count - 1)
    if begin + count * KEYS > num_keys:
        last_key = begin + (count - 1) * KEYS
        if KEYS == 128:
            clear_rows(values.index(slot).slice(WARP_GROUP * 64, 64), last_key + WARP_GROUP * 64, num_keys, WIDE)
        elif WARP_GROUP == 0:
            clear_rows(values.index(slot), last_key, num_keys, WIDE)
        await_clearing(cleared, clearings)
        clearings += 1
    adding = warpgroup_mma(weights, values.index(slot), acc, is_async=True)
    return adding, slot, row_max, row_sum, (done + count, clearings)


@gluon.jit
def outputs_of(band, results, SECOND: gl.constexpr):
    """Gate, branch output and LSE of a band, and their strides."""
    first, second, first_strides, second_strides = results
    gate, branch, lse = first
    stride_g, stride_gh, stride_b, stride_bh, stride_l = first_strides
    if SECOND > 0:
        gate, branch, lse = either(band, gate, second[0]), either(band, branch, second[1]), either(band, lse, second[2])
        stride_g, stride_gh = gl.where(band > 0, second_strides[0], stride_g), gl.where(band > 0, second_strides[1], stride_gh)
        stride_b, stride_bh = gl.where(band > 0, second_strides[2], stride_b), gl.where(band > 0, second_strides[3], stride_bh)
        stride_l = gl.where(band > 0, second_strides[4], stride_l)
    return gate, branch, lse, (stride_g, stride_gh, stride_b, stride_bh, stride_l)


@gluon.jit
def forward_rows(
    common,
    WARP_GROUP: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SECOND: gl.constexpr,
    ACCUMULATE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Rows 64·WARP_GROUP … of each of the program's tiles."""
    sources, queries, buffers, rings, tensors, results, tables, strides, scale, num_tiles, num_heads = common
    v_empty = rings[3]
    Q, Out = tensors
    stride_q, stride_qh, stride_o, stride_oh = strides
    KEYS: gl.constexpr = buffers[0].type.shape[1]
    DIM: gl.constexpr = buffers[0].type.shape[2]
    QUERIES: gl.constexpr = 128 // GROUP
    BANDS: gl.constexpr = 2 if SECOND > 0 else 1
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    query_tile = queries.index(WARP_GROUP)
    rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    wide_rows = WARP_GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, mma_s))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
    zeros = gl.zeros([64, KEYS], gl.float32, layout=mma_s)
    last = num_tiles * num_heads - 1
    num_items = (last - gl.program_id(0)) // gl.num_programs(0) * BANDS + BANDS
    item = item_of(0, num_heads, tables, sources, last, QUERIES, STRIDE, OFFSET, WINDOW, SECOND)
    place = item[1]
    if WARP_GROUP == 0:
        fill_first(sources, buffers, rings, 0, item, SECOND)
    valid = (place[2] + wide_rows // GROUP < place[4]) & (wide_rows < QUERIES * GROUP)
    first_at = row_pointers(Q + place[0] * GROUP * stride_qh, place[3], stride_q, stride_qh, wide_rows, GROUP)
    query_tile.store(gl.load(first_at[:, None] + dims, mask=valid[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    turns = (0, 0)
    for number in range(num_items):
        next_item = item_of(number + 1, num_heads, tables, sources, last, QUERIES, STRIDE, OFFSET, WINDOW, SECOND)
        next_place, more = next_item[1], number + 1 < num_items
        nothing = gl.zeros([64, DIM], gl.float32, layout=mma_o)
        adding, slot, row_max, row_sum, turns = attend(
            query_tile, sources, buffers, rings, turns, item, rows, columns, zeros, nothing, scale,
            WARP_GROUP, GROUP, SECOND, mma_s, mma_o, wide,
        )  # fmt: skip
        moves_on = more & (next_item[0] == 0)  # to other queries
        next_valid = (next_place[2] + wide_rows // GROUP < next_place[4]) & (wide_rows < QUERIES * GROUP) & moves_on
        at = row_pointers(Q + next_place[0] * GROUP * stride_qh, next_place[3], stride_q, stride_qh, wide_rows, GROUP)
        next_q = gl.load(at[:, None] + dims, mask=next_valid[:, None], other=0.0)
        if WARP_GROUP == 0:  # noqa: SIM102 (one is known when compiled, the other is not)
            if more:
                fill_first(sources, buffers, rings, turns[0], next_item, SECOND)
        band, place, _geometry, _first_key, _num_keys, _k_column, _v_column = item
        head, _sequence, start, row, num_queries, _first, _last = place
        group = head * GROUP
        Gate, Branch, Lse, result_strides = outputs_of(band, results, SECOND)
        stride_g, stride_gh, stride_b, stride_bh, stride_l = result_strides
        valid = (start + wide_rows // GROUP < num_queries) & (wide_rows < QUERIES * GROUP)
        out_at = row_pointers(Out + group * stride_oh, row, stride_o, stride_oh, wide_rows, GROUP)[:, None] + dims
        if ACCUMULATE:
            before = gl.load(out_at, mask=valid[:, None], other=0.0)
        elif SECOND > 0:
            before = gl.load(out_at, mask=valid[:, None] & (band > 0), other=0.0)
        gate = gl.load(row_pointers(Gate + group * stride_gh, row, stride_g, stride_gh, wide_rows, GROUP), mask=valid, other=0.0)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(slot), count=1)

        some = row_sum > 0
        total = gl.where(some, row_sum, 1.0)
        lse = gl.where(some, (row_max + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        written = (start + rows // GROUP < num_queries) & (rows < QUERIES * GROUP)
        gl.store(row_pointers(Lse + group, row, stride_l, 1, rows, GROUP), lse, mask=written)
        result = gl.convert_layout(acc / gl.convert_layout(total, gl.SliceLayout(1, mma_o))[:, None], wide)
        if KEEP:
            at = row_pointers(Branch + group * stride_bh, row, stride_b, stride_bh, wide_rows, GROUP)
            gl.store(at[:, None] + dims, result.to(Branch.dtype.element_ty), mask=valid[:, None])
        result = result * gate.to(gl.float32)[:, None]
        if ACCUMULATE or SECOND > 0:
            result += before.to(gl.float32)
        gl.store(out_at, result.to(Out.dtype.element_ty), mask=valid[:, None])
        if moves_on:
            gl.thread_barrier()
            query_tile.store(next_q)
            fence_async_shared()
            gl.thread_barrier()
        item = next_item


@gluon.jit(do_not_specialize=["num_tiles"])
def forward_kernel(
    k_desc, v_desc, k_desc_2, v_desc_2, tensors, tables, key_ends, key_strides, first_tensors, second_tensors, strides, first_strides, second_strides,
    scale, num_tiles, num_heads,
    GROUP: gl.constexpr, STRIDE: gl.constexpr, OFFSET: gl.constexpr, WINDOW: gl.constexpr, SECOND: gl.constexpr, STAGES: gl.constexpr,
    ACCUMULATE: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Out (+)= gate · o, branch output and LSE of the tiles program, program + programs, …, heads of a tile side by side.

    SECOND: the window of a second band, of raw keys, whose gate · o is added to Out; 0: there is none."""
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
    sources = ((k_desc, k_desc_2), (v_desc, v_desc_2), key_ends, key_strides)
    results = (first_tensors, second_tensors, first_strides, second_strides)
    common = (sources, queries, (keys, values), rings, tensors, results, tables, strides, scale, num_tiles, num_heads)
    gl.warp_specialize(
        [
            (forward_rows, (common, 0, GROUP, STRIDE, OFFSET, WINDOW, SECOND, ACCUMULATE, KEEP)),
            (forward_rows, (common, 1, GROUP, STRIDE, OFFSET, WINDOW, SECOND, ACCUMULATE, KEEP)),
        ],
        [4],
        [240],
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


def shared_layout(box: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def key_descriptor(x: torch.Tensor, keys: int) -> TensorDescriptor:
    """The copy engine's view of k or v: tiles of `keys` rows of one head, whose place in a row is head · stride of heads."""
    box = [keys, x.shape[2]]
    return TensorDescriptor(x, [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]], [x.stride(0), 1], box, shared_layout(box, x.dtype))


@lru_cache(maxsize=8)
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; each runs one program."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward_ring(window: bool) -> tuple[int, int]:
    """Keys of a tile and how many tiles of K (and of V) lie in shared memory, for a window alone or for anything else."""
    return (64, 3) if window else (128, 2)


def forward(
    q: torch.Tensor, bands: list[tuple[torch.Tensor, ...]], out: torch.Tensor, tables: tuple[torch.Tensor, ...], geometry: dict[str, int],
    second: int, *, scale: float, accumulate: bool, keep: bool,
) -> None:  # fmt: skip
    """`banded.banded_forward` on these kernels, for one band or for two, whose outputs are added up: writes out, branches and lse.

    Args:
        bands: one or two times k, v, ends of the band's keys, gate, branch (`out` unless `keep`), lse.
        tables: query tiles of ROWS // group queries, ends of queries and of tokens.
        geometry: STRIDE, OFFSET, WINDOW of the first band. second: the window of the second one, whose keys are raw ones; 0: there is none.
        scale: on q·k, times log2(e).
    """
    num_heads, num_tiles = bands[0][0].shape[1], tables[0].shape[0]
    keys, stages = forward_ring(geometry["WINDOW"] > 0)
    descriptors, key_ends, key_strides, tensors, strides = [], [], [], [], []
    for k, v, ends, gate, branch, lse in (bands[0], bands[-1]):
        descriptors += [key_descriptor(k, keys), key_descriptor(v, keys)]
        key_ends.append(ends)
        key_strides += [k.stride(1), v.stride(1)]
        tensors.append((gate, branch, lse))
        strides.append((*gate.stride(), *branch.stride()[:2], lse.stride(0)))
    launch(
        forward_kernel, (min(num_tiles * num_heads, num_processors(q.device)),),
        *descriptors, (q, out), tables, tuple(key_ends), tuple(key_strides), *tensors, (*q.stride()[:2], *out.stride()[:2]), *strides,
        scale, num_tiles, num_heads,
        GROUP=q.shape[1] // num_heads, **geometry, SECOND=second, STAGES=stages, ACCUMULATE=accumulate, KEEP=keep, num_warps=4,
    )  # fmt: skip
