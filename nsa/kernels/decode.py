"""Decode attention over the paged cache: the last few queries of each sequence, in four launches that a CUDA graph can hold.

1. `compression_kernel`: compressed tokens, split along the sequence; also each block's share of the score, per head.
2. `score_kernel`: block scores (the heads' shares, normalised), and the best n blocks of each chunk of blocks.
3. `blocks_kernel`: the best n of those; attention over the chosen blocks and over the window's, split by blocks.
4. `combine_kernel`: partial results of the three branches, times the gates.

Grids depend on shapes alone; programs past a sequence's end leave at once.

Every partial sum is kept relative to a whole power of two, so rescaling is exact, and outputs are summed over a fixed binary tree
of leaves (`tree_sum`). Other sums have tiles of one shape, and no layout depends on the capacity (`do_not_specialize`). So neither
the batch nor how many leaves a program takes changes a bit of a result, and equal logits give equal scores wherever they stand.
Leaves out prefill, φ (the cache holds its outputs) and gradients.

Names: m queries per sequence, rows = m·G of one KV head, row r = (query r // G, head r % G). Slot s of a sequence's
compressed pages holds compressed token s − first with first = l/d − 1, complete once the sequence has (s+1)·d tokens; the
l'/d slots of one block form a group. Block j scores the slots of group j and the first `first` of group j+1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nsa.attention import RECOMPUTE as RECOMPUTE_MARK
from nsa.attention import LayerCache
from nsa.blocks import num_blocks, selection_dtype
from nsa.config import SparsityConfig
from nsa.kernels.launch import LOG2_E, dot_precision, padded

NOTHING = tl.constexpr(-1.0e6)
"""Stands for the logit (base 2) of what is not visible."""
RECOMPUTE = tl.constexpr(RECOMPUTE_MARK)
STATISTICS = tl.constexpr(32)
"""Leaves whose maxima and sums are read at once."""
MIN_PROGRAMS = 512
"""A program takes several leaves where at least this many programs remain: four to each of an H100's SMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """Tile sizes of the four kernels. All but the numbers of leaves change results, by rounding."""

    leaf: int
    """Compressed slots of one leaf, a power of two >= 16."""
    rows: int
    """Rows (query, head) of one program of the compression kernel, a power of two >= 16."""
    compression_leaves: int
    """Leaves of one program of the compression kernel: 1, 2 or 4."""
    block_tile: int
    """Tokens of one leaf of the chosen and window blocks, a power of two >= 16."""
    block_leaves: int
    """Leaves of one program of the blocks kernel: 1, 2 or 4."""
    chunk: int
    """Blocks of which one program of the score kernel keeps the best n: a power of two >= n."""
    warps: int = 4
    """Warps of a program of the compression kernel."""
    stages: int = 1
    """Pipeline stages of the loops over leaves."""


def decode_tiles(q: torch.Tensor, cache: LayerCache, capacity: int, config: SparsityConfig) -> DecodeTiles:
    """The tiles for queries `[B, m, Hq, Dk]` and sequences of at most `capacity` tokens."""
    batch, num_new, num_heads, _ = q.shape
    heads, group = cache.num_kv_heads, num_heads // cache.num_kv_heads
    row_bytes = padded(max(cache.key_dim, cache.value_dim)) * cache.cmp.element_size()
    per_block = config.select_block_size // config.compress_stride
    rows = min(padded(num_new * group), max(16, 32768 // row_bytes), 128)
    leaf = max(min(128 if rows < 128 else 64, max(16, 32768 // row_bytes)), triton.next_power_of_2(per_block))
    block_tile = min(padded(config.select_block_size), 64, max(16, 32768 // row_bytes))
    leaves = -(-num_blocks(capacity, config) // (leaf // triton.next_power_of_2(per_block)))
    compression = batch * heads * -(-num_new * group // rows) * leaves
    blocks = batch * num_new * heads * sum(block_leaf_counts(config, block_tile))
    count = num_blocks(capacity, config)
    chunk = 128 if count <= 4096 else 512
    return DecodeTiles(
        leaf=leaf,
        rows=rows,
        compression_leaves=next((k for k in (4, 2) if compression // k >= MIN_PROGRAMS), 1),
        block_tile=block_tile,
        block_leaves=next((k for k in (4, 2) if blocks // k >= MIN_PROGRAMS), 1),
        chunk=max(chunk, triton.next_power_of_2(config.num_selected_blocks)),
        warps=8 if rows >= 64 else 4,
    )


def block_leaf_counts(config: SparsityConfig, tile: int) -> tuple[int, int]:
    """Leaves of `tile` tokens of the chosen blocks and of the window's, each rounded up to a multiple of 4."""
    size = config.select_block_size
    per_block = -(-size // tile)
    window = ((config.window_size + size - 2) // size + 1) * per_block
    return -(-config.num_selected_blocks * per_block // 4) * 4, -(-window // 4) * 4


@triton.jit
def power_of_two(exponent):
    """2**exponent of whole fp32 numbers <= 0, exactly; 0 below -126."""
    return ((tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tree_sum(x):
    """Sum over the first dimension, neighbours first: padding with zeros or summing aligned parts beforehand changes no bit."""
    for _ in tl.static_range(10):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), 1)
    return tl.reshape(x, (x.shape[1],))


@triton.jit
def attend_leaf(q, k, v, visible, scale, PRECISION: tl.constexpr):
    """Weights 2**(logit - top) `[R, S]` of one leaf, their sum and whole-numbered top `[R]`, and weights·v `[R, Dv]`."""
    logits = tl.where(visible, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, NOTHING)
    top = tl.maximum(tl.ceil(tl.max(logits, 1)), NOTHING)
    whole = tl.floor(logits)
    weights = tl.where(visible, tl.exp2(logits - whole) * power_of_two(whole - top[:, None]), 0.0)
    return weights, tl.sum(weights, 1), top, tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def merge(out, top, other_out, other_top):
    """The sum of two partial outputs `[R, Dv]`, each relative to 2**top `[R]`."""
    both = tl.maximum(top, other_top)
    return out * power_of_two(top - both)[:, None] + other_out * power_of_two(other_top - both)[:, None], both


@triton.jit(do_not_specialize=["num_leaves", "num_parts"])
def compression_kernel(
    q, cmp, block_table, seq_lens, leaf_top, leaf_sum, part_top, part_out, own_scores, next_scores, scale,
    q_batch, q_row, q_head, cmp_page, cmp_slot, cmp_head, table_batch, num_leaves, num_parts,
    HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_NEW: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK2: tl.constexpr, DV2: tl.constexpr,
    STRIDE: tl.constexpr, FIRST: tl.constexpr, PER_BLOCK: tl.constexpr, PER_BLOCK2: tl.constexpr, PER_PAGE: tl.constexpr,
    LEAF: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one KV head over LEAVES leaves of compressed tokens.

    Writes per leaf top and sum `[B, Hkv, rows, leaves]`, per program top `[B, Hkv, rows, parts]` and output `[…, parts, Dv]`, and
    per group of slots the weighted sums that go to the block of the same number and to the one before `[B, Hkv, rows, groups]`."""
    GROUPS: tl.constexpr = LEAF // PER_BLOCK2
    head, part = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    num_slots = length // STRIDE
    if part * (LEAVES * GROUPS * PER_BLOCK) >= num_slots:
        return
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = rows < NUM_NEW * GROUP
    positions = tl.maximum(length - NUM_NEW + rows // GROUP, 0)
    dk, dv = tl.arange(0, DK2), tl.arange(0, DV2)
    q_rows = q + batch * q_batch + (rows // GROUP) * q_row + (head * GROUP + rows % GROUP) * q_head
    queries = tl.load(q_rows[:, None] + dk[None, :], mask=real[:, None] & (dk < DK)[None, :], other=0.0)
    row_base = (batch * HEADS + head) * (NUM_NEW * GROUP) + rows

    column = tl.arange(0, LEAF)
    offset = column % PER_BLOCK2
    in_group = tl.arange(0, PER_BLOCK2)[None, None, :]
    out, top = tl.zeros([ROWS, DV2], tl.float32), tl.full([ROWS], NOTHING, tl.float32)
    pair_out, pair_top = out, top
    for step in range(LEAVES):
        leaf = part * LEAVES + step
        slots = (leaf * GROUPS + column // PER_BLOCK2) * PER_BLOCK + offset
        filled = (offset < PER_BLOCK) & (slots >= FIRST) & (slots < num_slots)
        pages = tl.load(block_table + batch * table_batch + slots // PER_PAGE, mask=filled, other=0).to(tl.int64)
        token = cmp + pages * cmp_page + (slots % PER_PAGE) * cmp_slot + head * cmp_head
        k = tl.load(token[:, None] + dk[None, :], mask=filled[:, None] & (dk < DK)[None, :], other=0.0).to(queries.dtype)
        v = tl.load(token[:, None] + (DK + dv)[None, :], mask=filled[:, None] & (dv < DV)[None, :], other=0.0).to(queries.dtype)
        visible = filled[None, :] & ((slots * STRIDE + (STRIDE - 1))[None, :] <= positions[:, None])
        weights, total, this_top, this_out = attend_leaf(queries, k, v, visible, scale, PRECISION)
        written = rows < tl.where(leaf < num_leaves, NUM_NEW * GROUP, 0)
        tl.store(leaf_top + row_base * num_leaves + leaf, this_top, mask=written)
        tl.store(leaf_sum + row_base * num_leaves + leaf, total, mask=written)
        if SCORES:
            grouped = tl.reshape(weights, (ROWS, GROUPS, PER_BLOCK2))
            places = row_base[:, None] * (num_leaves * GROUPS) + leaf * GROUPS + tl.arange(0, GROUPS)[None, :]
            own = tl.sum(grouped * tl.minimum(in_group + 1, FIRST + 1).to(tl.float32), 2)
            tl.store(own_scores + places, own, mask=written[:, None])
            if FIRST > 0:
                before = tl.sum(grouped * tl.maximum(FIRST - in_group, 0).to(tl.float32), 2)
                tl.store(next_scores + places, before, mask=written[:, None])
        if LEAVES == 1:
            out, top = this_out, this_top
        else:
            pair_out, pair_top = merge(pair_out, pair_top, this_out, this_top)
            if step % 2 == 1:
                out, top = merge(out, top, pair_out, pair_top)
                pair_out, pair_top = tl.zeros([ROWS, DV2], tl.float32), tl.full([ROWS], NOTHING, tl.float32)
    tl.store(part_top + row_base * num_parts + part, top, mask=real)
    target = (row_base * num_parts + part) * DV
    tl.store(part_out + target[:, None] + dv[None, :], out, mask=real[:, None] & (dv < DV)[None, :])


@triton.jit
def leaf_statistics(leaf_top, leaf_sum, rows, real, num_leaves, stride, ROWS: tl.constexpr):
    """Top and normaliser `[ROWS]` of rows whose leaves' tops and sums lie at `rows·stride`."""
    leaf = tl.arange(0, STATISTICS)
    top = tl.full([ROWS], NOTHING, tl.float32)
    for start in range(0, num_leaves, STATISTICS):
        inside = (start + leaf < num_leaves)[:, None] & real[None, :]
        top = tl.maximum(top, tl.max(tl.load(leaf_top + (rows * stride)[None, :] + (start + leaf)[:, None], mask=inside, other=NOTHING), 0))
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_leaves, STATISTICS):
        inside = (start + leaf < num_leaves)[:, None] & real[None, :]
        places = (rows * stride)[None, :] + (start + leaf)[:, None]
        sums = tl.load(leaf_sum + places, mask=inside, other=0.0)
        total += tl.sum(sums * power_of_two(tl.load(leaf_top + places, mask=inside, other=NOTHING) - top[None, :]), 0)
    return top, total


@triton.jit(do_not_specialize=["num_leaves", "num_chunks"])
def score_kernel(
    leaf_top, leaf_sum, own_scores, next_scores, chunk_keys, candidates, given, seq_lens, given_batch, given_row, given_head, num_leaves, num_chunks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP2: tl.constexpr, NUM_NEW: tl.constexpr, STRIDE: tl.constexpr, FIRST: tl.constexpr,
    PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, NUM: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    CHUNK: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The best NUM of CHUNK blocks for one query and KV head: keys int64 `[B, m, Hkv, chunks, NUM]`, best first.

    A key is the score's bits, then the block number, lower ones greater; negative = no block."""
    head, chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    query, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    current = tl.maximum(length - NUM_NEW + query, 0) // SIZE
    if (length == 0) | (chunk * CHUNK > current):
        return
    if GIVEN:  # noqa: SIM102 (one is static)
        if tl.load(given + batch * given_batch + query * given_row + head * given_head).to(tl.int32) != RECOMPUTE:
            return
    member = tl.arange(0, GROUP2)
    real = member < GROUP
    rows = ((batch * HEADS + head) * NUM_NEW + query) * GROUP + member
    filled_leaves = tl.cdiv(length // STRIDE, GROUPS * PER_BLOCK)
    top, total = leaf_statistics(leaf_top, leaf_sum, rows, real, filled_leaves, num_leaves, GROUP2)
    inverse = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)

    blocks = chunk * CHUNK + tl.arange(0, CHUNK)
    shares = tl.zeros([GROUP2, CHUNK], tl.float32)
    for shift in tl.static_range(2 if FIRST > 0 else 1):
        groups = blocks + shift
        inside = real[:, None] & (groups < filled_leaves * GROUPS)[None, :]
        scores = own_scores if shift == 0 else next_scores
        share = tl.load(scores + (rows * (num_leaves * GROUPS))[:, None] + groups[None, :], mask=inside, other=0.0)
        share_top = tl.load(leaf_top + (rows * num_leaves)[:, None] + (groups // GROUPS)[None, :], mask=inside, other=NOTHING)
        shares += share * power_of_two(share_top - top[:, None])
    score = tl.sum(shares * inverse[:, None], 0)

    forced = (blocks < NUM_INIT) | (blocks > current - NUM_LOCAL)
    bits = tl.where(forced, 0x7F800000, score.to(tl.int32, bitcast=True)).to(tl.int64)
    keys = tl.where(blocks <= current, (bits << 32) | (0x7FFFFFFF - blocks).to(tl.int64), -1 - blocks.to(tl.int64))
    # Through memory, so that the ranking does not inherit the scores' layout, which repeats every element in many threads.
    place = ((batch * NUM_NEW + query) * HEADS + head) * num_chunks + chunk
    column = tl.arange(0, CHUNK)
    tl.store(chunk_keys + place * CHUNK + column, keys)
    tl.debug_barrier()
    mine = tl.load(chunk_keys + place * CHUNK + column)
    ranks = tl.zeros([CHUNK], tl.int32)
    SLICE: tl.constexpr = 32 if CHUNK > 32 else CHUNK
    for start in range(0, CHUNK, SLICE):
        others = tl.load(chunk_keys + place * CHUNK + start + tl.arange(0, SLICE))
        ranks += tl.sum((others[None, :] > mine[:, None]).to(tl.int32), 1)
    tl.store(candidates + place * NUM + ranks, mine, mask=ranks < NUM)


@triton.jit
def best_blocks(candidates, num_chunks, NUM: tl.constexpr, NUM2: tl.constexpr, CANDIDATES: tl.constexpr):
    """The NUM best of `num_chunks`·NUM keys: block numbers `[NUM2]` ascending, then −1."""
    entry, order = tl.arange(0, CANDIDATES), tl.arange(0, NUM2)
    keys = tl.load(candidates + entry, mask=entry < num_chunks * NUM, other=-1)
    ranks = tl.zeros([CANDIDATES], tl.int32)
    for chunk in range(num_chunks):
        others = tl.load(candidates + chunk * NUM + order, mask=order < NUM, other=-1)
        ranks += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), 1)
    chosen = (keys >= 0) & (ranks < NUM)
    blocks = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    plus_one = tl.sum(tl.where(chosen[None, :] & (ranks[None, :] == order[:, None]), blocks[None, :] + 1, 0), 1)
    taken = tl.where(plus_one > 0, plus_one, 0x7FFFFFFF - order)
    places = tl.sum((taken[None, :] < taken[:, None]).to(tl.int32), 1)
    ascending = tl.sum(tl.where(places[None, :] == order[:, None], plus_one[None, :], 0), 1) - 1
    return ascending


@triton.jit(do_not_specialize=["num_chunks", "num_blocks"])
def blocks_kernel(
    q, raw, block_table, seq_lens, candidates, given, selection, leaf_top, leaf_sum, part_top, part_out, scale,
    q_batch, q_row, q_head, raw_page, raw_kind, raw_slot, raw_head, table_batch, given_batch, given_row, given_head, given_entry, num_chunks,
    num_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP2: tl.constexpr, NUM_NEW: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK2: tl.constexpr,
    DV2: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, NUM: tl.constexpr, NUM2: tl.constexpr,
    CHUNK: tl.constexpr, CANDIDATES: tl.constexpr, CHOSEN_SET: tl.constexpr, WINDOW_SET: tl.constexpr, CHOSEN_LEAVES: tl.constexpr,
    ALL_LEAVES: tl.constexpr, LEAVES: tl.constexpr, SCORES: tl.constexpr, GIVEN: tl.constexpr, RETURN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query's heads of one KV head over LEAVES leaves, of the chosen blocks (the first CHOSEN_LEAVES leaves) or the window's.

    Writes per leaf top and sum `[B, m, Hq, leaves]`, per program top `[B, m, Hq, parts]` and output `[…, parts, Dv]`; the first program
    also the selection."""
    PER_BLOCK: tl.constexpr = (SIZE + TILE - 1) // TILE
    PARTS: tl.constexpr = ALL_LEAVES // LEAVES
    head, part = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    query, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    order = tl.arange(0, NUM2)
    entry = (batch * NUM_NEW + query) * HEADS + head
    if length == 0:
        if RETURN & (part == 0):
            tl.store(selection + entry * NUM + order, tl.full([NUM2], -1, tl.int32).to(selection.dtype.element_ty), mask=order < NUM)
        return
    position = tl.maximum(length - NUM_NEW + query, 0)
    is_window = part * LEAVES >= CHOSEN_LEAVES
    start = tl.maximum(position - (WINDOW - 1), 0) // SIZE
    lowest = tl.where(is_window, position - (WINDOW - 1), 0)
    chosen = start + order
    if not is_window:
        if SCORES:
            chosen = best_blocks(candidates + entry * num_chunks * NUM, tl.minimum(position // SIZE // CHUNK + 1, num_chunks), NUM, NUM2, CANDIDATES)
        else:
            chosen = tl.where(order <= position // SIZE, order, -1)
        if GIVEN:
            row = given + batch * given_batch + query * given_row + head * given_head
            replayed = tl.load(row + order * given_entry, mask=order < NUM, other=-1).to(tl.int32)
            chosen = tl.where(tl.load(row).to(tl.int32) == RECOMPUTE, chosen, replayed)
        if RETURN & (part == 0):
            tl.store(selection + entry * NUM + order, chosen.to(selection.dtype.element_ty), mask=order < NUM)

    member = tl.arange(0, GROUP2)
    real = member < GROUP
    dk, dv, token = tl.arange(0, DK2), tl.arange(0, DV2), tl.arange(0, TILE)
    q_rows = q + batch * q_batch + query * q_row + (head * GROUP + member) * q_head
    queries = tl.load(q_rows[:, None] + dk[None, :], mask=real[:, None] & (dk < DK)[None, :], other=0.0)
    rows = entry * GROUP + member
    heads_row = raw + (head + tl.where(is_window, WINDOW_SET, CHOSEN_SET) * HEADS) * raw_head
    out, top = tl.zeros([GROUP2, DV2], tl.float32), tl.full([GROUP2], NOTHING, tl.float32)
    pair_out, pair_top = out, top
    for step in range(LEAVES):
        leaf = part * LEAVES + step
        number = tl.where(is_window, leaf - CHOSEN_LEAVES, leaf) // PER_BLOCK
        listed = tl.sum(tl.where(order == number, chosen, 0))
        block = tl.where(is_window, start + number, tl.where(number < NUM, listed, -1))
        within = (leaf % PER_BLOCK) * TILE + token
        tokens = block * SIZE + within
        there = (block >= 0) & (block < num_blocks)
        present = (within < SIZE) & (tokens >= lowest) & (tokens <= tl.where(there, position, -1))
        page = tl.load(block_table + batch * table_batch + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0).to(tl.int64)
        line = heads_row + page * raw_page + ((block * SIZE) % PAGE + within) * raw_slot
        k = tl.load(line[:, None] + dk[None, :], mask=present[:, None] & (dk < DK)[None, :], other=0.0).to(queries.dtype)
        v = tl.load((line + raw_kind)[:, None] + dv[None, :], mask=present[:, None] & (dv < DV)[None, :], other=0.0).to(queries.dtype)
        _weights, total, this_top, this_out = attend_leaf(queries, k, v, present[None, :] & (member >= 0)[:, None], scale, PRECISION)
        tl.store(leaf_top + rows * ALL_LEAVES + leaf, this_top, mask=real)
        tl.store(leaf_sum + rows * ALL_LEAVES + leaf, total, mask=real)
        if LEAVES == 1:
            out, top = this_out, this_top
        else:
            pair_out, pair_top = merge(pair_out, pair_top, this_out, this_top)
            if step % 2 == 1:
                out, top = merge(out, top, pair_out, pair_top)
                pair_out, pair_top = tl.zeros([GROUP2, DV2], tl.float32), tl.full([GROUP2], NOTHING, tl.float32)
    tl.store(part_top + rows * PARTS + part, top, mask=real)
    target = (rows * PARTS + part) * DV
    tl.store(part_out + target[:, None] + dv[None, :], out, mask=real[:, None] & (dv < DV)[None, :])


@triton.jit
def combine_branch(leaf_top, leaf_sum, part_top, part_out, num_leaves, LEAVES: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr):
    """One branch's output `[1, Dv]` for one row from its leaves' statistics and its parts (LEAVES leaves each)."""
    one = tl.arange(0, 1)
    top, total = leaf_statistics(leaf_top, leaf_sum, one, one == 0, num_leaves, 1, 1)
    PARTS: tl.constexpr = STATISTICS // LEAVES
    dv, part = tl.arange(0, DV2), tl.arange(0, PARTS)
    out = tl.zeros([DV2], tl.float32)
    for start in range(0, num_leaves, STATISTICS):
        parts = start // LEAVES + part
        inside = parts * LEAVES < num_leaves
        factors = power_of_two(tl.load(part_top + parts, mask=inside, other=NOTHING)[:, None] - top[None, :])
        out += tree_sum(tl.load(part_out + parts[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0) * factors)
    return tl.reshape(out, (1, DV2)) / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["num_leaves", "num_parts"])
def combine_kernel(
    cmp_leaf_top, cmp_leaf_sum, cmp_part_top, cmp_part_out, raw_leaf_top, raw_leaf_sum, raw_part_top, raw_part_out, gates, seq_lens, out,
    gates_batch, gates_row, gates_head, gates_branch, num_leaves, num_parts,
    HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_NEW: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, STRIDE: tl.constexpr, SLOTS: tl.constexpr,
    CHOSEN_LEAVES: tl.constexpr, ALL_LEAVES: tl.constexpr, CMP_LEAVES: tl.constexpr, RAW_LEAVES: tl.constexpr,
):  # fmt: skip
    """Output `[B, m, Hq, Dv]` of one query head: the gated sum of the branches; 0 for a padded row."""
    head, query, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    dv = tl.arange(0, DV2)
    row = (batch * NUM_NEW + query) * (HEADS * GROUP) + head
    result = tl.zeros([1, DV2], tl.float32)
    if length > 0:
        gate = gates + batch * gates_batch + query * gates_row + head * gates_head
        cmp_row = ((batch * HEADS + head // GROUP) * NUM_NEW + query) * GROUP + head % GROUP
        RAW_PARTS: tl.constexpr = ALL_LEAVES // RAW_LEAVES
        FIRST_PART: tl.constexpr = CHOSEN_LEAVES // RAW_LEAVES
        compressed = combine_branch(
            cmp_leaf_top + cmp_row * num_leaves, cmp_leaf_sum + cmp_row * num_leaves, cmp_part_top + cmp_row * num_parts,
            cmp_part_out + cmp_row * num_parts * DV, tl.cdiv(length // STRIDE, SLOTS), CMP_LEAVES, DV, DV2,
        )  # fmt: skip
        tops, sums = raw_leaf_top + row * ALL_LEAVES, raw_leaf_sum + row * ALL_LEAVES
        part_tops, part_outs = raw_part_top + row * RAW_PARTS, raw_part_out + row * RAW_PARTS * DV
        chosen = combine_branch(tops, sums, part_tops, part_outs, CHOSEN_LEAVES, RAW_LEAVES, DV, DV2)
        window = combine_branch(
            tops + CHOSEN_LEAVES, sums + CHOSEN_LEAVES, part_tops + FIRST_PART, part_outs + FIRST_PART * DV,
            ALL_LEAVES - CHOSEN_LEAVES, RAW_LEAVES, DV, DV2,
        )  # fmt: skip
        result = tl.load(gate).to(tl.float32) * compressed
        result += tl.load(gate + gates_branch).to(tl.float32) * chosen
        result += tl.load(gate + 2 * gates_branch).to(tl.float32) * window
    tl.store(out + row * DV + dv[None, :], result.to(out.dtype.element_ty), mask=(dv < DV)[None, :])


def paged_decode(
    q: torch.Tensor, cache: LayerCache, block_table: torch.Tensor, seq_lens: torch.Tensor, gates: torch.Tensor, *, config: SparsityConfig,
    selection: torch.Tensor | None, return_selection: bool, scale: float, tiles: DecodeTiles | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`nsa_decode` on Triton kernels; see there. A padded row (length 0) gets output 0 and selection −1.

    Args:
        tiles: other tile sizes than `decode_tiles` gives, for tests and tuning.
    """
    batch, num_new, num_heads, key_dim = q.shape
    heads, page_size, value_dim = cache.num_kv_heads, cache.page_size, cache.value_dim
    group, capacity = num_heads // heads, block_table.shape[1] * page_size
    tiles = tiles or decode_tiles(q, cache, capacity, config)
    out = q.new_empty(batch, num_new, num_heads, value_dim)
    used = torch.empty(batch, num_new, heads, config.num_selected_blocks, dtype=selection_dtype(capacity, config), device=q.device)
    if not batch:
        return (out, used) if return_selection else out
    if q.stride(-1) != 1:
        q = q.contiguous()
    stride, size, num = config.compress_stride, config.select_block_size, config.num_selected_blocks
    per_block = size // stride
    per_block2 = triton.next_power_of_2(per_block)
    groups, count = tiles.leaf // per_block2, num_blocks(capacity, config)
    num_leaves = -(-count // groups)
    num_parts = -(-num_leaves // tiles.compression_leaves)
    chosen_leaves, window_leaves = block_leaf_counts(config, tiles.block_tile)
    all_leaves = chosen_leaves + window_leaves
    raw_parts = all_leaves // tiles.block_leaves
    num_chunks, scores = -(-count // tiles.chunk), count > num
    first = config.compress_block_size // stride - 1

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(batch * num_new * num_heads, *shape, dtype=torch.float32, device=q.device)

    cmp_partial = (scratch(num_leaves), scratch(num_leaves), scratch(num_parts), scratch(num_parts, value_dim))
    raw_partial = (scratch(all_leaves), scratch(all_leaves), scratch(raw_parts), scratch(raw_parts, value_dim))
    own_scores = scratch(num_leaves * groups) if scores else out
    next_scores = scratch(num_leaves * groups) if scores and first else own_scores
    keys = torch.empty(batch * num_new * heads * num_chunks * (tiles.chunk + num) if scores else 0, dtype=torch.int64, device=q.device)
    chunk_keys, candidates = keys.split([len(keys) * tiles.chunk // (tiles.chunk + num), len(keys) * num // (tiles.chunk + num)])
    given = used if selection is None else selection
    common = {"HEADS": heads, "GROUP": group, "NUM_NEW": num_new}
    dims = {"DK": key_dim, "DV": value_dim, "DK2": padded(key_dim), "DV2": padded(value_dim)}
    precision = {"SCORES": scores, "PRECISION": dot_precision()}
    base2 = scale * LOG2_E

    compression_kernel[heads * num_parts, -(-num_new * group // tiles.rows), batch](
        q, cache.cmp, block_table, seq_lens, *cmp_partial, own_scores, next_scores, base2,
        *q.stride()[:3], *cache.cmp.stride()[:3], block_table.stride(0), num_leaves, num_parts, **common, **dims, **precision,
        STRIDE=stride, FIRST=first, PER_BLOCK=per_block, PER_BLOCK2=per_block2, PER_PAGE=page_size // stride, LEAF=tiles.leaf, ROWS=tiles.rows,
        LEAVES=tiles.compression_leaves, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if scores:
        score_kernel[heads * num_chunks, num_new, batch](
            *cmp_partial[:2], own_scores, next_scores, chunk_keys, candidates, given, seq_lens, *given.stride()[:3], num_leaves, num_chunks, **common,
            GROUP2=triton.next_power_of_2(group), STRIDE=stride, FIRST=first, PER_BLOCK=per_block, GROUPS=groups, SIZE=size, NUM=num,
            NUM_INIT=config.num_init_blocks, NUM_LOCAL=config.num_local_blocks, CHUNK=tiles.chunk, GIVEN=selection is not None,
            num_warps=4 if tiles.chunk <= 128 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    blocks_kernel[heads * raw_parts, num_new, batch](
        q, cache.raw, block_table, seq_lens, candidates, given, used, *raw_partial, base2,
        *q.stride()[:3], *cache.raw.stride()[:4], block_table.stride(0), *given.stride(), num_chunks, count, **common, **dims, **precision,
        GROUP2=padded(group), SIZE=size, TILE=tiles.block_tile, PAGE=page_size, WINDOW=config.window_size, NUM=num,
        NUM2=triton.next_power_of_2(num), CHUNK=tiles.chunk, CANDIDATES=triton.next_power_of_2(num_chunks * num),
        CHOSEN_SET=cache.set_index("slc"), WINDOW_SET=cache.set_index("win"), CHOSEN_LEAVES=chosen_leaves, ALL_LEAVES=all_leaves,
        LEAVES=tiles.block_leaves, GIVEN=selection is not None, RETURN=return_selection, num_warps=4, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    combine_kernel[num_heads, num_new, batch](
        *cmp_partial, *raw_partial, gates, seq_lens, out,
        *gates.stride(), num_leaves, num_parts, **common, DV=value_dim, DV2=padded(value_dim), STRIDE=stride, SLOTS=groups * per_block,
        CHOSEN_LEAVES=chosen_leaves, ALL_LEAVES=all_leaves, CMP_LEAVES=tiles.compression_leaves, RAW_LEAVES=tiles.block_leaves,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return (out, used) if return_selection else out
