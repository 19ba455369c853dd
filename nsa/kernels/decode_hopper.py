"""Attention of a decode step on Hopper, in Gluon: compressed tokens, and the window's and the chosen blocks.

The same numbers as in decode_kernels.py, for the same leaves; here a program walks several of them. K and V of the next leaves are on
their way to shared memory (asynchronous copies of 16 bytes a thread, in a ring) while a leaf is multiplied. The products are
transposed, K·qᵀ and vᵀ·weightsᵀ: the 64 rows that Hopper's tensor cores want are keys and value dims, and a few queries are
enough columns. The numbers of a leaf depend neither on the program that meets it nor on the ring.

Rollouts of one prompt have its pages in common: a program serves up to MAX_SHARE neighbouring sequences and reads the compressed tokens
that are the same for all of them once. Written for Triton 3.6's Gluon; fp32 and other shapes stay with decode_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.attention import RECOMPUTE as RECOMPUTE_MARK
from nsa.kernels.banded_hopper import num_processors
from nsa.kernels.launch import ceil_div, launch
from nsa.kernels.launch import power_of_two as next_power_of_two

STAGES = 3
"""Leaves of compressed tokens in shared memory at a time."""
MAX_SHARE = 4
"""Neighbouring sequences that a program serves at most."""
MIN_SHARED = 2
"""Sequences of a batch in which programs serve several."""
SHARED_MEMORY = 227 << 10
"""Bytes of shared memory that the programs of an SM have between them."""
NOTHING = gl.constexpr(-1.0e6)
"""As in decode_kernels.py."""
RECOMPUTE = gl.constexpr(RECOMPUTE_MARK)


@gluon.jit
def power_of_two(exponent):
    """2**exponent of whole fp32 numbers <= 0, exactly; 0 below -126."""
    return ((gl.maximum(exponent, -127.0).to(gl.int32) + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def merge(out, top, other_out, other_top):
    """The sum of two partial outputs `[Dv, R]`, each relative to 2**top `[R]`."""
    both = gl.maximum(top, other_top)
    return out * power_of_two(top - both)[None, :] + other_out * power_of_two(other_top - both)[None, :], both


@gluon.jit
def copy_leaf(
    cmp, keys, values, pages, number, leaf, num_slots, end, cmp_page, cmp_slot,
    K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr, FIRST: gl.constexpr, PER_PAGE: gl.constexpr,
):  # fmt: skip
    """Starts the copies of a leaf's K and then V, each a group; zeros where no slot is filled or the program's share has ended."""
    STAGES: gl.constexpr = keys.type.shape[0]
    LEAF: gl.constexpr = keys.type.shape[1]
    DK: gl.constexpr = keys.type.shape[2]
    DV: gl.constexpr = values.type.shape[2]
    place = number % STAGES
    limit = gl.where(leaf < end, num_slots, 0)
    slots = leaf * LEAF + gl.arange(0, LEAF, layout=gl.SliceLayout(1, K_LAYOUT))
    token = pages.to(gl.int64) * cmp_page + (slots % PER_PAGE) * cmp_slot
    dk = gl.arange(0, DK, layout=gl.SliceLayout(0, K_LAYOUT))
    async_copy.async_copy_global_to_shared(keys.index(place), cmp + token[:, None] + dk[None, :], mask=((slots >= FIRST) & (slots < limit))[:, None])
    async_copy.commit_group()
    slots = leaf * LEAF + gl.arange(0, LEAF, layout=gl.SliceLayout(1, V_LAYOUT))
    dv = gl.arange(0, DV, layout=gl.SliceLayout(0, V_LAYOUT))
    token = gl.convert_layout(pages, gl.SliceLayout(1, V_LAYOUT)).to(gl.int64) * cmp_page + (slots % PER_PAGE) * cmp_slot
    async_copy.async_copy_global_to_shared(
        values.index(place), cmp + DK + token[:, None] + dv[None, :], mask=((slots >= FIRST) & (slots < limit))[:, None]
    )
    async_copy.commit_group()


@gluon.jit
def pages_of(table, leaf, limit, LEAF: gl.constexpr, PER_PAGE: gl.constexpr, LAYOUT: gl.constexpr):
    """The page of each slot of a leaf, 0 past `limit`."""
    slots = leaf * LEAF + gl.arange(0, LEAF, layout=LAYOUT)
    return gl.load(table + slots // PER_PAGE, mask=slots < limit, other=0).to(gl.int32)


@gluon.jit
def walk_leaves(
    cmp, table, tiles, rows, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale, cmp_page, cmp_slot, num_leaves, num_parts,
    num_slots, begin, end, only, pages,
    STRIDE: gl.constexpr, FIRST: gl.constexpr, PER_BLOCK: gl.constexpr, PER_PAGE: gl.constexpr, LEAVES: gl.constexpr, K_LAYOUT: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Leaves [begin, end) of one page table for the rows of sequence `only` (−1: all). `pages`: those of leaf `begin`."""
    keys, values, queries, weight_tile = tiles
    positions, owner, place_s, place_g, owner_g, place_o, owner_o = rows
    DTYPE: gl.constexpr = keys.dtype
    STAGES: gl.constexpr = keys.type.shape[0]
    LEAF: gl.constexpr = keys.type.shape[1]
    DV: gl.constexpr = values.type.shape[2]
    ROWS: gl.constexpr = queries.type.shape[0]
    GROUPS: gl.constexpr = LEAF // PER_BLOCK
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ROWS, 16])
    v_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DV, DV // 8], [WARPS, 1], [1, 0])
    page_layout: gl.constexpr = gl.SliceLayout(1, K_LAYOUT)
    LANES: gl.constexpr = 32 if GROUPS > 32 else GROUPS
    by_group: gl.constexpr = gl.BlockedLayout([PER_BLOCK, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    of_group: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    AHEAD: gl.constexpr = STAGES - 1 if STAGES > 1 else 1
    for stage in gl.static_range(AHEAD):
        copy_leaf(cmp, keys, values, pages, stage, begin + stage, num_slots, end, cmp_page, cmp_slot, K_LAYOUT, v_wide, FIRST, PER_PAGE)
        pages = pages_of(table, begin + stage + 1, num_slots, LEAF, PER_PAGE, page_layout)
    slot = gl.arange(0, LEAF, layout=gl.SliceLayout(1, mma))
    dv = gl.arange(0, DV, layout=gl.SliceLayout(1, mma))
    written = (owner >= 0) & ((owner == only) | (only < 0))
    written_g = (owner_g >= 0) & ((owner_g == only) | (only < 0))
    written_o = (owner_o >= 0) & ((owner_o == only) | (only < 0))
    zeros_s = gl.zeros([LEAF, ROWS], gl.float32, layout=mma)
    zeros_o = gl.zeros([DV, ROWS], gl.float32, layout=mma)
    nothing = gl.full([ROWS], NOTHING, gl.float32, layout=gl.SliceLayout(0, mma))
    out, out_top, pair, pair_top = zeros_o, nothing, zeros_o, nothing
    for i in range(end - begin):
        leaf = begin + i
        async_copy.wait_group(2 * AHEAD - 1)
        fence_async_shared()
        gl.thread_barrier()
        if STAGES > 1:
            copy_leaf(cmp, keys, values, pages, i + AHEAD, leaf + AHEAD, num_slots, end, cmp_page, cmp_slot, K_LAYOUT, v_wide, FIRST, PER_PAGE)
            pages = pages_of(table, leaf + STAGES, num_slots, LEAF, PER_PAGE, page_layout)
        place = i % STAGES
        scored = warpgroup_mma(keys.index(place), queries.permute((1, 0)), zeros_s, use_acc=False, is_async=True)
        scored = warpgroup_mma_wait(0, deps=[scored])
        slots = leaf * LEAF + slot
        visible = ((slots >= FIRST) & (slots < num_slots))[:, None] & ((slots * STRIDE + (STRIDE - 1))[:, None] <= positions[None, :])
        logits = gl.where(visible, scored * scale, NOTHING)
        top = gl.maximum(gl.ceil(gl.max(logits, 0)), NOTHING)
        whole = gl.floor(logits)
        weights = gl.where(visible, gl.exp2(logits - whole) * power_of_two(whole - top[None, :]), 0.0)
        weight_tile.permute((1, 0)).store(weights.to(DTYPE))
        async_copy.wait_group(2 * STAGES - 2)
        fence_async_shared()
        gl.thread_barrier()
        adding = warpgroup_mma(values.index(place).permute((1, 0)), weight_tile.permute((1, 0)), zeros_o, use_acc=False, is_async=True)
        gl.store(leaf_top + place_s * num_leaves + leaf, top, mask=written)
        gl.store(leaf_sum + place_s * num_leaves + leaf, gl.sum(weights, 0), mask=written)
        if SCORES:
            spread = gl.convert_layout(weights, by_group)
            within = (gl.arange(0, LEAF, layout=gl.SliceLayout(1, by_group)) % PER_BLOCK)[:, None]
            number = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, of_group))[:, None]
            own = gl.sum((spread * gl.minimum(within + 1, FIRST + 1).to(gl.float32)).reshape([GROUPS, PER_BLOCK, ROWS]), 1)
            score = gl.convert_layout(own, of_group)
            at = (place_g * num_leaves + leaf)[None, :]
            if FIRST > 0:
                before = gl.sum((spread * gl.maximum(FIRST - within, 0).to(gl.float32)).reshape([GROUPS, PER_BLOCK, ROWS]), 1)
                before = gl.convert_layout(before, of_group)
                gl.store(leaf_edge + at + number * 0, before, mask=written_g[None, :] & (number == 0))
                following = gl.gather(before, gl.minimum(number + 1, GROUPS - 1) + owner_g[None, :] * 0, 0)
                score += gl.where(number < GROUPS - 1, following, 0.0)
            gl.store(scores + at * GROUPS + number, score, mask=written_g[None, :] & (number >= 0))
        this = warpgroup_mma_wait(0, deps=[adding])
        if STAGES == 1:
            gl.thread_barrier()
            copy_leaf(cmp, keys, values, pages, 0, leaf + 1, num_slots, end, cmp_page, cmp_slot, K_LAYOUT, v_wide, FIRST, PER_PAGE)
            pages = pages_of(table, leaf + 2, num_slots, LEAF, PER_PAGE, page_layout)
        step = leaf % LEAVES
        if LEAVES == 1:
            out, out_top = this, top
        else:
            pair, pair_top = merge(pair, pair_top, this, top)
            if step % 2 == 1:
                out, out_top = merge(out, out_top, pair, pair_top)
                pair, pair_top = zeros_o, nothing
        if (step == LEAVES - 1) | (leaf == end - 1):
            if LEAVES > 1:
                out, out_top = merge(out, out_top, pair, pair_top)
            item = place_o * num_parts + leaf // LEAVES
            gl.store(part_top + item, out_top, mask=written_o)
            gl.store(part_out + (item * DV)[None, :] + dv[:, None], out, mask=written_o[None, :] & (dv >= 0)[:, None])
            out, out_top, pair, pair_top = zeros_o, nothing, zeros_o, nothing
    async_copy.wait_group(0)
    gl.thread_barrier()


@gluon.jit
def shared_leaves(
    block_table, seq_lens, table_batch, first, batches, LEAF: gl.constexpr, PER_PAGE: gl.constexpr, STRIDE: gl.constexpr, SHARE: gl.constexpr
):
    """How many first leaves the SHARE sequences from `first` on have in common: the same pages, all slots filled. 0 where one is missing."""
    WARPS: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = 32 * WARPS
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    least = gl.load(seq_lens + first).to(gl.int32) // STRIDE
    for s in gl.static_range(1, SHARE):
        least = gl.minimum(least, gl.load(seq_lens + gl.minimum(first + s, batches - 1)).to(gl.int32) // STRIDE)
    whole = least // LEAF * (LEAF // PER_PAGE)  # pages
    if first + SHARE > batches:
        whole = 0
    column = gl.arange(0, WIDTH, layout=line)
    same, start = WIDTH, 0
    while (same == WIDTH) & (start < whole):
        mine = gl.load(block_table + first.to(gl.int64) * table_batch + start + column, mask=start + column < whole, other=0)
        found = gl.where(start + column < whole, WIDTH, column)
        for s in gl.static_range(1, SHARE):
            other = gl.load(
                block_table + gl.minimum(first + s, batches - 1).to(gl.int64) * table_batch + start + column, mask=start + column < whole, other=0
            )
            found = gl.where(other == mine, found, gl.minimum(found, column))
        same = gl.min(found, 0)
        start += same
    return start // (LEAF // PER_PAGE)


@gluon.jit(do_not_specialize=["num_leaves", "num_parts", "num_blocks", "splits", "batches"])
def hopper_compression_kernel(
    q, cmp, block_table, seq_lens, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale,
    q_batch, q_row, q_head, cmp_page, cmp_slot, cmp_head, table_batch, num_leaves, num_parts, num_blocks, splits, batches, num_new,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, STRIDE: gl.constexpr, FIRST: gl.constexpr,
    PER_BLOCK: gl.constexpr, PER_PAGE: gl.constexpr, LEAF: gl.constexpr, ROWS: gl.constexpr, LEAVES: gl.constexpr, STAGES: gl.constexpr,
    SHARE: gl.constexpr, LONE: gl.constexpr, SCORES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Writes what `decode_kernels.compression_kernel` writes.

    `splits` programs serve SHARE neighbouring sequences. Each takes a share of the leaves that are the same pages for all of them, for all
    of their rows, and then a share of the other leaves of one of them. LONE (SHARE 1): a program for each LEAVES leaves."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = LEAF // PER_BLOCK
    LANES: gl.constexpr = 32 if GROUPS > 32 else GROUPS
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ROWS, 16])
    k_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DK, DK // 8], [WARPS, 1], [1, 0])
    of_group: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    page_layout: gl.constexpr = gl.SliceLayout(1, k_wide)
    if PDL:
        gdc_launch_dependents()
    head, split = gl.program_id(0) % HEADS, gl.program_id(0) // HEADS
    first = gl.program_id(1) * SHARE
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, LEAF, DK], gl.NVMMASharedLayout.get_default_for([LEAF, DK], DTYPE))
    values = gl.allocate_shared_memory(DTYPE, [STAGES, LEAF, DV], gl.NVMMASharedLayout.get_default_for([LEAF, DV], DTYPE))
    queries = gl.allocate_shared_memory(DTYPE, [ROWS, DK], gl.NVMMASharedLayout.get_default_for([ROWS, DK], DTYPE))
    weight_tile = gl.allocate_shared_memory(DTYPE, [ROWS, LEAF], gl.NVMMASharedLayout.get_default_for([ROWS, LEAF], DTYPE))
    tiles = (keys, values, queries, weight_tile)
    if LONE:
        lone_pages = pages_of(block_table + first.to(gl.int64) * table_batch, split * LEAVES, num_blocks * PER_BLOCK, LEAF, PER_PAGE, page_layout)
    own = num_new * GROUP

    row_w = gl.arange(0, ROWS, layout=gl.SliceLayout(1, k_wide))
    dk = gl.arange(0, DK, layout=gl.SliceLayout(0, k_wide))
    sequence = gl.minimum(first + row_w // own, batches - 1).to(gl.int64)
    q_rows = q + sequence * q_batch + (row_w % own // GROUP) * q_row + (head * GROUP + row_w % GROUP) * q_head
    there = (row_w < SHARE * own) & (first + row_w // own < batches)

    row_s = gl.arange(0, ROWS, layout=gl.SliceLayout(0, mma))
    owner = gl.where((row_s < SHARE * own) & (first + row_s // own < batches), row_s // own, -1)
    lengths = gl.load(seq_lens + first + gl.maximum(owner, 0)).to(gl.int32)
    positions = gl.maximum(lengths - num_new + row_s % own // GROUP, 0)
    place_s = ((first + row_s // own).to(gl.int64) * HEADS + head) * own + row_s % own
    row_g = gl.arange(0, ROWS, layout=gl.SliceLayout(0, of_group))
    owner_g = gl.convert_layout(owner, gl.SliceLayout(0, of_group))
    place_g = ((first + row_g // own).to(gl.int64) * HEADS + head) * own + row_g % own
    rows = (positions, owner, place_s, place_g, owner_g, place_s, owner)
    cmp += head * cmp_head

    common = 0
    if SHARE > 1:
        common = shared_leaves(block_table, seq_lens, table_batch, first, batches, LEAF, PER_PAGE, STRIDE, SHARE) // LEAVES * LEAVES
    async_copy.async_copy_global_to_shared(queries, q_rows[:, None] + dk[None, :], mask=there[:, None])
    async_copy.commit_group()
    # A share of the common leaves, then one of those of a single sequence.
    for turn in range(0 if SHARE > 1 else 1, 2):
        only = turn * (split % SHARE + 1) - 1  # -1: all
        number, shares = split // (1 + turn * (SHARE - 1)), splits // (1 + turn * (SHARE - 1))
        member = gl.minimum(first + gl.maximum(only, 0), batches - 1)
        table = block_table + member.to(gl.int64) * table_batch
        num_slots = gl.load(seq_lens + member).to(gl.int32) // STRIDE
        filled_leaves = gl.cdiv(num_slots, LEAF)
        if LONE:
            begin = split * LEAVES
            end = gl.minimum(begin + LEAVES, filled_leaves)
            pages = lone_pages
        else:
            start = common * turn
            filled_leaves = gl.where(only < 0, common, filled_leaves)
            share = gl.cdiv(gl.cdiv(filled_leaves - start, LEAVES), shares) * LEAVES
            begin = start + number * share
            end = gl.minimum(begin + share, filled_leaves)
            pages = pages_of(table, begin, num_slots, LEAF, PER_PAGE, page_layout)
        if (begin < end) & (first + only < batches):
            walk_leaves(
                cmp, table, tiles, rows, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale, cmp_page, cmp_slot, num_leaves,
                num_parts, num_slots, begin, end, only if SHARE > 1 else -1, pages, STRIDE, FIRST, PER_BLOCK, PER_PAGE, LEAVES, k_wide, SCORES,
            )  # fmt: skip


@gluon.jit
def copy_block(
    raw, keys, values, page, number, block, there, lowest, position, raw_page, raw_kind, raw_slot, within,
    K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr, SIZE: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Starts the copies of 64 tokens' K and then V, each a group; zeros for tokens that are not there or not visible."""
    STAGES: gl.constexpr = keys.type.shape[0]
    TILE: gl.constexpr = keys.type.shape[1]
    DK: gl.constexpr = keys.type.shape[2]
    DV: gl.constexpr = values.type.shape[2]
    place = number % STAGES
    last = gl.where(there, position, -1)
    base = raw + page.to(gl.int64) * raw_page + ((block * SIZE) % PAGE + within) * raw_slot
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, K_LAYOUT))
    dk = gl.arange(0, DK, layout=gl.SliceLayout(0, K_LAYOUT))
    spot = block * SIZE + within + token
    async_copy.async_copy_global_to_shared(
        keys.index(place), base + (token * raw_slot)[:, None] + dk[None, :], mask=((spot >= lowest) & (spot <= last))[:, None]
    )
    async_copy.commit_group()
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, V_LAYOUT))
    dv = gl.arange(0, DV, layout=gl.SliceLayout(0, V_LAYOUT))
    spot = block * SIZE + within + token
    async_copy.async_copy_global_to_shared(
        values.index(place), base + raw_kind + (token * raw_slot)[:, None] + dv[None, :], mask=((spot >= lowest) & (spot <= last))[:, None]
    )
    async_copy.commit_group()


@gluon.jit
def block_of(chosen, leaf, end, num_blocks, order, PER_BLOCK: gl.constexpr, LISTED: gl.constexpr):
    """The block of a leaf, and whether the leaf is there."""
    block = chosen + leaf // PER_BLOCK
    if LISTED:
        block = gl.sum(gl.where(order == leaf // PER_BLOCK, chosen + 1, 0), 0) - 1
    return block, (block >= 0) & (block < num_blocks) & (leaf < end)


@gluon.jit
def walk_blocks(
    q_rows, raw, table, tiles, leaf_top, leaf_sum, part_top, part_out, scale, q_head, raw_page, raw_kind, raw_slot, entry, begin, end, position,
    lowest, chosen, order, num_blocks,
    GROUP: gl.constexpr, SIZE: gl.constexpr, PAGE: gl.constexpr, FIRST_LEAF: gl.constexpr, ALL_LEAVES: gl.constexpr, LEAVES: gl.constexpr,
    LISTED: gl.constexpr,
):  # fmt: skip
    """As `decode_kernels.attend_blocks`, for leaves [begin, end) of 64 tokens; `chosen` is the list or the first block."""
    keys, values, queries, weight_tile = tiles
    DTYPE: gl.constexpr = keys.dtype
    STAGES: gl.constexpr = keys.type.shape[0]
    TILE: gl.constexpr = keys.type.shape[1]
    DK: gl.constexpr = keys.type.shape[2]
    DV: gl.constexpr = values.type.shape[2]
    ROWS: gl.constexpr = queries.type.shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    PER_BLOCK: gl.constexpr = SIZE // TILE
    PARTS: gl.constexpr = ALL_LEAVES // LEAVES
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ROWS, 16])
    k_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DK, DK // 8], [WARPS, 1], [1, 0])
    v_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DV, DV // 8], [WARPS, 1], [1, 0])
    block, there = block_of(chosen, begin, end, num_blocks, order, PER_BLOCK, LISTED)
    page = gl.load(table + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0)
    row_w = gl.arange(0, ROWS, layout=gl.SliceLayout(1, k_wide))
    dk = gl.arange(0, DK, layout=gl.SliceLayout(0, k_wide))
    async_copy.async_copy_global_to_shared(queries, q_rows + (row_w * q_head)[:, None] + dk[None, :], mask=(row_w < GROUP)[:, None])
    async_copy.commit_group()
    AHEAD: gl.constexpr = STAGES - 1 if STAGES > 1 else 1
    for stage in gl.static_range(AHEAD):
        leaf = begin + stage
        copy_block(
            raw, keys, values, page, stage, block, there, lowest, position, raw_page, raw_kind, raw_slot, leaf % PER_BLOCK * TILE, k_wide, v_wide,
            SIZE, PAGE,
        )  # fmt: skip
        block, there = block_of(chosen, leaf + 1, end, num_blocks, order, PER_BLOCK, LISTED)
        page = gl.load(table + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0)
    member = gl.arange(0, ROWS, layout=gl.SliceLayout(0, mma))
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, mma))
    dv = gl.arange(0, DV, layout=gl.SliceLayout(1, mma))
    rows = entry * GROUP + member
    real = member < GROUP
    zeros_s = gl.zeros([TILE, ROWS], gl.float32, layout=mma)
    zeros_o = gl.zeros([DV, ROWS], gl.float32, layout=mma)
    nothing = gl.full([ROWS], NOTHING, gl.float32, layout=gl.SliceLayout(0, mma))
    out, out_top, pair, pair_top = zeros_o, nothing, zeros_o, nothing
    for i in range(end - begin):
        leaf = begin + i
        async_copy.wait_group(2 * AHEAD - 1)
        fence_async_shared()
        gl.thread_barrier()
        if STAGES > 1:
            copy_block(
                raw, keys, values, page, i + AHEAD, block, there, lowest, position, raw_page, raw_kind, raw_slot, (leaf + AHEAD) % PER_BLOCK * TILE,
                k_wide, v_wide, SIZE, PAGE,
            )  # fmt: skip
            block, there = block_of(chosen, leaf + STAGES, end, num_blocks, order, PER_BLOCK, LISTED)
            page = gl.load(table + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0)
        place = i % STAGES
        scored = warpgroup_mma(keys.index(place), queries.permute((1, 0)), zeros_s, use_acc=False, is_async=True)
        here, exists = block_of(chosen, leaf, end, num_blocks, order, PER_BLOCK, LISTED)
        spot = here * SIZE + leaf % PER_BLOCK * TILE + token
        seen = ((spot >= lowest) & (spot <= gl.where(exists, position, -1)))[:, None] & (member >= 0)[None, :]
        scored = warpgroup_mma_wait(0, deps=[scored])
        logits = gl.where(seen, scored * scale, NOTHING)
        top = gl.maximum(gl.ceil(gl.max(logits, 0)), NOTHING)
        whole = gl.floor(logits)
        weights = gl.where(seen, gl.exp2(logits - whole) * power_of_two(whole - top[None, :]), 0.0)
        weight_tile.permute((1, 0)).store(weights.to(DTYPE))
        async_copy.wait_group(2 * STAGES - 2)
        fence_async_shared()
        gl.thread_barrier()
        adding = warpgroup_mma(values.index(place).permute((1, 0)), weight_tile.permute((1, 0)), zeros_o, use_acc=False, is_async=True)
        gl.store(leaf_top + rows * ALL_LEAVES + (FIRST_LEAF + leaf), top, mask=real)
        gl.store(leaf_sum + rows * ALL_LEAVES + (FIRST_LEAF + leaf), gl.sum(weights, 0), mask=real)
        this = warpgroup_mma_wait(0, deps=[adding])
        if STAGES == 1:
            gl.thread_barrier()
            copy_block(
                raw, keys, values, page, 0, block, there, lowest, position, raw_page, raw_kind, raw_slot, (leaf + 1) % PER_BLOCK * TILE, k_wide,
                v_wide, SIZE, PAGE,
            )  # fmt: skip
            block, there = block_of(chosen, leaf + 2, end, num_blocks, order, PER_BLOCK, LISTED)
            page = gl.load(table + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0)
        step = leaf % LEAVES
        if LEAVES == 1:
            out, out_top = this, top
        else:
            pair, pair_top = merge(pair, pair_top, this, top)
            if step % 2 == 1:
                out, out_top = merge(out, out_top, pair, pair_top)
                pair, pair_top = zeros_o, nothing
        if (step == LEAVES - 1) | (leaf == end - 1):
            if LEAVES > 1:
                out, out_top = merge(out, out_top, pair, pair_top)
            item = rows * PARTS + (FIRST_LEAF + leaf) // LEAVES
            gl.store(part_top + item, out_top, mask=real)
            gl.store(part_out + (item * DV)[None, :] + dv[:, None], out, mask=real[None, :] & (dv >= 0)[:, None])
            out, out_top, pair, pair_top = zeros_o, nothing, zeros_o, nothing
    async_copy.wait_group(0)


@gluon.jit
def listed_blocks(candidates, num_keys, NUM: gl.constexpr, NUM2: gl.constexpr, CANDIDATES: gl.constexpr, LAYOUT: gl.constexpr):
    """As `decode_kernels.best_blocks`, the result in `SliceLayout(1, LAYOUT)`."""
    SLICE: gl.constexpr = 32 if CANDIDATES > 32 else CANDIDATES
    WARPS: gl.constexpr = gl.num_warps()
    tall: gl.constexpr = gl.BlockedLayout([SLICE, 1], [1, 32], [1, WARPS], [0, 1])
    entry = gl.arange(0, CANDIDATES, layout=gl.SliceLayout(0, tall))
    keys = gl.load(candidates + entry, mask=entry < num_keys, other=-1)
    ranks = gl.zeros([CANDIDATES], gl.int32, layout=gl.SliceLayout(0, tall))
    for start in range(0, num_keys, SLICE):
        place = start + gl.arange(0, SLICE, layout=gl.SliceLayout(1, tall))
        others = gl.load(candidates + place, mask=place < num_keys, other=-1)
        ranks += gl.sum((others[:, None] > keys[None, :]).to(gl.int32), 0)
    chosen = (keys >= 0) & (ranks < NUM)
    blocks = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(gl.int32)
    ranks = gl.convert_layout(gl.where(chosen, ranks, NUM2), gl.SliceLayout(0, LAYOUT))
    blocks = gl.convert_layout(blocks, gl.SliceLayout(0, LAYOUT))
    order = gl.arange(0, NUM2, layout=gl.SliceLayout(1, LAYOUT))
    plus_one = gl.sum(gl.where(ranks[None, :] == order[:, None], blocks[None, :] + 1, 0), 1)
    taken = gl.where(plus_one > 0, plus_one, 0x7FFFFFFF - order)
    places = gl.sum((gl.convert_layout(taken, gl.SliceLayout(0, LAYOUT))[None, :] < taken[:, None]).to(gl.int32), 1)
    places = gl.convert_layout(places, gl.SliceLayout(0, LAYOUT))
    across = gl.convert_layout(plus_one, gl.SliceLayout(0, LAYOUT))
    return gl.sum(gl.where(places[None, :] == order[:, None], across[None, :], 0), 1) - 1


@gluon.jit(do_not_specialize=["num_chunks", "num_blocks", "batches", "window_programs", "chosen_programs"])
def hopper_blocks_kernel(
    q, raw, block_table, seq_lens, candidates, given, selection, leaf_top, leaf_sum, part_top, part_out, scale,
    q_batch, q_row, q_head, raw_page, raw_kind, raw_slot, raw_head, table_batch, given_batch, given_row, given_head, given_entry, num_chunks,
    num_blocks, batches, window_programs, chosen_programs, num_new,
    HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, SIZE: gl.constexpr,
    PAGE: gl.constexpr, NUM: gl.constexpr, NUM2: gl.constexpr, CHUNK: gl.constexpr, CANDIDATES: gl.constexpr, WINDOW: gl.constexpr,
    CHOSEN_SET: gl.constexpr, WINDOW_SET: gl.constexpr, CHOSEN_LEAVES: gl.constexpr, ALL_LEAVES: gl.constexpr, LEAVES: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, GIVEN: gl.constexpr, PICKED: gl.constexpr, ONCE: gl.constexpr,
    REPLAYED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As `decode_kernels.blocks_kernel`, with `window_programs` and `chosen_programs` for each query and KV head."""
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = q.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DK], gl.NVMMASharedLayout.get_default_for([64, DK], DTYPE))
    values = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DV], gl.NVMMASharedLayout.get_default_for([64, DV], DTYPE))
    queries = gl.allocate_shared_memory(DTYPE, [ROWS, DK], gl.NVMMASharedLayout.get_default_for([ROWS, DK], DTYPE))
    weight_tile = gl.allocate_shared_memory(DTYPE, [ROWS, 64], gl.NVMMASharedLayout.get_default_for([ROWS, 64], DTYPE))
    tiles = (keys, values, queries, weight_tile)
    list_layout: gl.constexpr = gl.BlockedLayout([NUM2, 1], [1, 32], [1, WARPS], [0, 1])
    WINDOW_PARTS: gl.constexpr = (ALL_LEAVES - CHOSEN_LEAVES) // LEAVES
    CHOSEN_PARTS: gl.constexpr = CHOSEN_LEAVES // LEAVES
    index = gl.program_id(0) - batches * num_new * HEADS * window_programs
    of_window = index < 0
    index = gl.where(of_window, gl.program_id(0), index)
    programs = gl.where(of_window, window_programs, chosen_programs)
    head, number = index % HEADS, index // HEADS % programs
    query = index // HEADS // programs % num_new
    batch = (index // HEADS // programs // num_new).to(gl.int64)
    length = gl.load(seq_lens + batch).to(gl.int32)
    entry = (batch * num_new + query) * HEADS + head
    position = gl.maximum(length - num_new + query, 0)
    table = block_table + batch * table_batch
    q_rows = q + batch * q_batch + query * q_row + head * GROUP * q_head
    order = gl.arange(0, NUM2, layout=gl.SliceLayout(1, list_layout))
    last = position // SIZE
    chosen_leaves = NUM * (SIZE // 64)
    if not REPLAYED:
        chosen_leaves = gl.minimum(last + 1, NUM) * (SIZE // 64)
    window_leaves = (last - gl.maximum(position - (WINDOW - 1), 0) // SIZE + 1) * (SIZE // 64)
    if of_window:
        share = gl.cdiv(WINDOW_PARTS, window_programs) * LEAVES
        if (length > 0) & (number * share < window_leaves) & (not ONCE or (position >= WINDOW) | (position >= NUM * SIZE)):
            lowest = gl.maximum(position - (WINDOW - 1), 0)
            walk_blocks(
                q_rows, raw + (head + WINDOW_SET * HEADS) * raw_head, table, tiles, leaf_top, leaf_sum, part_top, part_out, scale, q_head, raw_page,
                raw_kind, raw_slot, entry, number * share, gl.minimum(number * share + share, window_leaves), position, lowest,
                lowest // SIZE, order, num_blocks, GROUP, SIZE, PAGE, CHOSEN_LEAVES, ALL_LEAVES, LEAVES, False,
            )  # fmt: skip
    else:
        if PDL:
            gdc_wait()
        if not PICKED:
            # No select with a scalar condition: Triton 3.6 does not compile one of tensors.
            if SCORES:
                # Where no more than NUM exist nothing was ranked: no keys, and all of the blocks.
                some = gl.minimum(gl.maximum(last + 1 - NUM, 0), 1)
                num_keys = gl.minimum(last // CHUNK + 1, num_chunks) * NUM * some
                chosen = listed_blocks(candidates + entry * num_chunks * NUM, num_keys, NUM, NUM2, CANDIDATES, list_layout)
                chosen = gl.maximum(chosen, gl.where(order <= gl.minimum(last, length - 1) - some * (last + 1), order, -1))
            else:
                chosen = gl.where(order <= gl.minimum(last, length - 1), order, -1)
            if GIVEN:
                row = given + batch * given_batch + query * given_row + head * given_head
                marks = gl.load(row + order * 0, mask=order < gl.minimum(length, 1) * NUM, other=RECOMPUTE).to(gl.int32)
                replayed = gl.load(row + order * given_entry, mask=order < NUM, other=-1).to(gl.int32)
                chosen = gl.where(marks == RECOMPUTE, chosen, replayed)
            # Every program of the entry writes the same list.
            gl.store(selection + entry * NUM + order, chosen.to(selection.dtype.element_ty), mask=order < NUM)
            gl.thread_barrier()
        chosen = gl.load(selection + entry * NUM + order, mask=order < NUM, other=-1).to(gl.int32)
        share = gl.cdiv(CHOSEN_PARTS, chosen_programs) * LEAVES
        if (length > 0) & (number * share < chosen_leaves):
            walk_blocks(
                q_rows, raw + (head + CHOSEN_SET * HEADS) * raw_head, table, tiles, leaf_top, leaf_sum, part_top, part_out, scale, q_head, raw_page,
                raw_kind, raw_slot, entry, number * share, gl.minimum(number * share + share, chosen_leaves), position, position * 0,
                chosen, order, num_blocks, GROUP, SIZE, PAGE, 0, ALL_LEAVES, LEAVES, True,
            )  # fmt: skip


def smem_bytes(stages: int, leaf: int, rows: int, key_dim: int, value_dim: int) -> int:
    """What a program takes of shared memory: ring, queries, weights, and the weights once more as fp32."""
    return 2 * (stages * leaf * (key_dim + value_dim) + rows * (key_dim + leaf)) + 4 * leaf * rows


def splits_of(pairs: int, parts: int, slots: int) -> int:
    """Programs for each of `pairs` sequences and KV heads of at most `parts` parts, where `slots` run at a time: as few as keep them busy."""
    shares = {n: pairs * n / (ceil_div(pairs * n, slots) * slots) for n in range(1, min(parts, 8 * ceil_div(slots, pairs)) + 1)}
    return next((n for n, busy in shares.items() if busy > 0.9), max(shares, key=lambda n: shares[n]))


def compression(arguments: tuple[Any, ...], q: torch.Tensor, heads: int, num_parts: int, constants: dict[str, Any]) -> None:
    """Launches `hopper_compression_kernel`.

    Args:
        arguments: its first ones, up to num_blocks. q: `[B, m, Hq, Dk]`. constants: those that `decode_kernels.compression_kernel` has too.
    """
    batch, num_new, num_heads, key_dim = q.shape
    own = num_new * num_heads // heads
    rows, processors, ring = max(16, next_power_of_two(own)), num_processors(q.device), STAGES
    lone = constants["LEAVES"] == 1 and batch * heads * num_parts <= 2 * processors
    share = 1 if lone or batch < MIN_SHARED else min(MAX_SHARE, rows // own)
    if lone:
        splits, ring = num_parts, 1
    else:
        while ring > 1 and smem_bytes(ring, constants["LEAF"], rows, key_dim, constants["DV"]) > SHARED_MEMORY:
            ring -= 1
        room = SHARED_MEMORY // smem_bytes(ring, constants["LEAF"], rows, key_dim, constants["DV"])
        splits = share * splits_of(ceil_div(batch, share) * heads * share, num_parts, processors * max(1, min(2, room)))
    launch(
        hopper_compression_kernel, (heads * splits, ceil_div(batch, share)), *arguments, splits, batch, num_new,
        **constants, ROWS=rows, STAGES=ring, SHARE=share, LONE=lone, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def blocks(arguments: tuple[Any, ...], q: torch.Tensor, heads: int, constants: dict[str, Any]) -> None:
    """Launches `hopper_blocks_kernel`; `arguments` are its first ones, up to batches."""
    batch, num_new, num_heads, _ = q.shape
    entries, leaves, chosen = batch * num_new * heads, constants["LEAVES"], constants["CHOSEN_LEAVES"]
    wanted = ceil_div(3 * num_processors(q.device), entries)
    parts = (constants["ALL_LEAVES"] - chosen) // leaves, chosen // leaves
    programs = [next(n for n in range(min(wanted, count), count + 1) if count % n == 0) for count in parts]
    launch(
        hopper_blocks_kernel, (entries * sum(programs),), *arguments, *programs, num_new,
        **constants, ROWS=max(8, next_power_of_two(num_heads // heads)), STAGES=1 if leaves == 1 and programs[1] == parts[1] else 2,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
