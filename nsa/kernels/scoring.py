"""Block scores and the choice of the n best blocks (Eq. 8-12) without a score matrix.

Two kernels per chunk of query tiles. The first computes q·kc again from the compression branch's LSE and writes each
query's block scores to a scratch of bounded size; the second finds every row's n-th best score by bisecting its bits
between two bounds and writes the chosen blocks in ascending order. Tiles come in the order of what they see, so that a
chunk's rows are as wide as its first tile needs (a power of two). Both add in one fixed order and use no atomics. Leaves out the
compression branch itself (banded.py), whose LSE it needs.

A tile's S is [blocks, columns]: row b and residue r stand for compressed token b·(l'/d) + r, columns for (query, head).
A column's bits are dealt so that all heads of a query lie in one thread's registers of a wgmma accumulator: summing the
group takes no shuffles. A token counts for its own block and, near the block's end, for the next one; that share is
summed apart and moved down one row, so a tile starts one row before the blocks it stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nsa.blocks import num_blocks
from nsa.config import SparsityConfig
from nsa.kernels.launch import LOG2_E, dot_precision, padded
from nsa.kernels.tiles import KernelPlan

SCRATCH_BYTES = 2**28
"""Scores of a chunk take about this much memory; more where a chunk would otherwise not fill the GPU."""
MIN_PROGRAMS = 264
CHOOSE_SCORES = 1024
"""Scores a warp of the choosing kernel holds: 32 registers of each lane."""
MIN_WIDTH = 128
"""Narrowest rows of scores that are worth a launch of their own."""
FORCED = tl.constexpr(0x7F800000)
"""Key of a forced block: the bits of +inf, above those of every finite score."""


@dataclass(frozen=True, slots=True)
class ScoreTile:
    """Shape of a scoring program: `blocks` rows, `columns` = padded queries × heads."""

    blocks: int
    columns: int
    num_warps: int
    num_stages: int


def score_tile(key_dim: int, group: int, dtype: torch.dtype) -> ScoreTile:
    """The fixed table of tile shapes by padded key dimension, padded group and dtype."""
    if dtype == torch.float32:
        return ScoreTile(blocks=32, columns=max(64 if key_dim <= 128 else 32, group), num_warps=4, num_stages=1)
    return ScoreTile(blocks=64, columns=max(128, group), num_warps=4, num_stages=3 if key_dim <= 128 else 2)


@triton.jit
def sum_heads(x, BLOCKS: tl.constexpr, QUERIES: tl.constexpr, HIGH_HEADS: tl.constexpr, LOW_QUERIES: tl.constexpr, LOW_HEADS: tl.constexpr):
    """[blocks, columns] → [blocks, queries]: the sum over the heads of the group, in a fixed order."""
    split = tl.reshape(x, [BLOCKS, QUERIES // LOW_QUERIES, HIGH_HEADS, LOW_QUERIES, LOW_HEADS])
    return tl.reshape(tl.sum(tl.sum(split, axis=4), axis=2), [BLOCKS, QUERIES])


@triton.jit
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
    out_query = tl.arange(0, QUERIES)
    out = scores + ((tile * tl.num_programs(1) + kv_head).to(tl.int64) * QUERIES + out_query)[None, :] * width
    own = tl.zeros([BLOCKS, QUERIES * GROUP_PAD], tl.float32)
    following = tl.zeros([BLOCKS, QUERIES * GROUP_PAD], tl.float32)
    for masked in tl.static_range(2):
        if masked == 0:
            first_step, last_step = 0, unmasked * PER_BLOCK
        else:
            first_step, last_step = unmasked * PER_BLOCK, tl.cdiv(visible_blocks, BLOCKS - SHIFT) * PER_BLOCK
        for step in range(first_step, last_step):
            residue = step % PER_BLOCK
            block = step // PER_BLOCK * (BLOCKS - SHIFT) - SHIFT + block_row
            token = block * PER_BLOCK + residue
            readable = (token >= 0) & (token < num_compressed)
            key = tl.load(keys + token.to(tl.int64)[:, None] * kc_row + dim[None, :], mask=readable[:, None] & (dim < DIM)[None, :], other=0.0)
            p = tl.exp2(tl.dot(key, tl.trans(q_tile), input_precision=PRECISION) * scale_log2 - lse_log2[None, :])
            if masked == 1:
                p = tl.where(token[:, None] < seen[None, :], p, 0.0)
            own += p * tl.minimum(PER_BLOCK - residue, PER_TOKEN).to(tl.float32)
            if PER_TOKEN > 2:
                following += p * tl.maximum(residue + PER_TOKEN - PER_BLOCK, 0).to(tl.float32)
            if residue == PER_BLOCK - 1:
                total = sum_heads(own, BLOCKS, QUERIES, HIGH_HEADS, LOW_QUERIES, LOW_HEADS)
                if PER_TOKEN > 1:
                    if PER_TOKEN == 2:
                        moved = sum_heads(p, BLOCKS, QUERIES, HIGH_HEADS, LOW_QUERIES, LOW_HEADS)
                    else:
                        moved = sum_heads(following, BLOCKS, QUERIES, HIGH_HEADS, LOW_QUERIES, LOW_HEADS)
                    source = tl.broadcast_to(tl.maximum(block_row - 1, 0)[:, None], [BLOCKS, QUERIES])
                    moved = tl.gather(moved, source, 0)
                    total += tl.where((block > 0)[:, None], moved, 0.0)
                stored = (block_row >= SHIFT) & (block < visible_blocks)
                tl.store(out + block[:, None], total, mask=stored[:, None])
                own = tl.zeros([BLOCKS, QUERIES * GROUP_PAD], tl.float32)
                following = tl.zeros([BLOCKS, QUERIES * GROUP_PAD], tl.float32)


@triton.jit
def choose_kernel(
    scores, selection, tiles, query_ends, key_ends, first_tile, width,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, SELECT: tl.constexpr, NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr, WIDTH_PAD: tl.constexpr,
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
    block = tl.arange(0, WIDTH_PAD)[None, :]
    # Scores are >= 0, so their bits order as they do; the bounds keep whatever else there is below the forced blocks.
    source = scores + ((tile * num_kv_heads + kv_head).to(tl.int64) * QUERIES + inner) * width
    scored = tl.where(current >= CHOSEN, current, -1)
    bits = tl.load(source[:, None] + block, mask=block <= scored[:, None], other=0.0).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, 0), FORCED - 1)
    bits = tl.where((block < NUM_INIT) | (block > current[:, None] - NUM_LOCAL), FORCED, bits)
    bits = tl.where(block <= current[:, None], bits, -1)
    # At least CHOSEN blocks have bits >= low, fewer have bits >= high. Each of GROUPS >= CHOSEN groups of blocks (one group
    # a lane) has a block as good as the worst of the groups' best; none but the forced is better than the best.
    low, high = tl.zeros([ROWS], tl.int32), tl.full([ROWS], FORCED + 1, tl.int32)
    count = current + 1  # at most CHOSEN: so many blocks have bits >= low
    searching = (count > CHOSEN).to(tl.int32)
    GROUPS: tl.constexpr = max(32, CHOSEN_PAD)
    if WIDTH_PAD % (4 * GROUPS) == 0:
        best = tl.max(tl.max(tl.reshape(bits, [ROWS, WIDTH_PAD // (4 * GROUPS), GROUPS, 4]), axis=3), axis=1)
        low = tl.where(searching > 0, tl.maximum(tl.min(best, axis=1), 0), 0)
    if NUM_INIT + NUM_LOCAL < CHOSEN:
        high = tl.max(tl.where(bits < FORCED, bits, -1), axis=1) + 1
        searching = tl.where(high - low > 1, searching, 0)
    while tl.max(searching, axis=0) > 0:
        middle = low + (high - low) // 2
        reached = tl.sum((bits >= middle[:, None]).to(tl.int32), axis=1)
        rise, fall = (searching > 0) & (reached >= CHOSEN), (searching > 0) & (reached < CHOSEN)
        low, high, count = tl.where(rise, middle, low), tl.where(fall, middle, high), tl.where(rise, reached, count)
        searching = ((count > CHOSEN) & (high - low > 1)).to(tl.int32)
    taken = bits >= low[:, None]
    if tl.max(count, axis=0) > CHOSEN:  # some row's n-th best score is not its alone
        above, equal = bits > low[:, None], bits == low[:, None]
        ties = CHOSEN - tl.sum(above.to(tl.int32), axis=1)
        taken = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= ties[:, None]))
    place = tl.cumsum(taken.to(tl.int32), axis=1) - 1
    row = selection + ((query_start + query).to(tl.int64) * num_kv_heads + kv_head) * CHOSEN
    tl.store(row[:, None] + place, tl.broadcast_to(block, [ROWS, WIDTH_PAD]), mask=taken)
    slot = tl.arange(0, CHOSEN_PAD)[None, :]
    tl.store(row[:, None] + slot, -1, mask=(current >= 0)[:, None] & (slot > current[:, None]) & (slot < CHOSEN))


def score_chunks(plan: KernelPlan, config: SparsityConfig, *, queries: int, num_kv_heads: int, num_tiles: int) -> list[tuple[int, int, int]]:
    """(first tile, number of tiles, width) of the chunks of `plan.query_tiles(queries)`.

    The width is a power of two and at least the number of blocks that a query of the chunk sees. A chunk's scores, fp32
    `[tiles, Hkv, queries, width]`, take SCRATCH_BYTES, or what MIN_PROGRAMS programs need.
    """
    query_lengths, key_lengths = plan.host_query_ends.diff(), plan.host_key_ends.diff()
    width, first, chunks = triton.next_power_of_2(num_blocks(plan.max_key_length, config)), 0, []
    while first < num_tiles:
        end = num_tiles
        if width > MIN_WIDTH:  # tiles that may see more than width / 2 blocks: those whose first query is at `least` or later
            least = (width // 2) * config.select_block_size - queries + 1
            before = (least - (key_lengths - query_lengths)).clamp(min=0)
            end = int(((query_lengths + queries - 1) // queries - (before + queries - 1) // queries).clamp(min=0).sum())
        size = max(SCRATCH_BYTES // (num_kv_heads * queries * width * 4), -(-MIN_PROGRAMS // num_kv_heads))
        chunks += [(start, min(size, end - start), width) for start in range(first, end, size)]
        first, width = max(first, end), width // 2
    return chunks


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
    group_pad, dim_pad = triton.next_power_of_2(group), padded(key_dim)
    shape = score_tile(dim_pad, group_pad, q.dtype)
    queries = shape.columns // group_pad
    tiles = plan.query_tiles(queries)
    chunks = score_chunks(plan, config, queries=queries, num_kv_heads=num_kv_heads, num_tiles=tiles.shape[0])
    most = max(count * width for _, count, width in chunks)
    scores = torch.empty(most * num_kv_heads * queries if some_left_out else 1, dtype=torch.float32, device=q.device)
    for first, count, width in chunks:
        choosing = min(queries, max(1, CHOOSE_SCORES // width))
        if some_left_out:
            score_kernel[(count, num_kv_heads)](
                q, kc, lse, scores, tiles, plan.query_ends, plan.key_ends, plan.compressed_ends,
                q.stride(0), q.stride(1), kc.stride(0), kc.stride(1), lse.stride(0), lse.stride(1), first, width, scale * LOG2_E,
                GROUP=group, GROUP_PAD=group_pad, DIM=key_dim, DIM_PAD=dim_pad, QUERIES=queries, BLOCKS=shape.blocks,
                PER_BLOCK=config.select_block_size // config.compress_stride, PER_TOKEN=config.compress_block_size // config.compress_stride,
                STRIDE=config.compress_stride, LENGTH=config.compress_block_size, SELECT=config.select_block_size, CHOSEN=n,
                PRECISION=dot_precision(), num_warps=shape.num_warps, num_stages=shape.num_stages,
            )  # fmt: skip
        choose_kernel[(count * queries // choosing, num_kv_heads)](
            scores, selection, tiles, plan.query_ends, plan.key_ends, first, width,
            QUERIES=queries, ROWS=choosing, CHOSEN=n, CHOSEN_PAD=triton.next_power_of_2(n), SELECT=config.select_block_size,
            NUM_INIT=config.num_init_blocks, NUM_LOCAL=config.num_local_blocks, WIDTH_PAD=width,
            num_warps=min(16, max(1, width // CHOOSE_SCORES)),
        )  # fmt: skip
    return selection
