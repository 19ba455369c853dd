"""The window's and the chosen blocks in a decode step on Hopper, in Gluon; decode_hopper.py says how it is built."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.attention import RECOMPUTE as RECOMPUTE_MARK
from nsa.kernels.banded_hopper import num_processors
from nsa.kernels.decode_hopper import NOTHING, add_leaf, leaf_weights, merge
from nsa.kernels.launch import ceil_div, launch
from nsa.kernels.launch import power_of_two as next_power_of_two

RECOMPUTE = gl.constexpr(RECOMPUTE_MARK)
MAX_REGISTERS = 168
"""Of a thread, so that three programs fit an SM. Small tiles come out at 146 to 183, for two or three."""


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
def block_of(chosen, first, step, leaf, end, num_blocks, order, PER_BLOCK: gl.constexpr):
    """The block of a leaf, and whether the leaf is there: of the list `chosen` where `first` is −1 and `step` 0; of those from `first` on
    where `step` is 1 and the list −1 throughout."""
    number = leaf // PER_BLOCK
    block = first + step * number + gl.sum(gl.where(order == number, chosen + 1, 0), 0)
    return block, (block >= 0) & (block < num_blocks) & (leaf < end)


@gluon.jit
def walk_blocks(
    q_rows, raw, table, tiles, leaf_top, leaf_sum, part_top, part_out, scale, q_head, raw_page, raw_kind, raw_slot, entry, begin, end, position,
    lowest, chosen, first, step, first_leaf, order, num_blocks,
    GROUP: gl.constexpr, SIZE: gl.constexpr, PAGE: gl.constexpr, ALL_LEAVES: gl.constexpr, LEAVES: gl.constexpr,
):  # fmt: skip
    """As `decode_kernels.attend_blocks`, for leaves [begin, end) of 64 tokens; `block_of` says which blocks these are."""
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
    block, there = block_of(chosen, first, step, begin, end, num_blocks, order, PER_BLOCK)
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
        block, there = block_of(chosen, first, step, leaf + 1, end, num_blocks, order, PER_BLOCK)
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
            block, there = block_of(chosen, first, step, leaf + STAGES, end, num_blocks, order, PER_BLOCK)
            page = gl.load(table + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0)
        place = i % STAGES
        scored = warpgroup_mma(keys.index(place), queries.permute((1, 0)), zeros_s, use_acc=False, is_async=True)
        here, exists = block_of(chosen, first, step, leaf, end, num_blocks, order, PER_BLOCK)
        spot = here * SIZE + leaf % PER_BLOCK * TILE + token
        seen = ((spot >= lowest) & (spot <= gl.where(exists, position, -1)))[:, None] & (member >= 0)[None, :]
        scored = warpgroup_mma_wait(0, deps=[scored])
        weights, top = leaf_weights(scored, seen, scale)
        weight_tile.permute((1, 0)).store(weights.to(DTYPE))
        async_copy.wait_group(2 * STAGES - 2)
        fence_async_shared()
        gl.thread_barrier()
        adding = warpgroup_mma(values.index(place).permute((1, 0)), weight_tile.permute((1, 0)), zeros_o, use_acc=False, is_async=True)
        gl.store(leaf_top + rows * ALL_LEAVES + (first_leaf + leaf), top, mask=real)
        gl.store(leaf_sum + rows * ALL_LEAVES + (first_leaf + leaf), gl.sum(weights, 0), mask=real)
        this = warpgroup_mma_wait(0, deps=[adding])
        if STAGES == 1:
            gl.thread_barrier()
            copy_block(
                raw, keys, values, page, 0, block, there, lowest, position, raw_page, raw_kind, raw_slot, (leaf + 1) % PER_BLOCK * TILE, k_wide,
                v_wide, SIZE, PAGE,
            )  # fmt: skip
            block, there = block_of(chosen, first, step, leaf + 2, end, num_blocks, order, PER_BLOCK)
            page = gl.load(table + block * SIZE // PAGE, mask=there & (block * SIZE <= position), other=0)
        turn = leaf % LEAVES
        out, out_top, pair, pair_top = add_leaf(this, top, (out, out_top, pair, pair_top), turn, zeros_o, nothing, LEAVES)
        if (turn == LEAVES - 1) | (leaf == end - 1):
            if LEAVES > 1:
                out, out_top = merge(out, out_top, pair, pair_top)
            item = rows * PARTS + (first_leaf + leaf) // LEAVES
            gl.store(part_top + item, out_top, mask=real)
            gl.store(part_out + (item * DV)[None, :] + dv[:, None], out, mask=real[None, :] & (dv >= 0)[:, None])
            out, out_top, pair, pair_top = zeros_o, nothing, zeros_o, nothing
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["num_blocks", "batches", "window_programs", "chosen_programs"])
def hopper_blocks_kernel(
    q, raw, block_table, seq_lens, given, selection, leaf_top, leaf_sum, part_top, part_out, scale,
    q_batch, q_row, q_head, raw_page, raw_kind, raw_slot, raw_head, table_batch, given_batch, given_row, given_head, given_entry,
    num_blocks, batches, window_programs, chosen_programs, num_new,
    HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, SIZE: gl.constexpr,
    PAGE: gl.constexpr, NUM: gl.constexpr, NUM2: gl.constexpr, WINDOW: gl.constexpr,
    CHOSEN_SET: gl.constexpr, WINDOW_SET: gl.constexpr, CHOSEN_LEAVES: gl.constexpr, ALL_LEAVES: gl.constexpr, LEAVES: gl.constexpr,
    STAGES: gl.constexpr, GIVEN: gl.constexpr, PICKED: gl.constexpr, ONCE: gl.constexpr,
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
    begin_of_window = gl.maximum(position - (WINDOW - 1), 0)
    window_leaves = (last - begin_of_window // SIZE + 1) * (SIZE // 64)
    # One body for both: what stands in the instruction cache twice is read twice.
    leaves = gl.where(of_window, window_leaves, chosen_leaves)
    share = gl.where(of_window, gl.cdiv(WINDOW_PARTS, window_programs), gl.cdiv(CHOSEN_PARTS, chosen_programs)) * LEAVES
    lowest = gl.where(of_window, begin_of_window, 0)
    first = gl.where(of_window, begin_of_window // SIZE, -1)
    step = gl.where(of_window, position * 0 + 1, position * 0)
    first_leaf = step * CHOSEN_LEAVES
    row = head + HEADS * (CHOSEN_SET + step * (WINDOW_SET - CHOSEN_SET))
    if step == 0:
        if PDL:
            gdc_wait()
        if not PICKED:
            blocks = gl.where(order <= gl.minimum(last, length - 1), order, -1)
            if GIVEN:
                target = given + batch * given_batch + query * given_row + head * given_head
                marks = gl.load(target + order * 0, mask=order < gl.minimum(length, 1) * NUM, other=RECOMPUTE).to(gl.int32)
                replayed = gl.load(target + order * given_entry, mask=order < NUM, other=-1).to(gl.int32)
                blocks = gl.where(marks == RECOMPUTE, blocks, replayed)
            # Every program of the entry writes the same list.
            gl.store(selection + entry * NUM + order, blocks.to(selection.dtype.element_ty), mask=order < NUM)
            gl.thread_barrier()
    chosen = gl.load(selection + entry * NUM + order, mask=order < NUM * (1 - step), other=-1).to(gl.int32)
    wanted = (length > 0) & (number * share < leaves)
    if ONCE:
        wanted = wanted & ((step == 0) | (position >= WINDOW) | (position >= NUM * SIZE))
    if wanted:
        walk_blocks(
            q_rows, raw + row * raw_head, table, tiles, leaf_top, leaf_sum, part_top, part_out, scale, q_head, raw_page, raw_kind, raw_slot, entry,
            number * share, gl.minimum(number * share + share, leaves), position, lowest, chosen, first, step, first_leaf, order, num_blocks,
            GROUP, SIZE, PAGE, ALL_LEAVES, LEAVES,
        )  # fmt: skip


def blocks(arguments: tuple[Any, ...], q: torch.Tensor, heads: int, constants: dict[str, Any]) -> None:
    """Launches `hopper_blocks_kernel`; `arguments` are its first ones, up to batches."""
    batch, num_new, num_heads, _ = q.shape
    entries, leaves, chosen = batch * num_new * heads, constants["LEAVES"], constants["CHOSEN_LEAVES"]
    wanted = ceil_div(3 * num_processors(q.device), entries)
    parts = (constants["ALL_LEAVES"] - chosen) // leaves, chosen // leaves
    programs = [next(n for n in range(min(wanted, count), count + 1) if count % n == 0) for count in parts]
    rows = max(8, next_power_of_two(num_heads // heads))
    small = rows <= 16 and max(constants["DK"], constants["DV"]) <= 128
    launch(
        hopper_blocks_kernel, (entries * sum(programs),), *arguments, *programs, num_new,
        **constants, ROWS=rows, STAGES=1 if leaves == 1 and programs[1] == parts[1] else 2,
        num_warps=4, maxnreg=MAX_REGISTERS if small else None, enable_fp_fusion=False,
    )  # fmt: skip
