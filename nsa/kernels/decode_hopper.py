"""Compressed tokens in a decode step on Hopper, in Gluon, and what this kernel has in common with decode_blocks_hopper.py.

The same numbers as in decode_kernels.py, for the same leaves; here a program walks several of them. K and V of the next leaves are on
their way to shared memory (asynchronous copies of 16 bytes a thread, in a ring) while a leaf is multiplied. The products are
transposed, K·qᵀ and vᵀ·weightsᵀ: the 64 rows that Hopper's tensor cores want are keys and value dims, and a few queries are
enough columns. The numbers of a leaf depend neither on the program that meets it nor on the ring.

Rollouts of one prompt have its pages in common: a program serves up to MAX_SHARE neighbouring sequences and reads the compressed tokens
that the first of them has in common with others once, for all of these. What a sequence has for itself is read for it alone. Written
for Triton 3.6's Gluon; fp32 and other shapes stay with decode_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents

from nsa.kernels.banded_hopper import num_processors
from nsa.kernels.launch import ceil_div, launch
from nsa.kernels.launch import power_of_two as next_power_of_two

STAGES = 3
"""Leaves of compressed tokens in shared memory at a time."""
MAX_SHARE = 16
"""Neighbouring sequences that a program serves at most."""
WIDE_ROWS = 32
"""Rows (query, head) of their common tile where heads are small, elsewhere as many as a sequence by itself takes. With 64 registers are
spilled (160 stores)."""
EVERYWHERE = gl.constexpr(1 << 30)
"""A limit that no leaf reaches."""
SHARED_MEMORY = 227 << 10
"""Bytes of shared memory that the programs of an SM have between them."""
NOTHING = gl.constexpr(-1.0e6)
"""As in decode_kernels.py."""


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
def add_leaf(leaf_out, leaf_top, sums, step, zeros, nothing, LEAVES: gl.constexpr):
    """A program's output and its top, and those of its unfinished pair, with leaf `step` of LEAVES (1, 2 or 4) added: a binary tree."""
    out, out_top, pair, pair_top = sums
    if LEAVES == 1:
        out, out_top = leaf_out, leaf_top
    else:
        pair, pair_top = merge(pair, pair_top, leaf_out, leaf_top)
        if step % 2 == 1:
            out, out_top = merge(out, out_top, pair, pair_top)
            pair, pair_top = zeros, nothing
    return out, out_top, pair, pair_top


@gluon.jit
def leaf_weights(scored, visible, scale):
    """Weights 2**(logit − top) `[keys, rows]` of a leaf against its whole-numbered top `[rows]`, and that top."""
    logits = gl.where(visible, scored * scale, NOTHING)
    top = gl.maximum(gl.ceil(gl.max(logits, 0)), NOTHING)
    whole = gl.floor(logits)
    return gl.where(visible, gl.exp2(logits - whole) * power_of_two(whole - top[None, :]), 0.0), top


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
def store_shares(leaf_edge, scores, weights, place, written, leaf, num_leaves, FIRST: gl.constexpr, PER_BLOCK: gl.constexpr):
    """What the weights `[keys, rows]` of a leaf give to the scores of its blocks, and to that of the block before it."""
    LEAF: gl.constexpr = weights.shape[0]
    ROWS: gl.constexpr = weights.shape[1]
    GROUPS: gl.constexpr = LEAF // PER_BLOCK
    WARPS: gl.constexpr = gl.num_warps()
    LANES: gl.constexpr = 32 if GROUPS > 32 else GROUPS
    by_group: gl.constexpr = gl.BlockedLayout([PER_BLOCK, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    of_group: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    spread = gl.convert_layout(weights, by_group)
    within = (gl.arange(0, LEAF, layout=gl.SliceLayout(1, by_group)) % PER_BLOCK)[:, None]
    number = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, of_group))[:, None]
    own = gl.sum((spread * gl.minimum(within + 1, FIRST + 1).to(gl.float32)).reshape([GROUPS, PER_BLOCK, ROWS]), 1)
    score = gl.convert_layout(own, of_group)
    at = (place * num_leaves + leaf)[None, :]
    if FIRST > 0:
        before = gl.sum((spread * gl.maximum(FIRST - within, 0).to(gl.float32)).reshape([GROUPS, PER_BLOCK, ROWS]), 1)
        before = gl.convert_layout(before, of_group)
        gl.store(leaf_edge + at + number * 0, before, mask=written[None, :] & (number == 0))
        following = gl.gather(before, gl.minimum(number + 1, GROUPS - 1) + (place * 0).to(gl.int32)[None, :], 0)
        score += gl.where(number < GROUPS - 1, following, 0.0)
    gl.store(scores + at * GROUPS + number, score, mask=written[None, :] & (number >= 0))


@gluon.jit
def walk_leaves(
    cmp, table, tiles, rows, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale, cmp_page, cmp_slot, num_leaves, num_parts,
    num_slots, begin, end, pages,
    STRIDE: gl.constexpr, FIRST: gl.constexpr, PER_BLOCK: gl.constexpr, PER_PAGE: gl.constexpr, LEAVES: gl.constexpr, K_LAYOUT: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Leaves [begin, end) of one page table, each for the rows whose limit lies beyond it. `pages`: those of leaf `begin`."""
    keys, values, queries, weight_tile = tiles
    positions, place_s, limit_s, place_g, limit_g = rows
    DTYPE: gl.constexpr = keys.dtype
    STAGES: gl.constexpr = keys.type.shape[0]
    LEAF: gl.constexpr = keys.type.shape[1]
    DV: gl.constexpr = values.type.shape[2]
    ROWS: gl.constexpr = queries.type.shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ROWS, 16])
    v_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DV, DV // 8], [WARPS, 1], [1, 0])
    page_layout: gl.constexpr = gl.SliceLayout(1, K_LAYOUT)
    AHEAD: gl.constexpr = STAGES - 1 if STAGES > 1 else 1
    for stage in gl.static_range(AHEAD):
        copy_leaf(cmp, keys, values, pages, stage, begin + stage, num_slots, end, cmp_page, cmp_slot, K_LAYOUT, v_wide, FIRST, PER_PAGE)
        pages = pages_of(table, begin + stage + 1, num_slots, LEAF, PER_PAGE, page_layout)
    slot = gl.arange(0, LEAF, layout=gl.SliceLayout(1, mma))
    dv = gl.arange(0, DV, layout=gl.SliceLayout(1, mma))
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
        weights, top = leaf_weights(scored, visible, scale)
        weight_tile.permute((1, 0)).store(weights.to(DTYPE))
        if SCORES and STAGES == 1:  # while V is on its way
            store_shares(leaf_edge, scores, weights, place_g, leaf < limit_g, leaf, num_leaves, FIRST, PER_BLOCK)
        async_copy.wait_group(2 * STAGES - 2)
        fence_async_shared()
        gl.thread_barrier()
        adding = warpgroup_mma(values.index(place).permute((1, 0)), weight_tile.permute((1, 0)), zeros_o, use_acc=False, is_async=True)
        gl.store(leaf_top + place_s * num_leaves + leaf, top, mask=leaf < limit_s)
        gl.store(leaf_sum + place_s * num_leaves + leaf, gl.sum(weights, 0), mask=leaf < limit_s)
        if SCORES and STAGES > 1:  # while the tensor cores work
            store_shares(leaf_edge, scores, weights, place_g, leaf < limit_g, leaf, num_leaves, FIRST, PER_BLOCK)
        this = warpgroup_mma_wait(0, deps=[adding])
        if STAGES == 1:
            gl.thread_barrier()
            copy_leaf(cmp, keys, values, pages, 0, leaf + 1, num_slots, end, cmp_page, cmp_slot, K_LAYOUT, v_wide, FIRST, PER_PAGE)
            pages = pages_of(table, leaf + 2, num_slots, LEAF, PER_PAGE, page_layout)
        step = leaf % LEAVES
        out, out_top, pair, pair_top = add_leaf(this, top, (out, out_top, pair, pair_top), step, zeros_o, nothing, LEAVES)
        if (step == LEAVES - 1) | (leaf == end - 1):
            if LEAVES > 1:
                out, out_top = merge(out, out_top, pair, pair_top)
            item = place_s * num_parts + leaf // LEAVES
            gl.store(part_top + item, out_top, mask=leaf < limit_s)
            gl.store(part_out + (item * DV)[None, :] + dv[:, None], out, mask=(leaf < limit_s)[None, :] & (dv >= 0)[:, None])
            out, out_top, pair, pair_top = zeros_o, nothing, zeros_o, nothing
    async_copy.wait_group(0)
    gl.thread_barrier()


@gluon.jit
def common_leaves(
    block_table, seq_lens, table_batch, first, batches,
    LEAF: gl.constexpr, PER_PAGE: gl.constexpr, STRIDE: gl.constexpr, LEAVES: gl.constexpr, SHARE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """How many first leaves each of the SHARE sequences from `first` on has in common with `first`, `[SHARE]`: the same pages, all slots
    filled, a multiple of LEAVES. For `first` itself, how many it has in common with any."""
    COLUMNS: gl.constexpr = 128
    number = gl.arange(0, SHARE, layout=gl.SliceLayout(1, LAYOUT))
    member = gl.minimum(first + number, batches - 1).to(gl.int64)
    slots = gl.minimum(gl.load(seq_lens + member).to(gl.int32), gl.load(seq_lens + first).to(gl.int32)) // STRIDE
    other = (number > 0) & (first + number < batches)
    same = gl.where(other, slots // LEAF * (LEAF // PER_PAGE), 0)  # pages, as far as is known
    start, most = 0, gl.max(same, 0)
    while start < most:
        column = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        wanted = column[None, :] < same[:, None]
        page = gl.load(block_table + (member * table_batch)[:, None] + column[None, :], mask=wanted, other=0)
        leading = gl.load(block_table + first.to(gl.int64) * table_batch + column, mask=column < most, other=0)
        same = gl.minimum(same, gl.min(gl.where(wanted & (page != leading[None, :]), column[None, :], EVERYWHERE), 1))
        start += COLUMNS
        most = gl.max(gl.where(same > start, same, 0), 0)
    leaves = same // (LEAF // PER_PAGE) // LEAVES * LEAVES
    return gl.where(number == 0, gl.max(leaves, 0), leaves)


@gluon.jit
def load_queries(q, queries, first, head, batches, q_batch, q_row, q_head, own, SEQUENCES: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Starts the copy of the rows (query, head) of SEQUENCES sequences from `first` on."""
    row = gl.arange(0, queries.type.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    dk = gl.arange(0, queries.type.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    sequence = gl.minimum(first + row // own, batches - 1).to(gl.int64)
    source = q + sequence * q_batch + (row % own // GROUP) * q_row + (head * GROUP + row % GROUP) * q_head
    there = (row < SEQUENCES * own) & (first + row // own < batches)
    async_copy.async_copy_global_to_shared(queries, source[:, None] + dk[None, :], mask=there[:, None])
    async_copy.commit_group()


@gluon.jit
def rows_of(
    seq_lens, first, head, batches, num_new, limits, SEQUENCES: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    MMA: gl.constexpr, OF_GROUP: gl.constexpr, OF_SEQUENCE: gl.constexpr,
):  # fmt: skip
    """Of the rows of SEQUENCES sequences from `first` on: positions, places, and the leaf up to which each is written, from `limits`
    `[SEQUENCES]` (one sequence: everywhere); places and limits in both layouts that `walk_leaves` needs."""
    own = num_new * GROUP
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MMA))
    there = (row < SEQUENCES * own) & (first + row // own < batches)
    owner = gl.where(there, row // own, 0)
    positions = gl.maximum(gl.load(seq_lens + first + owner).to(gl.int32) - num_new + row % own // GROUP, 0)
    place = ((first + owner).to(gl.int64) * HEADS + head) * own + row % own
    limit = gl.where(there, EVERYWHERE, 0)
    if SEQUENCES > 1:
        number = gl.arange(0, SEQUENCES, layout=gl.SliceLayout(1, OF_SEQUENCE))
        owned = gl.convert_layout(owner, gl.SliceLayout(0, OF_SEQUENCE))[None, :] == number[:, None]
        spread = gl.sum(gl.where(owned, gl.convert_layout(limits, gl.SliceLayout(1, OF_SEQUENCE))[:, None], 0), 0)
        limit = gl.minimum(limit, gl.convert_layout(spread, gl.SliceLayout(0, MMA)))
    layout_g: gl.constexpr = gl.SliceLayout(0, OF_GROUP)
    return positions, place, limit, gl.convert_layout(place, layout_g), gl.convert_layout(limit, layout_g)


@gluon.jit(do_not_specialize=["num_leaves", "num_parts", "num_blocks", "splits", "batches"])
def hopper_compression_kernel(
    q, cmp, block_table, seq_lens, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale,
    q_batch, q_row, q_head, cmp_page, cmp_slot, cmp_head, table_batch, num_leaves, num_parts, num_blocks, splits, batches, num_new,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, STRIDE: gl.constexpr, FIRST: gl.constexpr,
    PER_BLOCK: gl.constexpr, PER_PAGE: gl.constexpr, LEAF: gl.constexpr, ROWS: gl.constexpr, WIDE: gl.constexpr, LEAVES: gl.constexpr,
    STAGES: gl.constexpr, SHARE: gl.constexpr, APART: gl.constexpr, LONE: gl.constexpr, SCORES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Writes what `decode_kernels.compression_kernel` writes.

    `splits` programs serve SHARE neighbouring sequences. Each takes a share of the leaves that the first has in common with others, for the
    WIDE rows of all that have them, and then a share of the other leaves of SHARE / APART sequences, one after the other with ROWS rows; APART
    divides SHARE and `splits`. LONE (SHARE 1): a program for each LEAVES leaves."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = LEAF // PER_BLOCK
    LANES: gl.constexpr = 32 if GROUPS > 32 else GROUPS
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ROWS, 16])
    mma_wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDE, 16])
    k_wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DK, DK // 8], [WARPS, 1], [1, 0])
    of_group: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    of_table: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    of_sequence: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    page_layout: gl.constexpr = gl.SliceLayout(1, k_wide)
    if PDL:
        gdc_launch_dependents()
    head, split = gl.program_id(0) % HEADS, gl.program_id(0) // HEADS
    first = gl.program_id(1) * SHARE
    own = num_new * GROUP
    cmp += head * cmp_head
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, LEAF, DK], gl.NVMMASharedLayout.get_default_for([LEAF, DK], DTYPE))
    values = gl.allocate_shared_memory(DTYPE, [STAGES, LEAF, DV], gl.NVMMASharedLayout.get_default_for([LEAF, DV], DTYPE))
    queries = gl.allocate_shared_memory(DTYPE, [ROWS, DK], gl.NVMMASharedLayout.get_default_for([ROWS, DK], DTYPE))
    weight_tile = gl.allocate_shared_memory(DTYPE, [ROWS, LEAF], gl.NVMMASharedLayout.get_default_for([ROWS, LEAF], DTYPE))
    tiles = (keys, values, queries, weight_tile)
    if LONE:
        lone_pages = pages_of(block_table + first.to(gl.int64) * table_batch, split * LEAVES, num_blocks * PER_BLOCK, LEAF, PER_PAGE, page_layout)

    if SHARE > 1:
        common = common_leaves(block_table, seq_lens, table_batch, first, batches, LEAF, PER_PAGE, STRIDE, LEAVES, SHARE, of_table)
        most = gl.max(common, 0)
        share = gl.cdiv(gl.cdiv(most, LEAVES), splits) * LEAVES
        begin = split * share
        end = gl.minimum(begin + share, most)
        if begin < end:
            wide_queries = gl.allocate_shared_memory(DTYPE, [WIDE, DK], gl.NVMMASharedLayout.get_default_for([WIDE, DK], DTYPE))
            wide_weights = gl.allocate_shared_memory(DTYPE, [WIDE, LEAF], gl.NVMMASharedLayout.get_default_for([WIDE, LEAF], DTYPE))
            table = block_table + first.to(gl.int64) * table_batch
            num_slots = gl.load(seq_lens + first).to(gl.int32) // STRIDE
            pages = pages_of(table, begin, num_slots, LEAF, PER_PAGE, page_layout)
            load_queries(q, wide_queries, first, head, batches, q_batch, q_row, q_head, own, SHARE, GROUP, k_wide)
            rows = rows_of(seq_lens, first, head, batches, num_new, common, SHARE, HEADS, GROUP, WIDE, mma_wide, of_group, of_sequence)
            walk_leaves(
                cmp, table, (keys, values, wide_queries, wide_weights), rows, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale,
                cmp_page, cmp_slot, num_leaves, num_parts, num_slots, begin, end, pages, STRIDE, FIRST, PER_BLOCK, PER_PAGE, LEAVES, k_wide, SCORES,
            )  # fmt: skip
    for turn in range(SHARE // APART):
        number = split % APART + turn * APART
        member = first + number
        if member < batches:
            table = block_table + member.to(gl.int64) * table_batch
            num_slots = gl.load(seq_lens + member).to(gl.int32) // STRIDE
            filled_leaves = gl.cdiv(num_slots, LEAF)
            if LONE:
                begin = split * LEAVES
                end = gl.minimum(begin + LEAVES, filled_leaves)
                pages = lone_pages
            else:
                start = 0
                if SHARE > 1:
                    start = gl.sum(gl.where(gl.arange(0, SHARE, layout=gl.SliceLayout(1, of_table)) == number, common, 0), 0)
                share = gl.cdiv(gl.cdiv(filled_leaves - start, LEAVES), splits // APART) * LEAVES
                begin = start + split // APART * share
                end = gl.minimum(begin + share, filled_leaves)
                pages = pages_of(table, begin, num_slots, LEAF, PER_PAGE, page_layout)
            if begin < end:
                load_queries(q, queries, member, head, batches, q_batch, q_row, q_head, own, 1, GROUP, k_wide)
                rows = rows_of(seq_lens, member, head, batches, num_new, 0, 1, HEADS, GROUP, ROWS, mma, of_group, of_sequence)
                walk_leaves(
                    cmp, table, tiles, rows, leaf_top, leaf_sum, leaf_edge, part_top, part_out, scores, scale, cmp_page, cmp_slot, num_leaves,
                    num_parts, num_slots, begin, end, pages, STRIDE, FIRST, PER_BLOCK, PER_PAGE, LEAVES, k_wide, SCORES,
                )  # fmt: skip


def smem_bytes(stages: int, leaf: int, rows: int, wide: int, key_dim: int, value_dim: int) -> int:
    """What a program takes of shared memory: ring, queries and weights of both kinds of tiles, and weights once more as fp32."""
    return 2 * (stages * leaf * (key_dim + value_dim) + (rows + wide) * (key_dim + leaf)) + 4 * leaf * max(rows, wide)


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
    value_dim, leaf = constants["DV"], constants["LEAF"]
    rows, processors, ring = max(16, next_power_of_two(own)), num_processors(q.device), STAGES
    lone = constants["LEAVES"] == 1 and batch * heads * num_parts <= 2 * processors
    most = max(rows, WIDE_ROWS if key_dim + value_dim <= 128 else 0) // own
    share = 1 if lone else min(MAX_SHARE, 1 << most.bit_length() - 1, next_power_of_two(batch))
    wide = max(16, next_power_of_two(share * own)) if share > 1 else 0
    if lone:
        splits, apart, ring = num_parts, 1, 1
    else:
        # Two programs on an SM, whatever that leaves of the ring: one reads while the other begins or ends.
        while ring > 1 and 2 * smem_bytes(ring, leaf, rows, wide, key_dim, value_dim) > SHARED_MEMORY:
            ring -= 1
        room = SHARED_MEMORY // smem_bytes(ring, leaf, rows, wide, key_dim, value_dim)
        groups, slots = ceil_div(batch, share) * heads, processors * max(1, min(2, room))
        apart = next((n for n in (16, 8, 4, 2) if n <= share and groups * n <= slots), 1)
        splits = apart * splits_of(groups * apart, num_parts, slots)
    launch(
        hopper_compression_kernel, (heads * splits, ceil_div(batch, share)), *arguments, splits, batch, num_new,
        **constants, ROWS=rows, WIDE=wide or rows, STAGES=ring, SHARE=share, APART=apart, LONE=lone, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
