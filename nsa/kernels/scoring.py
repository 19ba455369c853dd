"""Block scores and the choice of the n best blocks (Eq. 8-12) without a score matrix.

Two kernels per chunk of query tiles. The first (here, or for Hopper GPUs in scoring_hopper.py) computes q·kc again from the
compression branch's LSE and writes each query's block scores to a scratch of bounded size; the second finds every row's n-th
best score and writes the chosen blocks in ascending order. Tiles come in the order of what they see, so that a chunk's rows
are as wide as its first tile needs (a power of two). Both add in one fixed order and use no atomics. Leaves out the
compression branch itself (banded.py), whose LSE it needs.

A tile's S is [blocks, columns]: row b and residue r stand for compressed token b·(l'/d) + r, columns for (query, head).
A column's bits are dealt so that all heads of a query lie in one thread's registers of a wgmma accumulator: summing the
group takes no shuffles. A token counts for its own block and, near the block's end, for the next one; that share is
summed apart and moved down one row, so a tile starts one row before the blocks it stores.

A row of scores lies in one warp (rows of more than 1024 in several), as [repeats, lanes]: repeats in a lane's registers.
The n-th best of the lanes' best, found among few numbers, leaves few blocks too many; these are dropped one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from nsa.blocks import num_blocks
from nsa.config import SparsityConfig
from nsa.kernels.banded import runs_hopper_kernels
from nsa.kernels.launch import LOG2_E, dot_precision, launch, padded, power_of_two
from nsa.kernels.tiles import KernelPlan

SCRATCH_BYTES = 2**28
"""Scores of a chunk take about this much memory; more where a chunk would otherwise not fill the GPU."""
MIN_PROGRAMS = 264
CHOOSE_SCORES = 1024
"""Scores a warp of the choosing kernel holds: 32 registers of each lane."""
MIN_WIDTH = 128
"""Narrowest rows of scores that are worth a launch of their own."""
FEW = tl.constexpr(4)
"""So many blocks too many are dropped one by one; more by halving the range of their scores."""
chunk_lists: WeakKeyDictionary[KernelPlan, dict[tuple[int, ...], list[tuple[int, int, int]]]] = WeakKeyDictionary()
"""`score_chunks` of plans in use: every layer asks for the same."""
FORCED = tl.constexpr(0x7F800000)
"""Key of a forced block: the bits of +inf, above those of every finite score."""


@dataclass(frozen=True, slots=True)
class ScoreTile:
    """Shape of a scoring program: `blocks` rows, `columns` = padded queries × heads; `registers` a thread at most, None: the compiler's choice."""

    blocks: int
    columns: int
    num_warps: int
    num_stages: int
    registers: int | None


def score_tile(key_dim: int, group: int, dtype: torch.dtype) -> ScoreTile:
    """The fixed table of tile shapes by padded key dimension, padded group and dtype."""
    if dtype == torch.float32:
        return ScoreTile(blocks=32, columns=max(64 if key_dim <= 128 else 32, group), num_warps=8, num_stages=1, registers=None)
    # 168 registers: three programs an SM; larger keys leave no room in shared memory for that. Few heads are many queries to sum for.
    return ScoreTile(blocks=64, columns=max(128 if group >= 4 else 64, group), num_warps=4, num_stages=2, registers=168 if key_dim <= 128 else None)


@triton.jit
def sum_heads(x, BLOCKS: tl.constexpr, QUERIES: tl.constexpr, HIGH_HEADS: tl.constexpr, LOW_QUERIES: tl.constexpr, LOW_HEADS: tl.constexpr):
    """[blocks, columns] → [blocks, queries / LOW_QUERIES, LOW_QUERIES]: the sum over the heads of the group, in a fixed order."""
    split = tl.reshape(x, [BLOCKS, QUERIES // LOW_QUERIES, HIGH_HEADS, LOW_QUERIES, LOW_HEADS])
    return tl.sum(tl.sum(split, axis=4), axis=2)


@triton.jit(do_not_specialize=["first_tile"])
def score_kernel(
    q, kc, lse, scores, tiles, query_ends, key_ends, compressed_ends,
    q_row, q_head, kc_row, kc_head, lse_row, lse_head, first_tile, width, scale_log2,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr,
    PER_BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, SELECT: tl.constexpr, CHOSEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one query tile and KV head: fp32 [tile in chunk, Hkv, QUERIES, width]."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tiles + 2 * (first_tile + tile))
    start = tl.load(tiles + 2 * (first_tile + tile) + 1)
    query_start, query_end = tl.load(query_ends + sequence), tl.load(query_ends + sequence + 1)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    num_queries = query_end - query_start
    offset = key_end - key_start - num_queries
    last_position = tl.minimum(start + QUERIES, num_queries) - 1 + offset
    visible_blocks = last_position // SELECT + 1
    if visible_blocks <= CHOSEN:  # nothing to choose: every visible block is taken
        return
    LOW_HEADS: tl.constexpr = 2 if GROUP_PAD > 1 else 1
    HIGH_HEADS: tl.constexpr = GROUP_PAD // LOW_HEADS
    LOW_QUERIES: tl.constexpr = 4 if QUERIES >= 4 else QUERIES
    SHIFT: tl.constexpr = 1 if PER_TOKEN > 1 else 0
    column = tl.arange(0, QUERIES * GROUP_PAD)
    head = (column // (LOW_HEADS * LOW_QUERIES)) % HIGH_HEADS * LOW_HEADS + column % LOW_HEADS
    query = start + column // (LOW_HEADS * LOW_QUERIES * HIGH_HEADS) * LOW_QUERIES + (column // LOW_HEADS) % LOW_QUERIES
    valid = (query < num_queries) & (head < GROUP)
    row = (query_start + query).to(tl.int64)
    head = kv_head * GROUP + head
    dim = tl.arange(0, DIM_PAD)
    q_tile = tl.load(q + row[:, None] * q_row + head[:, None] * q_head + dim[None, :], mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)
    lse_log2 = tl.load(lse + row * lse_row + head * lse_head, mask=valid, other=float("inf")) * 1.4426950408889634
    lse_log2 = tl.where(lse_log2 == float("-inf"), 0.0, lse_log2)
    # compressed tokens that the tile's first query sees; tiles of blocks wholly below it need no mask
    seen_by_all = tl.maximum(start + offset + 1 - LENGTH + STRIDE, 0) // STRIDE
    seen = tl.maximum(query + offset + 1 - LENGTH + STRIDE, 0) // STRIDE
    unmasked = seen_by_all // ((BLOCKS - SHIFT) * PER_BLOCK)
    block_row = tl.arange(0, BLOCKS)
    # compressed_ends is int32, the products with strides are not
    keys = kc + tl.load(compressed_ends + sequence).to(tl.int64) * kc_row + kv_head * kc_head
    num_compressed = tl.load(compressed_ends + sequence + 1) - tl.load(compressed_ends + sequence)
    # offsets within a tile are int32 (see choose_blocks)
    key_rows = (block_row * PER_BLOCK * kc_row)[:, None] + dim[None, :]
    out = scores + (tile * tl.num_programs(1) + kv_head).to(tl.int64) * QUERIES * width
    out_rows = (tl.arange(0, QUERIES) * width)[None, :]
    own = tl.zeros([BLOCKS, QUERIES // LOW_QUERIES, LOW_QUERIES], tl.float32)
    following = tl.zeros([BLOCKS, QUERIES // LOW_QUERIES, LOW_QUERIES], tl.float32)
    for masked in tl.static_range(2):
        if masked == 0:
            first_step, last_step = 0, unmasked * PER_BLOCK
        else:
            first_step, last_step = unmasked * PER_BLOCK, tl.cdiv(visible_blocks, BLOCKS - SHIFT) * PER_BLOCK
        for step in range(first_step, last_step):
            residue = step % PER_BLOCK
            first_block = step // PER_BLOCK * (BLOCKS - SHIFT) - SHIFT
            block = first_block + block_row
            token = block * PER_BLOCK + residue
            readable = token >= 0
            if masked == 1:
                readable = readable & (token < num_compressed)
            mask = readable[:, None]
            if DIM < DIM_PAD:
                mask = mask & (dim < DIM)[None, :]
            key = tl.load(keys + (first_block * PER_BLOCK + residue).to(tl.int64) * kc_row + key_rows, mask=mask, other=0.0)
            p = tl.exp2(tl.dot(key, tl.trans(q_tile), input_precision=PRECISION) * scale_log2 - lse_log2[None, :])
            if masked == 1:
                p = tl.where(token[:, None] < seen[None, :], p, 0.0)
            p = sum_heads(p, BLOCKS, QUERIES, HIGH_HEADS, LOW_QUERIES, LOW_HEADS)
            own += p * tl.minimum(PER_BLOCK - residue, PER_TOKEN).to(tl.float32)
            if PER_TOKEN > 2:
                following += p * tl.maximum(residue + PER_TOKEN - PER_BLOCK, 0).to(tl.float32)
            if residue == PER_BLOCK - 1:
                total = tl.reshape(own, [BLOCKS, QUERIES])
                if PER_TOKEN > 1:
                    moved = tl.reshape(p if PER_TOKEN == 2 else following, [BLOCKS, QUERIES])
                    source = tl.broadcast_to(tl.maximum(block_row - 1, 0)[:, None], [BLOCKS, QUERIES])
                    moved = tl.gather(moved, source, 0)
                    total += tl.where((block > 0)[:, None], moved, 0.0)
                stored = (block_row >= SHIFT) & (block < visible_blocks)
                tl.store(out + (out_rows + block[:, None]), total, mask=stored[:, None])
                own = tl.zeros([BLOCKS, QUERIES // LOW_QUERIES, LOW_QUERIES], tl.float32)
                following = tl.zeros([BLOCKS, QUERIES // LOW_QUERIES, LOW_QUERIES], tl.float32)


@triton.jit
def rank(flags, REPEATS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MOST: tl.constexpr):
    """How many of its row's flags come before each, of int32 0 or 1 `[repeats, rows, lanes]`; a row has at most MOST set."""
    fours = tl.reshape(flags, [REPEATS, ROWS, LANES // 4, 4])
    counts = tl.sum(fours, axis=3)
    if MOST < 256 and REPEATS <= 8:  # a byte for each repeat: one scan over the lanes serves all
        shift = (8 * tl.arange(0, REPEATS))[:, None, None]
        packed = tl.sum(counts.to(tl.int64) << shift, axis=0)
        before = tl.cumsum(packed, axis=1) - packed + (tl.sum(packed, axis=1) * 0x0101010101010100)[:, None]
        first = ((before[None, :, :] >> shift) & 255).to(tl.int32)
    else:
        total = tl.sum(counts, axis=2)
        first = tl.cumsum(counts, axis=2) - counts + (tl.cumsum(total, axis=0) - total)[:, :, None]
    # Within a thread, step by step: a scan would carry them through shared memory.
    low, high = tl.split(tl.reshape(fours, [REPEATS, ROWS, LANES // 4, 2, 2]))
    flag_0, flag_2 = tl.split(low)
    flag_1, _ = tl.split(high)
    place_1 = first + flag_0
    place_2 = place_1 + flag_1
    places = tl.join(tl.join(first, place_2), tl.join(place_1, place_2 + flag_2))
    return tl.reshape(places, [REPEATS, ROWS, LANES])


@triton.jit
def at_least(bits, bound):
    """How many of each row's bits `[repeats, rows, lanes]`, all >= -1, are >= bound `[rows]`, which is >= 0."""
    return -tl.sum(tl.sum((bound[None, :, None] - 1 - bits) >> 31, axis=0), axis=1)


@triton.jit(do_not_specialize=["first_tile"])
def choose_kernel(
    scores, selection, tiles, query_ends, key_ends, first_tile, width,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, SELECT: tl.constexpr, NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one KV head: the CHOSEN best of each one's visible blocks, ascending, then -1."""
    tile, kv_head, num_kv_heads = tl.program_id(0) // (QUERIES // ROWS), tl.program_id(1), tl.num_programs(1)
    inner = tl.program_id(0) % (QUERIES // ROWS) * ROWS + tl.arange(0, ROWS)
    sequence = tl.load(tiles + 2 * (first_tile + tile))
    query = tl.load(tiles + 2 * (first_tile + tile) + 1) + inner
    query_start, query_end = tl.load(query_ends + sequence), tl.load(query_ends + sequence + 1)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    position = query + (key_end - key_start) - (query_end - query_start)
    current = tl.where(query < query_end - query_start, position // SELECT, -1)  # the query's own block; -1: no such query
    block = (tl.arange(0, REPEATS) * LANES)[:, None, None] + tl.arange(0, LANES)[None, None, :]
    back = current[None, :, None] - block
    # Scores are >= 0, so their bits order as they do; the bounds keep whatever else there is below the forced blocks.
    source = scores + ((tile * num_kv_heads + kv_head).to(tl.int64) * QUERIES + inner) * width
    # A row of the scratch has room for every block: without a mask along it four scores come at once.
    scored = tl.broadcast_to((current >= CHOSEN)[None, :, None], [REPEATS, ROWS, LANES])
    bits = tl.load(source[None, :, None] + block, mask=scored, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, 0), FORCED - 1)
    forced = (block < NUM_INIT) | (back < NUM_LOCAL)
    free = tl.where((back >= 0) & (forced == 0), bits, -1)
    bits = tl.where((back >= 0) & forced, FORCED, free)
    # At least CHOSEN blocks have bits >= low, fewer have bits >= high; count: how many have bits >= low.
    low, high, count = tl.zeros([ROWS], tl.int32), tl.full([ROWS], FORCED + 1, tl.int32), current + 1
    if NUM_INIT + NUM_LOCAL < CHOSEN:  # the forced blocks are fewer, and none but they are better than the best score
        high = tl.max(tl.max(free, axis=0), axis=1) + 1
    open_rows = (count > CHOSEN) & (high - low > 1)
    if REPEATS > 1 and LANES >= CHOSEN:
        best = tl.max(bits, axis=0)
        if LANES // 4 >= CHOSEN:  # each four lanes have a block as good as the worst fours' best
            low = tl.where(open_rows, tl.maximum(tl.min(tl.max(tl.reshape(best, [ROWS, LANES // 4, 4]), axis=2), axis=1), 0), 0)
        top, found = high, count
        searching = (open_rows & (top - low > 1)).to(tl.int32)
        while tl.max(searching, axis=0) > 0:
            middle = low + (top - low) // 2
            reached = -tl.sum((middle[:, None] - 1 - best) >> 31, axis=1)
            rise, fall = (searching > 0) & (reached >= CHOSEN), (searching > 0) & (reached < CHOSEN)
            low, top, found = tl.where(rise, middle, low), tl.where(fall, middle, top), tl.where(rise, reached, found)
            searching = ((searching > 0) & (found > CHOSEN) & (top - low > 1)).to(tl.int32)
        count = tl.where(open_rows, at_least(bits, low), count)
    searching = (open_rows & (count > CHOSEN) & (high - low > 1)).to(tl.int32)
    while tl.max(searching, axis=0) > 0:
        if tl.max(tl.where(searching > 0, count, 0), axis=0) <= CHOSEN + FEW:
            middle = tl.min(tl.min(tl.where(bits > low[None, :, None], bits, FORCED), axis=0), axis=1)  # the next score
            fallen = low + 1
        else:
            middle = low + (high - low) // 2
            fallen = middle
        reached = at_least(bits, middle)
        rise, fall = (searching > 0) & (reached >= CHOSEN), (searching > 0) & (reached < CHOSEN)
        low, high, count = tl.where(rise, middle, low), tl.where(fall, fallen, high), tl.where(rise, reached, count)
        searching = ((searching > 0) & (count > CHOSEN) & (high - low > 1)).to(tl.int32)
    taken = (bits >= low[None, :, None]).to(tl.int32)
    if tl.max(count, axis=0) > CHOSEN:  # some row's n-th best score is not its alone
        above, equal = (bits > low[None, :, None]).to(tl.int32), (bits == low[None, :, None]).to(tl.int32)
        ties = CHOSEN - tl.sum(tl.sum(above, axis=0), axis=1)
        taken = above + tl.where(rank(equal, REPEATS, ROWS, LANES, REPEATS * LANES) < ties[None, :, None], equal, 0)
    place = rank(taken, REPEATS, ROWS, LANES, CHOSEN)
    row = selection + ((query_start + query).to(tl.int64) * num_kv_heads + kv_head) * CHOSEN
    tl.store(row[None, :, None] + place, tl.broadcast_to(block, [REPEATS, ROWS, LANES]), mask=taken > 0)
    slot = tl.arange(0, CHOSEN_PAD)[None, :]
    tl.store(row[:, None] + slot, -1, mask=(current >= 0)[:, None] & (slot > current[:, None]) & (slot < CHOSEN))


def score_chunks(plan: KernelPlan, config: SparsityConfig, *, queries: int, num_kv_heads: int, num_tiles: int) -> list[tuple[int, int, int]]:
    """(first tile, number of tiles, width) of the chunks of `plan.query_tiles(queries)`, found once for a plan.

    The width is a power of two and at least the number of blocks that a query of the chunk sees. A chunk's scores, fp32
    `[tiles, Hkv, queries, width]`, take SCRATCH_BYTES, or what MIN_PROGRAMS programs need.
    """
    lists, key = chunk_lists.setdefault(plan, {}), (queries, num_kv_heads, num_tiles, SCRATCH_BYTES, MIN_PROGRAMS, MIN_WIDTH)
    if key in lists:
        return lists[key]
    query_lengths, key_lengths = plan.host_query_ends.diff(), plan.host_key_ends.diff()
    width, first, chunks = max(4, power_of_two(num_blocks(plan.max_key_length, config))), 0, []
    while first < num_tiles:
        end = num_tiles
        if width > MIN_WIDTH:  # tiles that may see more than width / 2 blocks: those whose first query is at `least` or later
            least = (width // 2) * config.select_block_size - queries + 1
            before = (least - (key_lengths - query_lengths)).clamp(min=0)
            end = int(((query_lengths + queries - 1) // queries - (before + queries - 1) // queries).clamp(min=0).sum())
        size = max(SCRATCH_BYTES // (num_kv_heads * queries * width * 4), -(-MIN_PROGRAMS // num_kv_heads))
        chunks += [(start, min(size, end - start), width) for start in range(first, end, size)]
        first, width = max(first, end), width // 2
    lists[key] = chunks
    return chunks


def hopper_kernels(q: torch.Tensor, kc: torch.Tensor, per_block: int, per_token: int) -> ModuleType | None:
    """The module of the Hopper kernel where it computes these scores; it is imported only where it can run."""
    if not kc.shape[0] or not runs_hopper_kernels(q.device):
        return None
    from nsa.kernels import scoring_hopper

    return scoring_hopper if scoring_hopper.takes(q, kc, per_block, per_token) else None


def choose_blocks(q: torch.Tensor, kc: torch.Tensor, lse: torch.Tensor, plan: KernelPlan, config: SparsityConfig, *, scale: float) -> torch.Tensor:
    """The n blocks each query attends to (Eq. 8-12): forced initial and local blocks, then the best by score.

    Args:
        q: `[T, Hq, Dk]`. kc: compressed keys `[C, Hkv, Dk]` in q's dtype. The last dimension of both is contiguous.
        lse: fp32 `[T, Hq]`, the compression branch's natural log of Σ exp(scale·q·k); -inf where nothing is visible.
        plan: rows of the sequences. scale: factor on q·k.
    Returns:
        int32 `[T, Hkv, n]`: block numbers from the sequence's start, ascending, then -1. Ties go to the lower block.
    """
    num_kv_heads, group, key_dim, n = kc.shape[1], q.shape[1] // kc.shape[1], q.shape[2], config.num_selected_blocks
    selection = torch.empty(q.shape[0], num_kv_heads, n, dtype=torch.int32, device=q.device)
    if not selection.numel():
        return selection
    some_left_out = num_blocks(plan.max_key_length, config) > n
    group_pad, dim_pad = power_of_two(group), padded(key_dim)
    shape = score_tile(dim_pad, group_pad, q.dtype)
    per_block, per_token = config.select_block_size // config.compress_stride, config.compress_block_size // config.compress_stride
    hopper = hopper_kernels(q, kc, per_block, per_token)
    queries = (hopper.COLUMNS if hopper else shape.columns) // group_pad
    if hopper and some_left_out:
        kc = hopper.whole_blocks(kc, per_block)
    if kc.stride(0) * shape.blocks * per_block >= 2**31:
        kc = kc.contiguous()
    tiles = plan.query_tiles(queries)
    chunks = score_chunks(plan, config, queries=queries, num_kv_heads=num_kv_heads, num_tiles=tiles.shape[0])
    most = max(count * width for _, count, width in chunks)
    scores = torch.empty(most * num_kv_heads * queries if some_left_out else 1, dtype=torch.float32, device=q.device)
    tables = (tiles, plan.query_ends, plan.key_ends, plan.compressed_ends)
    constants = {"GROUP": group, "GROUP_PAD": group_pad, "PER_BLOCK": per_block, "STRIDE": config.compress_stride}
    constants |= {"LENGTH": config.compress_block_size, "SELECT": config.select_block_size, "CHOSEN": n}
    for first, count, width in chunks:
        if some_left_out and hopper:
            hopper.write_scores(
                q, kc, lse, scores, tables, (first, count, width), constants, scale=scale * LOG2_E
            )  # fmt: skip
        elif some_left_out:
            launch(
                score_kernel, (count, num_kv_heads), q, kc, lse, scores, *tables,
                *q.stride()[:2], *kc.stride()[:2], *lse.stride(), first, width, scale * LOG2_E,
                **constants, DIM=key_dim, DIM_PAD=dim_pad, QUERIES=queries, BLOCKS=shape.blocks, PER_TOKEN=per_token,
                PRECISION=dot_precision(), num_warps=shape.num_warps, num_stages=shape.num_stages, maxnreg=shape.registers,
            )  # fmt: skip
        rows, warps = min(queries, max(1, CHOOSE_SCORES // width)), min(16, max(1, width // CHOOSE_SCORES))
        lanes = min(width, 128 * warps)
        launch(
            choose_kernel, (count * queries // rows, num_kv_heads), scores, selection, tiles, plan.query_ends, plan.key_ends, first, width,
            QUERIES=queries, ROWS=rows, CHOSEN=n, CHOSEN_PAD=power_of_two(n), SELECT=config.select_block_size,
            NUM_INIT=config.num_init_blocks, NUM_LOCAL=config.num_local_blocks, REPEATS=width // lanes, LANES=lanes, num_warps=warps,
        )  # fmt: skip
    return selection
