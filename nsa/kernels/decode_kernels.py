"""The kernels of a decode step that attend: compressed tokens, blocks, and the sum of the branches.

See `nsa.kernels.decode` for the order, the names and what they promise.

`PDL`: launched as programmatic dependents, so that a kernel starts while the one before it ends; what that one wrote is read after
`gdc_wait`, and only inputs of the whole step before it. Every program waits, even one with nothing to do: a kernel whose programs all
left early would count as complete before its predecessor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.kernels.decode_choice import NOTHING, STATISTICS, add_sum, all_or_given, power_of_two, tree_sum


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


@triton.jit
def merge_leaf(step, leaf_out, leaf_top, out, top, pair_out, pair_top, LEAVES: tl.constexpr):
    """A program's output and that of its unfinished pair once leaf `step` of LEAVES (1, 2 or 4) is added: a binary tree."""
    if LEAVES == 1:
        out, top = leaf_out, leaf_top
    else:
        pair_out, pair_top = merge(pair_out, pair_top, leaf_out, leaf_top)
        if step % 2 == 1:
            out, top = merge(out, top, pair_out, pair_top)
            pair_out, pair_top = tl.zeros_like(out), tl.full(top.shape, NOTHING, tl.float32)
    return out, top, pair_out, pair_top


@triton.jit
def compression_program(
    q, cmp, table, length, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale, q_row, q_head, cmp_page, cmp_slot, batch, head, part,
    first_row, num_leaves, num_parts, num_blocks, num_new,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK2: tl.constexpr, DV2: tl.constexpr,
    STRIDE: tl.constexpr, FIRST: tl.constexpr, PER_BLOCK: tl.constexpr, PER_BLOCK2: tl.constexpr, PER_PAGE: tl.constexpr,
    LEAF: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one KV head over LEAVES leaves of compressed tokens; `compression_kernel` says what it writes."""
    GROUPS: tl.constexpr = LEAF // PER_BLOCK2
    column = tl.arange(0, LEAF)
    offset = column % PER_BLOCK2
    group = column // PER_BLOCK2
    num_slots = length // STRIDE
    # A lone leaf's pages are looked up beside the length, not after it.
    if LEAVES == 1:
        lone = (part * GROUPS + group) * PER_BLOCK + offset
        lone_pages = tl.load(table + lone // PER_PAGE, mask=lone < num_blocks * PER_BLOCK, other=0)
    if part * (LEAVES * GROUPS * PER_BLOCK) < num_slots:
        rows = first_row + tl.arange(0, ROWS)
        real = rows < num_new * GROUP
        positions = tl.maximum(length - num_new + rows // GROUP, 0)
        dk, dv = tl.arange(0, DK2), tl.arange(0, DV2)
        q_rows = (q + (rows // GROUP) * q_row + (head * GROUP + rows % GROUP) * q_head)[:, None] + dk[None, :]
        if LEAVES > 1:
            queries = tl.load(q_rows, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
        row_base = (batch * HEADS + head) * (num_new * GROUP) + rows
        in_group = tl.arange(0, PER_BLOCK2)[None, None, :]
        number = tl.broadcast_to(tl.arange(0, GROUPS)[None, :], (ROWS, GROUPS))
        out, top = tl.zeros([ROWS, DV2], tl.float32), tl.full([ROWS], NOTHING, tl.float32)
        pair_out, pair_top = out, top
        for step in range(LEAVES):
            leaf = part * LEAVES + step
            slots = (leaf * GROUPS + group) * PER_BLOCK + offset
            filled = (offset < PER_BLOCK) & (slots >= FIRST) & (slots < num_slots)
            pages = tl.where(filled, lone_pages, 0) if LEAVES == 1 else tl.load(table + slots // PER_PAGE, mask=filled, other=0)
            token = cmp + pages.to(tl.int64) * cmp_page + (slots % PER_PAGE) * cmp_slot
            k = tl.load(token[:, None] + dk[None, :], mask=filled[:, None] & (dk < DK)[None, :], other=0.0)
            v = tl.load(token[:, None] + (DK + dv)[None, :], mask=filled[:, None] & (dv < DV)[None, :], other=0.0)
            if LEAVES == 1:  # K and V are on their way before anything waits for q
                queries = tl.load(q_rows, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
            visible = filled[None, :] & ((slots * STRIDE + (STRIDE - 1))[None, :] <= positions[:, None])
            weights, total, this_top, this_out = attend_leaf(queries, k.to(queries.dtype), v.to(queries.dtype), visible, scale, PRECISION)
            places = row_base * num_leaves + leaf
            written = rows < tl.where(leaf < num_leaves, num_new * GROUP, 0)
            tl.store(leaf_top + places, this_top, mask=written)
            tl.store(leaf_sum + places, total, mask=written)
            if SCORES:
                grouped = tl.reshape(weights, (ROWS, GROUPS, PER_BLOCK2))
                score = tl.sum(grouped * tl.minimum(in_group + 1, FIRST + 1).to(tl.float32), 2)
                if FIRST > 0:
                    before = tl.sum(grouped * tl.maximum(FIRST - in_group, 0).to(tl.float32), 2)
                    tl.store(leaf_edge + places, tl.sum(tl.where(number == 0, before, 0.0), 1), mask=written)
                    if GROUPS > 1:
                        score += tl.where(number < GROUPS - 1, tl.gather(before, tl.minimum(number + 1, GROUPS - 1), 1), 0.0)
                tl.store(scores + places[:, None] * GROUPS + number, score, mask=written[:, None])
            out, top, pair_out, pair_top = merge_leaf(step, this_out, this_top, out, top, pair_out, pair_top, LEAVES)
        tl.store(part_top + row_base * num_parts + part, top, mask=real)
        target = (row_base * num_parts + part) * DV
        tl.store(part_out + target[:, None] + dv[None, :], out, mask=real[:, None] & (dv < DV)[None, :])


@triton.jit
def leaf_counts(position, SIZE: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr, WINDOW: tl.constexpr, GIVEN: tl.constexpr):
    """Leaves of a query's chosen blocks (of a replayed list: all that it has room for) and of its window's blocks."""
    PER_BLOCK: tl.constexpr = (SIZE + TILE - 1) // TILE
    last = position // SIZE
    chosen = NUM if GIVEN else tl.minimum(last + 1, NUM)
    return chosen * PER_BLOCK, (last - tl.maximum(position - (WINDOW - 1), 0) // SIZE + 1) * PER_BLOCK


@triton.jit
def attend_blocks(
    q, raw, table, leaf_top, leaf_sum, part_top, part_out, scale, q_head, raw_page, raw_kind, raw_slot, entry, head, part, position, lowest,
    blocks, num_blocks,
    GROUP: tl.constexpr, GROUP2: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK2: tl.constexpr, DV2: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, FIRST_LEAF: tl.constexpr, ALL_LEAVES: tl.constexpr, LEAVES: tl.constexpr, LISTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query's heads of one KV head over LEAVES leaves, from the part-th LEAVES on, of listed blocks (−1 = none) or of those from `blocks` on.

    Writes per leaf top and sum `[B, m, Hq, leaves]`, per program top `[B, m, Hq, parts]` and output `[…, parts, Dv]`."""
    PER_BLOCK: tl.constexpr = (SIZE + TILE - 1) // TILE
    PARTS: tl.constexpr = ALL_LEAVES // LEAVES
    member = tl.arange(0, GROUP2)
    real = member < GROUP
    dk, dv, token = tl.arange(0, DK2), tl.arange(0, DV2), tl.arange(0, TILE)
    q_rows = (q + (head * GROUP + member) * q_head)[:, None] + dk[None, :]
    if LEAVES > 1:
        queries = tl.load(q_rows, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
    rows = entry * GROUP + member
    out, top = tl.zeros([GROUP2, DV2], tl.float32), tl.full([GROUP2], NOTHING, tl.float32)
    pair_out, pair_top = out, top
    for step in range(LEAVES):
        local = part * LEAVES + step
        if LISTED:
            order = tl.arange(0, blocks.shape[0])
            block = tl.sum(tl.where(order == local // PER_BLOCK, blocks + 1, 0)) - 1
        else:
            block = blocks + local // PER_BLOCK
        within = (local % PER_BLOCK) * TILE + token
        tokens = block * SIZE + within
        there = (block >= 0) & (block < num_blocks)
        present = (within < SIZE) & (tokens >= lowest) & (tokens <= tl.where(there, position, -1))
        page = tl.load(table + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0).to(tl.int64)
        line = raw + page * raw_page + ((block * SIZE) % PAGE + within) * raw_slot
        k = tl.load(line[:, None] + dk[None, :], mask=present[:, None] & (dk < DK)[None, :], other=0.0)
        v = tl.load((line + raw_kind)[:, None] + dv[None, :], mask=present[:, None] & (dv < DV)[None, :], other=0.0)
        if LEAVES == 1:
            queries = tl.load(q_rows, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
        seen = present[None, :] & (member >= 0)[:, None]
        _weights, total, this_top, this_out = attend_leaf(queries, k.to(queries.dtype), v.to(queries.dtype), seen, scale, PRECISION)
        tl.store(leaf_top + rows * ALL_LEAVES + (FIRST_LEAF + local), this_top, mask=real)
        tl.store(leaf_sum + rows * ALL_LEAVES + (FIRST_LEAF + local), total, mask=real)
        out, top, pair_out, pair_top = merge_leaf(step, this_out, this_top, out, top, pair_out, pair_top, LEAVES)
    place = rows * PARTS + (FIRST_LEAF // LEAVES + part)
    tl.store(part_top + place, top, mask=real)
    tl.store(part_out + (place * DV)[:, None] + dv[None, :], out, mask=real[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["num_leaves", "num_parts", "num_blocks", "programs"])
def compression_kernel(
    q, cmp, block_table, seq_lens, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale,
    q_batch, q_row, q_head, cmp_page, cmp_slot, cmp_head, table_batch, num_leaves, num_parts, num_blocks, programs, num_new,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK2: tl.constexpr, DV2: tl.constexpr,
    STRIDE: tl.constexpr, FIRST: tl.constexpr, PER_BLOCK: tl.constexpr, PER_BLOCK2: tl.constexpr, PER_PAGE: tl.constexpr,
    LEAF: tl.constexpr, ROWS: tl.constexpr, LEAVES: tl.constexpr, LONE: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The compression branch: parts p, p + `programs`, … of LEAVES leaves for the p-th program of a sequence, KV head and tile of rows.

    Writes per leaf top, sum and `edge` `[B, Hkv, rows, leaves]`, per part top `[B, Hkv, rows, parts]` and output `[…, parts, Dv]`, and
    each block's share of the score `[B, Hkv, rows, blocks]`: what the block's own slots give, and those of the group after it where
    that lies in the same leaf; `edge` is what a leaf's first group gives to the block before it.

    LONE: there is a program for each part."""
    if PDL:
        gdc_launch_dependents()
    row_tiles = (num_new * GROUP + ROWS - 1) // ROWS
    head, index = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch = tl.program_id(1).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    part, end = index // row_tiles, index // row_tiles + 1
    if not LONE:
        end = tl.cdiv(length // STRIDE, LEAVES * (LEAF // PER_BLOCK2) * PER_BLOCK)
    for this in range(part, end, programs):
        compression_program(
            q + batch * q_batch, cmp + head * cmp_head, block_table + batch * table_batch, length, leaf_top, leaf_sum, leaf_edge, part_top,
            part_out, scores, scale, q_row, q_head, cmp_page, cmp_slot, batch, head, this, (index % row_tiles) * ROWS, num_leaves, num_parts,
            num_blocks, num_new, HEADS, GROUP, DK, DV, DK2, DV2, STRIDE, FIRST, PER_BLOCK, PER_BLOCK2, PER_PAGE, LEAF, ROWS, LEAVES, SCORES,
            PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_blocks", "batches"])
def blocks_kernel(
    q, raw, block_table, seq_lens, given, selection, leaf_top, leaf_sum, part_top, part_out, scale,
    q_batch, q_row, q_head, raw_page, raw_kind, raw_slot, raw_head, table_batch, given_batch, given_row, given_head, given_entry,
    num_blocks, batches, num_new,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP2: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK2: tl.constexpr,
    DV2: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, NUM: tl.constexpr, NUM2: tl.constexpr,
    WINDOW: tl.constexpr, CHOSEN_SET: tl.constexpr, WINDOW_SET: tl.constexpr, CHOSEN_LEAVES: tl.constexpr,
    ALL_LEAVES: tl.constexpr, LEAVES: tl.constexpr, GIVEN: tl.constexpr, RETURN: tl.constexpr, PICKED: tl.constexpr,
    ONCE: tl.constexpr, REPLAYED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query's heads of one KV head over LEAVES leaves of the window or of the chosen blocks. Those stand in `selection` (PICKED), or they are
    all that exist or given; then the first program writes them to `selection` (RETURN).

    The window's programs come first in the grid and wait for nothing: they read while the blocks are still being chosen."""
    if PDL:
        gdc_launch_dependents()
    WINDOW_PARTS: tl.constexpr = (ALL_LEAVES - CHOSEN_LEAVES) // LEAVES
    CHOSEN_PARTS: tl.constexpr = CHOSEN_LEAVES // LEAVES
    entries = batches * num_new * HEADS
    index = tl.program_id(0) - entries * WINDOW_PARTS
    of_window = index < 0
    index = tl.where(of_window, tl.program_id(0), index)
    parts = tl.where(of_window, WINDOW_PARTS, CHOSEN_PARTS)
    head, part = index % HEADS, index // HEADS % parts
    query = index // HEADS // parts % num_new
    batch = (index // HEADS // parts // num_new).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    order = tl.arange(0, NUM2)
    entry = (batch * num_new + query) * HEADS + head
    position = tl.maximum(length - num_new + query, 0)
    chosen_leaves, window_leaves = leaf_counts(position, SIZE, TILE, NUM, WINDOW, REPLAYED)
    if of_window:
        lowest = tl.maximum(position - (WINDOW - 1), 0)
        if (length > 0) & (part * LEAVES < window_leaves) & (not ONCE or (position >= WINDOW) | (position >= NUM * SIZE)):
            attend_blocks(
                q + batch * q_batch + query * q_row, raw + (head + WINDOW_SET * HEADS) * raw_head, block_table + batch * table_batch, leaf_top,
                leaf_sum, part_top, part_out, scale, q_head, raw_page, raw_kind, raw_slot, entry, head, part, position, lowest, lowest // SIZE,
                num_blocks, GROUP, GROUP2, DK, DV, DK2, DV2, SIZE, TILE, PAGE, CHOSEN_LEAVES, ALL_LEAVES, LEAVES, False, PRECISION,
            )  # fmt: skip
        return
    if PDL:
        gdc_wait()
    if length == 0:
        if RETURN & (part == 0):
            tl.store(selection + entry * NUM + order, tl.full([NUM2], -1, tl.int32).to(selection.dtype.element_ty), mask=order < NUM)
        return
    if PICKED:
        chosen = tl.load(selection + entry * NUM + order, mask=order < NUM, other=-1).to(tl.int32)
    else:
        row = given + batch * given_batch + query * given_row + head * given_head
        chosen = all_or_given(row, position, given_entry, order, SIZE, NUM, GIVEN)
    if RETURN & (part == 0):
        tl.store(selection + entry * NUM + order, chosen.to(selection.dtype.element_ty), mask=order < NUM)
    if part * LEAVES >= chosen_leaves:
        return
    attend_blocks(
        q + batch * q_batch + query * q_row, raw + (head + CHOSEN_SET * HEADS) * raw_head, block_table + batch * table_batch, leaf_top, leaf_sum,
        part_top, part_out, scale, q_head, raw_page, raw_kind, raw_slot, entry, head, part, position, 0, tl.where(order < NUM, chosen, -1),
        num_blocks, GROUP, GROUP2, DK, DV, DK2, DV2, SIZE, TILE, PAGE, 0, ALL_LEAVES, LEAVES, True, PRECISION,
    )  # fmt: skip


@triton.jit
def read_leaves(leaf_top, leaf_sum, part_top, part_out, dv, start, first, end, LEAVES: tl.constexpr, DV: tl.constexpr):
    """Of the STATISTICS leaves from `start` on those in [first, end): tops and sums, and their programs' tops and columns dv of the outputs."""
    leaf = start + tl.arange(0, STATISTICS)
    part = start // LEAVES + tl.arange(0, STATISTICS // LEAVES)
    counted = (leaf >= first) & (leaf < end)
    inside = (part * LEAVES >= first) & (part * LEAVES < end)
    outs = tl.load(part_out + part[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
    part_tops = tl.load(part_top + part, mask=inside, other=NOTHING)
    tops = tl.load(leaf_top + leaf, mask=counted, other=NOTHING)
    return tops, tl.load(leaf_sum + leaf, mask=counted, other=0.0), part_tops, outs


@triton.jit
def add_leaves(out, total, top, tops, sums, part_tops, outs):
    """One row's output `[columns]`, sum and top `[1]` so far, plus what `read_leaves` gave."""
    total, both = add_sum(total, top, sums[:, None], tops[:, None])
    out = out * power_of_two(top - both) + tree_sum(outs * power_of_two(part_tops[:, None] - both[None, :]))
    return out, total, both


@triton.jit(do_not_specialize=["num_leaves", "num_parts"])
def combine_kernel(
    cmp_leaf_top, cmp_leaf_sum, cmp_part_top, cmp_part_out, raw_leaf_top, raw_leaf_sum, raw_part_top, raw_part_out, gates, seq_lens, out,
    gates_batch, gates_row, gates_head, gates_branch, num_leaves, num_parts, num_new,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
    SLOTS: tl.constexpr, CHOSEN_LEAVES: tl.constexpr, ALL_LEAVES: tl.constexpr, CMP_LEAVES: tl.constexpr, RAW_LEAVES: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr, WINDOW: tl.constexpr, ONCE: tl.constexpr, REPLAYED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one query head's output `[B, m, Hq, Dv]`: the gated sum of the branches; 0 for a padded row."""
    SLICES: tl.constexpr = (DV + COLUMNS - 1) // COLUMNS
    head, query, batch = tl.program_id(0) // SLICES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    gate = gates + batch * gates_batch + query * gates_row + head * gates_head
    compressed_gate = tl.load(gate).to(tl.float32)
    chosen_gate = tl.load(gate + gates_branch).to(tl.float32)
    window_gate = tl.load(gate + 2 * gates_branch).to(tl.float32)
    dv = (tl.program_id(0) % SLICES) * COLUMNS + tl.arange(0, COLUMNS)
    row = (batch * num_new + query) * (HEADS * GROUP) + head
    if PDL:
        gdc_wait()
    result = tl.zeros([COLUMNS], tl.float32)
    if length > 0:
        cmp_row = ((batch * HEADS + head // GROUP) * num_new + query) * GROUP + head % GROUP
        RAW_PARTS: tl.constexpr = ALL_LEAVES // RAW_LEAVES
        cmp_tops, cmp_sums = cmp_leaf_top + cmp_row * num_leaves, cmp_leaf_sum + cmp_row * num_leaves
        cmp_part_tops, cmp_outs = cmp_part_top + cmp_row * num_parts, cmp_part_out + cmp_row * num_parts * DV
        tops, sums = raw_leaf_top + row * ALL_LEAVES, raw_leaf_sum + row * ALL_LEAVES
        part_tops, outs = raw_part_top + row * RAW_PARTS, raw_part_out + row * RAW_PARTS * DV
        cmp_leaves = tl.cdiv(length // STRIDE, SLOTS)
        position = tl.maximum(length - num_new + query, 0)
        chosen_leaves, window_leaves = leaf_counts(position, SIZE, TILE, NUM, WINDOW, REPLAYED)
        window_first, window_end = CHOSEN_LEAVES, CHOSEN_LEAVES + window_leaves
        if ONCE & (position < WINDOW) & (position < NUM * SIZE):  # chosen blocks and window are the whole sequence
            window_first, window_end = 0, chosen_leaves
        nothing, zero = tl.full([1], NOTHING, tl.float32), tl.zeros([1], tl.float32)
        compressed, compressed_sum, compressed_top = result, zero, nothing
        chosen, chosen_sum, chosen_top = result, zero, nothing
        window, window_sum, window_top = result, zero, nothing
        for start in range(0, tl.maximum(cmp_leaves, window_end), STATISTICS):
            of_compressed = read_leaves(cmp_tops, cmp_sums, cmp_part_tops, cmp_outs, dv, start, 0, cmp_leaves, CMP_LEAVES, DV)
            of_chosen = read_leaves(tops, sums, part_tops, outs, dv, start, 0, chosen_leaves, RAW_LEAVES, DV)
            of_window = read_leaves(tops, sums, part_tops, outs, dv, start, window_first, window_end, RAW_LEAVES, DV)
            compressed, compressed_sum, compressed_top = add_leaves(compressed, compressed_sum, compressed_top, *of_compressed)
            chosen, chosen_sum, chosen_top = add_leaves(chosen, chosen_sum, chosen_top, *of_chosen)
            window, window_sum, window_top = add_leaves(window, window_sum, window_top, *of_window)
        result = compressed_gate * (compressed / tl.where(compressed_sum > 0.0, compressed_sum, 1.0))
        result += chosen_gate * (chosen / tl.where(chosen_sum > 0.0, chosen_sum, 1.0))
        result += window_gate * (window / tl.where(window_sum > 0.0, window_sum, 1.0))
    tl.store(out + row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
